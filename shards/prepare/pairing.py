"""Images and labels matched by id, and splits for data sets that come without."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.image_files import images_below
from shards.images import SUFFIXES
from shards.names import MAX_BYTES, shortened
from shards.prepare.dataset import Task, absent
from shards.sample import Sample
from shards.words import counted

VAL_SHARE = 5  # one image in five validates: 143 of Stanford Background's 715
MASK_SUFFIXES = (*SUFFIXES, ".npy")
# of one name in several formats these are taken, and the others named
USUAL = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Pair:
    """An image with its label (None: unlabelled) under the id that the data set gives it."""

    id: str
    split: str
    image: Path
    label: Path | None


def pair_tasks(
    root: Path,
    pairs: Iterable[Pair],
    read: Callable[..., Sample],
    without_mask: str = "",
    **more: Any,
) -> list[Task]:
    """Tasks of read(key, split, image, label, **more) for each pair; of `absent` where a file is
    not there.

    without_mask: what can be done about an image of train that has none. Keys: see `key_of`. Raises
    InputError for a name that leads out of `root`, and for two pairs of one key.
    """
    tasks: list[Task] = []
    named: dict[str, Pair] = {}
    for pair in pairs:
        key = key_of(pair.id)
        if key in named:
            got = f"{pair.image} and {named[key].image} would both be called {key!r}"
            raise InputError(
                got,
                "each id once, and different with '_' for '.' and '/'",
                "correct the list, or rename",
            )
        named[key] = pair
        files = [path for path in (pair.image, pair.label) if path is not None]
        # lists come with the data: one from elsewhere must not make us read what lies outside
        for path in files:
            check_inside(root, path)
        lost = [path for path in files if not path.is_file()]
        if lost:
            tasks.append(_absent(key, pair, lost, without_mask))
            continue
        arguments = (pair.image, pair.label, *more.values())
        tasks.append(Task(key, pair.split, read, arguments, names=tuple(more)))
    if not named:
        raise InputError(f"no images in {root}", "at least one", "correct --root")
    return tasks


def _absent(key: str, pair: Pair, lost: list[Path], without_mask: str) -> Task:
    """A task that fails, not an error: with --skip-bad it is left out, and counted, like a damaged
    one.
    """
    may_lack = lost == [pair.label] and pair.split != "val"
    return Task(key, pair.split, absent, (_lost(lost[0], pair), without_mask if may_lack else ""))


def _lost(path: Path, pair: Pair) -> str:
    """A file that is not there, for messages: beside it the one that it would belong to."""
    kind, other = ("image", pair.label) if path == pair.image else ("mask", pair.image)
    return f"{path}, the {kind} of {other}" if other is not None and other.is_file() else str(path)


def key_of(id_: str) -> str:
    """The id as the key of a sample, which is part of the names within a tar.

    "_" for "." (it would cut the name short), for "/" and "\\" (they would make a folder of it) and
    for what cannot be printed; a plain blank for every other, such as macOS puts into names of
    screenshots. One that is too long is cut, and ends in digits of its hash.
    """
    key = []
    for sign in id_:
        blank = unicodedata.category(sign) == "Zs"
        plain = " " if blank else sign
        key.append(plain if plain.isprintable() and plain not in "./\\" else "_")
    return shortened("".join(key), MAX_BYTES)


def source_of(source: str, path: Path) -> str:
    """The source_id of a file; bytes of its name that are no UTF-8 as \\xNN."""
    name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
    return f"{source}/{name}"


def check_inside(root: Path, path: Path) -> None:
    """Raise InputError when a path leads out of `root` by its name: absolute, or by "..".

    Links do not count: whoever put them there wants what they lead to.
    """
    if path.is_relative_to(root) and ".." not in path.relative_to(root).parts:
        return
    # by "..", which may stay inside; links followed, since "link/.." is not where it began
    real = path.resolve()
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
    folder: Path,
    suffix: str = "",
    suffixes: Iterable[str] = SUFFIXES,
    *,
    notes: list[str] | None = None,
    strange: bool = True,
) -> dict[str, Path]:
    """The image files below `folder` whose names end in `suffix` and an extension, sorted, by
    relative path without both.

    See `images_below` for what is left out; it is added to `notes`, with strange also the images
    whose names end in something else. Raises InputError for two files of one id.
    """
    listing = images_below(folder, suffixes)
    found: dict[str, Path] = {}
    others: list[Path] = []
    # the usual formats first: beside a.jpg an a.tif is what a.jpg was made from
    for path in sorted(listing.files, key=lambda path: path.suffix.lower() not in USUAL):
        id_ = path.relative_to(folder).with_suffix("").as_posix()
        if not id_.endswith(suffix):
            others.append(path)
            continue
        id_ = id_.removesuffix(suffix)
        if id_ not in found:
            found[id_] = path
        elif found[id_].suffix.lower() in USUAL and path.suffix.lower() not in USUAL:
            listing.pass_over("beside a JPEG or PNG of the same name", path)
        else:
            # a.jpg and a.png: which of them the mask belongs to cannot be told
            raise InputError(
                f"{found[id_]} and {path}", "one file for each id", "remove one of them"
            )
    if notes is not None:
        # where none ends so, the caller has more to say
        if found and others and strange:
            listing.passed_over[f"whose names do not end in {suffix}"] = others
        notes += [note for note in listing.notes() if note not in notes]
    return dict(sorted(found.items(), key=lambda item: item[1]))


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


def pairs_of_splits(
    splits: Mapping[str, Sequence[str]],
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    folders: tuple[Path, Path],
) -> list[Pair]:
    """Image and label of every id of the splits, in order; of what is not there, the path that it
    would have in the folder of images or of labels, as <id>.png.
    """
    return [
        Pair(
            *(id_, split, images.get(id_, folders[0] / f"{id_}.png")),
            labels.get(id_, folders[1] / f"{id_}.png"),
        )
        for split, id_ in each_id(splits)
    ]


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
