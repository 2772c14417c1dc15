"""Predictions on files.

Every kind of image at its own size, bad input first, and no picture overwritten.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distseg.evaluate.inference import _spans, probabilities
from distseg.predict import run as predict_module
from distseg.predict.run import (
    PredictOptions,
    _blocks,
    collect_images,
    image_probabilities,
    predict,
)
from distseg.tracking.figures import overlay
from distseg.tracking.legend import with_legend
from shards.errors import InputError
from shards.images import load_rgb
from shards.sample import ClassSet

CLASSES = ClassSet(
    ("dark", "red", "green things", "blue"), ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
)


class Colors(nn.Module):
    """Calls each pixel by its strongest channel, or dark: an exact stand-in for a segmentor."""

    num_classes = 4

    def forward(self, image: Tensor) -> Tensor:
        dark = torch.full_like(image[:, :1], 0.25)
        return torch.cat([dark, image], 1) * 20


def colored(height: int, width: int) -> np.ndarray:
    """Blocks of dark, red, green and blue, 8 pixels each."""
    rows, columns = np.mgrid[:height, :width] // 8
    return np.array([(0, 0, 0), (200, 0, 0), (0, 200, 0), (0, 0, 200)], np.uint8)[
        (rows + 2 * columns) % 4
    ]


def expected(image: np.ndarray) -> np.ndarray:
    return np.where(image.max(2) > 64, image.argmax(2) + 1, 0).astype(np.uint8)


def save(path: Path, image: np.ndarray, **options: object) -> Path:
    Image.fromarray(image).save(path, **options)
    return path


@pytest.mark.parametrize("size", [(48, 64), (33, 71), (7, 5), (1, 1), (300, 410)])
def test_outputs_hold_the_labels_at_the_images_size(tmp_path: Path, size: tuple[int, int]) -> None:
    image = colored(*size)
    path = save(tmp_path / "a.png", image)
    (index_path,) = predict(
        Colors(), [path], tmp_path / "out", CLASSES, PredictOptions(probabilities=True)
    )
    assert index_path == tmp_path / "out" / "a.png"
    with Image.open(index_path) as index:
        assert index.mode == "L"
        assert np.array_equal(index, expected(image))
    with Image.open(tmp_path / "out" / "a_color.png") as color:
        assert color.mode == "P" and np.array_equal(color, expected(image))
        assert np.array_equal(
            color.convert("RGB"), np.array(CLASSES.palette, np.uint8)[expected(image)]
        )
    with Image.open(tmp_path / "out" / "a_overlay.png") as mixed:
        mixed = np.asarray(mixed)
        # the picture stays where it is, the names come below
        assert mixed.shape[0] > size[0] and mixed.shape[1] >= size[1]
        inside = mixed[: size[0], : size[1]]
        assert np.array_equal(inside, overlay(image, expected(image), CLASSES, 0.5))
    planes = probabilities(Colors(), image).numpy()
    for name, plane in zip(("dark", "red", "green_things", "blue"), planes, strict=True):
        with Image.open(tmp_path / "out" / f"a_prob_{name}.png") as picture:
            np.testing.assert_array_equal(picture, np.rint(plane * 255))
    assert len(list((tmp_path / "out").iterdir())) == 3 + 4 + 1


@pytest.mark.parametrize("size", [(60, 80), (1024, 2048), (300, 9)])
def test_the_legend_names_the_classes_that_occur_and_leaves_the_picture_alone(
    size: tuple[int, int],
) -> None:
    picture = np.full((*size, 3), 7, np.uint8)
    whole = with_legend(picture, CLASSES, [1, 3])
    assert np.array_equal(whole[: size[0], : size[1]], picture)
    strip = whole[size[0] :]
    found = {tuple(color) for color in strip.reshape(-1, 3).tolist()}
    assert {CLASSES.palette[1], CLASSES.palette[3]} <= found
    assert not {CLASSES.palette[0], CLASSES.palette[2]} & found
    # letters of at least 12 px, and of 1/64 of the longer side: read on a screen 1000 px wide
    rows = np.flatnonzero((strip == CLASSES.palette[1]).all(2).any(1))
    assert len(rows) + 2 >= max(12, max(size) / 64)
    assert len(strip) <= max(70, 0.2 * size[0])
    # one class more, one entry more: nothing is cut off at the right
    assert with_legend(picture, CLASSES, [1]).shape[1] <= whole.shape[1] <= max(size[1], 120)
    long = ClassSet(("x" * 500, "b"), CLASSES.palette[:2])
    assert with_legend(picture, long, [0, 1]).shape[1] <= max(size[1], 420)


def test_a_large_image_in_tiles_is_labelled_as_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = colored(300, 410)
    path = save(tmp_path / "a.png", image)
    sides = []

    def counted(model: nn.Module, part: np.ndarray, *options: Any, **more: Any) -> Tensor:
        sides.append(max(part.shape))
        return probabilities(model, part, *options, **more)

    monkeypatch.setattr(predict_module, "probabilities", counted)
    (index,) = predict(Colors(), [path], tmp_path / "out", CLASSES, PredictOptions(max_px=128))
    assert np.array_equal(Image.open(index), expected(image))
    assert max(sides) == 128 and len(sides) > 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(tmp_path: Path, orientation: int) -> None:
    upright = colored(40, 56)
    upright[:8, :8] = (200, 0, 0)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", np.ascontiguousarray(turned), exif=exif)
    (index,) = predict(Colors(), [path], tmp_path / "out", CLASSES, PredictOptions())
    assert np.array_equal(Image.open(index), expected(upright))


def test_gray_transparent_palette_and_16_bit_images_become_8_bit_rgb(tmp_path: Path) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.repeat(gray[..., None], 3, 2)
    rgba = np.concatenate([colored(16, 16), gray[..., None]], 2)
    assert np.array_equal(load_rgb(save(tmp_path / "gray.png", gray)), rgb)
    assert np.array_equal(load_rgb(save(tmp_path / "deep.png", gray.astype(np.uint16) * 257)), rgb)
    between = np.minimum(gray.astype(int) * 257 + 100, 65535).astype(np.uint16)
    assert np.array_equal(load_rgb(save(tmp_path / "deep.tif", between)), rgb)
    assert np.array_equal(load_rgb(save(tmp_path / "alpha.png", rgba)), rgba[..., :3])
    Image.fromarray(colored(16, 16)).convert("P").save(tmp_path / "palette.png")
    assert np.array_equal(
        load_rgb(tmp_path / "palette.png"),
        np.array(Image.open(tmp_path / "palette.png").convert("RGB")),
    )
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "print.jpg")
    assert load_rgb(tmp_path / "print.jpg").shape == (16, 16, 3)


def test_bad_images_are_named_when_all_others_are_done(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    good = [save(tmp_path / name, colored(64, 64)) for name in ("good.png", "last.png")]
    for name in ("cut.jpg", "cut.png"):
        whole = save(tmp_path / name, noise).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    whole = save(tmp_path / "hole.jpg", noise).read_bytes()
    (tmp_path / "hole.jpg").write_bytes(whole[:1500] + whole[2000:])
    (tmp_path / "text.jpg").write_text("not a picture")
    save(tmp_path / "float.tif", noise[..., 0].astype(np.float32))
    bad = [
        tmp_path / name
        for name in ("cut.jpg", "cut.png", "hole.jpg", "text.jpg", "float.tif", "missing.jpg")
    ]
    with pytest.raises(InputError) as caught:
        predict(Colors(), [good[0], *bad, good[1]], tmp_path / "out", CLASSES, PredictOptions())
    assert caught.value.got.startswith("6 of 8 images cannot be read; the others are in")
    assert all(str(path) in caught.value.got for path in bad)
    assert not any(str(path) in caught.value.got for path in good)
    for path in good:
        assert np.array_equal(Image.open(tmp_path / "out" / path.name), expected(colored(64, 64)))
    assert (tmp_path / "out" / "classes.json").is_file()
    with pytest.raises(InputError, match="6 of 6 images cannot be read:"):
        predict(Colors(), bad, tmp_path / "none", CLASSES, PredictOptions())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 8), (5, 40)])
def test_jpegs_of_a_few_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path / "a.jpg", np.full((*size, 3), (200, 0, 0), np.uint8), quality=100)
    (index,) = predict(Colors(), [path], tmp_path / "out", CLASSES, PredictOptions())
    assert np.array_equal(Image.open(index), np.ones(size))


@pytest.mark.parametrize("stem", ["x" * 238, "x" * 251, "\u00e9" * 120, "\u5b57" * 83])
def test_long_names_are_cut_and_stay_apart(tmp_path: Path, stem: str) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    images = []
    for last in "ab":
        name = f"{stem[:-1]}{last}.png"
        assert len(os.fsencode(name)) <= longest
        images.append(save(tmp_path / name, colored(9, 9)))
    wanted = PredictOptions(probabilities=True)
    written = predict(Colors(), images, tmp_path / "out", CLASSES, wanted)
    assert len(set(written)) == 2 and all(path.is_file() for path in written)
    assert len(list((tmp_path / "out").iterdir())) == 2 * (3 + 4) + 1
    short = len(os.fsencode(images[0].name)) + len("_prob_green_things") <= longest
    assert (written[0].stem == images[0].stem) == short


@pytest.mark.parametrize("size", [(300, 410), (129, 640), (700, 128), (200, 200)])
def test_tiles_are_bit_for_bit_the_blended_windows(size: tuple[int, int]) -> None:
    class Blurred(Colors):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(torch.nn.functional.avg_pool2d(image, 9, 1, 4))

    image = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    options = PredictOptions(max_px=128)
    found = image_probabilities(Blurred(), image, options)
    total = torch.zeros(4, *size)
    for top, bottom, row in _spans(size[0], 128, 32):
        for left, right, column in _spans(size[1], 128, 32):
            part = probabilities(Blurred(), image[top:bottom, left:right])
            total[:, top:bottom, left:right] += part * row[:, None] * column
    assert torch.equal(found, total)
    blocks = [block.shape for *_, block in _blocks(Blurred(), image, options)]
    assert all(max(shape) <= 128 for shape in blocks)  # no more is held at a time
    assert sum(shape[1] * shape[2] for shape in blocks) == size[0] * size[1]


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    names = [
        "a.png",
        "a.bmp",
        "A.ppm",
        "a_color.png",
        "b_overlay.bmp",
        "b.png",
        "deeper/a.png",
        "deeper/a.bmp",
    ]
    images = []
    for number, name in enumerate(names):
        images.append(save(tmp_path / name, colored(32 + number, 40)))
    written = predict(Colors(), images, tmp_path / "out", CLASSES, PredictOptions())
    assert written[0].name == "a.png" and written[1].name == "a_bmp.png"
    assert [Image.open(path).height for path in written] == [
        32 + number for number in range(len(names))
    ]
    assert len({path.name.lower() for path in (tmp_path / "out").glob("*.png")}) == 3 * len(names)
    key = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [(c["index"], c["name"]) for c in key] == list(enumerate(CLASSES.names))
    assert key[1]["color"] == [255, 0, 0]


def test_class_names_that_differ_in_signs_only_get_pictures_of_their_own(tmp_path: Path) -> None:
    classes = ClassSet(("a/b", "a b", "c", "d"), CLASSES.palette)
    path = save(tmp_path / "x.png", colored(40, 40))
    predict(Colors(), [path], tmp_path / "out", classes, PredictOptions(probabilities=True))
    assert len(list((tmp_path / "out").glob("x_prob_*.png"))) == 4


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.tiff"):
        save(tmp_path / name, colored(8, 8), format="PNG")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in collect_images(tmp_path)] == ["a.png", "b.JPG", "c.tiff"]
    assert collect_images(tmp_path / "a.png") == [tmp_path / "a.png"]


def test_wrong_paths_and_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        collect_images(tmp_path / "missing")
    (tmp_path / "x" / "deep").mkdir(parents=True)
    with pytest.raises(InputError, match="no image in"):
        collect_images(tmp_path / "x")
    path = save(tmp_path / "x" / "deep" / "a.png", colored(8, 8))
    with pytest.raises(InputError, match=f"for example {path.parent}"):
        collect_images(tmp_path / "x")
    with pytest.raises(InputError, match="holds the images themselves"):
        predict(Colors(), [path], path.parent, CLASSES, PredictOptions())
    with pytest.raises(InputError, match="4 classes and 1 class names"):
        predict(
            Colors(), [path], tmp_path / "out", ClassSet(("a",), ((0, 0, 0),)), PredictOptions()
        )
    for options in ({"max_px": 64}, {"overlay_alpha": 1.5}):
        with pytest.raises(InputError):
            PredictOptions(**options)
