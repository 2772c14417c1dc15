"""Masks: every way to store ids gives those ids, and what would change them is refused."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin
from test_images import encoded, saved, turned_by

from shards.errors import InputError
from shards.maps import MapsReader
from shards.prepare import prepare
from shards.prepare.mask_files import mask_values
from shards.prepare.masks import Coding, color_code, masked_sample, read_mask

RNG = np.random.default_rng(1)
IDS = RNG.integers(0, 4, (6, 8)).astype(np.uint8)
PHOTO = RNG.integers(0, 256, (6, 8, 3), np.uint8)
CODING = Coding(((0, 0), (1, 1), (2, 2), (3, 255)), names=("sky", "road", "car"))
LABEL = np.where(IDS == 3, 255, IDS)
COLORS = np.array([(0, 0, 0), (200, 30, 30), (30, 200, 30), (90, 90, 90)], np.uint8)
BY_COLOR = Coding(
    tuple(zip(map(color_code, COLORS.tolist()), (0, 1, 2, 255), strict=True)),
    colors=True,
    names=("sky", "road", "car"),
)


def gray_png(values: np.ndarray, bits: int) -> bytes:
    """A gray PNG of 1, 2, 4, 8 or 16 bits, written by the standard's words."""
    height, width = values.shape
    if bits == 16:
        packed = values.astype(">u2").view(np.uint8)
    else:
        places = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(places.reshape(height, -1).astype(np.uint8), axis=1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), packed], 1)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    )
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def numpy_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_palette(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray(values, mode="P")
    picture.putpalette(COLORS.tobytes())
    return picture


def opencv(form: str, values: np.ndarray) -> bytes:
    return cv2.imencode(form, values)[1].tobytes()


RGB_IDS = np.repeat(IDS[..., None], 3, 2)
ALPHA = RNG.integers(0, 256, IDS.shape, np.uint8)[..., None]
BIG = IDS.astype(np.uint16) * 1000
STORED: dict[str, tuple[bytes, np.ndarray]] = {
    "1 bit": (gray_png(IDS & 1, 1), IDS & 1),
    "2 bits": (gray_png(IDS, 2), IDS),
    "4 bits": (gray_png(IDS, 4), IDS),
    "8 bits": (gray_png(IDS, 8), IDS),
    "16 bits": (gray_png(BIG, 16), BIG),
    "palette": (encoded(as_palette(IDS), "PNG"), IDS),
    "palette of 2 bits": (encoded(as_palette(IDS), "PNG", bits=2), IDS),
    "gif": (encoded(as_palette(IDS), "GIF"), IDS),
    "bmp": (encoded(Image.fromarray(IDS), "BMP"), IDS),
    "lossless webp": (encoded(Image.fromarray(RGB_IDS), "WEBP", lossless=True), IDS),
    "tiff": (encoded(Image.fromarray(IDS), "TIFF"), IDS),
    "tiff of 16 bits": (opencv(".tiff", BIG), BIG),
    "tiff of 32 bits": (encoded(Image.fromarray(BIG.astype(np.int32) * 99), "TIFF"), BIG * 99.0),
    "tiff of floats": (encoded(Image.fromarray(BIG.astype(np.float32)), "TIFF"), BIG),
    "gray and alpha": (encoded(Image.fromarray(np.dstack([IDS, ALPHA])), "PNG"), IDS),
    "rgb": (encoded(Image.fromarray(RGB_IDS), "PNG"), IDS),
    "rgba": (encoded(Image.fromarray(np.dstack([RGB_IDS, ALPHA])), "PNG"), IDS),
    "rgb of 16 bits": (opencv(".png", np.repeat(BIG[..., None], 3, 2)), BIG),
    "rgb tiff of 16 bits": (opencv(".tiff", np.repeat(BIG[..., None], 3, 2)), BIG),
    "pgm up to 3": (b"P5 # c\n8 6\n3\n" + IDS.tobytes(), IDS),
    "pgm up to 999": (b"P5 8 6 3000\n" + BIG.astype(">u2").tobytes(), BIG),
    "array": (numpy_file(IDS), IDS),
    "array of int64": (numpy_file(IDS.astype(np.int64) - 1), IDS.astype(int) - 1),
    "array of floats": (numpy_file(IDS.astype(np.float64)), IDS),
    "array with an axis": (numpy_file(IDS[None]), IDS),
    "array of bool": (numpy_file(IDS > 1), (IDS > 1).astype(np.uint8)),
}


@pytest.mark.parametrize("form", STORED)
def test_ids_are_those_that_were_stored(tmp_path: Path, form: str) -> None:
    content, expected = STORED[form]
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(mask_values(tmp_path / "a.png"), expected)


@settings(max_examples=40)
@given(st.data(), st.sampled_from([1, 2, 4, 8, 16]))
def test_gray_png_of_every_depth(tmp_path_factory, data: st.DataObject, bits: int) -> None:
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 19))
    flat = data.draw(
        st.lists(st.integers(0, 2**bits - 1), min_size=height * width, max_size=height * width)
    )
    values = np.array(flat, np.int64).reshape(height, width)
    path = tmp_path_factory.getbasetemp() / "gray.png"
    path.write_bytes(gray_png(values, bits))
    np.testing.assert_array_equal(mask_values(path), values)


def test_a_colour_profile_makes_no_webp_lossy(tmp_path: Path) -> None:
    form = {"lossless": True, "icc_profile": bytes(6001)}
    (tmp_path / "a.webp").write_bytes(encoded(Image.fromarray(RGB_IDS), "WEBP", **form))
    np.testing.assert_array_equal(mask_values(tmp_path / "a.webp"), IDS)
    # b"VP8L" in what is not the picture
    form = {"icc_profile": b"VP8L" * 9}
    (tmp_path / "b.webp").write_bytes(encoded(Image.fromarray(RGB_IDS), "WEBP", **form))
    with pytest.raises(InputError, match="loses values"):
        mask_values(tmp_path / "b.webp")


REFUSED: dict[str, tuple[bytes, str]] = {
    "jpeg": (encoded(Image.fromarray(IDS), "JPEG"), r"loses values \(JPEG\)"),
    "webp": (encoded(Image.fromarray(RGB_IDS), "WEBP"), "loses values"),
    "jpeg 2000": (encoded(Image.fromarray(IDS), "JPEG2000"), "loses values"),
    "jpeg in tiff": (encoded(Image.fromarray(IDS), "TIFF", compression="jpeg"), "loses values"),
    "animation": (
        encoded(as_palette(IDS), "GIF", save_all=True, append_images=[as_palette(3 - IDS)]),
        "2 frames",
    ),
    "pages": (
        encoded(
            Image.fromarray(IDS), "TIFF", save_all=True, append_images=[Image.fromarray(3 - IDS)]
        ),
        "2 frames or pages",
    ),
    "colours": (encoded(Image.fromarray(PHOTO), "PNG"), "mode RGB"),
    "fractions": (numpy_file(IDS + 0.5), "between whole numbers"),
    "not a number": (numpy_file(IDS + np.nan), "between whole numbers"),
    "one-hot": (numpy_file(np.zeros((3, 6, 8), np.uint8)), r"shape \(3, 6, 8\)"),
    "pickled": (numpy_file(np.array([{}], object)), "unreadable mask"),
    "text": (b"hello", "a mask that begins with b'hello'"),
    "cut": (STORED["8 bits"][0][:50], "unreadable mask"),
    "cut array": (STORED["array"][0][:-9], "unreadable mask"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_would_change_ids_is_refused(tmp_path: Path, form: str) -> None:
    content, message = REFUSED[form]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.png: .*{message}"):
        mask_values(tmp_path / "a.png")


def test_a_reduced_copy_within_a_tiff_is_no_second_page(tmp_path: Path) -> None:
    reduced = TiffImagePlugin.ImageFileDirectory_v2()
    reduced[254] = 1  # NewSubfileType
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "a.tif"), new=True) as writer:
        Image.fromarray(IDS).save(writer, "TIFF")
        writer.newFrame()
        Image.fromarray(IDS[::2, ::2].copy()).save(writer, "TIFF", tiffinfo=reduced)
    with Image.open(tmp_path / "a.tif") as opened:
        assert opened.n_frames == 2
    np.testing.assert_array_equal(mask_values(tmp_path / "a.tif"), IDS)


def test_all_unknown_values_are_named_with_what_is_known(tmp_path: Path) -> None:
    wrong = IDS.copy()
    wrong[0, :3], wrong[1, 0] = 7, 9
    path = saved(tmp_path / "a.png", Image.fromarray(wrong), "PNG")
    with pytest.raises(InputError) as caught:
        read_mask(path, (6, 8), CODING)
    assert "value 7 in 3 pixels, value 9 in 1 pixels" in caught.value.got
    assert caught.value.needed == "one of: 0 sky, 1 road, 2 car, 3 void"
    assert "write `void: [3, 7, 9]`" in caught.value.action
    colors = COLORS[IDS]
    colors[2, 2] = (199, 32, 30)
    path = saved(tmp_path / "b.png", Image.fromarray(colors), "PNG")
    with pytest.raises(InputError) as caught:
        read_mask(path, (6, 8), BY_COLOR)
    assert "(199, 32, 30) in 1 pixels (nearest: (200, 30, 30) road)" in caught.value.got
    assert "(90, 90, 90) void" in caught.value.needed and "(0, 0, 0) sky" in caught.value.needed
    assert "write `void: [[90, 90, 90], [199, 32, 30]]`" in caught.value.action
    gray = saved(tmp_path / "c.png", Image.fromarray(IDS + np.uint8(1)), "PNG")
    with pytest.raises(InputError, match=r"(?s)gray.*leave out `mask_values: colors`"):
        read_mask(gray, (6, 8), BY_COLOR)


@pytest.mark.parametrize("workers", [0, 2])
def test_unknown_values_of_all_masks_are_told_at_once(tmp_path: Path, workers: int) -> None:
    root = folder_of(tmp_path / "data", IDS, "classes: [sky, road, car]\nvoid: [3, 255]\n")
    for name, value in (("a", 7), ("b", 9), ("c", 9)):
        wrong = IDS.copy()
        wrong[0, 0] = value
        saved(root / "masks" / f"{name}.png", Image.fromarray(wrong), "PNG")
    with pytest.raises(InputError) as caught:
        prepare("folder", root, tmp_path / "maps.h5", workers=workers)
    assert "in 1 pixels\n  of 4 masks: value 9 in 2, value 7 in 1" in caught.value.got
    assert "write `void: [3, 7, 9, 255]`" in caught.value.action


def test_lossy_masks_take_the_nearest_value_where_that_is_said(tmp_path: Path) -> None:
    blocks = np.kron(IDS, np.ones((16, 16), np.uint8))
    binary = saved(tmp_path / "a.jpg", Image.fromarray((blocks > 1) * np.uint8(255)), "JPEG")
    coding = Coding(((0, 0), (255, 1)), nearest=True)
    np.testing.assert_array_equal(read_mask(binary, blocks.shape, coding), blocks > 1)
    colored = saved(tmp_path / "b.jpg", Image.fromarray(COLORS[blocks]), "JPEG", quality=98)
    nearest = Coding(BY_COLOR.codes, colors=True, nearest=True)
    values = mask_values(colored, colors=True, lossy=True).astype(int)
    distances = ((values[..., None, :] - COLORS.astype(int)) ** 2).sum(-1)
    expected = np.array([0, 1, 2, 255])[distances.argmin(-1)]
    np.testing.assert_array_equal(read_mask(colored, blocks.shape, nearest), expected)


@pytest.mark.parametrize("coding", [CODING, BY_COLOR])
def test_exchanged_folders_are_told(tmp_path: Path, coding: Coding) -> None:
    mask = Image.fromarray(COLORS[IDS] if coding.colors else IDS)
    photo = saved(tmp_path / "photo.jpg", Image.fromarray(PHOTO), "JPEG")
    other = saved(tmp_path / "photo.png", Image.fromarray(PHOTO), "PNG")
    path = saved(tmp_path / "mask.png", mask, "PNG")
    for one in (photo, other):
        assert masked_sample("a", "train", one, path, coding=coding, source="x").label is not None
        with pytest.raises(InputError, match=r"(?s)photo.*exchange the folders"):
            masked_sample("a", "train", path, one, coding=coding, source="x")
    # by another YAML, drawn in few colours all the same; a photograph has more than 32
    unknown = replace(coding, codes=((123456, 0),))
    with pytest.raises(InputError, match="exchange the folders"):
        masked_sample("a", "train", path, other, coding=unknown, source="x")
    with pytest.raises(InputError) as caught:  # neither is a mask
        masked_sample("a", "train", photo, other, coding=coding, source="x")
    assert "exchange the folders" not in str(caught.value)


def test_a_turned_image_needs_the_mask_that_viewers_show(tmp_path: Path) -> None:
    image = saved(tmp_path / "a.jpg", Image.fromarray(PHOTO), "JPEG", exif=turned_by(6))
    upright = np.rot90(IDS, -1)
    mask = saved(tmp_path / "up.png", Image.fromarray(np.ascontiguousarray(upright)), "PNG")
    stored = saved(tmp_path / "stored.png", Image.fromarray(IDS), "PNG")
    sample = masked_sample("a", "train", image, mask, coding=CODING, source="x")
    np.testing.assert_array_equal(sample.label, np.rot90(LABEL, -1))
    assert "turned" in sample.notes[0]
    with pytest.raises(
        InputError, match=r"(?s)6 x 8 pixels for an image 8 x 6 .*; .*`exif: ignore`"
    ):
        masked_sample("a", "train", image, stored, coding=CODING, source="x")
    as_stored = Coding(CODING.codes, turn=False)
    sample = masked_sample("a", "train", image, stored, coding=as_stored, source="x")
    assert sample.image == image.read_bytes()
    np.testing.assert_array_equal(sample.label, LABEL)
    with pytest.raises(InputError, match="leave out `exif: ignore`"):
        masked_sample("a", "train", image, mask, coding=as_stored, source="x")


def folder_of(root: Path, masks: np.ndarray, text: str) -> Path:
    for name in "abcd":
        saved(root / "images" / f"{name}.png", Image.fromarray(PHOTO), "PNG")
        saved(root / "masks" / f"{name}.png", Image.fromarray(masks), "PNG")
    (root / "distseg.yaml").write_text(text)
    return root


def test_masks_of_0_and_255_with_two_classes(tmp_path: Path) -> None:
    binary = (IDS > 1) * np.uint8(255)
    text = "classes: [{name: ground}, {name: road}]\n"
    for more in ("", "void: [255]\n"):
        root = folder_of(tmp_path / "data", binary, text + more)
        with pytest.raises(InputError, match=r"(?s)'ground' and void.*`ids: \[255\]`"):
            prepare("folder", root, tmp_path / "maps.h5")
    said = "classes: [{name: ground}, {name: road, ids: [255]}]\n"
    with pytest.raises(InputError, match=r"255 means two things .*void: "):
        prepare("folder", folder_of(root, binary, said), tmp_path / "maps.h5")
    prepare("folder", folder_of(root, binary, said + "void: []\n"), tmp_path / "maps.h5")
    with MapsReader(tmp_path / "maps.h5") as reader:
        np.testing.assert_array_equal(reader.read("a").label, IDS > 1)
