"""What all parsers of the command line share: errors that name the nearest word.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from shards.errors import InputError
from shards.words import nearest

Commands = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors, told like those of all other bad input.

    suggest: what to do about an option that is none, by its name and the word behind it ("" where
    it has no value); "" where it knows nothing. besides: what may be given in place of an option's
    choices, by its name.
    """

    suggest: Callable[[str, str], str] | None = None
    # whether a name is that of a key; None where a command takes no keys that are known
    is_key: Callable[[str], bool] | None = None
    besides: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise InputError(f"{self.prog}: {message}", usage, f"`{self.prog} --help` explains it")

    # argparse's own hook; its message lists the choices and names none
    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        option = action.option_strings[-1] if action.option_strings else ""
        got = " ".join(word for word in (self.prog, option, str(value)) if word)
        needed = f"one of: {', '.join(choices)}"
        needed += f"; {self.besides[option]}" if option in self.besides else ""
        raise InputError(got, needed, nearest(str(value), choices))

    def accepts(self, word: str, options: argparse.Namespace) -> bool:
        """Whether a word that argparse found no place for is key=value of a command with keys."""
        return hasattr(options, "overrides") and not word.startswith("-") and "=" in word

    def check_keys(self, words: Iterable[str]) -> None:
        """Raise InputError for an option written as a key: chip=l4 in place of --chip l4."""
        if self.is_key is None:
            return
        for word in words:
            name, equals, value = word.partition("=")
            option = f"--{name.replace('_', '-')}"
            action = self._option_string_actions.get(option)
            if not equals or action is None or self.is_key(name):
                continue
            # of a value that is none either, that error says the option too
            self._check_value(action, value)
            written = option if action.nargs == 0 else f"{option} {value}"
            needed = f"the option {option}: {name} is no key"
            raise InputError(f"{self.prog} {word}", needed, f"write {written}")

    def refuse(self, word: str, arguments: list[str]) -> NoReturn:
        """Raise InputError for a word of the arguments that is no option, with the nearest one."""
        if not word.startswith("-"):
            self.error(f"one word too many: {word}")
        name, _, value = word.lstrip("-").partition("=")
        following = arguments[arguments.index(word) + 1 :] if word in arguments else []
        if not value and following and not following[0].startswith("-"):
            value = following[0]
        options = [option for option in self._option_string_actions if option.startswith("--")]
        action = self.suggest(name, value) if self.suggest is not None else ""
        needed = f"an option: {', '.join(options)}"
        raise InputError(
            f"{self.prog} {word}", needed, action or nearest(f"--{name}", options, 0.6)
        )


def add_command(commands: Commands, name: str, summary: str, text: str, **options: Any) -> Parser:
    """A command's parser; text: its description, shown as it is written."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=summary, description=text, formatter_class=raw, **options
    )
    # whoever refuses a word asks the parser of the command that was called
    parser.set_defaults(parser=parser)
    return parser


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Words of the form key=value, anywhere on the command line."""
    # a default, without which some Pythons say that it is required
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=example)
