"""Images and labels matched by id, and splits for data sets that come without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.prepare.dataset import Task, absent
from shards.sample import Sample, decode_image
from shards.words import counted

VAL_SHARE = 5  # one image in five validates: 143 of Stanford Background's 715
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Pair:
    """An image with its label (None: unlabelled) under the id that the data set gives it."""

    id: str
    split: str
    image: Path
    label: Path | None


def pair_tasks(
    root: Path, pairs: Iterable[Pair], read: Callable[..., Sample], **more: Any
) -> list[Task]:
    """Tasks of read(key, split, image, label, **more) for each pair; of `absent` where a file is
    not there.

    A key is the id with "_" for "." and "/", which cannot be in names within a tar. Raises
    InputError for a file outside of `root`, links followed, and for two pairs of one key.
    """
    tasks: list[Task] = []
    named: dict[str, Pair] = {}
    for pair in pairs:
        # a "." would cut the key short in a tar, a "/" make a folder of it
        key = pair.id.replace("/", "_").replace(".", "_")
        if key in named:
            got = f"{pair.image} and {named[key].image} would both be called {key!r}"
            raise InputError(
                got,
                "each id once, and different with '_' for '.' and '/'",
                "correct the list, or rename",
            )
        named[key] = pair
        files = [path for path in (pair.image, pair.label) if path is not None]
        # lists and links come with the data: one from elsewhere must not make us read what lies
        # outside
        for path in files:
            check_inside(root, path)
        # a task that fails, not an error: with --skip-bad it is left out, and counted, like a
        # damaged one
        lost = [str(path) for path in files if not path.is_file()]
        if lost:
            tasks.append(Task(key, pair.split, absent, (lost[0],)))
            continue
        arguments = (pair.image, pair.label, *more.values())
        tasks.append(Task(key, pair.split, read, arguments, names=tuple(more)))
    if not named:
        raise InputError(f"no images in {root}", "at least one", "correct --root")
    return tasks


def check_inside(root: Path, path: Path) -> None:
    """Raise InputError when a path, links followed, leads out of `root`.

    A list's "../x", or a link.
    """
    # to resolve costs a system call for each part of the path: that of the folder is kept, since a
    # set has many files in few folders
    real = path.resolve() if path.is_symlink() else _resolved(path.parent) / path.name
    if not real.is_relative_to(_resolved(root)):
        action = "copy it there, or give a folder that holds both as --root"
        raise InputError(f"{path} leads to {real}", f"files inside {root}", action)


@lru_cache(maxsize=4096)
def _resolved(folder: Path) -> Path:
    return folder.resolve()


def locate(root: Path, marker: str, *inside: str) -> Path:
    """The first of root and root/<inside> that has a folder `marker`.

    Raises InputError when none has.
    """
    for folder in (root, *(root / name for name in inside)):
        if (folder / marker).is_dir():
            return folder
    needed = " or ".join(f"{name}/{marker}" for name in (".", *inside))
    raise InputError(
        f"no {marker} in {root}", f"the data set as unpacked, with {needed}", "correct --root"
    )


def files_by_id(
    folder: Path, suffix: str = "", suffixes: Iterable[str] = IMAGE_SUFFIXES
) -> dict[str, Path]:
    """The files below `folder` whose names end in `suffix` and an extension, sorted, by relative
    path without both.

    Hidden files are passed over. Raises InputError for two files of one id.
    """
    found: dict[str, Path] = {}
    # sorted: a folder's own order differs from disk to disk, and with it the order of the maps
    for path in sorted(folder.rglob("*.*")):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if (
            # .JPG and .jpg: cameras write both
            path.suffix.lower() not in suffixes
            or path.name.startswith(".")
            or not stem.endswith(suffix)
        ):
            continue
        key = stem.removesuffix(suffix)
        # a.jpg and a.png: which of them the mask belongs to cannot be told
        if key in found:
            raise InputError(
                f"{found[key]} and {path}", "one file for each id", "remove one of them"
            )
        found[key] = path
    return found


def ids_in_list(path: Path) -> list[str]:
    """The words of a list, an id a line. Raises InputError for an empty or unreadable one."""
    try:
        # at any white space: lists come with Windows' line ends, and with blank lines
        ids = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: {error}", "a list with an id a line", "put it there, or name another"
        ) from None
    if not ids:
        raise InputError(f"{path} is empty", "an id a line", "choose another list")
    return ids


def check_listed_once(splits: Mapping[str, Iterable[str]]) -> None:
    """Raise InputError for an id that is in two splits, or in one twice."""
    seen: dict[str, str] = {}
    for split, ids in splits.items():
        for id_ in ids:
            if id_ in seen:
                got = f"{id_} is listed twice ({seen[id_]} and {split})"
                raise InputError(got, "each id in one list, once", "correct the lists")
            seen[id_] = split


def each_id(splits: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """(split, id) of every id, in order."""
    for split, ids in splits.items():
        for id_ in ids:
            yield split, id_


def seeded_splits(keys: list[str], seed: int) -> dict[str, list[str]]:
    """{"train": keys, "val": keys}: a fifth of a permutation by `seed` validates."""
    if len(keys) < 2 or seed < 0:
        raise InputError(
            f"{counted(len(keys), 'image')} and seed {seed}",
            "two or more, and a seed from 0",
            "add images" if len(keys) < 2 else "correct seed",
        )
    # Philox by name: default_rng may be another generator in a later NumPy, and the split another
    # one
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(keys))
    # one at least, however few there are
    val = {keys[index] for index in order[: max(1, len(keys) // VAL_SHARE)]}
    return {
        # in the order of the keys: the permutation says who validates, not who comes first
        "train": [key for key in keys if key not in val],
        "val": [key for key in keys if key in val],
    }


def read_image(path: Path) -> tuple[bytes, tuple[int, int]]:
    """(the file's bytes, (height, width)).

    Decodes all of it: raises InputError naming a file that cannot be used.
    """
    try:
        content = path.read_bytes()
        # the bytes go on as they are, the pixels are dropped: JPEG coded again would lose quality
        return content, decode_image(content).shape[:2]
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}", "a readable image file", "unpack the data set again"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error.got}", error.needed, error.action) from None
