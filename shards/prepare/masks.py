"""Label pictures: pixel values or colours turned into class indices, with nothing unknown let
through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shards.errors import InputError
from shards.images import stored_image
from shards.prepare.dataset import Task
from shards.prepare.mask_files import first_channel, mask_values
from shards.prepare.pairing import source_of
from shards.sample import IGNORE_INDEX, Sample

NUM_LISTED = 24  # values that an error message spells out, of known and of unknown ones
NUM_OFFERED = 8  # unknown values that may all be void; more are another kind of masks
MAX_COLORS = 32  # that drawn masks have at most, and photographs have more than
MAX_SEARCHED = 300  # masks that are looked through for further unknown values, evenly
BLOCK_PX = 2**22  # looked up at a time: the search takes eight bytes for each pixel, several times


@dataclass(frozen=True)
class Coding:
    """What a mask's pixels mean: (value, class index or 255 for void), each value once.

    colors: values are 0xRRGGBB of the picture's colours, a palette applied; else gray values or
    palette indices. names: of the classes, for messages. turn: images and masks are turned upright
    as their EXIF orientation says. nearest: masks may be kept with loss (JPEG), and every value
    stands for the nearest known one. first_channel: values are those of the first channel of a
    picture that has several, of 8 or 16 bits.
    """

    codes: tuple[tuple[int, int], ...]
    colors: bool = False
    names: tuple[str, ...] = ()
    turn: bool = True
    nearest: bool = False
    first_channel: bool = False


class UnknownValues(InputError):
    """A mask holds what the coding does not know: counts has the pixels of each such value."""

    path: Path
    counts: dict[int, int]
    coding: Coding


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
    stored = stored_image(image, coding.turn)
    label = None
    if mask is not None:
        try:
            label = read_mask(mask, stored.size, coding)
        except InputError as error:
            if _is_mask(image, coding) or _are_exchanged(image, mask):
                needed = "an image and its mask: here it is the image that reads as a mask"
                action = "exchange the folders of images and masks, or the two columns of the list"
                raise InputError(error.got, needed, action) from None
            raise _explained(error, image, mask, coding) from None
    return Sample(key, stored.content, label, split, source_of(source, image), stored.notes)


def read_mask(path: Path, size: tuple[int, int], coding: Coding) -> np.ndarray:
    """(H, W) uint8 of class indices, 255 for void.

    Size: the image's (H, W). Raises InputError, naming the file.
    """
    values = _values(path, coding)
    # never resized to fit: a mask of another size is mostly another image's
    if values.shape[:2] != size:
        got = (
            f"{path}: {values.shape[0]} x {values.shape[1]} pixels "
            f"for an image {size[0]} x {size[1]} (height x width)"
        )
        raise InputError(got, "a mask of the image's size", "replace the image or the mask")
    label, unknown = _coded(values, coding)
    is_gray = sum(unknown.values()) == label.size and all(map(_is_gray, unknown))
    # data sets with a preparer of their own have no YAML
    if coding.colors and coding.names and is_gray:
        got, needed = f"{path}: gray, without a known colour", "a colour for each class"
        raise InputError(got, needed, "leave out `mask_values: colors`, and name the values as ids")
    if unknown:
        raise _unknown(path, unknown, coding)
    return label


def _values(path: Path, coding: Coding) -> np.ndarray:
    if coding.first_channel:
        return first_channel(path)
    return mask_values(path, colors=coding.colors, turn=coding.turn, lossy=coding.nearest)


def _coded(values: np.ndarray, coding: Coding) -> tuple[np.ndarray, dict[int, int]]:
    """`_indices` of values of any size, in blocks of rows."""
    size = values.shape[:2]
    label = np.empty(size, np.uint8)
    unknown: dict[int, int] = {}
    rows = max(1, BLOCK_PX // max(1, size[1]))
    for top in range(0, size[0], rows):
        label[top : top + rows], strange = _indices(values[top : top + rows], coding)
        for value, count in strange.items():
            unknown[value] = unknown.get(value, 0) + count
    return label, unknown


def _indices(values: np.ndarray, coding: Coding) -> tuple[np.ndarray, dict[int, int]]:
    """((H, W) uint8 of class indices, how many pixels each unknown value has)."""
    if coding.colors:
        # widened first: shifted by 16, a byte would be lost
        wide = values.astype(np.int64)
        values = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    if coding.nearest:
        every, place = np.unique(values, return_inverse=True)
        closest = [_nearest(int(value), coding) for value in every]
        values = np.array(closest, np.int64)[place.reshape(values.shape)]
    # a search among the known values, not a table: of colours it would have 2^24 entries
    known, indices = np.array(sorted(coding.codes), np.int64).T
    # clipped: a value above all known ones has its place behind the last
    place = np.searchsorted(known, values).clip(max=len(known) - 1)
    # searchsorted answers for unknown values, too: compared, not trusted
    wrong, counts = np.unique(values[known[place] != values], return_counts=True)
    strange = dict(zip(wrong.tolist(), counts.tolist(), strict=True))
    return indices.astype(np.uint8)[place], strange


def _nearest(value: int, coding: Coding) -> int:
    """The known value, or colour, that is nearest (the lowest of several)."""

    def distance(known: int) -> int:
        if not coding.colors:
            return abs(known - value)
        return sum((a - b) ** 2 for a, b in zip(_rgb(known), _rgb(value), strict=True))

    return min(sorted(known for known, _ in coding.codes), key=distance)


def _unknown(path: Path, unknown: dict[int, int], coding: Coding) -> UnknownValues:
    """The error of a mask whose values mean nothing, all of them named, the most frequent first."""
    listed = []
    for value, count in _most_first(unknown):
        near = f" (nearest: {_named(_nearest(value, coding), coding)})" if coding.colors else ""
        listed.append(f"{_value(value, coding)} in {count} pixels{near}")
    known = [_named(value, coding) for value, _ in sorted(coding.codes)]
    needed = f"one of: {', '.join(known[:NUM_LISTED])}{', ...' if known[NUM_LISTED:] else ''}"
    error = UnknownValues(f"{path}: {_bounded(listed)}", needed, _void_or(unknown, coding))
    # as attributes, which go with an exception from process to process
    error.path, error.counts, error.coding = path, unknown, coding
    return error


def with_other_masks(error: UnknownValues, tasks: Sequence[Task]) -> InputError:
    """The error with what is unknown in other masks, too: else they would be told one by one."""
    named = [task for task in tasks if task.read is masked_sample]
    # evenly: those beside each other are alike
    named = named[:: max(1, -(-len(named) // MAX_SEARCHED))]
    masks: dict[int, int] = {}
    for task in named:
        for value in _unknown_values(task.arguments[1], error.coding):
            masks[value] = masks.get(value, 0) + 1
    if not masks.keys() - error.counts.keys():
        return error
    listed = []
    for value, count in _most_first(masks):
        listed.append(f"{_value(value, error.coding)} in {count}")
    got = f"{error.got}\n  of {len(named)} masks: {_bounded(listed)}"
    return InputError(got, error.needed, _void_or(masks, error.coding))


def _unknown_values(mask: Path | None, coding: Coding) -> Iterable[int]:
    try:
        return () if mask is None else _coded(_values(mask, coding), coding)[1]
    except InputError:
        return ()  # unreadable: another error than the one that is told


def _void_or(unknown: Iterable[int], coding: Coding) -> str:
    """What to do about unknown values: `void:` spelt out where they are few."""
    values = sorted(unknown)
    action = "correct the mask, or say which class this is"
    # data sets with a preparer of their own have no YAML
    if not coding.names or len(values) > NUM_OFFERED:
        return f"{action}, or name it in `void:`"
    void = sorted({value for value, index in coding.codes if index == IGNORE_INDEX} | {*values})
    spelt = [str(list(_rgb(value)) if coding.colors else value) for value in void]
    return f"{action}; if it is none, write `void: [{', '.join(spelt)}]` in the YAML"


def _most_first(counts: dict[int, int]) -> list[tuple[int, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _bounded(listed: list[str]) -> str:
    more = len(listed) - NUM_LISTED
    return ", ".join(listed[:NUM_LISTED]) + (f", and {more} more" if more > 0 else "")


def _value(value: int, coding: Coding) -> str:
    return f"colour {_color(value)}" if coding.colors else f"value {value}"


def _named(value: int, coding: Coding) -> str:
    """A known value or colour with its class beside it, where that has a name."""
    index = dict(coding.codes)[value]
    name = "void" if index == IGNORE_INDEX else (*coding.names, *[""] * 256)[index]
    shown = _color(value) if coding.colors else str(value)
    return f"{shown} {name}".rstrip()


def _color(value: int) -> str:
    return f"({', '.join(map(str, _rgb(value)))})"


def _rgb(value: int) -> tuple[int, int, int]:
    return value >> 16, value >> 8 & 255, value & 255


def _is_mask(image: Path, coding: Coding) -> bool:
    """Whether every pixel of the image file is one that masks have."""
    try:
        strict = replace(coding, nearest=False)
        values = mask_values(image, colors=coding.colors, turn=coding.turn)
        read_mask(image, values.shape[:2], strict)
    except InputError:
        return False
    return True


def _is_gray(value: int) -> bool:
    return len(set(_rgb(value))) == 1


def _are_exchanged(image: Path, mask: Path) -> bool:
    """Whether the image is drawn in a few colours, without loss, and the mask is in many."""
    try:
        drawn = _num_colors(mask_values(image, colors=True))
        return drawn <= MAX_COLORS < _num_colors(mask_values(mask, colors=True, lossy=True))
    except InputError:
        return False


def _num_colors(values: np.ndarray) -> int:
    """values: (H, W, 3) uint8."""
    return len(np.unique(values.reshape(-1, 3), axis=0))


def _explained(error: InputError, image: Path, mask: Path, coding: Coding) -> InputError:
    """The error; of sizes that differ by a turn, with the reason."""
    try:
        # the other way round: does the mask fit the pixels as they are stored?
        stored = stored_image(image, turn=not coding.turn)
        read_mask(mask, stored.size, coding)
    except InputError:
        return error
    if coding.turn:
        why = "it fits the pixels as they are stored, while EXIF says that viewers turn the image"
        action = "write `exif: ignore` in the YAML, or turn the mask as viewers turn the image"
    else:
        why = "it fits the image as viewers show it, which EXIF says is turned"
        action = "leave out `exif: ignore`"
    return InputError(f"{error.got}; {why}", error.needed, action)
