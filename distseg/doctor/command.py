"""`distseg doctor`: its arguments, read without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from distseg.config.arguments import add_device
from shards.command_line import Commands, add_command

TEXT = """\
Look at machine, disk, network and data before a run is started on them, in some seconds.

On all processes of a job:
  torchrun --standalone --nproc_per_node=N -m distseg.doctor --run-dir runs/x --shards DIR
  srun distseg doctor --run-dir runs/x --shards DIR
Exit code 1 for what would end or break a run; warnings and measurements leave it 0."""


def add_doctor(commands: Commands) -> None:
    """Add `doctor` to the commands."""
    parser = add_command(commands, "doctor", "check machine, disk, network and data", TEXT)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs are written"
    )
    parser.add_argument("--shards", metavar="DIR|URL", help="packed shards to read")
    parser.add_argument("--split", default="train", help="of the shards (train)")
    add_device(parser)
    parser.set_defaults(handler=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from distseg.doctor.run import run

    return run(options.run_dir, options.shards, options.split, options.device)
