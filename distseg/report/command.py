"""`distseg report`: its arguments, read without what draws."""

from __future__ import annotations

import argparse
from pathlib import Path

from shards.command_line import Commands, add_command

TEXT = """\
Write one HTML page about one or several runs: curves, health, IoU and confusion of classes,
predictions, what differs between the configurations, and means over seeds. It needs neither a
network nor another file."""


def add_report(commands: Commands) -> None:
    """Add `report` to the commands."""
    parser = add_command(commands, "report", "an HTML page about runs, to look at or to send", TEXT)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directories, finished or not"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="else report.html in the run's directory"
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also a W&B report with the same panels"
    )
    parser.set_defaults(handler=_report)


def _report(options: argparse.Namespace) -> int:
    from distseg.report.run import run

    return run(options.runs, options.out, options.wandb)
