"""A sample: an image in its original bytes, a label of class indices, and how both are encoded."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import simplejpeg
from isal import isal_zlib
from PIL import Image, UnidentifiedImageError

from shards.errors import InputError
from shards.images import JPEG_SIGNATURE, PNG_SIGNATURE, with_picture
from shards.names import check_name, is_control
from shards.words import counted

IGNORE_INDEX = 255  # void: not counted, not trained on
# the stubs of isal say that its error is an instance
ISAL_ERROR: type[Exception] = isal_zlib.error  # type: ignore[assignment]
# what Pillow raises for damaged files: SyntaxError for a broken PNG chunk, a bomb for an absurd
# size
UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    ValueError,
    SyntaxError,
)


@dataclass(frozen=True)
class ClassSet:
    """Class names in the order of their indices, and one RGB colour (0 to 255) for each."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        # labels are uint8 with 255 for void: a larger set would need another label format
        if not 1 <= len(self.names) <= IGNORE_INDEX:
            raise InputError(
                f"{len(self.names)} classes", "1 to 255 (index 255 is void)", "merge some classes"
            )
        for name in self.names:
            # said at the terminal, where a control character does what it likes
            if not isinstance(name, str) or not name or any(map(is_control, name)):
                needed = "a text without control characters"
                raise InputError(f"class name {name!r}", needed, "rename the class")
        # metrics and tables are keyed by name: two of one name would overwrite each other
        if len(set(self.names)) != len(self.names):
            raise InputError(f"class names {self.names}", "each name once", "rename the classes")
        if len(self.palette) != len(self.names):
            names = counted(len(self.names), "class name")
            got = f"{names} and {counted(len(self.palette), 'colour')}"
            raise InputError(got, "one colour per class", "correct the palette")
        for name, color in zip(self.names, self.palette, strict=True):
            if len(color) != 3 or not all(0 <= value <= 255 for value in color):
                raise InputError(
                    f"colour {color} of {name}",
                    "red, green, blue from 0 to 255",
                    "correct the palette",
                )

    @property
    def num_classes(self) -> int:
        """Number of classes, void not counted."""
        return len(self.names)


# Okabe and Ito's colours for colour-blind readers, some moved towards the things they stand for
# here, not in prepare/: the generated scenes have these classes, too
STANFORD = ClassSet(
    names=("sky", "tree", "road", "grass", "water", "building", "mountain", "foreground"),
    palette=(
        (86, 180, 233),
        (0, 110, 70),
        (120, 120, 120),
        (150, 210, 60),
        (0, 80, 178),
        (213, 94, 0),
        (204, 121, 167),
        (240, 228, 66),
    ),
)


@dataclass(frozen=True)
class Sample:
    """One image with its label.

    key: unique printable name without "." and "/"; image: the original file's bytes (JPEG or PNG);
    label: (H, W) uint8, class indices and 255 for void, None for an unlabelled image; split: for
    example "train", named as a key is; source_id: where it came from; notes: what was done to the
    image on the way here, which `distseg prepare` counts and tells, and nobody keeps; origin: how
    its label was made where no person made it, of what JSON has.
    """

    key: str
    image: bytes
    label: np.ndarray | None
    split: str
    source_id: str
    notes: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)


def check_sample(sample: Sample, num_classes: int) -> None:
    """Raise InputError unless key, image and label fit each other and the classes.

    Reads the header only.
    """
    _check_types(sample)
    for what, name in (("key", sample.key), ("split", sample.split)):
        # both become file names in a tar, where everything after the first "." tells a sample's
        # members apart
        if not name or not name.isprintable() or "." in name or "/" in name:
            raise InputError(
                f"{what} {name!r}", 'a printable name without "." and "/"', f"rename the {what}"
            )
        # what is written here must be what readers take
        check_name(name, what, f"rename the {what}")
    try:
        size = image_size(sample.image)
    except InputError as error:
        raise InputError(f"{sample.key}: {error.got}", error.needed, error.action) from None
    label = sample.label
    if label is None:
        return
    # the size from the header alone: whoever packs or prepares decodes the whole image elsewhere
    if label.dtype != np.uint8 or label.shape != size:
        got = f"{sample.key}: image of {size} pixels with a {label.dtype} label of {label.shape}"
        raise InputError(got, "a uint8 label of the image's height and width", "correct the pair")
    # an index without a class would be a device-side assert in a loss on a GPU, hours later
    wrong = label[(label >= num_classes) & (label != IGNORE_INDEX)]
    if wrong.size:
        got = f"{sample.key}: label {int(wrong.max())} in {wrong.size} pixels"
        needed = f"0 to {num_classes - 1}, or {IGNORE_INDEX} for void"
        raise InputError(got, needed, "correct the label or the class names")


def _check_types(sample: Sample) -> None:
    """Raise InputError for fields of other types, as a preparer of the user's own may give."""
    for name in ("key", "split", "source_id", "image"):
        value = getattr(sample, name)
        if not isinstance(value, (bytes, bytearray) if name == "image" else str):
            needed = "the bytes of the image's file" if name == "image" else "text"
            got = f"{sample.key}: {name} of type {type(value).__name__}"
            raise InputError(got, needed, "correct the preparer")
    if sample.label is not None and not hasattr(sample.label, "dtype"):
        got = f"{sample.key}: a {type(sample.label).__name__} as label"
        raise InputError(got, "a NumPy array (H, W) uint8, or None", "correct the preparer")


def image_extension(image: bytes) -> str:
    """ "jpg" or "png", from the first bytes. Raises InputError for anything else."""
    # by content: what a file's name says may be wrong, and members of a tar are named after this
    if image.startswith(JPEG_SIGNATURE):
        return "jpg"
    if image.startswith(PNG_SIGNATURE):
        return "png"
    raise InputError(f"an image that begins with {image[:8]!r}", "a JPEG or PNG file", "convert it")


def image_size(image: bytes) -> tuple[int, int]:
    """(height, width) from the header. Raises InputError for an unreadable image."""
    image_extension(image)
    try:
        # Pillow reads no more than the header until pixels are asked for
        return with_picture(image, lambda opened: (opened.height, opened.width))
    except UNREADABLE as error:
        raise InputError(
            f"an unreadable image ({error})", "a whole JPEG or PNG file", "replace the file"
        ) from None


def decode_image(image: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises InputError for an unreadable, truncated or 16-bit gray image."""
    try:
        if image_extension(image) == "jpg":
            # the same pixels as Pillow's, in less time
            return simplejpeg.decode_jpeg(image, colorspace="RGB")
        return with_picture(image, _rgb)
    except UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"an unreadable image ({error})", "a whole JPEG or PNG file", "replace the file"
        ) from None


def _rgb(opened: Image.Image) -> np.ndarray:
    if opened.mode.startswith("I"):  # Pillow would cut every value above 255 to 255
        raise InputError("an image of 16-bit gray values", "8 bits a channel", "convert it")
    # palettes and gray are resolved; an alpha channel is dropped
    return np.asarray(opened.convert("RGB"))


def encode_label(label: np.ndarray) -> bytes:
    """(H, W) uint8 as an 8-bit gray PNG.

    Filter 0 in every row, one IDAT: smallest and fastest to decode.
    """
    height, width = label.shape
    rows = np.zeros((height, width + 1), np.uint8)  # the leading 0 of each row is its filter type
    # by hand: Pillow chooses a filter for each row, which makes labels larger and slower to decode
    rows[:, 1:] = label
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    # level 9: written once, read in every epoch
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def decode_label(png: bytes) -> np.ndarray:
    """(H, W) uint8, perhaps read-only, from `encode_label`'s bytes.

    Raises InputError for any other PNG.
    """
    try:
        # by place, not by walking through the chunks: encode_label writes this one form, whose IHDR
        # is at 8 and IDAT at 33. Other PNGs fail one of the checks below
        width, height, *form = struct.unpack(">IIBBBBB", png[16:29])
        length = struct.unpack(">I", png[33:37])[0]
        # the chunk's own crc32 is not looked at, since the reader has checked the member's; rows:
        # (height, width + 1) uint8, with the filter type in front
        rows = np.frombuffer(isal_zlib.decompress(png[41 : 41 + length]), np.uint8).reshape(
            height, width + 1
        )
        whole = (
            png[:8] == PNG_SIGNATURE
            and png[12:16] == b"IHDR"
            and png[37:41] == b"IDAT"
            # beside the data: signature 8, IHDR 25, frames of IDAT and IEND 12 each
            and len(png) == length + 57
        )
    except (struct.error, ISAL_ERROR, ValueError):
        whole = False
    if not whole or form != [8, 0, 0, 0, 0] or rows[:, 0].any():
        raise InputError(
            "a label that is not distseg's gray PNG",
            "shards written by `distseg pack`",
            "pack again",
        )
    return rows[:, 1:]


def decode_coded_label(png: bytes, table: np.ndarray) -> np.ndarray:
    """(H, W) uint8, class indices and 255, of a mask that another program wrote as PNG.

    table: (256,) int16, what each value means, -1 for nothing. Values are palette indices, or gray
    as it is stored, also that of colours with red = green = blue; transparency is dropped. Raises
    InputError for other pictures, and for a value without a meaning.
    """
    needed = "a palette or gray PNG of at most 8 bits, whose values are the ids"
    try:
        if image_extension(png) != "png":
            raise InputError("a mask as JPEG, which changes values", needed, "use the original")
        mode, values = with_picture(png, lambda opened: (opened.mode, np.asarray(opened)))
        bits = png[24]
    except UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"an unreadable mask ({error})", needed, "replace it") from None
    if values.ndim == 3:
        values, *others = np.moveaxis(values, 2, 0)
        # LA has one other, which is alpha
        if mode not in ("LA", "PA") and any((values != other).any() for other in others[:2]):
            raise InputError("a mask in colours", needed, "use the original, with ids")
    if mode not in ("L", "P", "1", "LA", "PA", "RGB", "RGBA") or bits > 8:
        raise InputError(f"a mask of mode {mode} and {bits} bits", needed, "write 8 bits")
    if mode == "L" and bits < 8:
        values = values // (255 // (2**bits - 1))  # Pillow has stretched them to 255
    values = values.astype(np.uint8, copy=False)
    # OpenCV's look-up takes a tenth of the time of NumPy's
    wrong = cv2.LUT(values, (table < 0).astype(np.uint8)).view(bool)
    if wrong.any():
        got = f"id {int(values[wrong].max())} in {np.count_nonzero(wrong)} pixels"
        raise InputError(got, "ids that the classes' YAML names", "correct the mask or the YAML")
    return cv2.LUT(values, table.astype(np.uint8))


def to_one_hot(label: np.ndarray, num_classes: int) -> np.ndarray:
    """(H, W) uint8 -> one-hot (C, H, W) uint8; a void pixel is an all-zero column."""
    # a view: a bool is a byte that is 0 or 1 already, and a copy would double the memory
    return (label[None] == np.arange(num_classes, dtype=np.uint8)[:, None, None]).view(np.uint8)


def from_one_hot(label_map: np.ndarray) -> np.ndarray:
    """One-hot (C, H, W) of any dtype -> (H, W) uint8, void columns to 255.

    InputError for other values.
    """
    binary = label_map == 1
    # uint16: of more than 255 planes a sum in uint8 would wrap to a lawful 0 or 1
    if not np.array_equal(binary, label_map) or (binary.sum(axis=0, dtype=np.uint16) > 1).any():
        raise InputError(
            "a label map that is not one-hot",
            "columns of zeros with at most a single 1",
            "make it anew",
        )
    # sum of x_c (c + 1) - 1 in uint8: several times faster than argmax; an all-zero column wraps to
    # 255
    label = np.full(binary.shape[1:], IGNORE_INDEX, np.uint8)
    for index, plane in enumerate(binary):
        label += plane * np.uint8(index + 1)
    return label


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )
