"""Pictures of the common formats: which are read, and what their files become.

Shards keep JPEG and PNG. A JPEG keeps its bytes, whatever its name ends in; a picture of another
format is decoded once and kept as a PNG of the same values.
"""

from __future__ import annotations

import io
import math
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.errors import InputError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
# by Pillow's names; not all that it opens: EPS starts another program, TGA takes almost any bytes
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".mpo"),
    "PNG": (".png", ".apng"),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    "AVIF": (".avif",),
    "QOI": (".qoi",),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
READ = "JPEG, PNG, TIFF, BMP, WebP, GIF, PPM, JPEG 2000, AVIF or QOI"
# 3 GiB of RGB. Pillow's own limit, a sixth of it, is below what satellites and scanners give
MAX_PX = 2**30
ORIENTATION = 274  # the tag's number in EXIF
SIXTEEN_BITS = 65535
TWELVE_BITS = 4096
DARK = "; no value is above 4095, so that all is nearly black: scale it before"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
Result = TypeVar("Result")
# of Pillow's limit, which is one for the whole process
_limit = threading.Lock()


@dataclass(frozen=True)
class StoredImage:
    """An image as shards keep it: a JPEG's or PNG's bytes, (height, width), and what was done to
    it on the way there, if anything.
    """

    content: bytes
    size: tuple[int, int]
    notes: tuple[str, ...] = ()


def with_picture(content: bytes, use: Callable[[Image.Image], Result]) -> Result:
    """use(picture) of a file's bytes, header read.

    Raises whatever Pillow's plugins raise for a damaged file, which is more than they document;
    InputError above MAX_PX.
    """
    return _with_content(content, lambda _, picture: use(picture))


def _with_content(content: bytes, use: Callable[[bytes, Image.Image], Result]) -> Result:
    try:
        with _opened(io.BytesIO(content)) as picture:
            return use(content, picture)
    # Pillow refuses a PNG for too much text, or too large a colour profile, which nobody asked for
    except (OSError, ValueError, SyntaxError):
        bare = without_text(content)
        if len(bare) == len(content):
            raise
        with _opened(io.BytesIO(bare)) as picture:
            return use(bare, picture)


def _opened(file: BinaryIO) -> Image.Image:
    # Pillow's limit cannot be lifted for one picture. The lock is held for the header alone
    with _limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(file, formats=_known())
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if math.prod(picture.size) > MAX_PX:
        got = f"{picture.height} x {picture.width} pixels (height x width)"
        raise InputError(got, f"at most {MAX_PX} pixels", "cut it into several images")
    return picture


def _known() -> list[str]:
    Image.init()
    # AVIF and QOI are in newer versions of Pillow only
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def named(path: Path, kind: str = "image", formats: str = READ) -> Iterator[None]:
    """Whatever is raised about a picture's file, as an InputError that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error.got}", error.needed, error.action) from None
    # Pillow's plugins raise more kinds than they document, MemoryError among them
    except Exception as error:
        raise _explained(error, path, kind, formats) from None


def _explained(error: Exception, path: Path, kind: str, formats: str) -> InputError:
    if isinstance(error, OSError) and error.strerror:  # of the system, not of Pillow
        needed, action = f"a readable {kind} file", "unpack the data set again"
        return InputError(f"{path}: {error.strerror}", needed, action)
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            begin = file.read(len(PNG_SIGNATURE))
        if not begin.startswith((JPEG_SIGNATURE, PNG_SIGNATURE)):
            got = f"{path}: {'an' if kind == 'image' else 'a'} {kind} that begins with {begin!r}"
            return InputError(got, formats, "convert it, or replace the file")
        error = ValueError("its header is damaged")
    got = f"{path}: an unreadable {kind} ({str(error) or type(error).__name__})"
    return InputError(got, f"a whole file: {formats}", "replace it")


def without_text(content: bytes) -> bytes:
    """A PNG without its texts and its colour profile; anything else as it is."""
    if not content.startswith(PNG_SIGNATURE):
        return content
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        end = at + 12 + length  # length, kind and checksum around the data
        if kind not in TEXT_CHUNKS:
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def orientation(picture: Image.Image) -> int:
    """How viewers turn it, 1 to 8 as in EXIF; 1, upright, where nothing sensible is said."""
    try:
        turned = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing; the picture itself may be whole
        return 1
    return turned if turned in range(2, 9) else 1


def upright(picture: Image.Image) -> Image.Image:
    """The picture, turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(picture) if orientation(picture) > 1 else picture


def several_frames(picture: Image.Image) -> bool:
    """Whether it is animated, or has pages other than smaller copies of the first."""
    if picture.format == "MPO" or getattr(picture, "n_frames", 1) < 2:
        return False  # an MPO's other pictures are a phone's previews
    if picture.format != "TIFF":
        return True
    try:
        for page in range(1, picture.n_frames):  # type: ignore[attr-defined]
            picture.seek(page)
            # NewSubfileType's lowest bit: overviews, as in every GeoTIFF
            if not int(picture.tag_v2.get(254, 0)) & 1:  # type: ignore[attr-defined]
                return True
    finally:
        picture.seek(0)
    return False


def num_pixels(path: Path) -> int:
    """Of a picture, by its header; 0 for one that cannot be read."""
    try:
        with path.open("rb") as file, _opened(file) as picture:
            return math.prod(picture.size)
    except Exception:  # told by who reads it
        return 0


def load_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a file, upright: turned as its EXIF orientation says.

    Gray is repeated, transparency dropped, 16-bit gray divided by 257 and rounded, 16-bit colours
    keep their high byte; of an animation or several pages the first. Raises InputError, naming the
    file, for one that cannot be read.
    """
    with named(path):
        return _with_content(path.read_bytes(), _rgb)


def _rgb(content: bytes, picture: Image.Image) -> np.ndarray:
    if content.startswith(JPEG_SIGNATURE):
        # as training decodes it; Pillow takes a JPEG with a hole in it without a word
        whole = simplejpeg.decode_jpeg(content, colorspace="RGB")
        if orientation(picture) == 1:
            return whole
    picture = in_eight_bits(upright(picture))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def in_eight_bits(picture: Image.Image) -> Image.Image:
    """The picture; of 16-bit gray values (some of them in 32) one with 8 bits, white staying white.

    Raises ValueError for values of another range.
    """
    if picture.mode == "F":
        raise ValueError("floating-point values of unknown range")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > SIXTEEN_BITS:
        raise ValueError("values beyond 16 bits")
    # 257 = 65535 / 255
    return Image.fromarray(np.rint(values / np.float32(257)).astype(np.uint8))


def stored_image(path: Path, turn: bool = True) -> StoredImage:
    """An image file as shards keep it, all of it decoded once.

    turn: upright as its EXIF orientation says (else as its pixels are stored); a JPEG that is
    turned becomes a PNG, since turning it as a JPEG would change its pixels. Raises InputError,
    naming a file that cannot be used.
    """
    with named(path):
        content = path.read_bytes()
        return _with_content(content, lambda read, picture: _stored(read, picture, turn))


def _stored(content: bytes, picture: Image.Image, turn: bool) -> StoredImage:
    notes = []
    turned = turn and orientation(picture) > 1
    if turned:
        notes.append("turned upright as EXIF says, and kept as PNG")
    elif content.startswith(JPEG_SIGNATURE):
        # as training will decode it: what is cut off is found now
        return StoredImage(content, simplejpeg.decode_jpeg(content, colorspace="RGB").shape[:2])
    if several_frames(picture):
        notes.append("of several frames or pages the first is taken")
    picture.load()  # first of all: a TIFF turns itself here, and its mode may change
    if picture.mode.startswith("I"):
        dark = np.asarray(picture).max() < TWELVE_BITS
        notes.append(f"16 bits brought to 8, so that 65535 is white{DARK if dark else ''}")
    as_it_is = picture.format == "PNG" and not turned and picture.mode[0] not in "IF"
    size = (picture.height, picture.width)
    if not as_it_is:
        picture = in_eight_bits(upright(picture) if turned else picture)
        content, size = _png(picture), (picture.height, picture.width)
    return StoredImage(content, size, tuple(notes))


def _png(picture: Image.Image) -> bytes:
    """Its values in a PNG: palette, gray, colours, with their transparency."""
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        picture = picture.convert("RGB")
    # of the metadata nothing else: thumbnails, texts and an orientation that holds no more
    kept = picture.info.get("transparency")
    picture.info = {} if kept is None else {"transparency": kept}
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
