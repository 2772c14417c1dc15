"""Label pictures: pixel values or colours turned into class indices, with nothing unknown let
through.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import InputError
from shards.prepare.pairing import read_image
from shards.sample import UNREADABLE, Sample

# P is read without its palette, so that VOC's coloured PNGs give indices; no LA, RGB: there an
# index would be a guess
GRAY_MODES = ("P", "L", "1", "I", "I;16")  # pictures whose values, or palette indices, are ids
NUM_LISTED = 24  # known values that an error message spells out


@dataclass(frozen=True)
class Coding:
    """What a mask's pixels mean: (value, class index or 255 for void), each value once.

    colors: values are 0xRRGGBB of the picture's colours, a palette applied; else gray values or
    palette indices.
    """

    codes: tuple[tuple[int, int], ...]
    colors: bool = False


def color_code(color: Iterable[int]) -> int:
    """(red, green, blue), 0 to 255 each, as the 0xRRGGBB of a Coding."""
    red, green, blue = color
    return red << 16 | green << 8 | blue


def masked_sample(
    key: str, split: str, image: Path, mask: Path | None, *, coding: Coding, source: str
) -> Sample:
    """The sample of an image and its mask (None: unlabelled), `source` and file name its source_id.

    Raises InputError naming the file that is unreadable, of another size, or holds what the coding
    does not know.
    """
    # decoded whole: an image that is cut off is found here, not in an epoch
    content, size = read_image(image)
    label = None if mask is None else read_mask(mask, size, coding)
    return Sample(key, content, label, split, f"{source}/{image.name}")


def read_mask(path: Path, size: tuple[int, int], coding: Coding) -> np.ndarray:
    """(H, W) uint8 of class indices, 255 for void.

    Size: the image's (H, W). Raises InputError, naming the file.
    """
    try:
        # read first, and opened from memory: what the disk says and what Pillow says are one kind
        # of error
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            mode = picture.mode
            # (H, W), or (H, W, 3) uint8 of colours
            values = np.asarray(picture.convert("RGB") if coding.colors else picture)
    except UNREADABLE as error:
        raise InputError(
            f"{path}: {error}", "a readable PNG", "unpack the data set again"
        ) from None
    if not coding.colors and mode not in GRAY_MODES:
        needed = "a palette or gray picture whose values are the class indices"
        raise InputError(
            f"{path}: a picture in mode {mode}",
            needed,
            "use the original masks, not coloured copies",
        )
    # never resized to fit: a mask of another size is mostly another image's
    if values.shape[:2] != size:
        got = (
            f"{path}: {values.shape[0]} x {values.shape[1]} pixels "
            f"for an image {size[0]} x {size[1]}"
        )
        raise InputError(got, "a mask of the image's size", "replace the image or the mask")
    if coding.colors:
        # widened first: shifted by 16, a byte would be lost
        wide = values.astype(np.uint32)
        values = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return _indices(path, values, coding)


def _indices(path: Path, values: np.ndarray, coding: Coding) -> np.ndarray:
    # a search among the known values, not a table: of colours it would have 2^24 entries
    known, indices = np.array(sorted(coding.codes), np.int64).T
    # clipped: a value above all known ones has its place behind the last
    place = np.searchsorted(known, values).clip(max=len(known) - 1)
    # searchsorted answers for unknown values, too: compared, not trusted
    wrong = values[known[place] != values]
    if wrong.size:
        got = (
            f"{path}: {_named(int(wrong[0]), coding)} "
            f"in {np.count_nonzero(wrong == wrong[0])} pixels"
        )
        listed = ", ".join(
            _named(value, coding).split(" ", 1)[1] for value in known[:NUM_LISTED].tolist()
        )
        needed = f"one of: {listed}{', ...' if len(known) > NUM_LISTED else ''}"
        raise InputError(got, needed, "correct the mask, or say which class this is")
    return indices.astype(np.uint8)[place]  # (H, W) uint8


def _named(value: int, coding: Coding) -> str:
    return (
        f"colour ({value >> 16}, {value >> 8 & 255}, {value & 255})"
        if coding.colors
        else f"value {value}"
    )
