"""GTA5 and SYNTHIA-RAND-CITYSCAPES, on files of their exact layout and pixel formats."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from shards.errors import InputError
from shards.maps import MapsReader
from shards.prepare import prepare
from shards.prepare.cityscapes import CITYSCAPES, TABLE
from shards.prepare.synthia import SYNTHIA

# label ids as cityscapesScripts numbers them, in the order of its train ids
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# id_to_trainid of the public loaders for SYNTHIA with 16 classes (AdvEnt, DAFormer): id -> train id
SYNTHIA_IDS = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 10, 10: 11, 17: 12}
SYNTHIA_IDS |= {8: 13, 19: 15, 12: 17, 11: 18}


def blocks(size: tuple[int, int], values: list[int]) -> np.ndarray:
    """(H, W) uint8 of rectangles that hold the values one after the other."""
    height, width = size
    rows, columns = np.arange(height)[:, None] * 6 // height, np.arange(width) * 7 // width
    return np.array(values, np.uint8)[(7 * rows + columns) % len(values)]


def save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, compress_level=1)


def gta5(root: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """images/ and labels/ as unpacked; the label ids of each."""
    palette = np.zeros((256, 3), np.uint8)
    for id_, _, color in TABLE:
        palette[id_] = color
    labels = {}
    for number, (name, size) in enumerate(sizes.items()):
        labels[name] = blocks(size, list(range(35)))
        label = Image.fromarray(labels[name])
        if number != 1:  # the second is gray, as some copies are
            label = label.convert("P")
            label.putpalette(palette.tobytes())
        save(root / "labels" / f"{name}.png", label)
        colors = np.repeat(blocks(size, [10 + number, 200, 90])[..., None], 3, axis=2)
        save(root / "images" / f"{name}.png", Image.fromarray(colors))
    return labels


def test_gta5_has_the_19_classes_of_cityscapes_at_every_size(tmp_path: Path) -> None:
    sizes = {"00001": (1052, 1914), "00002": (46, 83), "24966": (105, 191)}
    labels = gta5(tmp_path / "GTA5", sizes)
    # as DAFormer's converter leaves them beside the labels
    save(tmp_path / "GTA5/labels/00001_labelTrainIds.png", Image.new("L", (8, 8)))
    (tmp_path / "val.txt").write_text("24966\n")
    made = prepare("gta5", tmp_path, tmp_path / "maps.h5", val_list=str(tmp_path / "val.txt"))
    assert made.num_samples == {"train": 2, "val": 1}
    assert "1 labels/*_labelTrainIds.png: made of the others" in made.notes
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.classes == CITYSCAPES
        for name, ids in labels.items():
            sample = reader.read(name)
            expected = np.full(ids.shape, 255, np.uint8)
            for index, id_ in enumerate(CITYSCAPES_IDS):
                expected[ids == id_] = index
            assert np.array_equal(sample.label, expected) and sample.label.shape == sizes[name]
            assert sample.image == (tmp_path / f"GTA5/images/{name}.png").read_bytes()


def test_a_label_of_another_size_is_named_and_left_out_on_request(tmp_path: Path) -> None:
    gta5(tmp_path / "root", {"00001": (24, 40), "00002": (24, 40)})
    (tmp_path / "root/images/00001.png").rename(tmp_path / "00001.png")
    with pytest.raises(InputError, match=r"images/00001.png, the image of .*labels/00001.png"):
        prepare("gta5", tmp_path / "root", tmp_path / "maps.h5")
    (tmp_path / "00001.png").rename(tmp_path / "root/images/00001.png")
    save(tmp_path / "root/labels/00002.png", Image.new("L", (40, 22), 7))
    with pytest.raises(InputError, match=r"00002.png: 22 x 40 pixels for an image 24 x 40"):
        prepare("gta5", tmp_path / "root", tmp_path / "maps.h5")
    made = prepare("gta5", tmp_path / "root", tmp_path / "maps.h5", skip_bad=True)
    assert made.num_samples == {"train": 1} and len(made.left_out) == 1


def synthia(root: Path, names: list[str], size: tuple[int, int]) -> np.ndarray:
    """RGB/ and GT/LABELS/ as unpacked: 16 bits a channel, class, object, 0; the class ids."""
    ids = blocks(size, list(range(23)))
    for name in names:
        label = np.zeros((*size, 3), np.uint16)
        label[..., 2] = ids  # OpenCV writes blue, green, red: red is the file's first
        label[..., 1] = ids + np.uint16(300)  # objects are numbered beyond 8 bits
        (root / "GT/LABELS").mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / f"GT/LABELS/{name}.png"), label)
        save(root / f"RGB/{name}.png", Image.fromarray(np.repeat(ids[..., None] * 9, 3, axis=2)))
    return ids


def test_synthia_has_16_classes_of_the_first_of_16_bit_channels(tmp_path: Path) -> None:
    root = tmp_path / "RAND_CITYSCAPES"
    ids = synthia(root, ["0000000", "0009399"], (76, 128))
    content = (root / "GT/LABELS/0000000.png").read_bytes()
    assert (content[24], content[25]) == (16, 2)  # bits of a channel; in colours
    made = prepare("synthia", tmp_path, tmp_path / "maps.h5")
    assert made.num_samples == {"train": 2}
    names = [CITYSCAPES.names[train_id] for train_id in sorted(SYNTHIA_IDS.values())]
    expected = np.full(ids.shape, 255, np.uint8)
    for id_, train_id in SYNTHIA_IDS.items():
        expected[ids == id_] = names.index(CITYSCAPES.names[train_id])
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.classes == SYNTHIA and list(SYNTHIA.names) == names and len(names) == 16
        for name in ("0000000", "0009399"):
            assert np.array_equal(reader.read(name).label, expected)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("synthia", lambda r: (r / "GT/LABELS/1.png").write_bytes(b"\x89PNG"), "1.png: an unread"),
        ("synthia", lambda r: (r / "RGB/1.png").unlink(), "no PNG in .*RGB"),
        ("synthia", lambda r: cv2.imwrite(str(r / "GT/LABELS/1.png"), ID_23), "value 23 in 48 pi"),
        ("gta5", lambda r: save(r / "labels/1.png", Image.new("L", (8, 6), 35)), "value 35 in 48"),
        ("gta5", lambda r: save(r / "labels/1.png", Image.new("RGB", (8, 6), "red")), "mode RGB"),
        ("gta5", lambda r: (r / "labels/1.png").unlink(), "no PNG in .*labels"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, damage: object, message: str) -> None:
    root = tmp_path / "root"
    if name == "gta5":
        gta5(root, {"1": (6, 8)})
    else:
        synthia(root, ["1"], (6, 8))
    assert callable(damage)
    damage(root)
    with pytest.raises(InputError, match=message):
        prepare(name, root, tmp_path / "maps.h5")
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.slow
@pytest.mark.skipif(
    "DISTSEG_SAMPLES_ROOT" not in os.environ,
    reason="set DISTSEG_SAMPLES_ROOT to the small real samples",
)
def test_a_real_cityscapes_frame_in_the_layout_of_gta5_has_the_same_label(tmp_path: Path) -> None:
    """Its ids are Cityscapes', and so is what they mean."""
    samples = Path(os.environ["DISTSEG_SAMPLES_ROOT"]) / "cityscapes_1"
    frame, root = "frankfurt_000000_000294", tmp_path / "gta5"
    files = {"images": f"leftImg8bit/{frame}_leftImg8bit.png"}
    files["labels"] = f"gtFine/{frame}_gtFine_labelIds.png"
    for folder, file in files.items():
        (root / folder).mkdir(parents=True)
        shutil.copy(samples / file, root / folder / "00001.png")
    prepare("gta5", root, tmp_path / "maps.h5")
    table = np.full(256, 255, np.uint8)
    table[list(CITYSCAPES_IDS)] = range(19)
    with MapsReader(tmp_path / "maps.h5") as reader:
        expected = table[np.asarray(Image.open(samples / files["labels"]))]
        assert np.array_equal(reader.read("00001").label, expected)


ID_23 = np.full((6, 8, 3), 23, np.uint16)
