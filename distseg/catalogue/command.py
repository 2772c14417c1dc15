"""`distseg models`: its arguments, read without torch."""

from __future__ import annotations

import argparse

from distseg.config.schema import (
    DISCRIMINATORS,
    ENCODERS,
    HEADS,
    SEGMENTORS,
    SEGMENTORS_TOLD,
)
from shards.command_line import Commands, add_command
from shards.errors import InputError
from shards.words import nearest

TEXT = """\
Measure segmentors and discriminators: parameters, output stride, field of view, work at
321x321 px.

Segmentors named HEAD_ENCODER are listed by their parts; a part's name lists what it is in:
distseg models vitb14

Your own as in training: distseg models segmentor=my_net.py:MyNet discriminator=my_pkg.judge:MyJudge
"""


def add_models(commands: Commands) -> None:
    """Add `models` to the commands."""
    summary = "list the networks to choose from, with their sizes"
    parser = add_command(commands, "models", summary, TEXT)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these; none: all, of HEAD_ENCODER the parts"
    )
    parser.add_argument(
        "--classes", type=int, default=21, metavar="N", help="number of classes (21)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(handler=_models)


def _models(options: argparse.Namespace) -> int:
    known = (*SEGMENTORS, *HEADS, *ENCODERS, *DISCRIMINATORS)
    for name in options.names:
        # one of the user's own is looked at when torch is there
        if name not in known and "=" not in name:
            needed = f"among: {SEGMENTORS_TOLD}; {', '.join(DISCRIMINATORS)}; or your own, "
            needed += "segmentor=FILE.py:NAME"
            raise InputError(f"no network {name}", needed, nearest(name, known))
    from distseg.catalogue.run import run

    return run(options.names, options.classes, options.json)
