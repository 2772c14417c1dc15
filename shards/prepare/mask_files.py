"""The values that a mask's file holds, as they were written: never scaled, blended or cut."""

from __future__ import annotations

import io
import re
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from shards.errors import InputError
from shards.images import PNG_SIGNATURE, named, several_frames, upright, with_picture

# P and PA are read without their palette, so that VOC's coloured PNGs give indices
GRAY_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
GRAY_IN_COLOURS = ("LA", "RGB", "RGBA")
NUMPY = b"\x93NUMPY"
LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")
BITS_PER_SAMPLE = 258  # the tag's number in TIFF
IDS = "a palette or gray picture whose values are the class indices"
ORIGINAL = "use the original masks, not coloured copies; of colours write `mask_values: colors`"


def mask_values(
    path: Path, *, colors: bool = False, turn: bool = True, lossy: bool = False
) -> np.ndarray:
    """(H, W) of whole numbers, or with colors (H, W, 3) uint8.

    Palette indices; gray values as they are stored, of 1, 2 and 4 bits too; the gray of pictures in
    colours with red = green = blue; arrays of whole numbers (.npy). Transparency is dropped. turn:
    as the file's EXIF orientation says. lossy: also of formats that change values. Raises
    InputError, naming the file, for anything else.
    """
    with named(path, "mask", "PNG, TIFF, BMP, GIF, or another format without loss, or .npy"):
        content = path.read_bytes()
        if content.startswith(NUMPY):
            return _array(content, colors)

        def values(picture: Image.Image) -> np.ndarray:
            _check_kind(picture, content, lossy)
            picture.load()  # a TIFF turns itself, and its mode may change
            picture = upright(picture) if turn else picture
            return _colors(picture) if colors else _ids(picture, content)

        return with_picture(content, values)


def first_channel(path: Path) -> np.ndarray:
    """(H, W) uint8 or uint16: the first channel of a PNG of any number of them, 8 or 16 bits each.

    Raises InputError, naming the file, for anything else.
    """
    with named(path, "mask", "PNG"):
        # by OpenCV: of 16 bits a channel Pillow drops the lower eight
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise InputError("an unreadable picture", "a whole PNG", "replace the file")
        # blue, green, red: the first of the file is the third here, of gray with alpha all three
        return values if values.ndim == 2 else values[..., 2]


def _array(content: bytes, colors: bool) -> np.ndarray:
    # pickled objects run code when they are read
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if colors:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4):
            got = f"an array of {array.dtype} and shape {array.shape}"
            raise InputError(got, "(H, W, 3) uint8, a colour for each pixel", "save it so")
        return array[..., :3]
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        got = f"an array of {array.dtype} and shape {array.shape}"
        needed = "(H, W) whole numbers, a class for each pixel"
        raise InputError(got, needed, "save it so, of one-hot maps the argmax")
    return _whole(array)


def _whole(values: np.ndarray) -> np.ndarray:
    """(H, W) as whole numbers, which floating-point ones must be too."""
    if values.dtype.kind != "f":
        return values.astype(np.uint8) if values.dtype == bool else values
    numbers = np.rint(values)
    # NaN is not equal to itself
    if not np.array_equal(numbers, values) or np.abs(numbers).max(initial=0) > 2**31:
        raise InputError("values between whole numbers", IDS, "save the indices themselves")
    return numbers.astype(np.int64)


def _check_kind(picture: Image.Image, content: bytes, lossy: bool) -> None:
    """Raise InputError for a format that keeps other values than it was given, and for frames."""
    if several_frames(picture):
        got = f"a mask of {picture.n_frames} frames or pages"  # type: ignore[attr-defined]
        raise InputError(got, "one mask a file", "keep the one that belongs to the image")
    packed = picture.info.get("compression") in LOSSY_IN_TIFF and picture.format == "TIFF"
    blended = picture.format in LOSSY or (
        picture.format == "WEBP" and not _is_lossless_webp(content)
    )
    if (packed or blended) and not lossy:
        got = f"a mask in a format that loses values ({picture.format})"
        needed = "PNG, or another format without loss: along outlines these values are of others"
        action = (
            "use the original masks; where there are none, write `lossy_masks: nearest` in the "
            "YAML, which takes the nearest value that it names"
        )
        raise InputError(got, needed, action)


def _is_lossless_webp(content: bytes) -> bool:
    """By the kind of its picture, which a colour profile of any length may precede."""
    at = 12  # behind RIFF, its length, and WEBP
    while at + 8 <= len(content):
        kind, length = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8L"
        at += 8 + length + length % 2
    return False


def _colors(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith(("I", "F")):
        got = f"a mask in mode {picture.mode}, which has no colours"
        raise InputError(got, "colours of 8 bits a channel", "write `mask_values: ids`")
    return np.asarray(picture.convert("RGB"))


def _ids(picture: Image.Image, content: bytes) -> np.ndarray:
    if picture.mode == "PA":
        return np.asarray(picture)[..., 0]
    if picture.mode in GRAY_MODES:
        return _unscaled(_whole(np.asarray(picture)), picture, content)
    if picture.mode not in GRAY_IN_COLOURS:
        raise InputError(f"a picture in mode {picture.mode}", IDS, ORIGINAL)
    # of 16 bits a channel Pillow drops the lower eight
    values = np.asarray(picture) if _depth(picture, content) <= 8 else _deep(content)
    if picture.mode == "LA" and values.shape[2] == 2:
        return values[..., 0]
    if (values[..., 0] != values[..., 1]).any() or (values[..., 1] != values[..., 2]).any():
        raise InputError(f"a picture in mode {picture.mode}, and not all of it gray", IDS, ORIGINAL)
    return _unscaled(values[..., 0], picture, content)


def _deep(content: bytes) -> np.ndarray:
    """(H, W, 3 or 4) uint16."""
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise InputError("a picture of 16 bits a channel", IDS, "save the indices as gray values")
    return values


def _depth(picture: Image.Image, content: bytes) -> int:
    """Bits of a channel, as stored; 8 where the format has no others."""
    if picture.format == "PNG" and content.startswith(PNG_SIGNATURE):
        return content[24]
    if picture.format == "TIFF":
        stored = picture.tag_v2.get(BITS_PER_SAMPLE, (8,))  # type: ignore[attr-defined]
        return int(stored[0] if isinstance(stored, tuple) else stored)
    return 8


def _unscaled(values: np.ndarray, picture: Image.Image, content: bytes) -> np.ndarray:
    """Gray values that Pillow has spread over 0 to 255 (or to 65535), as they are stored."""
    if picture.format == "PPM":
        # P5, width, height, highest value; comments between them
        header = re.sub(rb"#[^\r\n]*", b" ", content[:4096]).split()[:4]
        if header[0] in (b"P1", b"P4"):
            return values
        highest, spread = int(header[3]), 255 if picture.mode in ("L", "RGB") else 65535
        return np.rint(values * (highest / spread)).astype(np.int64)
    depth = _depth(picture, content)
    if picture.mode == "L" and depth in (2, 4):
        return values // (255 // (2**depth - 1))
    return values
