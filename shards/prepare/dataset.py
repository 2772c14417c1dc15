"""What a preparer gives: the classes of a data set, and its samples as tasks still to be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import user_code
from shards.errors import InputError
from shards.sample import ClassSet, Sample


# no closures: a task is pickled for worker processes, and its repr is part of the name of the work
# that was done
@dataclass(frozen=True)
class Task:
    """A sample that is still to be read: read(key, split, *arguments) gives it, in any process.

    read: a module's function; arguments: plain values whose repr tells them apart. The paths among
    them are the files that are read: with their sizes and times they say whether work that was done
    before an interruption still holds. names: of the last arguments, which are given by name.
    """

    key: str
    split: str
    read: Callable[..., Sample]
    arguments: tuple[Any, ...]
    names: tuple[str, ...] = ()  # no part of the repr: the values alone say what is read

    def run(self) -> Sample:
        """Read the sample. Raises InputError, naming the file, when it cannot be used."""
        action = "replace it, or leave such samples out with --skip-bad"
        try:
            count = len(self.arguments) - len(self.names)
            named = dict(zip(self.names, self.arguments[count:], strict=True))
            sample = self.read(self.key, self.split, *self.arguments[:count], **named)
        except InputError:  # says already what is wrong where
            raise
        except (OSError, ValueError) as error:  # of a preparer of the user's own
            got = f"{self.key}: {user_code.told(error)}"
            raise InputError(got, "a sample that can be read", action) from error
        # of a user's preparer that forgets to return, most often
        if not isinstance(sample, Sample):
            got = f"{self.key}: {self.read.__qualname__} gives a {type(sample).__name__}"
            raise InputError(got, "a shards.sample.Sample", f"correct {self.read.__qualname__}")
        return sample

    @property
    def files(self) -> list[Path]:
        """The files that `run` reads."""
        # by type, so that a preparer need not list its files twice
        return [argument for argument in self.arguments if isinstance(argument, Path)]


def absent(key: str, split: str, file: str, also: str = "") -> Sample:
    """The `read` of a sample whose file is not there. Raises InputError, and nothing else.

    also: what else can be done about it.
    """
    ways = ["add it", "take the other one away", "correct the lists", *([also] if also else [])]
    action = f"{', '.join(ways)}, or leave such samples out with --skip-bad"
    raise InputError(
        f"{key}: no {file}", "an image and a label for every id of the data set", action
    )


@dataclass(frozen=True)
class DataSet:
    """classes; tasks, in the order that the samples are stored in; notes: what was left out on
    purpose, and why, a line each; name: what the maps are called, when it is not the preparer's
    name; code: sha256 of the preparer, where it may change from one run to the next;
    several_classes: labels that hold one class and void alone, all of them, are a mistake.
    """

    classes: ClassSet
    # a sequence, not an iterator: its length is known for progress, and its parts can be gone on
    # from
    tasks: Sequence[Task]
    notes: tuple[str, ...] = ()
    name: str = ""
    code: str = ""
    several_classes: bool = False
