"""A data set into HDF5 maps: in parts, by several processes, going on after an interruption."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards.errors import InputError
from shards.files import check_space, say, tracked
from shards.maps import MapsReader, MapsWriter
from shards.prepare.dataset import DataSet, Task
from shards.processes import mapped
from shards.sample import IGNORE_INDEX, ClassSet
from shards.words import counted

PART_SAMPLES = 32  # what a kill costs at most, for each worker
VERSION = 1  # of parts: another one is never gone on from


@dataclass(frozen=True)
class Prepared:
    """What was written to `path`.

    Samples for each split, why each bad sample was left out, notes of the preparer.
    """

    path: Path
    num_samples: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# one of many small files: HDF5 has one writer at a time, and a file whose writer was killed cannot
# be relied on
@dataclass(frozen=True)
class _Part:
    """A run of a data set's samples, stored as maps of their own until all are there."""

    path: Path
    name: str
    classes: ClassSet
    tasks: tuple[Task, ...]
    skip_bad: bool


def write_dataset(
    out: Path, name: str, dataset: DataSet, num_workers: int, skip_bad: bool
) -> Prepared:
    """Write a data set's maps to `out`, which appears when it is complete.

    Every part is kept beside `out`, under a name made from its samples, their files' sizes and
    times, until then: the same command goes on after an interruption, and after a bad file was
    replaced. What is written does not depend on the number of worker processes (0: none), nor on
    interruptions. skip_bad: leave out samples that are missing or cannot be read, and say so in the
    maps. Raises InputError for the first bad sample otherwise, a split without samples, too little
    space.
    """
    # beside `out`: on the disk that has the space, and where the same command looks again
    folder = out.with_name(f".{out.name}.parts")
    parts = _parts(folder, name, dataset, skip_bad)
    todo = [part for part in parts if not _done(part)]
    # also a look at every file, before the first is read
    sizes = [_bytes(part) for part in parts]
    waiting = sum(_bytes(part) for part in todo)
    check_space(out, sum(sizes) + waiting)  # the images alone, in the parts and in the file
    num_done = sum(len(part.tasks) for part in parts) - sum(len(part.tasks) for part in todo)
    if num_done:
        say(f"going on: {num_done} of {counted(len(dataset.tasks), 'sample')} done")
    # of files that have changed since, or of other options: no run would ever go on from them
    _remove_others(folder, parts)
    try:
        # only what is left to do goes to the workers: what is done is read once, when all is joined
        keys = itertools.chain.from_iterable(mapped(_write_part, todo, num_workers))
        for _ in tracked(keys, len(dataset.tasks) - num_done, f"preparing {name}"):
            pass
        prepared = _join(out, name, dataset, parts)
    finally:
        with suppress(OSError):
            folder.rmdir()  # when nothing is in it to go on from
    # last: until `out` has its name, the parts are all there is
    shutil.rmtree(folder, ignore_errors=True)
    return prepared


def _parts(folder: Path, name: str, dataset: DataSet, skip_bad: bool) -> list[_Part]:
    parts = []
    for start in range(0, len(dataset.tasks), PART_SAMPLES):
        # cut by number, whatever the workers are: the same parts, so the same names, for 0 or 8 of
        # them
        tasks = tuple(dataset.tasks[start : start + PART_SAMPLES])
        path = folder / f"{_identity(name, dataset, tasks)}.h5"
        parts.append(_Part(path, name, dataset.classes, tasks, skip_bad))
    return parts


def _identity(name: str, dataset: DataSet, tasks: Sequence[Task]) -> str:
    """Hex digits that change with everything a part is made from."""
    digest = hashlib.sha256(repr((VERSION, name, dataset.classes)).encode())
    digest.update(dataset.code.encode())
    for task in tasks:
        # size and time, not content: to read all files just to see that nothing changed would take
        # as long as the work
        times = [(status.st_size, status.st_mtime_ns) for status in map(_status, task.files)]
        # by name: the repr of a function has its address in it, which differs in each process
        read = f"{task.read.__module__}.{task.read.__qualname__}"
        digest.update(repr((task.key, task.split, read, task.arguments, times)).encode())
    return digest.hexdigest()[:32]


def _bytes(part: _Part) -> int:
    files = itertools.chain.from_iterable(task.files for task in part.tasks)
    return sum(_status(path).st_size for path in files)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        action = (
            "is another process moving the data? When it is done, "
            "run the same command again: it goes on"
        )
        raise InputError(
            f"{path} has vanished since the data were listed", "files that stay", action
        ) from None


def _done(part: _Part) -> bool:
    """Whether an earlier run wrote it.

    One that left samples out will not do where that is an error.
    """
    if not part.path.is_file():
        return False
    with MapsReader(part.path) as reader:
        # opened, too: a file that is damaged raises instead of counting as done
        return part.skip_bad or not reader.left_out


def _remove_others(folder: Path, parts: list[_Part]) -> None:
    wanted = {part.path for part in parts}
    for path in folder.glob("*.h5"):
        if path not in wanted:
            path.unlink()


def _write_part(part: _Part) -> list[str]:
    """Write the part's samples; returns the keys of its tasks."""
    with MapsWriter.publishing(part.path, part.name, part.classes) as writer:
        for task in part.tasks:
            try:
                writer.add(task.run())
            except InputError as error:
                if not part.skip_bad:
                    raise
                # kept in the maps: whoever trains on them later can see what is missing, and why
                writer.left_out[task.key] = error.got
    return [task.key for task in part.tasks]


def _join(out: Path, name: str, dataset: DataSet, parts: list[_Part]) -> Prepared:
    with MapsWriter.publishing(out, name, dataset.classes) as writer:
        for part in tracked(parts, len(parts), f"writing {out.name}"):
            # in the data set's order, one file open at a time
            with MapsReader(part.path) as reader:
                writer.copy(reader)
        # a run without its validation set would find out at its first evaluation
        empty = {task.split for task in dataset.tasks} - writer.splits.keys()
        if empty:
            raise InputError(
                f"split {min(empty)!r}: all samples are bad", "a good one", "replace the files"
            )
        if dataset.several_classes:
            check_several_classes(dataset.classes, writer.pixels)
    notes = [*dataset.notes]
    for note, count in sorted(writer.notes.items()):
        notes.append(f"{count} {'image' if count == 1 else 'images'}: {note}")
    # not strict: pixels has 256 places, of which those behind the classes are void or unused
    labelled = zip(dataset.classes.names, writer.pixels, strict=False)
    absent = (
        [class_name for class_name, count in labelled if count == 0] if writer.pixels.any() else []
    )
    if absent:
        notes.append(f"no pixel in any label of: {', '.join(absent)}")
    return Prepared(
        out,
        {split: len(keys) for split, keys in writer.splits.items()},
        writer.left_out,
        tuple(notes),
    )


def check_several_classes(classes: ClassSet, pixels: np.ndarray) -> None:
    """Raise InputError for labels of one class and void, out of several: (256,) int64 by index."""
    used = np.flatnonzero(pixels[: classes.num_classes])
    # 0 and 255 for two classes, most often; as they are, every prediction would be right
    if len(used) == 1 and classes.num_classes > 1 and pixels[IGNORE_INDEX]:
        got = f"all labels hold {classes.names[used[0]]!r} and void, and no other class"
        action = (
            "are 0 and 255 the masks' two classes? Then give the second one `ids: [255]` in the "
            "YAML, and write `void: []`"
        )
        raise InputError(got, "labels of two classes or more", action)
