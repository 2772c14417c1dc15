"""Which image files are found, what they become on their way into shards, and what is said of the
rest.
"""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shards import images
from shards.errors import InputError
from shards.image_files import images_below
from shards.images import load_rgb, stored_image
from shards.prepare.pairing import files_by_id, key_of
from shards.sample import Sample, check_sample, decode_image, image_extension

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9)).astype(np.uint16)


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def saved(path: Path, picture: Image.Image, form: str, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture, form, **options))
    return path


def turned_by(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("a.tif", "TIFF", {}),
        ("a.TIFF", "TIFF", {"compression": "tiff_lzw"}),
        ("a.bmp", "BMP", {}),
        ("a.webp", "WEBP", {"lossless": True}),
        ("a.ppm", "PPM", {}),
        ("a.jp2", "JPEG2000", {"irreversible": False}),
        ("a.png", "PNG", {}),
        ("a.jpg", "PNG", {}),  # a wrong name: the content counts
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats_without_loss_keep_their_pixels(
    tmp_path: Path, name: str, form: str, options: dict[str, object], mode: str
) -> None:
    picture = Image.fromarray(RGB).convert(mode)
    path = saved(tmp_path / name, picture, form, **options)
    stored = stored_image(path)
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(decode_image(stored.content), expected)
    np.testing.assert_array_equal(load_rgb(path), expected)
    assert stored.size == (6, 9) and image_extension(stored.content) == "png"
    assert images_below(tmp_path).files == [path]


@pytest.mark.parametrize("name", ["a.jpg", "a.JPE", "a.jfif", "a.png", "a", "a.jpg_large"])
def test_a_jpeg_keeps_its_bytes_whatever_its_name_ends_in(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, Image.fromarray(RGB), "JPEG", exif=turned_by(1))
    assert stored_image(path).content == path.read_bytes()
    assert list(files_by_id(tmp_path)) == ["a"]


def test_palette_transparency_cmyk_and_one_bit(tmp_path: Path) -> None:
    gif = saved(tmp_path / "a.gif", Image.fromarray(RGB).quantize(16), "GIF")
    with Image.open(gif) as opened:
        np.testing.assert_array_equal(
            decode_image(stored_image(gif).content), np.asarray(opened.convert("RGB"))
        )
    rgba = np.concatenate([RGB, RGB[..., :1]], 2)
    path = saved(tmp_path / "a.tif", Image.fromarray(rgba), "TIFF")
    with Image.open(io.BytesIO(stored_image(path).content)) as opened:
        np.testing.assert_array_equal(opened, rgba)
    cmyk = Image.fromarray(RGB).convert("CMYK")
    path = saved(tmp_path / "b.tif", cmyk, "TIFF")
    np.testing.assert_array_equal(
        decode_image(stored_image(path).content), np.asarray(cmyk.convert("RGB"))
    )
    path = saved(tmp_path / "c.bmp", Image.fromarray(RGB[..., 0] > 99), "BMP")
    np.testing.assert_array_equal(
        decode_image(stored_image(path).content)[..., 0], (RGB[..., 0] > 99) * 255
    )


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_and_are_told(tmp_path: Path, form: str) -> None:
    path = saved(tmp_path / "a", Image.fromarray(DEEP), form)
    stored = stored_image(path)
    np.testing.assert_array_equal(
        decode_image(stored.content)[..., 0], np.rint(DEEP / 257).astype(np.uint8)
    )
    assert "16 bits" in stored.notes[0] and "black" not in stored.notes[0]
    dark = saved(tmp_path / "b", Image.fromarray(DEEP >> 4), form)
    assert "nearly black" in stored_image(dark).notes[0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_turns_an_image_as_viewers_do(tmp_path: Path, form: str, value: int) -> None:
    path = saved(tmp_path / "a", Image.fromarray(RGB), form, exif=turned_by(value))
    with Image.open(path) as opened:
        opened.load()
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    stored = stored_image(path)
    np.testing.assert_array_equal(decode_image(stored.content), expected)
    np.testing.assert_array_equal(load_rgb(path), expected)
    assert stored.size == expected.shape[:2] == ((6, 9) if value < 5 else (9, 6))
    with Image.open(io.BytesIO(stored.content)) as opened:
        assert opened.getexif().get(0x0112, 1) == 1  # or viewers would turn it once more
    if form == "JPEG":
        assert (stored.content == path.read_bytes()) == (value == 1)
        assert stored_image(path, turn=False).content == path.read_bytes()


def test_of_several_frames_the_first_is_taken_and_told(tmp_path: Path) -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())
    for form in ("GIF", "TIFF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        path = saved(tmp_path / form, first, form, save_all=True, append_images=[second], **options)
        stored = stored_image(path)
        assert "first" in stored.notes[0]
        if form != "GIF":
            np.testing.assert_array_equal(decode_image(stored.content), RGB)


def test_a_png_with_megabytes_of_text_or_profile_is_read(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(RGB), "PNG")
    packed = zlib.compress(bytes(3_000_000))
    chunks = (
        (b"zTXt", b"a\0\0" + packed),
        (b"iCCP", b"a\0\0" + packed),
        (b"iTXt", b"a\0\1\0\0\0" + packed),
    )
    for kind, content in chunks:
        chunk = struct.pack(">I", len(content)) + kind + content
        chunk += struct.pack(">I", zlib.crc32(kind + content))
        for at in (33, len(whole) - 12):  # behind IHDR, and before IEND
            path = tmp_path / "a.png"
            path.write_bytes(whole[:at] + chunk + whole[at:])
            stored = stored_image(path)
            np.testing.assert_array_equal(decode_image(stored.content), RGB)
            np.testing.assert_array_equal(load_rgb(path), RGB)
            check_sample(Sample("a", path.read_bytes(), None, "train", ""), 1)


def test_pillows_limit_of_pixels_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(RGB), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    np.testing.assert_array_equal(load_rgb(path), RGB)
    np.testing.assert_array_equal(decode_image(stored_image(path).content), RGB)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr(images, "MAX_PX", 10)
    with pytest.raises(InputError, match=r"a\.png: 6 x 9 pixels \(height x width\)"):
        stored_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFFs
@pytest.mark.parametrize("form", ["TIFF", "BMP", "GIF", "WEBP", "PPM", "PNG", "JPEG"])
def test_damaged_files_are_named_and_nothing_else_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(images, "MAX_PX", 10**5)  # a damaged size would take seconds to fill
    content, path = encoded(Image.fromarray(RGB), form), tmp_path / "a"
    for trial in range(40):
        damaged = bytearray(content)
        damaged[RNG.integers(min(60, len(content)))] ^= 1 << RNG.integers(8)
        path.write_bytes(damaged[: len(content) // 2] if trial % 4 == 0 else damaged)
        for read in (stored_image, load_rgb):
            try:
                read(path)
            except InputError as error:
                assert error.got.startswith(f"{path}: ")


def picture(path: Path) -> Path:
    return saved(path, Image.fromarray(RGB), "PNG")


def test_hidden_and_tool_folders_are_left_out_and_named(tmp_path: Path) -> None:
    wanted = [picture(tmp_path / "a.png"), picture(tmp_path / "b" / "c.png")]
    for folder in (".ipynb_checkpoints", ".Trash-1000/files", "b/@eaDir", "__MACOSX", "#recycle"):
        picture(tmp_path / folder / "a-checkpoint.png")
    picture(tmp_path / ".hidden.png")
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_text("a system's own")
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "a.heic").write_text("ftypheic")
    listing = images_below(tmp_path)
    assert listing.files == wanted
    hidden, other = listing.notes() if "hidden" in listing.notes()[0] else listing.notes()[::-1]
    assert "6 hidden: " in hidden and ".ipynb_checkpoints" in hidden and ".Trash-1000" in hidden
    assert "2 not read as images: a.heic, notes.txt" in other


def test_pipes_are_never_waited_for(tmp_path: Path) -> None:
    for name in ("a.jpg", "b"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "lost.png").symlink_to("nowhere")
    listing = images_below(tmp_path)
    assert listing.files == [tmp_path / "lost.png"]
    assert set(listing.passed_over["no files"]) == {tmp_path / "a.jpg", tmp_path / "b"}


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "root"
    picture(store / "b.png")
    picture(root / "city" / "a.png")
    (root / "linked").symlink_to(store)
    (root / "file.png").symlink_to(store / "b.png")
    (root / "city" / "up").symlink_to("..")
    (store / "back").symlink_to(root)
    (root / "self").symlink_to("self")
    found = {path.relative_to(root).as_posix() for path in images_below(root).files}
    assert found == {"city/a.png", "linked/b.png", "file.png"}
    assert any("links back" in note for note in images_below(root).notes())
    assert {path.name for path in images_below(root / "linked").files} == {
        "b.png",
        "a.png",
        "file.png",
    }


def test_of_one_name_the_usual_format_is_taken(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    saved(tmp_path / "a.tif", Image.fromarray(RGB), "TIFF")
    saved(tmp_path / "a.thm", Image.fromarray(RGB), "JPEG")  # a camera's thumbnail
    notes: list[str] = []
    assert [path.name for path in files_by_id(tmp_path, notes=notes).values()] == ["a.png", "b.png"]
    assert any("a.tif" in note for note in notes) and any("a.thm" in note for note in notes)
    saved(tmp_path / "a.jpg", Image.fromarray(RGB), "JPEG")
    with pytest.raises(InputError, match=r"a\.jpg and .*a\.png"):
        files_by_id(tmp_path)


def test_a_folder_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png")

    def forbidden(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shards.image_files.os.scandir", forbidden)  # root may read everything
    with pytest.raises(InputError, match="Permission denied"):
        images_below(tmp_path)


PNG = encoded(Image.fromarray(RGB), "PNG")


@settings(max_examples=60)
@given(st.text(min_size=1))
@example("a\\b")
def test_every_name_gives_a_key_and_printable_ones_keep_theirs(name: str) -> None:
    key = key_of(name)
    check_sample(Sample(key, PNG, None, "train", ""), 1)
    if name.isprintable() and len(name.encode()) <= 220:
        assert key == name.translate(str.maketrans("/.\\", "___"))


def test_keys_of_long_names_are_cut_and_stay_apart() -> None:
    # a file's name may have 255 bytes, and folders are before it
    names = [f"{'字' * 83}/{'x' * 250}{last}" for last in "ab"]
    keys = {key_of(name) for name in names}
    assert len(keys) == 2
    for key in keys:
        check_sample(Sample(key, PNG, None, "train", ""), 1)


def test_keys_of_macos_screenshots() -> None:
    assert key_of("Bild 1\u202fPM\xa0x") == "Bild 1 PM x"
    accent = unicodedata.normalize("NFD", "é")
    assert key_of(accent) == accent
