"""Labels survive their encodings, images decode as the reference does, and what does not fit is
refused.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.errors import InputError
from shards.sample import (
    IGNORE_INDEX,
    STANFORD,
    ClassSet,
    Sample,
    check_sample,
    decode_image,
    decode_label,
    encode_label,
    from_one_hot,
    image_extension,
    image_size,
    to_one_hot,
)


def image_file(form: str, mode: str = "RGB", height: int = 24, width: int = 35) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


@st.composite
def labels(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """(H, W) uint8 with some void, and its number of classes."""
    num_classes = draw(st.integers(1, 255))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    label = rng.integers(0, num_classes, (height, width)).astype(np.uint8)
    label[rng.random((height, width)) < 0.2] = IGNORE_INDEX
    return label, num_classes


@given(labels())
@settings(max_examples=60, deadline=None)
def test_label_through_png_and_back(drawn: tuple[np.ndarray, int]) -> None:
    label, _ = drawn
    png = encode_label(label)
    np.testing.assert_array_equal(decode_label(png), label)
    # any other decoder agrees
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), label)


@given(labels())
@settings(max_examples=60, deadline=None)
def test_label_through_one_hot_and_back(drawn: tuple[np.ndarray, int]) -> None:
    label, num_classes = drawn
    label_map = to_one_hot(label, num_classes)
    assert label_map.dtype == np.uint8 and label_map.shape == (num_classes, *label.shape)
    np.testing.assert_array_equal(label_map.sum(axis=0), label != IGNORE_INDEX)
    np.testing.assert_array_equal(from_one_hot(label_map), label)
    np.testing.assert_array_equal(from_one_hot(label_map.astype(np.float64)), label)


def test_label_png_is_the_fast_form() -> None:
    """8-bit gray, one IDAT, filter 0 in every row, the form that the decoders are quickest with."""
    png = encode_label(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert struct.unpack(">IIBB", png[16:26]) == (4, 3, 8, 0)
    assert png.count(b"IDAT") == 1
    rows = np.frombuffer(zlib.decompress(png[41:-16]), np.uint8).reshape(3, 5)
    assert not rows[:, 0].any()


@pytest.mark.parametrize("value", [2, 255, -1, 0.5, 256, float("nan")])
def test_one_hot_refuses_other_values(value: float) -> None:
    label_map = to_one_hot(np.zeros((4, 4), np.uint8), 3).astype(np.float64)
    label_map[0, 1, 2] = value
    with pytest.raises(InputError, match="not one-hot"):
        from_one_hot(label_map)


def test_one_hot_refuses_two_classes_in_a_pixel() -> None:
    label_map = to_one_hot(np.zeros((4, 4), np.uint8), 3)
    label_map[2, 1, 2] = 1
    with pytest.raises(InputError, match="not one-hot"):
        from_one_hot(label_map)


@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "L")]
)
def test_image_decodes_as_pillow_does(form: str, mode: str) -> None:
    content = image_file(form, mode)
    reference = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(content), reference)
    assert image_size(content) == reference.shape[:2] == (24, 35)
    assert image_extension(content) == ("jpg" if form == "JPEG" else "png")


def test_gray_of_16_bits_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(np.arange(0, 60000, 1000, np.uint16).reshape(6, 10)).save(file, "PNG")
    with pytest.raises(InputError, match="16-bit"):
        decode_image(file.getvalue())


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_damaged_image_is_an_input_error_or_an_image(form: str) -> None:
    """No other exception, whatever the damage; a JPEG cut short is always refused."""
    content, rng = image_file(form), np.random.default_rng(1)
    for trial in range(300):
        damaged = bytearray(content)
        # every other trial in the header, where the decoders are most easily led astray
        damaged[rng.integers(60 if trial % 2 else len(content))] ^= 1 << rng.integers(8)
        for read in (decode_image, image_size):
            try:
                read(bytes(damaged))
            except InputError:
                continue
    for length in rng.integers(0, len(content) - 20, 50):
        with pytest.raises(InputError):
            decode_image(content[:length])


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_not_images(content: bytes) -> None:
    with pytest.raises(InputError):
        image_size(content)


@pytest.mark.parametrize("damage", ["truncated", "colour", "filtered", "other size", "empty"])
def test_other_pngs_are_not_labels(damage: str) -> None:
    png = encode_label(np.zeros((5, 6), np.uint8))
    rows = zlib.compress(np.full((5, 7), 1, np.uint8).tobytes(), 9)
    other = {
        "truncated": png[:-1],
        "colour": image_file("PNG"),
        "filtered": png[:33] + struct.pack(">I", len(rows)) + b"IDAT" + rows + bytes(4) + png[-12:],
        "other size": png[:19] + b"\x07" + png[20:],
        "empty": b"",
    }
    with pytest.raises(InputError, match="gray PNG"):
        decode_label(other[damage])


JPEG = image_file("JPEG")
LABEL = np.zeros((24, 35), np.uint8)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", JPEG, LABEL, "train", ""), "key 'a.b'"),
        (Sample("", JPEG, LABEL, "train", ""), "key ''"),
        (Sample("a/b", JPEG, LABEL, "train", ""), "key 'a/b'"),
        (Sample("a\0b", JPEG, LABEL, "train", ""), "key 'a.x00b'"),  # HDF5 would cut it there
        # how Python names an undecodable file
        (Sample("\udcff", JPEG, LABEL, "train", ""), "key '.udcff'"),
        (Sample("a", JPEG, LABEL, "x\ny", ""), "split 'x.ny'"),
        (Sample("a", JPEG, LABEL, "../x", ""), "split '../x'"),
        (Sample("a", b"text", LABEL, "train", ""), "a: an image that begins with b'text'"),
        (
            Sample("a", JPEG, LABEL.T, "train", ""),
            r"a: image of \(24, 35\) pixels with .*\(35, 24\)",
        ),
        (Sample("a", JPEG, LABEL.astype(np.int64), "train", ""), "int64 label"),
        (
            Sample("a", JPEG, LABEL + np.uint8(8), "train", ""),
            "a: label 8 in 840 pixels\n.*0 to 7, or 255",
        ),
        (Sample("a", JPEG, LABEL + np.uint8(254), "train", ""), "a: label 254"),
        (Sample(7, JPEG, LABEL, "train", ""), "7: key of type int"),
        (Sample("a", JPEG, LABEL, "train", None), "a: source_id of type NoneType"),
        (Sample("a", "text", LABEL, "train", ""), "a: image of type str"),
        (Sample("a", JPEG, LABEL.tolist(), "train", ""), "a: a list as label"),
    ],
)
def test_sample_that_does_not_fit(sample: Sample, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sample(sample, STANFORD.num_classes)


def test_void_and_unlabelled_samples_fit() -> None:
    check_sample(Sample("a", JPEG, np.full((24, 35), IGNORE_INDEX, np.uint8), "train", ""), 1)
    check_sample(Sample("a", JPEG, None, "train", ""), 1)


@pytest.mark.parametrize(
    ("names", "palette"),
    [
        ((), ()),
        (("a", "a"), ((0, 0, 0), (1, 1, 1))),
        (("a", "b"), ((0, 0, 0),)),
        (("a",), ((0, 0, 256),)),
        (tuple(map(str, range(256))), ((0, 0, 0),) * 256),
    ],
)
def test_class_set_refuses(names: tuple, palette: tuple) -> None:
    with pytest.raises(InputError):
        ClassSet(names, palette)
