"""A preparer of the user's own: the same form as ours, or a generator of samples."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards import user_code
from shards.errors import InputError
from shards.maps import MapsWriter
from shards.prepare.dataset import DataSet, Task, absent
from shards.prepare.parts import Prepared
from shards.sample import ClassSet, Sample
from shards.user_code import UserCode

KEY = "preparer"
CLASSES = "CLASSES"  # the name of the ClassSet beside a generator


def name_of(reference: str) -> str:
    """What the maps are called: as the file or the module."""
    place = user_code.short(reference).rpartition(":")[0]
    return place.removesuffix(user_code.SUFFIX).rpartition(".")[2]


@dataclass(frozen=True)
class Generated:
    """A generator of samples, with their classes."""

    classes: ClassSet
    samples: Iterator[Sample]
    code: UserCode

    def write(self, out: Path, name: str) -> Prepared:
        """Write all samples to `out`, one after the other, in this process.

        Raises InputError for a sample that does not fit the classes, for none at all, and for what
        goes wrong in the generator.
        """
        with MapsWriter.publishing(out, name, self.classes) as writer:
            # one after the other: a generator cannot be shared among processes, nor gone on with in
            # its middle
            for sample in self._checked():
                writer.add(sample)
            # an empty file of maps would pack, and fail in training only
            if not writer.splits:
                needed, action = "at least one sample", "check --root and the code"
                raise InputError(f"{self.code.reference} gives no sample", needed, action)
        return Prepared(out, {split: len(keys) for split, keys in writer.splits.items()})

    def _checked(self) -> Iterator[Sample]:
        said, action = f"{KEY}={self.code.reference}", f"correct {self.code.name}"
        try:
            for sample in self.samples:
                if not isinstance(sample, Sample):
                    got = f"{said} gives a {type(sample).__name__}"
                    raise InputError(got, "a shards.sample.Sample", action)
                yield sample
        except InputError:
            raise
        # a generator fails between two samples as well, where no call of ours is in sight
        except BaseException as error:
            if not user_code.is_own(error):
                raise
            got = f"{said}: {user_code.told(error, self.code.path)}"
            raise InputError(got, "samples to the end", action) from error


def called(reference: str, arguments: dict[str, Any]) -> DataSet | Generated:
    """What the user's preparer gives.

    Raises InputError for what goes wrong in it, and for anything but a DataSet or a generator that
    has CLASSES beside it.
    """
    code = user_code.load(reference, KEY)
    given = user_code.call(code, KEY, arguments, "option")
    if isinstance(given, DataSet):
        # the sha256 makes parts that older code wrote worthless: they are never gone on from
        tasks = [_whole(task) for task in given.tasks]
        return replace(given, tasks=tasks, code=code.sha256)
    # beside the function, since the file of maps begins with its classes, before the first sample
    classes = getattr(sys.modules[code.value.__module__], CLASSES, None)
    if isinstance(given, Iterator) and isinstance(classes, ClassSet):
        return Generated(classes, given, code)
    got = f"{KEY}={reference} gives a {type(given).__name__}"
    if isinstance(given, Iterator):
        got = f"{KEY}={reference} gives samples one by one, and {code.path} has no {CLASSES}"
    needed = f"a DataSet, or a generator of Sample beside {CLASSES} = ClassSet(names, colours)"
    raise InputError(got, needed, f"correct {code.name}")


def _whole(task: Task) -> Task:
    """The task; one whose file is not there as `absent`, which is told before time is spent."""
    lost = [path for path in task.files if not path.is_file()]
    return replace(task, read=absent, arguments=(str(lost[0]),), names=()) if lost else task
