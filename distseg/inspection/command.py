"""`distseg inspect`: its arguments, read without what decodes and draws."""

from __future__ import annotations

import argparse
from pathlib import Path

from distseg.config.names import KEYS
from shards.command_line import Commands, add_command
from shards.commands import check_threads
from shards.errors import InputError

TEXT = """\
Look at packed shards before time is spent on them, and let training accept them when they are
sound.

errors    (exit code 1)  damaged or missing files, unreadable images, labels of another size, form
                         or range
warnings  (exit code 0)  classes that a split lacks, void, pictures that are in two splits, frayed
                         labels, ..."""


def add_inspect(commands: Commands) -> None:
    """Add `inspect` to the commands."""
    parser = add_command(commands, "inspect", "find what is wrong with shards", TEXT)
    parser.add_argument("shards", metavar="DIR", help="what `distseg pack` wrote")
    place = "for inspection.json and contact_sheet.png; else the same"
    parser.add_argument("--out", type=Path, metavar="DIR", help=place)
    parser.add_argument(
        "--threads", type=int, metavar="N", help="decoding threads; else one for each core"
    )
    colors = KEYS["evaluate.palette"]
    parser.add_argument(
        "--palette",
        default=colors.default,
        choices=tuple(colors.choices),
        help="colours of the classes in contact_sheet.png, as evaluate.palette",
    )
    parser.set_defaults(handler=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from distseg.inspection.run import run

    check_threads(options.threads)
    # inspecting writes verified.json beside the shards, which is possible in a folder only
    if "://" in options.shards:
        action = (
            "run it where they are a folder, and copy verified.json there too; or copy them here"
        )
        raise InputError(f"inspect {options.shards}", "a folder of packed shards", action)
    return run(Path(options.shards), options.out, options.threads, options.palette)
