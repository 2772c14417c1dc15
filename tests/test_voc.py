"""PASCAL VOC: palette masks read as indices, lists, pairs by id, and what is refused."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from shards.errors import InputError
from shards.maps import MapsReader
from shards.pack import pack
from shards.prepare import prepare
from shards.prepare.voc import VOC, samples, voc_palette
from shards.reader import ShardReader
from shards.sample import decode_label


def write(
    root: Path, key: str, mask: np.ndarray, mode: str = "P", labels: str = "SegmentationClass"
) -> None:
    for folder in ("JPEGImages", labels):
        (root / folder).mkdir(parents=True, exist_ok=True)
    image = np.full((*mask.shape[:2], 3), 90, np.uint8)
    (root / "JPEGImages" / f"{key}.jpg").write_bytes(simplejpeg.encode_jpeg(image))
    picture = Image.fromarray(mask, mode="RGB" if mode == "RGB" else "L")
    if mode == "P":
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette([value for color in voc_palette(256) for value in color])
    picture.save(root / labels / f"{key}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    rng = np.random.default_rng(0)
    for index in range(5):
        mask = rng.choice([0, 3, 20, 255], size=(20 + index, 30)).astype(np.uint8)
        write(folder, f"2007_{index:06d}", mask)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000003\n2007_000000\n2007_000001\n")
    # 2007_000004 is in no list, as most of VOC's images are
    (lists / "val.txt").write_text("2007_000002\n")
    return tmp_path


def masks(root: Path) -> dict[str, np.ndarray]:
    folder = root / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    return {path.stem: np.asarray(Image.open(path)) for path in folder.glob("*.png")}


def test_the_palette_is_the_development_kits() -> None:
    assert voc_palette(3) == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert voc_palette(256)[255] == (224, 224, 192)  # the void border
    assert VOC.palette[15] == (192, 128, 128) and VOC.names[15] == "person"
    assert len(VOC.names) == 21


def test_masks_keep_their_indices_and_lists_give_the_splits(root: Path, tmp_path: Path) -> None:
    dataset = samples(root)
    read = [task.run() for task in dataset.tasks]
    assert dataset.classes == VOC and dataset.notes == ("1 image of JPEGImages is in no list",)
    assert [(s.key, s.split) for s in read] == [
        ("2007_000003", "train"),
        ("2007_000000", "train"),
        ("2007_000001", "train"),
        ("2007_000002", "val"),
    ]
    expected = masks(root)
    assert all(np.array_equal(sample.label, expected[sample.key]) for sample in read)
    prepare("voc", root, tmp_path / "voc.h5")
    assert MapsReader(tmp_path / "voc.h5").name == "voc"


def test_other_lists_and_gray_masks(root: Path, tmp_path: Path) -> None:
    folder = root / "VOCdevkit" / "VOC2012"
    write(
        folder, "2007_000004", np.full((9, 8), 7, np.uint8), mode="L", labels="SegmentationClassAug"
    )
    write(
        folder,
        "2007_000000",
        np.full((9, 8), 255, np.uint8),
        mode="L",
        labels="SegmentationClassAug",
    )
    (tmp_path / "aug.txt").write_text("2007_000004")
    (tmp_path / "val.txt").write_text("2007_000000")
    options = {"train_list": str(tmp_path / "aug.txt"), "val_list": str(tmp_path / "val.txt")}
    (train, val) = [
        task.run() for task in samples(folder, **options, labels="SegmentationClassAug").tasks
    ]
    assert (train.label == 7).all() and (val.label == 255).all()


def test_what_cannot_be_used_is_named(root: Path, tmp_path: Path) -> None:
    folder = root / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    with pytest.raises(InputError, match="no JPEGImages"):
        samples(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="nowhere"):
        samples(root, train_list=str(tmp_path / "nowhere.txt"))
    (lists / "val.txt").write_text("2007_000000")
    with pytest.raises(InputError, match="2007_000000 is listed twice"):
        samples(root)
    (lists / "val.txt").write_text("2007_000099")
    with pytest.raises(
        InputError,
        match=r"1 of 4 samples are not whole, the first: 2007_000099: no .*2007_000099\.jpg",
    ):
        prepare("voc", root, tmp_path / "voc.h5")
    for mask, mode, message in (
        (np.full((9, 8), 21, np.uint8), "P", r"2007_000002\.png: value 21 in 72 pixels"),
        (np.eye(3, dtype=np.uint8)[np.zeros((9, 8), int)], "RGB", "mode RGB"),
    ):
        write(folder, "2007_000002", mask, mode)
        (lists / "val.txt").write_text("2007_000002")
        with pytest.raises(InputError, match=message):
            [task.run() for task in samples(root).tasks]
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(
        folder / "SegmentationClass" / "2007_000002.png"
    )
    with pytest.raises(InputError, match="5 x 5 pixels for an image 9 x 8"):
        [task.run() for task in samples(root).tasks]


REAL_VOID_SHARE = 5.34  # % of the pixels of the 676 pairs whose lists are lists/*_here.txt


@pytest.mark.slow
@pytest.mark.skipif(
    "DISTSEG_VOC_ROOT" not in os.environ, reason="set DISTSEG_VOC_ROOT to a VOC2012 folder"
)
def test_real_data(tmp_path: Path) -> None:
    """Every pair of the lists (lists/*_here.txt where there are such).

    Byte-identical, every pixel as in the PNG.
    """
    root = Path(os.environ["DISTSEG_VOC_ROOT"])
    lists = {
        f"{split}_list": str(root / "lists" / f"{split}_here.txt") for split in ("train", "val")
    }
    made = prepare(
        "voc", root, tmp_path / "maps.h5", **lists if (root / "lists").is_dir() else {}, workers=2
    )
    manifest = pack(tmp_path / "maps.h5", tmp_path / "shards", num_workers=2)
    pixels = np.zeros(256, np.int64)
    with MapsReader(tmp_path / "maps.h5") as maps_reader:
        for split, keys in maps_reader.splits.items():
            reader = ShardReader(tmp_path / "shards", split)
            assert len(reader) == len(keys) == made.num_samples[split]
            for index, key in enumerate(keys):
                raw, sample = reader.read(index), maps_reader.read(key)
                assert raw.key == key
                assert (
                    raw.image == sample.image == (root / "JPEGImages" / f"{key}.jpg").read_bytes()
                )
                # OpenCV gives the colours; the palette is one to one, so that they give the index
                # again
                expected = _index_of(cv2.imread(str(root / "SegmentationClass" / f"{key}.png")))
                np.testing.assert_array_equal(decode_label(raw.label), expected)
                np.testing.assert_array_equal(sample.label, expected)
                total = maps_reader.label_map(key).sum(axis=0, dtype=int)
                np.testing.assert_array_equal(total, expected != 255)  # one-hot, void all zeros
                pixels += np.bincount(expected.ravel(), minlength=256)
    counts = np.zeros(256, np.int64)
    for info in manifest.splits.values():
        counts[:21] += info.class_pixels
        counts[255] += info.void_pixels
    np.testing.assert_array_equal(counts, pixels)
    if (root / "lists").is_dir():
        assert made.num_samples == {"train": 330, "val": 346}
        assert round(100 * pixels[255] / pixels.sum(), 2) == REAL_VOID_SHARE


def _index_of(colors: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 BGR -> (H, W) uint8; 254, which is no index of VOC's, for another colour."""
    blue, green, red = np.moveaxis(colors.astype(np.int64), 2, 0)
    return _table()[red << 16 | green << 8 | blue]


@cache
def _table() -> np.ndarray:
    table = np.full(2**24, 254, np.uint8)
    for index in (*range(21), 255):
        red, green, blue = voc_palette(256)[index]
        table[red << 16 | green << 8 | blue] = index
    return table
