"""Stanford Background (Gould, Fulton, Koller 2009): text files of class indices, -1 for unknown."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from shards.errors import InputError
from shards.images import stored_image
from shards.prepare.dataset import DataSet
from shards.prepare.lists import ids_in_list
from shards.prepare.pairing import (
    Pair,
    each_id,
    files_by_id,
    pair_tasks,
    seeded_splits,
    source_of,
)
from shards.sample import IGNORE_INDEX, STANFORD, Sample

UNKNOWN = -1


def samples(root: Path, seed: int | None = None) -> DataSet:
    """A folder with images/<id>.jpg and labels/<id>.regions.txt.

    The splits are those of splits/*train*.txt and splits/*val*.txt (an id a line); without that
    folder, as in the original archive, a fifth of a permutation by `seed` (default 0) validates.
    Pairs are made by id. Missing: an image without a label, a label without an image. Raises
    InputError when the lists do not name each image once; a sample, when it is read, for an
    unreadable image, or a label of another size or with values not -1 to 7.
    """
    folders = root / "images", root / "labels"
    # by id on both sides: the n-th image and the n-th label of two sorted folders need not belong
    # together
    notes: list[str] = []
    images = files_by_id(folders[0], notes=notes)
    labels = {
        path.name.removesuffix(".regions.txt"): path for path in folders[1].glob("*.regions.txt")
    }
    if not images:
        raise InputError(
            f"no images/*.jpg in {root}",
            "the folder that the data set was unpacked to",
            "correct --root",
        )
    # ids of both folders, so that a lost file does not change how the others are split
    splits = _splits(root, sorted(images.keys() | labels.keys()), seed)
    pairs = [
        Pair(
            *(id_, split, images.get(id_, folders[0] / f"{id_}.jpg")),
            folders[1] / f"{id_}.regions.txt",
        )
        for split, id_ in each_id(splits)
    ]
    return DataSet(STANFORD, pair_tasks(root, pairs, _sample), tuple(notes))


def _splits(root: Path, keys: list[str], seed: int | None) -> dict[str, list[str]]:
    folder = root / "splits"
    if not folder.is_dir():
        return seeded_splits(keys, seed or 0)
    # given and without effect, it would be believed
    if seed is not None:
        got = f"seed={seed} where {folder} lists the splits"
        raise InputError(got, "either lists or a seed", "leave out seed, or remove splits/")
    splits = {name: _list(folder, name, keys) for name in ("train", "val")}
    listed = splits["train"] + splits["val"]
    # exactly once each: an image in both lists would be validated on after it was trained on
    if sorted(listed) != keys:
        wrong = sorted(set(keys) ^ set(listed)) or sorted(
            {key for key in listed if listed.count(key) > 1}
        )
        got = (
            f"{folder}: {len(wrong)} ids not listed exactly once or without an image, "
            f"the first: {wrong[0]}"
        )
        raise InputError(
            got,
            "each image in one list, once",
            "correct the lists, or remove splits/ for a seeded split",
        )
    return splits


def _list(folder: Path, name: str, keys: list[str]) -> list[str]:
    paths = sorted(folder.glob(f"*{name}*.txt"))
    if len(paths) != 1:
        raise InputError(
            f"{len(paths)} files {folder}/*{name}*.txt", "one", "keep one list for each split"
        )
    return ids_in_list(paths[0], keys)


def _sample(key: str, split: str, image_path: Path, label_path: Path) -> Sample:
    image = stored_image(image_path)
    label = _read_label(label_path, image.size)
    return Sample(
        key, image.content, label, split, source_of("iccv09Data", image_path), image.notes
    )


def _read_label(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 with 255 for unknown, from rows of whole numbers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # loadtxt only warns of an empty file
            # no comment sign: a "#" in a damaged file would cut the line in silence; ndmin for an
            # image of a single row
            values = np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None)
    except (ValueError, Warning) as error:
        raise InputError(
            f"{path}: {error}", "rows of whole numbers", "unpack the data set again"
        ) from None
    if values.shape != size:
        got = (
            f"{path}: {values.shape[0]} rows of {values.shape[1]} numbers "
            f"for an image {size[0]} x {size[1]}"
        )
        raise InputError(
            got, "one number for every pixel (height x width)", "unpack the data set again"
        )
    wrong = values[(values < UNKNOWN) | (values >= STANFORD.num_classes)]
    if wrong.size:
        got = f"{path}: label {wrong[0]} where there are {STANFORD.num_classes} classes"
        raise InputError(
            got, f"0 to {STANFORD.num_classes - 1}, or {UNKNOWN} for unknown", "correct the file"
        )
    # after the check of the range, or 255 would be outside of it; (H, W)
    values[values == UNKNOWN] = IGNORE_INDEX
    return values.astype(np.uint8)
