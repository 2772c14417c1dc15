"""Your own images and masks.

Every form of mask and layout that the YAML can name, and every way to get it wrong.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import InputError
from shards.manifest import Manifest
from shards.maps import MapsReader
from shards.pack import pack
from shards.prepare import prepare

SIZE = (6, 9)
IDS = np.random.default_rng(5).choice([0, 7, 9, 40, 255], SIZE)  # not class indices
COLORS = {0: (0, 0, 0), 7: (255, 128, 0), 9: (1, 2, 3), 40: (1, 3, 2), 255: (250, 250, 250)}
EXPECTED = np.select([IDS == 7, (IDS == 9) | (IDS == 40)], [0, 1], 255)
BY_ID = """
classes:
  - {name: sky, color: [10, 20, 30], ids: [7]}
  - {name: road, color: [40, 50, 60], ids: [9, 40]}
void: [0, 255]
"""
BY_COLOR = """
mask_values: colors
classes:
- {name: sky, color: [255, 128, 0]}
- {name: road, color: [1, 2, 3]}
- {name: car, color: [1, 3, 2]}
void: [[0, 0, 0], [250, 250, 250]]
"""


def save(path: Path, values: np.ndarray, mode: str = "L") -> None:
    """A mask of IDS-like values: as gray, with a palette, 16 bits deep, or as the colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        Image.fromarray(values.astype(np.uint16)).save(path)
        return
    gray = Image.fromarray(values.astype(np.uint8))
    if mode != "L":
        gray = Image.fromarray(values.astype(np.uint8), mode="P")
        gray.putpalette([part for value in range(256) for part in COLORS.get(value, (9, 9, 9))])
    (gray.convert(mode) if mode.startswith("RGB") else gray).save(path)


def image(path: Path, kind: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(np.full((*SIZE, 3), 80, np.uint8)).save(content, kind)
    path.write_bytes(content.getvalue())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five pairs; with dots, a folder and capital extensions in their names."""
    root = tmp_path / "mine"
    for name in ("a", "b.v2", "c", "north/d", "e"):
        image(root / "images" / f"{name}{'.JPG' if name == 'c' else '.jpg'}")
        save(root / "masks" / f"{name}.png", IDS)
    (root / "images" / "._a.jpg").write_text("of another system")
    (root / "distseg.yaml").write_text(BY_ID)
    return root


def labels(root: Path, **options: str | int) -> dict[str, np.ndarray | None]:
    out = root.parent / "maps.h5"
    prepare("folder", root, out, **options)
    with MapsReader(out) as reader:
        return {key: reader.read(key).label for keys in reader.splits.values() for key in keys}


def splits(root: Path, **options: str | int) -> dict[str, set[str]]:
    out = root.parent / "maps.h5"
    prepare("folder", root, out, **options)
    with MapsReader(out) as reader:
        return {split: set(keys) for split, keys in reader.splits.items()}


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_ids_in_pictures_of_every_mode(root: Path, mode: str) -> None:
    for path in (root / "masks").rglob("*.png"):
        save(path, IDS, mode)
    found = labels(root)
    assert found.keys() == {"a", "b_v2", "c", "north_d", "e"}
    for label in found.values():
        np.testing.assert_array_equal(label, EXPECTED)


def test_ids_above_255(root: Path) -> None:
    for path in (root / "masks").rglob("*.png"):
        save(path, np.where(IDS == 9, 9000, IDS), "I;16")
    (root / "distseg.yaml").write_text(BY_ID.replace("[9, 40]", "[9000, 40]"))
    np.testing.assert_array_equal(labels(root)["a"], EXPECTED)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_colours_in_pictures_of_every_mode(root: Path, mode: str) -> None:
    for path in (root / "masks").rglob("*.png"):
        save(path, IDS, mode)
    (root / "distseg.yaml").write_text(BY_COLOR)
    expected = np.select([IDS == 7, IDS == 9, IDS == 40], [0, 1, 2], 255)
    np.testing.assert_array_equal(labels(root)["north_d"], expected)
    with MapsReader(root.parent / "maps.h5") as reader:
        assert reader.classes.palette == ((255, 128, 0), (1, 2, 3), (1, 3, 2))


def test_names_alone_are_ids_in_their_order(root: Path) -> None:
    for path in (root / "masks").rglob("*.png"):
        save(path, np.select([IDS == 7, IDS == 255], [1, 255], 0))
    (root / "distseg.yaml").write_text("classes: [sky, road]\n")
    expected = np.select([IDS == 7, IDS == 255], [1, 255], 0)
    np.testing.assert_array_equal(labels(root)["a"], expected)
    with MapsReader(root.parent / "maps.h5") as reader:
        assert reader.classes.names == ("sky", "road") and len(set(reader.classes.palette)) == 2


def test_splits_by_seed_lists_and_folders(root: Path, tmp_path: Path) -> None:
    by_seed = splits(root)
    assert len(by_seed["val"]) == 1 and splits(root) == by_seed and splits(root, seed=0) == by_seed
    assert len({frozenset(splits(root, seed=seed)["val"]) for seed in range(8)}) > 1
    (root / "t.txt").write_text("a\nnorth/d\n")
    (root / "v.txt").write_text("b.v2\n")
    (root / "distseg.yaml").write_text(BY_ID + "splits: {train: t.txt, val: v.txt}\n")
    assert splits(root) == {"train": {"a", "north_d"}, "val": {"b_v2"}}
    with pytest.raises(InputError, match="seed=1 where"):
        splits(root, seed=1)
    for name in ("train", "val"):  # both number their images alike
        image(tmp_path / "two" / name / "0001.jpg")
        save(tmp_path / "two" / name / "0001_mask.png", IDS)
    beside = (
        "images: '{split}'\nmasks: '{split}'\nmask_suffix: _mask\nsplits: [train, val]\nname: two\n"
    )
    (tmp_path / "two.yaml").write_text(BY_ID + beside)
    out = tmp_path / "two.h5"
    prepare("folder", tmp_path / "two", out, layout=str(tmp_path / "two.yaml"))
    with MapsReader(out) as reader:
        assert (reader.name, reader.splits) == (
            "two",
            {"train": ["train_0001"], "val": ["val_0001"]},
        )


def test_maps_and_shards_of_one_folder_are_not_replaced_by_those_of_another(
    root: Path, tmp_path: Path
) -> None:
    other, maps, out = tmp_path / "other", tmp_path / "other.h5", tmp_path / "shards"
    shutil.copytree(root, other)
    splits(root)
    with pytest.raises(InputError, match="the data set 'mine'"):
        prepare("folder", other, tmp_path / "maps.h5")
    prepare("folder", other, maps)
    pack(tmp_path / "maps.h5", out)
    with pytest.raises(InputError, match=r"holds the data set 'mine'[^!]*--overwrite"):
        pack(maps, out)
    assert Manifest.load(out).name == "mine"
    with pytest.raises(InputError, match=r"pack .*other\.h5 --out .*other` makes them"):
        Manifest.load(maps)


def test_images_without_a_mask_stay_unlabelled_where_that_is_allowed(root: Path) -> None:
    (root / "masks" / "c.png").unlink()
    with pytest.raises(
        InputError, match=r"1 of 5 samples are not whole, the first: c: no .*masks/c\.png"
    ):
        labels(root)
    (root / "distseg.yaml").write_text(BY_ID + "unlabelled: true\n")
    for seed in range(6):
        assert "c" in splits(root, seed=seed)["train"]
    assert [key for key, label in labels(root).items() if label is None] == ["c"]
    (root / "t.txt").write_text("a")
    (root / "v.txt").write_text("c")
    (root / "distseg.yaml").write_text(
        BY_ID + "unlabelled: true\nsplits: {train: t.txt, val: v.txt}\n"
    )
    with pytest.raises(InputError, match=r"c: no .*masks/c\.png"):  # nothing to score it by
        labels(root)


def test_a_class_that_is_in_no_mask_is_told(root: Path, tmp_path: Path) -> None:
    (root / "distseg.yaml").write_text(BY_ID.replace("void", "  - {name: boat, ids: [77]}\nvoid"))
    assert prepare("folder", root, tmp_path / "maps.h5").notes == (
        "no pixel in any label of: boat",
    )


def yaml(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "distseg.yaml").write_text(text)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no yaml": (lambda r: (r / "distseg.yaml").unlink(), "(?s)no .*distseg.yaml.*write it"),
    "broken yaml": (yaml("classes: [{"), "distseg.yaml: while parsing"),
    "binary yaml": (lambda r: (r / "distseg.yaml").write_bytes(b"\xff\x00\x80"), "distseg.yaml: "),
    "words": (yaml("sky and road"), "distseg.yaml: str instead"),
    "empty yaml": (yaml(""), "distseg.yaml: NoneType instead"),
    "unknown key": (yaml(BY_ID + "spilts: 1"), r"key 'spilts' \(nearest: splits\)"),
    "unknown key of a class": (
        yaml("classes: [{name: a, colour: [1, 2, 3]}]"),
        r"'colour' \(nearest: color\)",
    ),
    "no classes": (yaml("void: [1]"), "classes: None is no list"),
    "classes that are numbers": (yaml("classes: [1, 2]"), "1 is neither a name nor"),
    "names alone for colours": (
        yaml("mask_values: colors\nclasses: [sky]"),
        "sky needs color",
    ),
    "a name that YAML takes for no": (yaml("classes: [{name: no}]"), "name False is no text"),
    "two of one name": (yaml("classes: [{name: a}, {name: a}]"), "distseg.yaml: class names"),
    "two of one id": (yaml("classes: [{name: a, ids: [1]}, {name: b}]"), "id 1 means two things"),
    "id is void too": (yaml("classes: [{name: a, ids: [255]}]"), "id 255 means two things"),
    "id is a word": (yaml("classes: [{name: a, ids: [x]}]"), "a: id 'x'"),
    "colour of two": (yaml("classes: [{name: a, color: [1, 2]}]"), r"color \[1, 2\]"),
    "colours without colour": (yaml("mask_values: colors\nclasses: [{name: a}]"), "a needs color"),
    "void id among colours": (yaml(BY_COLOR + "name: [x]\n"), "name: .* no text"),
    "mask values of another kind": (
        yaml(BY_ID + "mask_values: rgb"),
        "'rgb' is none of ids, colors",
    ),
    "splits without a place": (yaml(BY_ID + "splits: [train, val]"), "neither a list with"),
    "no list file": (yaml(BY_ID + "splits: {train: t.txt, val: v.txt}"), "t.txt: "),
    "empty list": (
        lambda r: [(r / "t.txt").write_text("\n"), yaml(BY_ID + "splits: {train: t.txt}")(r)],
        "t.txt is empty",
    ),
    "id in a list without a file": (
        lambda r: [(r / "t.txt").write_text("a zz"), yaml(BY_ID + "splits: {train: t.txt}")(r)],
        "zz: no ",
    ),
    "list leads outside": (
        lambda r: [
            (r / "t.txt").write_text("../../../etc/passwd"),
            yaml(BY_ID + "splits: {train: t.txt}")(r),
        ],
        "passwd.jpg leads to",
    ),
    "images elsewhere": (
        yaml(BY_ID + "images: JPEGImages"),
        r"(?s)no image in .*JPEGImages.*has images, masks\)",
    ),
    "a list names a mask that is not there": (
        lambda r: [
            (r / "t.txt").write_text("images/a.jpg masks/zz.png"),
            yaml(BY_ID + "splits: {train: t.txt}")(r),
        ],
        "a: no .*mine/masks/zz.png, the mask of .*mine/images/a.jpg",
    ),
    "a list names an image that is not there": (
        lambda r: [
            (r / "t.txt").write_text("/home/x/images/zz.jpg"),
            yaml(BY_ID + "splits: {train: t.txt}")(r),
        ],
        "zz: no .*mine/images/zz.jpg",
    ),
    "a mask in a folder of its own": (
        lambda r: save(r / "masks" / "masks" / "zz.png", IDS),
        "masks_zz: no .*images/masks/zz.jpg, the image of .*masks/masks/zz.png",
    ),
    "all masks a folder deeper": (
        lambda r: [
            (r / "masks").rename(r / "m"),
            (r / "masks").mkdir(),
            (r / "m").rename(r / "masks" / "masks"),
        ],
        "(?s)a.jpg and masks/a.png.*add to the YAML: masks: masks/masks$",
    ),
    "no mask": (
        lambda r: (r / "masks" / "e.png").unlink(),
        "(?s)e: no .*masks/e.png.*unlabelled: true",
    ),
    "mask of a format that is not read": (
        lambda r: (r / "masks" / "e.png").rename(r / "masks" / "e.mat"),
        r"(?s)e: no .*masks/e\.png.*passed over in .*masks: 1 not read as images: e\.mat",
    ),
    "no image": (lambda r: (r / "images" / "e.jpg").unlink(), "e: no .*images/e.jpg"),
    "keys that meet": (
        lambda r: [image(r / "images" / "b_v2.jpg"), save(r / "masks" / "b_v2.png", IDS)],
        "would both be called 'b_v2'",
    ),
    "two images of one name": (
        lambda r: image(r / "images" / "a.png", "PNG"),
        "images/a.jpg and .*images/a.png",
    ),
    "unknown id": (
        lambda r: save(r / "masks" / "e.png", np.full(SIZE, 3)),
        "(?s)e.png: value 3 in 54 pixels.*one of: 0 void, 7 sky, 9 road",
    ),
    "colours for ids": (
        lambda r: save(r / "masks" / "e.png", IDS, "RGB"),
        "e.png: a picture in mode RGB",
    ),
    "mask of another size": (
        lambda r: save(r / "masks" / "e.png", IDS.T),
        "e.png: 9 x 6 pixels for an image 6 x 9",
    ),
    "mask is text": (
        lambda r: (r / "masks" / "e.png").write_text("hello"),
        "e.png: a mask that begins with b'hello'",
    ),
    "image is text": (
        lambda r: (r / "images" / "e.jpg").write_text("hello"),
        "e.jpg: an image that begins",
    ),
    "image is cut": (
        lambda r: (r / "images" / "e.jpg").write_bytes((r / "images" / "e.jpg").read_bytes()[:-40]),
        "e.jpg: an unreadable image",
    ),
    "image is empty": (
        lambda r: (r / "images" / "e.jpg").write_text(""),
        "e.jpg: an image that begins",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_nothing_is_written(
    root: Path, tmp_path: Path, case: str
) -> None:
    damage, message = WRONG[case]
    damage(root)
    with pytest.raises(InputError, match=message):
        prepare("folder", root, tmp_path / "maps.h5")
    assert not list(tmp_path.glob("*.h5*")) and not list(tmp_path.glob(".*"))


def test_links_are_followed_wherever_they_lead(root: Path) -> None:
    before = splits(root)
    for name in ("masks", "images/north", "images/a.jpg"):
        (root / name).rename(root.parent / Path(name).name)
        (root / name).symlink_to(root.parent / Path(name).name)
    (root / "images" / "north" / "up").symlink_to(root / "images")  # a cycle
    assert splits(root) == before
