"""What the parsers of commands share that take keys of the configuration, or a run.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from distseg.config.names import KEYS, find, full_name
from shards.command_line import Commands, Parser, add_command
from shards.errors import InputError

BAD_INPUT = 2  # exit code


def configured_command(commands: Commands, name: str, summary: str, text: str) -> Parser:
    """A command that takes keys of the configuration, and explains them."""
    # without argparse's own --help, which takes no argument
    parser = add_command(commands, name, summary, text, add_help=False)
    explained = "this help, or that of a key or a section (loss.adv_weight, loss)"
    parser.add_argument("-h", "--help", action=_KeyHelp, nargs="?", metavar="KEY", help=explained)
    parser.suggest = as_key
    parser.is_key = lambda word: find(full_name(word)) is not None
    return parser


def as_key(option: str, value: str) -> str:
    """What to do about an option that is the name of a key: --steps 5 is written steps=5.

    "" where it is near to none. Of keys with the same last part, or that are explained by this word
    (--lr, --learning-rate), all are named.
    """
    word, value = option.replace("-", "_"), value or "VALUE"
    if find(full_name(word)) is not None:
        return f"write {word}={value}"
    same_last = [key for key in KEYS if key.rpartition(".")[2] == word]
    similar = difflib.get_close_matches(word, KEYS, n=1, cutoff=0.8)
    meant = [key for key, entry in KEYS.items() if entry.meaning.startswith(word.replace("_", " "))]
    found = " or ".join(f"{key}={value}" for key in same_last or similar or meant)
    return f"did you mean {found}?" if found else ""


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, and which of its checkpoints."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, e.g. runs/stanford")
    parser.add_argument(
        "--checkpoint", default="last", metavar="WHICH", help="last (default), best, or a step"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


class _KeyHelp(argparse.Action):
    """`--help`, and `--help KEY` for a key or a section of the configuration."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            parser.print_help()
            parser.exit()
        from distseg.config.reference import help_text

        try:
            # `--help loss.adv_weight=0.1` is asked as well, of a command line that is at hand
            print(help_text(values.partition("=")[0]))
        except InputError as error:
            parser.exit(BAD_INPUT, f"error: {error}\n")
        parser.exit()
