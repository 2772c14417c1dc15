"""The `distseg` command: its subcommands assembled, and what becomes of their errors.

Each subcommand's parser lives beside its work, in a module that imports nothing heavy; what it
needs is imported only when it runs: --help stays instant.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards import terminal
from shards.command_line import Commands, Parser
from shards.errors import InputError, TemporaryError
from shards.storage import is_passing

# exit codes; the last two are what shells give for Ctrl-C, and for a reader that has gone
BAD_INPUT, INTERRUPTED, NO_READER = 2, 130, 141

OVERVIEW = """\
distseg: adversarial training of semantic segmentation networks, on one machine or many

usage: distseg COMMAND ...    `distseg COMMAND --help` explains one

{commands}
examples
  distseg prepare toy --out data/toy.h5 && distseg pack data/toy.h5 --out data/toy
  torchrun --standalone --nproc_per_node=2 -m distseg.train preset=toy run_dir=runs/toy
  distseg predict runs/toy picture.jpg --out predictions

documentation: docs/quickstart.md in the repository, then docs/index.md; `distseg --version`
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns its exit code. Bad input is one message on stderr, exit code 2."""
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()  # what is left of it: at the end of Python nobody could answer
    except BrokenPipeError:
        # `| head` has what it wanted; another pipe is another matter
        if not terminal.has_no_reader(sys.stdout):
            raise
        return NO_READER


def _main(arguments: list[str] | None) -> int:
    if arguments is None:
        terminal.use_utf8()
    terminal.forgive(sys.stdout, sys.stderr)
    # before the handler, whose first act is to read the configuration
    if _rank() != "0":
        _leave_notes_to_rank_0()
    try:
        options = parse(arguments)
        _check_text(getattr(options, "overrides", []))
        return options.handler(options)
    except InputError as error:
        # torchrun shows the output of all ranks: 64 times the same message would hide it
        if _is_told_here(error):
            where = "" if _rank() == "0" else f" on rank {_rank()}"
            print(f"error{where}: {error}", file=sys.stderr)
        return BAD_INPUT
    except RuntimeError as error:
        # a failure that is no fault of the program brings its exit code; all others are shown whole
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"error on rank {_rank()}: {error}", file=sys.stderr)
        return exit_code
    except OSError as error:
        # of storage, where it is not tried again: the next start may well find it answering
        if not is_passing(error, Path()):
            raise
        print(f"error on rank {_rank()}: {error}", file=sys.stderr)
        return TemporaryError.exit_code
    # no traceback: it shows where the program was, and not what went wrong
    except KeyboardInterrupt as error:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        return INTERRUPTED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line; key=value may stand before, between and after the options.

    Raises InputError for what is no command line, with the nearest command, option or key.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # as git and others have it; `help` is no command of its own
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    # key=value may stand anywhere, which argparse alone does not allow
    options, rest = build_parser().parse_known_args(arguments)
    # argparse takes optional positionals only where it meets the required ones
    for word in rest:
        # an option that is misspelt must not pass for a value
        if not options.parser.accepts(word, options):
            options.parser.refuse(word, arguments)
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.parser.check_keys(getattr(options, "overrides", []))
    return options


def _check_text(overrides: list[str]) -> None:
    """Raise InputError for bytes that are no text: no configuration could be written with them."""
    for word in overrides:
        if any("\udc80" <= letter <= "\udcff" for letter in word):
            got = f"argument {word!a}, bytes that are no UTF-8"
            action = "rename the file or folder, or call with LC_ALL=C.UTF-8 if the name is UTF-8"
            raise InputError(got, "text in UTF-8", action)


class _Overview(Parser):
    """The parser of `distseg` itself, whose help is the overview of all commands."""

    groups: dict[str, dict[str, str]]  # by their titles: the commands, each with its summary

    def format_help(self) -> str:
        width = max(len(name) for name in itertools.chain(*self.groups.values()))
        lines = []
        for title, group in self.groups.items():
            lines.append(title)
            lines += [f"  {name:{width}}  {summary}" for name, summary in group.items()]
        return OVERVIEW.format(commands="\n".join([*lines, ""]))


def _overview(options: argparse.Namespace) -> int:
    print(options.parser.format_help(), end="")
    return 0


class _Version(argparse.Action):
    """`--version`, which asks git only when it is called for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from distseg.runs.version import described

        print(described())
        parser.exit()


def build_parser() -> Parser:
    """The command's parser, without importing anything heavy."""
    parser = _Overview("distseg")
    text = "print the version, and the commit of a clone"
    parser.add_argument("--version", action=_Version, nargs=0, help=text)
    # with no command: the overview, as from --help
    parser.set_defaults(root=parser, parser=parser, handler=_overview)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    parser.groups = {}
    for title, additions in _groups().items():
        before = set(commands.choices)
        for add in additions:
            add(commands)
        parser.groups[title] = {
            entry.dest: entry.help or ""
            for entry in commands._choices_actions
            if entry.dest not in before
        }
    return parser


def _groups() -> dict[str, tuple[Callable[[Commands], None], ...]]:
    """What adds the commands, in the order in which one uses them."""
    from distseg.catalogue.command import add_models
    from distseg.completion import add_completion
    from distseg.doctor.command import add_doctor
    from distseg.estimate.command import add_estimate
    from distseg.evaluate.command import add_evaluate, add_pictures, add_summarize
    from distseg.export.command import add_export
    from distseg.inspection.command import add_inspect
    from distseg.predict.command import add_predict
    from distseg.pseudo_label.command import add_pseudo_label
    from distseg.report.command import add_report
    from distseg.train.command import add_train
    from launchers.commands import add_submit, add_sweep
    from shards.commands import add_import, add_pack, add_prepare

    return {
        "data": (add_prepare, add_pack, add_import, add_inspect),
        "before a run": (add_models, add_estimate, add_doctor),
        "training": (add_train, add_submit, add_sweep),
        "results": (
            *(add_evaluate, add_summarize, add_report, add_pictures),
            *(add_predict, add_pseudo_label, add_export),
        ),
        "your shell": (add_completion,),
    }


def _rank(of_torchrun: str = "RANK", of_srun: str = "SLURM_PROCID") -> str:
    # SLURM_PROCID alone makes no rank: a batch script may have it too, outside of any step
    in_step = "SLURM_STEP_ID" in os.environ
    return os.environ.get(of_torchrun, os.environ.get(of_srun, "0") if in_step else "0")


def _is_told_here(error: InputError) -> bool:
    """Whether this process prints it: what all ranks met alike is told once per machine or once."""
    if _rank() == "0":
        return True
    if getattr(error, "raised_in_job", False):
        # an error of this rank alone is told by it: nobody else knows
        return not hasattr(error, "raised_on_all_ranks")
    return _rank("LOCAL_RANK", "SLURM_LOCALID") == "0"  # machines can differ


def _leave_notes_to_rank_0() -> None:
    """All ranks read the same configuration: what it has to note is printed once."""
    import logging

    logging.getLogger("distseg.config").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
