"""Stanford Background (Gould, Fulton, Koller 2009): text files of class indices, -1 for unknown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.errors import InputError
from shards.sample import IGNORE_INDEX, STANFORD, ClassSet, Sample, image_size

UNKNOWN = -1
VAL_SHARE = 5  # one image in five validates where the data set comes without lists: 143 of 715


def samples(root: Path, seed: int = 0) -> tuple[ClassSet, Iterator[Sample], int]:
    """(classes, samples, how many) of a folder with images/<id>.jpg and labels/<id>.regions.txt.

    The splits are those of splits/*train*.txt and splits/*val*.txt (an id a line); without that folder, as in the
    original archive, every fifth id of a permutation by `seed` validates. Pairs are made by id. Raises InputError when
    an image has no label, a label no image, or the lists do not name each image once.
    """
    images = {path.stem: path for path in sorted((root / "images").glob("*.jpg"))}
    labels = {path.name.removesuffix(".regions.txt"): path for path in (root / "labels").glob("*.regions.txt")}
    if not images:
        raise InputError(f"no images/*.jpg in {root}", "the unpacked iccv09Data", "correct --root")
    unpaired = sorted(images.keys() ^ labels.keys())
    if unpaired:
        side = "label" if unpaired[0] in images else "image"
        got = f"{len(unpaired)} ids without a pair, the first: {unpaired[0]} has no {side}"
        raise InputError(f"{root}: {got}", "an image and a label for every id", "unpack the data set again")
    splits = _splits(root, sorted(images), seed)
    pairs = [(images[key], labels[key], split) for split, keys in splits.items() for key in keys]
    return STANFORD, (_sample(*pair) for pair in pairs), len(pairs)


def _splits(root: Path, keys: list[str], seed: int) -> dict[str, list[str]]:
    folder = root / "splits"
    if not folder.is_dir():
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(keys))
        val = {keys[index] for index in order[: len(keys) // VAL_SHARE]}
        return {"train": [key for key in keys if key not in val], "val": [key for key in keys if key in val]}
    splits = {name: _list(folder, name) for name in ("train", "val")}
    listed = splits["train"] + splits["val"]
    if sorted(listed) != keys:
        wrong = sorted(set(keys) ^ set(listed)) or sorted({key for key in listed if listed.count(key) > 1})
        got = f"{folder}: {len(wrong)} ids not listed exactly once or without an image, the first: {wrong[0]}"
        raise InputError(got, "each image in one list, once", "correct the lists, or remove splits/ for a seeded split")
    return splits


def _list(folder: Path, name: str) -> list[str]:
    paths = sorted(folder.glob(f"*{name}*.txt"))
    if len(paths) != 1:
        raise InputError(f"{len(paths)} files {folder}/*{name}*.txt", "one", "keep one list for each split")
    return paths[0].read_text().split()


def _sample(image_path: Path, label_path: Path, split: str) -> Sample:
    image = image_path.read_bytes()
    try:
        size = image_size(image)
    except InputError as error:
        raise InputError(f"{image_path}: {error.got}", error.needed, error.action) from None
    return Sample(image_path.stem, image, _read_label(label_path, size), split, f"iccv09Data/{image_path.name}")


def _read_label(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 with 255 for unknown, from rows of whole numbers."""
    try:
        rows = [line for line in path.read_text().splitlines() if line.strip()]
        values = np.array(" ".join(rows).split(), dtype=np.int64)
    except ValueError as error:
        raise InputError(f"{path}: {error}", "whole numbers", "unpack the data set again") from None
    if len(rows) != size[0] or values.size != size[0] * size[1]:
        got = f"{path}: {values.size} numbers in {len(rows)} rows for an image of {size[0]} x {size[1]}"
        raise InputError(got, "one number for every pixel", "unpack the data set again")
    if values.min() < UNKNOWN or values.max() >= STANFORD.num_classes:
        wrong = values.min() if values.min() < UNKNOWN else values.max()
        got = f"{path}: label {wrong}"
        raise InputError(got, f"0 to {STANFORD.num_classes - 1}, or {UNKNOWN} for unknown", "correct the file")
    values[values == UNKNOWN] = IGNORE_INDEX
    return values.astype(np.uint8).reshape(size)
