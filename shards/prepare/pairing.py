"""Images and labels matched by id, and splits for data sets that come without."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.errors import InputError
from shards.sample import image_size

VAL_SHARE = 5  # one image in five validates: 143 of Stanford Background's 715


def check_pairs(root: Path, images: dict[str, Path], labels: dict[str, Path]) -> None:
    """Raise InputError, naming the first id, unless the two dicts by id are the same ids, and some."""
    if not images:
        raise InputError(f"no images/*.jpg in {root}", "the folder that the data set was unpacked to", "correct --root")
    unpaired = sorted(images.keys() ^ labels.keys())
    if unpaired:
        side = "label" if unpaired[0] in images else "image"
        got = f"{root}: {len(unpaired)} ids without a pair, the first: {unpaired[0]} has no {side}"
        raise InputError(got, "an image and a label for every id", "unpack the data set again")


def seeded_splits(keys: list[str], seed: int) -> dict[str, list[str]]:
    """{"train": keys, "val": keys}: a fifth of a permutation by `seed` validates; needs two keys."""
    if len(keys) < 2 or seed < 0:
        raise InputError(f"{len(keys)} images and seed {seed}", "two or more, and a seed from 0", "correct them")
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(keys))
    val = {keys[index] for index in order[: max(1, len(keys) // VAL_SHARE)]}
    return {"train": [key for key in keys if key not in val], "val": [key for key in keys if key in val]}


def read_image(path: Path) -> tuple[bytes, tuple[int, int]]:
    """(the file's bytes, (height, width) from its header). Raises InputError naming an unreadable file."""
    try:
        content = path.read_bytes()
        return content, image_size(content)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "a readable image file", "unpack the data set again") from None
    except InputError as error:
        raise InputError(f"{path}: {error.got}", error.needed, error.action) from None
