"""Lists of images as people and other toolboxes write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_images import RGB, saved

from shards.errors import InputError
from shards.maps import MapsReader
from shards.prepare import prepare
from shards.prepare.lists import Entry, Names, entries_of

YAML = "classes: [{name: sky}, {name: road}]\nsplits: {train: t.txt, val: v.txt}\n"
COMPOSED, APART = "caf\u00e9", "cafe\u0301"


def read(tmp_path: Path, text: str | bytes, images: Names, masks: Names | None = None) -> list:
    path = tmp_path / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return entries_of(path, images, masks)


IMAGES = ("a", "#7", "b", "b.v2", "my photo", "north/d", "Bild 1\u202fPM", COMPOSED)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a b\r\n\r\n b.v2 ", ["a", "b", "b.v2"]),
        (b"\xef\xbb\xbfa\nb", ["a", "b"]),
        ("a.jpg\nb.v2.PNG\n", ["a", "b.v2"]),
        ("my photo\nmy photo.jpg", ["my photo", "my photo"]),
        ("JPEGImages/a.jpg\n/home/x/images/north/d.jpg", ["a", "north/d"]),
        ("images\\north\\d.jpg\n./b.jpg", ["north/d", "b"]),
        ("Bild 1\u202fPM.png", ["Bild 1\u202fPM"]),
        (APART, [COMPOSED]),
        ("zz\nzz.jpg\nnot there", ["zz", "zz", "not there"]),
        ("a zz", ["a", "zz"]),
        ("images/zz.jpg masks/a.png", ["images/zz", "a"]),
        ("/my data/images/a.jpg", ["a"]),
        ("../../../etc/passwd", ["../../../etc/passwd"]),
        ("# train, 2 of 7\na\n #b\n", ["a"]),
        ("#7\n#8\na", ["#7", "a"]),
    ],
)
def test_lines_that_name_images(tmp_path: Path, text: str | bytes, expected: list[str]) -> None:
    assert [entry.image for entry in read(tmp_path, text, Names(IMAGES))] == expected


@pytest.mark.parametrize(
    "line",
    [
        "images/my photo.jpg masks/my photo.png",
        "images/my photo.jpg\tmasks/my photo.png",
        "my photo.jpg, my photo.png",
        "my photo my photo",
    ],
)
def test_a_line_of_an_image_and_its_mask(tmp_path: Path, line: str) -> None:
    images, masks = Names(IMAGES, folder="images"), Names(IMAGES, folder="masks")
    assert read(tmp_path, line, images, masks) == [Entry("my photo", "my photo")]


def test_pairs_by_list_and_names_with_suffixes(tmp_path: Path) -> None:
    images = Names(("1", "2"), "_sat", "images")
    masks = Names(("1", "2", "other"), "_mask", "data/masks")
    for line in ("1_sat.jpg 1_mask.png", "1_sat 1_mask", "x/1_sat.jpg y/1_mask.png"):
        assert read(tmp_path, line, images, masks) == [Entry("1", "1")]
    assert read(tmp_path, "1_sat.jpg\n2_mask", images, masks)[0] == Entry("1")
    assert read(tmp_path, "1_sat.jpg other_mask.png", images, masks) == [Entry("1", "other")]
    assert read(tmp_path, "images/1.png masks/2.png", images, masks) == [Entry("1", "2")]
    assert read(tmp_path, "1.png 2.png", images, masks) == [Entry("1"), Entry("2")]
    assert read(tmp_path, "1_sat.jpg lost.png", images, masks) == [Entry("1", "lost")]
    # files that are not there, by the ids that they would have
    assert read(tmp_path, "images/1_sat.jpg masks/9_mask.png", images, masks) == [Entry("1", "9")]
    assert read(tmp_path, "/x/images/9_sat.jpg", images, masks) == [Entry("9")]
    # a mask alone stands for its image
    assert read(tmp_path, "1_mask\nmasks/2_mask.png", images, masks) == [Entry("1"), Entry("2")]
    assert read(tmp_path, "1_mask 2_mask", images, masks) == [Entry("1"), Entry("2")]


def test_lists_pair_masks_of_other_names(tmp_path: Path) -> None:
    for name in "ab":
        pair(tmp_path, name, f"{name}_gt")
        list_ = f"images/{name}.jpg masks/{name}_gt.png\n"
        (tmp_path / f"{name}.txt").write_text(list_)
    (tmp_path / "distseg.yaml").write_text(
        YAML.split("\n")[0] + "\nsplits: {train: a.txt, val: b.txt}"
    )
    prepare("folder", tmp_path, tmp_path / "maps.h5")
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.splits == {"train": ["a"], "val": ["b"]}


NAME = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1)


@settings(max_examples=60)
@given(st.sets(NAME.filter(lambda name: name == name.strip(" \t") != ""), min_size=1))
def test_every_name_is_found_by_itself(tmp_path_factory, names: set[str]) -> None:
    folder = tmp_path_factory.getbasetemp()
    ordered = sorted(name for name in names if not name.startswith("\ufeff"))
    if ordered:
        found = read(folder, "\n".join(ordered), Names(ordered))
        assert [entry.image for entry in found] == ordered


def test_an_empty_or_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        read(tmp_path, b"\xef\xbb\xbf\n \n", Names(()))
    with pytest.raises(InputError, match="is empty"):
        read(tmp_path, "# nothing yet\n", Names(()))
    with pytest.raises(InputError) as why:
        entries_of(tmp_path / "nowhere", Names(()))
    assert why.value.got == f"{tmp_path / 'nowhere'}: No such file or directory"


def pair(root: Path, image: str, mask: str, value: int = 0) -> None:
    saved(root / "images" / f"{image}.jpg", Image.fromarray(RGB), "JPEG")
    label = np.full(RGB.shape[:2], value, np.uint8)
    label[0] = 1
    saved(root / "masks" / f"{mask}.png", Image.fromarray(label), "PNG")


def test_a_set_with_such_names_and_lists_is_prepared(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    pair(root, "a b", "a b")
    pair(root, "Bild 1.00\u202fPM", "Bild 1.00\u202fPM")
    pair(root, COMPOSED, APART)
    pair(root, "x", "other", value=1)
    (root / "t.txt").write_text(
        f"a b\nBild 1.00\u202fPM.jpg\nimages/{APART}.jpg\n", encoding="utf-8-sig"
    )
    (root / "v.txt").write_text("images/x.jpg masks/other.png\n")
    (root / "distseg.yaml").write_text(YAML)
    made = prepare("folder", root, tmp_path / "maps.h5")
    assert any("normal form" in note for note in made.notes)
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.splits == {"train": ["a b", "Bild 1_00 PM", COMPOSED], "val": ["x"]}
        assert (reader.read("x").label == 1).all()
    (root / "v.txt").write_text("images/x.jpg masks/lost.png\n")
    with pytest.raises(InputError, match=r"x: no .*masks/lost\.png"):
        prepare("folder", root, tmp_path / "maps.h5")


@pytest.mark.parametrize("end", ["_sat", ""])
def test_beside_each_other_either_may_have_the_suffix(tmp_path: Path, end: str) -> None:
    for name in ("1", "2"):
        saved(tmp_path / f"{name}{end}.jpg", Image.fromarray(RGB), "JPEG")
        mask = Image.fromarray(RGB[..., 0] % 2)
        saved(tmp_path / f"{name}{'' if end else '_mask'}.png", mask, "PNG")
    suffix = "image_suffix: _sat" if end else "mask_suffix: _mask"
    text = f"classes: [{{name: sky}}, {{name: road}}]\nimages: '.'\nmasks: '.'\n{suffix}\n"
    (tmp_path / "distseg.yaml").write_text(text)
    made = prepare("folder", tmp_path, tmp_path / "maps.h5")
    assert made.num_samples == {"train": 1, "val": 1}


@pytest.mark.parametrize("beside", [True, False])
def test_images_with_a_suffix_of_their_own(tmp_path: Path, beside: bool) -> None:
    images, masks = ("data", "data") if beside else ("images", "masks")
    for name in ("1", "2", "3"):
        saved(tmp_path / images / f"{name}_sat.jpg", Image.fromarray(RGB), "JPEG")
        saved(tmp_path / masks / f"{name}_mask.png", Image.fromarray(RGB[..., 0] % 2), "PNG")
    text = f"classes: [{{name: sky}}, {{name: road}}]\nimages: {images}\nmasks: {masks}\n"
    (tmp_path / "distseg.yaml").write_text(text + "mask_suffix: _mask\nimage_suffix: _sat\n")
    made = prepare("folder", tmp_path, tmp_path / "maps.h5")
    assert made.num_samples == {"train": 2, "val": 1} and made.notes == ()
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert sorted([*reader.splits["train"], *reader.splits["val"]]) == ["1", "2", "3"]
    if not beside:
        (tmp_path / "distseg.yaml").write_text(text)
        with pytest.raises(
            InputError, match="add to the YAML: image_suffix: _sat, mask_suffix: _mask"
        ):
            prepare("folder", tmp_path, tmp_path / "other.h5")


def test_images_that_share_no_name_with_any_mask_are_told(tmp_path: Path) -> None:
    pair(tmp_path, "0001", "0007")
    (tmp_path / "distseg.yaml").write_text(YAML.split("\n")[0])
    with pytest.raises(InputError, match=r"0001\.jpg and 0007\.png"):
        prepare("folder", tmp_path, tmp_path / "maps.h5")


def test_a_voc_list_of_pairs(tmp_path: Path) -> None:
    for folder, form, picture in (
        ("JPEGImages", "JPEG", RGB),
        ("SegmentationClass", "PNG", RGB[..., 0] % 2),
    ):
        for name in ("2007_1", "2007_2"):
            ending = "jpg" if form == "JPEG" else "png"
            saved(tmp_path / folder / f"{name}.{ending}", Image.fromarray(picture), form)
    for name, split in (("2007_1", "t"), ("2007_2", "v")):
        line = f"JPEGImages/{name}.jpg SegmentationClass/{name}.png\n"
        (tmp_path / f"{split}.txt").write_text(line)
    lists = {"train_list": str(tmp_path / "t.txt"), "val_list": str(tmp_path / "v.txt")}
    prepare("voc", tmp_path, tmp_path / "maps.h5", **lists)
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.splits == {"train": ["2007_1"], "val": ["2007_2"]}
