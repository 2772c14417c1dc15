"""The reference of all commands as Markdown, read from the parsers themselves.

    python docs/cli_reference.py > docs/cli.md

argparse's own help is worded otherwise by each Python, and wraps by the terminal: so its actions
are written out here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from distseg.cli import build_parser

TOP = """# Every command

By `python docs/cli_reference.py > docs/cli.md` out of the parsers. `key=value` may stand anywhere
on a command line that takes [keys](configuration.md)."""


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's subcommands by name; none where it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All parsers that do something, those of sub-subcommands too, in the order of --help."""
    inside = subparsers(parser)
    if not inside:
        yield parser
    for child in inside.values():
        yield from commands(child)


def row(action: argparse.Action) -> str:
    """A table's row of one argument."""
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    names = names.replace("|", "\\|")
    takes_value = bool(action.option_strings) and action.nargs != 0
    value = f" {action.metavar or action.dest.upper()}" if takes_value else ""
    if action.choices and not action.metavar:
        value = " " + "\\|".join(map(str, action.choices))
    text = (action.help or "").replace("|", "\\|").replace("%%", "%").replace("\n", " ")
    return f"| `{names}{value}` | {text} |"


def page() -> str:
    """The whole page."""
    parts = [TOP]
    for parser in commands(build_parser()):
        actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        rows = [row(action) for action in actions if action.dest != "help"]
        table = "\n".join(["| | |", "|---|---|", *rows])
        # as written: descriptions have tables and examples in columns
        parts.append(f"## {parser.prog}\n```text\n{parser.description or ''}\n```\n\n{table}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
