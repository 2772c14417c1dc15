"""Cityscapes, CamVid, KITTI road and ADE20K.

Small sets in their layouts, and real samples of three of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import InputError
from shards.maps import MapsReader
from shards.prepare import prepare
from shards.prepare.ade20k import ADE20K
from shards.prepare.camvid import CAMVID
from shards.prepare.cityscapes import CITYSCAPES
from shards.prepare.kitti_road import KITTI_ROAD
from shards.sample import ClassSet

RNG = np.random.default_rng(0)
SIZE = (12, 20)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*SIZE, 3), np.uint8)).save(path)


def mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def ids(count: int) -> np.ndarray:
    """All of 0 to count - 1, and the rest by chance."""
    values = RNG.integers(0, count, SIZE)
    values.flat[:count] = np.arange(count)
    return values


def cityscapes(root: Path) -> None:
    for split, city in (("train", "ulm"), ("train", "aachen"), ("val", "lindau"), ("test", "bonn")):
        name = f"{split}/{city}/{city}_000000_000019"
        picture(root / "leftImg8bit" / f"{name}_leftImg8bit.png")
        mask(root / "gtFine" / f"{name}_gtFine_labelIds.png", ids(34))
        mask(root / "gtFine" / f"{name}_gtFine_labelTrainIds.png", ids(19))
        mask(root / "gtFine" / f"{name}_gtFine_instanceIds.png", ids(34))


def camvid(root: Path) -> None:
    """The masks' names sort in the opposite order of the images', and the list pairs them."""
    lines = {"train": "", "val": "", "test": ""}
    for split in lines:
        for index in range(2):
            picture(root / split / f"{split}_{index}.png")
            mask(root / f"{split}annot" / f"annot_{9 - index}.png", ids(12))
            lines[split] += (
                f"/SegNet/CamVid/{split}/{split}_{index}.png "
                f"/SegNet/CamVid/{split}annot/annot_{9 - index}.png\n"
            )
    for split in lines:
        (root / f"{split}.txt").write_text(lines[split])


def kitti_road(root: Path) -> None:
    colors = np.array([[255, 0, 0], [255, 0, 255], [0, 0, 0]])
    for scene in ("um", "umm", "uu"):
        for index in range(2):
            picture(root / "training" / "image_2" / f"{scene}_{index:06d}.png")
            for task in ("road", "lane") if scene == "um" else ("road",):
                mask(
                    root / "training" / "gt_image_2" / f"{scene}_{task}_{index:06d}.png",
                    colors[ids(3)],
                )
    (root / "testing").mkdir()


def ade20k(root: Path) -> None:
    for split, count in (("training", 3), ("validation", 2)):
        for index in range(count):
            picture(root / "images" / split / f"ADE_{split}_{index}.jpg")
            mask(root / "annotations" / split / f"ADE_{split}_{index}.png", ids(151))


def by_hand(codes: dict[int, int]) -> Callable[[Path], np.ndarray]:
    """A mask read in the plainest way, pixel by pixel; what is not in the table is void."""

    def read(path: Path) -> np.ndarray:
        values = np.asarray(Image.open(path)).astype(int)
        if values.ndim == 3:
            values = values[..., 0] * 65536 + values[..., 1] * 256 + values[..., 2]
        return np.array([[codes.get(value, 255) for value in row] for row in values.tolist()])

    return read


# cityscapesScripts gives the train ids in this order of label ids
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LABEL_IDS = by_hand({id_: index for index, id_ in enumerate(CITYSCAPES_IDS)})
TRAIN_IDS = by_hand({index: index for index in range(19)})
ROAD = by_hand({0xFF0000: 0, 0xFF00FF: 1})
SCENE = by_hand({value: value - 1 for value in range(1, 151)})


def cityscapes_mask(labels: str) -> Callable[[str, str], str]:
    return lambda key, split: f"gtFine/{split}/{key.split('_')[0]}/{key}_gtFine_{labels}.png"


def kitti_mask(task: str) -> Callable[[str, str], str]:
    return lambda key, _: f"training/gt_image_2/{key.replace('_', f'_{task}_')}.png"


def camvid_mask(key: str, split: str) -> str:
    return f"{split}annot/annot_{9 - int(key[-1])}.png"


def ade20k_mask(key: str, _: str) -> str:
    return f"annotations/{'validation' if 'val' in key else 'training'}/{key}.png"


Case = tuple[
    str,
    dict[str, str],
    Callable[[Path], None],
    ClassSet,
    Callable[[str, str], str],
    Callable,
    dict[str, int],
]
CASES: dict[str, Case] = {
    "cityscapes": (
        *("cityscapes", {}, cityscapes, CITYSCAPES),
        *(cityscapes_mask("labelIds"), LABEL_IDS, {"train": 2, "val": 1}),
    ),
    "cityscapes, train ids": (
        *("cityscapes", {"labels": "labelTrainIds"}, cityscapes, CITYSCAPES),
        *(cityscapes_mask("labelTrainIds"), TRAIN_IDS, {"train": 2, "val": 1}),
    ),
    "camvid": (
        *(
            "camvid",
            {},
            camvid,
            CAMVID,
            camvid_mask,
            by_hand({index: index for index in range(11)}),
        ),
        {"train": 2, "val": 2, "test": 2},
    ),
    "kitti road": (
        "kitti_road",
        {},
        kitti_road,
        KITTI_ROAD,
        kitti_mask("road"),
        ROAD,
        {"train": 5, "val": 1},
    ),
    "kitti lane": (
        *("kitti_road", {"task": "lane"}, kitti_road, KITTI_ROAD, kitti_mask("lane"), ROAD),
        {"train": 1, "val": 1},
    ),
    "ade20k": ("ade20k", {}, ade20k, ADE20K, ade20k_mask, SCENE, {"train": 3, "val": 2}),
}


def check(root: Path, maps: Path, mask_of: Callable[[str, str], str], read: Callable) -> int:
    """Compare all maps with the raw files; returns the number of samples."""
    images = {
        path.name: path
        for path in root.rglob("*")
        if path.suffix in (".png", ".jpg") and "gt" not in str(path)
    }
    with MapsReader(maps) as reader:
        for split, keys in reader.splits.items():
            for key in keys:
                sample = reader.read(key)
                assert sample.image == images[sample.source_id.split("/")[-1]].read_bytes()
                np.testing.assert_array_equal(sample.label, read(root / mask_of(key, split)))
                total = reader.label_map(key).sum(axis=0, dtype=int)  # one-hot, void all zeros
                np.testing.assert_array_equal(total, sample.label != 255)
        return len(reader)


@pytest.mark.parametrize("case", CASES)
def test_every_pixel_and_every_byte(tmp_path: Path, case: str) -> None:
    name, options, write, classes, mask_of, read, counts = CASES[case]
    write(tmp_path / "root")
    made = prepare(name, tmp_path / "root", tmp_path / "maps.h5", **options)
    assert made.num_samples == counts
    assert check(tmp_path / "root", tmp_path / "maps.h5", mask_of, read) == sum(counts.values())
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert (reader.name, reader.classes) == (name, classes)


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    cityscapes(tmp_path / "cityscapes")
    made = prepare("cityscapes", tmp_path / "cityscapes", tmp_path / "maps.h5")
    assert made.notes == ("leftImg8bit/test has no fine labels",)
    made = prepare("cityscapes", tmp_path / "cityscapes", tmp_path / "maps.h5", test=1)
    assert made.num_samples == {"train": 2, "val": 1, "test": 1} and made.notes == ()
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.read("bonn_000000_000019").label is None
    kitti_road(tmp_path / "kitti")
    made = prepare("kitti_road", tmp_path / "kitti", tmp_path / "kitti.h5", task="lane")
    assert made.notes == (
        "4 training images are not of the scenes with lanes",
        "the testing images have no ground truth",
    )


def test_camvid_without_lists_pairs_by_name(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(
            tmp_path / split / "0001TP_006690.png"
            if split == "train"
            else tmp_path / split / "0016E5_07959.png"
        )
    mask(tmp_path / "trainannot" / "0001TP_006690.png", np.full(SIZE, 11))
    mask(tmp_path / "valannot" / "0016E5_07959.png", np.full(SIZE, 3))
    made = prepare("camvid", tmp_path, tmp_path / "maps.h5")
    assert made.num_samples == {"train": 1, "val": 1} and made.notes[0] == "there is no test"
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert (reader.read("0001TP_006690").label == 255).all() and (
            reader.read("0016E5_07959").label == 3
        ).all()


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cityscapes id": (
        "cityscapes",
        lambda r: mask(first(r, "ulm*labelIds*"), np.full(SIZE, 34)),
        "labelIds.png: value 34",
    ),
    "cityscapes no gtFine": (
        "cityscapes",
        lambda r: shutil.rmtree(r / "gtFine"),
        "(?s)no labelIds.*unpack gtFine",
    ),
    "cityscapes no mask": (
        "cityscapes",
        lambda r: first(r, "ulm*labelIds*").unlink(),
        "ulm_000000_000019: no",
    ),
    "camvid 12": (
        "camvid",
        lambda r: mask(first(r, "annot*"), np.full(SIZE, 12)),
        "annot_8.png: value 12 in 240 pixels",
    ),
    "camvid odd list": (
        "camvid",
        lambda r: (r / "val.txt").write_text("a b c"),
        "val.txt: 3 paths",
    ),
    "camvid list outside": (
        "camvid",
        lambda r: (r / "val.txt").write_text("x/../../etc.png x/valannot/annot_9.png"),
        r"etc\.png leads to",
    ),
    "kitti colour": (
        "kitti_road",
        lambda r: mask(first(r, "uu_road*"), np.full((*SIZE, 3), 7)),
        r"(?s)uu_road_000000.png: colour \(7, 7, 7\) in 240 pixels.*\(255, 0, 255\)",
    ),
    "kitti index mask": (
        "kitti_road",
        lambda r: mask(first(r, "uu_road*"), np.full(SIZE, 1)),
        r"colour \(1, 1, 1\)",
    ),
    "ade20k 151": (
        "ade20k",
        lambda r: mask(first(r, "ADE_val*png"), np.full(SIZE, 151)),
        "value 151",
    ),
    "ade20k size": (
        "ade20k",
        lambda r: mask(first(r, "ADE_val*png"), np.ones((3, 4))),
        "3 x 4 pixels for an image 12 x 20",
    ),
    "ade20k colours": (
        "ade20k",
        lambda r: mask(first(r, "ADE_val*png"), RNG.integers(0, 150, (*SIZE, 3))),
        "mode RGB",
    ),
    "ade20k empty split": (
        "ade20k",
        lambda r: shutil.rmtree(r / "images" / "validation"),
        "no images in .*validation",
    ),
    "not the root": ("ade20k", lambda r: shutil.rmtree(r / "annotations"), "no annotations in"),
}


def first(root: Path, pattern: str) -> Path:
    return min(root.rglob(pattern))


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    name, damage, message = DAMAGE[case]
    root = tmp_path / "root"
    {"cityscapes": cityscapes, "camvid": camvid, "kitti_road": kitti_road, "ade20k": ade20k}[name](
        root
    )
    damage(root)
    with pytest.raises(InputError, match=message):
        prepare(name, root, tmp_path / "maps.h5")
    assert list(tmp_path.iterdir()) == [root]


def copied(samples: Path, root: Path, names: dict[str, str]) -> Path:
    """The sample files in the layout of the whole data set."""
    for target, source in names.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples / source, root / target)
    return root


@pytest.mark.slow
@pytest.mark.skipif(
    "DISTSEG_SAMPLES_ROOT" not in os.environ,
    reason="set DISTSEG_SAMPLES_ROOT to the small real samples",
)
def test_real_samples(tmp_path: Path) -> None:
    """Three ADE20K images, two of KITTI road with road and lane, a Cityscapes frame.

    Every pixel, every byte.
    """
    samples = Path(os.environ["DISTSEG_SAMPLES_ROOT"])
    frame, gt, left = "frankfurt_000000_000294", "cityscapes_1/gtFine", "cityscapes_1/leftImg8bit"
    names = {}
    for split in ("train", "val"):  # one frame, in both splits under two names
        city = f"{split}/frankfurt/{frame if split == 'val' else 'frankfurt_000000_000295'}"
        names[f"leftImg8bit/{city}_leftImg8bit.png"] = f"{left}/{frame}_leftImg8bit.png"
        for labels in ("labelIds", "labelTrainIds"):
            names[f"gtFine/{city}_gtFine_{labels}.png"] = f"{gt}/{frame}_gtFine_{labels}.png"
    root = copied(samples, tmp_path / "cityscapes", names)
    maps = {labels: tmp_path / f"{labels}.h5" for labels in ("labelIds", "labelTrainIds")}
    for labels, read in (("labelIds", LABEL_IDS), ("labelTrainIds", TRAIN_IDS)):
        prepare("cityscapes", root, maps[labels], labels=labels)
        assert check(root, maps[labels], cityscapes_mask(labels), read) == 2
    by_id, by_train_id = (MapsReader(path).read(frame).label for path in maps.values())
    # our table is the one that made the other file; both were made smaller since
    for index in np.unique(by_id):
        assert np.bincount(by_train_id[by_id == index]).argmax() == index
    assert (by_id == by_train_id).mean() > 0.997

    for task in ("road", "lane"):
        prepare("kitti_road", samples / "kitti_road_2", tmp_path / "kitti.h5", task=task)
        assert check(samples / "kitti_road_2", tmp_path / "kitti.h5", kitti_mask(task), ROAD) == 2

    names = {}
    for index, split in ((1, "training"), (2, "training"), (3, "validation")):
        key = f"ADE_val_0000000{index}"
        new = key if split == "validation" else key.replace("val", "train")
        names[f"images/{split}/{new}.jpg"] = f"ade20k_3/sampleData/images/{key}.jpg"
        names[f"annotations/{split}/{new}.png"] = f"ade20k_3/sampleData/annotations/{key}.png"
    root = copied(samples, tmp_path / "ade", names)
    prepare("ade20k", root, tmp_path / "ade.h5")
    assert check(root, tmp_path / "ade.h5", ade20k_mask, SCENE) == 3
    listed = (samples / "ade20k_3" / "objectInfo150.csv").read_text().splitlines()[1:]
    # words of a name are apart by ";" there, as names are
    for name, row in zip(ADE20K.names, listed, strict=True):
        words = row.split(",")[-1].split(";")
        assert name.split()[0] == words[0] and set(name.split()) <= set(words)
