"""Stanford Background, from a small set in its layout and, where it is, from the real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from shards.errors import InputError
from shards.maps import MapsReader
from shards.pack import pack
from shards.prepare import prepare
from shards.prepare.stanford import samples
from shards.reader import ShardReader
from shards.sample import IGNORE_INDEX, STANFORD, decode_label

SIZES = {
    "0000047": (24, 32),
    "0000051": (32, 24),
    "0000059": (21, 32),
    "6000324": (24, 32),
    "9005273": (5, 7),
}
# void, then the eight classes: shares of all pixels in % as the data set's own text files give them
REAL_SHARES = (0.515, 14.48, 14.02, 22.52, 6.85, 4.00, 22.61, 1.34, 13.66)


def text_label(path: Path) -> np.ndarray:
    """(H, W) int, -1 for unknown: parsed in the plainest way there is."""
    return np.array(
        [[int(value) for value in line.split()] for line in path.read_text().splitlines()]
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five images in the layout of iccv09Data, with lists."""
    root = tmp_path / "iccv09Data"
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True)
    for index, (key, (height, width)) in enumerate(SIZES.items()):
        rng = np.random.default_rng(index)
        image = simplejpeg.encode_jpeg(rng.integers(0, 256, (height, width, 3), np.uint8))
        (root / "images" / f"{key}.jpg").write_bytes(image)
        np.savetxt(
            root / "labels" / f"{key}.regions.txt", rng.integers(-1, 8, (height, width)), fmt="%d"
        )
        # the original archive has these as well
        (root / "labels" / f"{key}.surfaces.txt").write_text("0 1\n")
    (root / "splits" / "train.txt").write_text("0000051\n6000324\n0000059\n0000047\n")
    (root / "splits" / "val.txt").write_text("9005273\n")
    return root


def check_every_pixel(root: Path, maps: Path, directory: Path) -> int:
    """Compare maps and shards with the raw files; returns the number of samples."""
    count = 0
    with MapsReader(maps) as maps_reader:
        for split, keys in maps_reader.splits.items():
            reader = ShardReader(directory, split)
            for index, key in enumerate(keys):
                raw, sample = reader.read(index), maps_reader.read(key)
                assert (raw.key, sample.split) == (key, split)
                assert raw.image == sample.image == (root / "images" / f"{key}.jpg").read_bytes()
                expected = text_label(root / "labels" / f"{key}.regions.txt")
                expected[expected == -1] = IGNORE_INDEX
                np.testing.assert_array_equal(decode_label(raw.label), expected)
                np.testing.assert_array_equal(sample.label, expected)
                count += 1
            assert len(reader) == len(keys)
    return count


def test_every_pixel_through_maps_and_shards(root: Path, tmp_path: Path) -> None:
    prepare("stanford", root, tmp_path / "maps.h5")
    pack(tmp_path / "maps.h5", tmp_path / "shards")
    assert check_every_pixel(root, tmp_path / "maps.h5", tmp_path / "shards") == 5
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.splits == {
            "train": ["0000051", "6000324", "0000059", "0000047"],
            "val": ["9005273"],
        }
        assert (reader.name, reader.classes) == ("stanford", STANFORD)
        assert reader.read("0000059").source_id == "iccv09Data/0000059.jpg"


def test_without_lists_a_seed_splits(root: Path) -> None:
    for path in (root / "splits").iterdir():
        path.unlink()
    (root / "splits").rmdir()

    def split(seed: int | None) -> dict[str, str]:
        return {task.key: task.split for task in samples(root, seed).tasks}

    assert split(0).keys() == SIZES.keys()
    assert list(split(0).values()).count("val") == 1  # a fifth
    assert split(0) == split(0) == split(None)
    assert len({tuple(split(seed)) for seed in range(20)}) > 1  # the keys, those of val last


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(change((root / name).read_text()))


LABEL = "labels/0000047.regions.txt"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no images": (
        lambda root: [path.unlink() for path in (root / "images").iterdir()],
        "no images",
    ),
    "no label": (lambda root: (root / LABEL).unlink(), "0000047: no .*regions"),
    "no image": (lambda root: (root / "images/6000324.jpg").unlink(), "6000324: no .*jpg"),
    "not listed": (
        rewrite("splits/train.txt", lambda text: text.replace("0000051\n", "")),
        "first: 0000051",
    ),
    "listed twice": (rewrite("splits/val.txt", lambda text: text + "0000051\n"), "first: 0000051"),
    "list without image": (rewrite("splits/val.txt", lambda text: text + "123\n"), "first: 123"),
    "no list": (lambda root: (root / "splits/val.txt").unlink(), "0 files .*val"),
    "a row too few": (
        rewrite(LABEL, lambda text: text[text.index("\n") + 1 :]),
        "0000047.* 23 rows of 32 numbers for an image 24 x 32",
    ),
    "a row cut short": (
        rewrite(LABEL, lambda text: text.rstrip()[:-2]),
        r"0000047\.regions\.txt: ",
    ),
    "transposed": (
        lambda root: np.savetxt(root / LABEL, np.zeros((32, 24)), fmt="%d"),
        "32 rows of 24",
    ),
    "label 8": (
        rewrite(LABEL, lambda text: text.replace("7", "8", 1)),
        "0000047.* label 8 where .* 8 classes",
    ),
    "label -2": (rewrite(LABEL, lambda text: text.replace("-1", "-2", 1)), "0000047.* label -2"),
    "a letter": (rewrite(LABEL, lambda text: text.replace("7", "x", 1)), "0000047.*'x'"),
    "a fraction": (rewrite(LABEL, lambda text: text.replace("7", "6.5", 1)), r"0000047.*'6\.5'"),
    "empty label": (rewrite(LABEL, lambda text: ""), "0000047"),
    "not an image": (
        lambda root: (root / "images/0000047.jpg").write_text("hello"),
        r"0000047\.jpg: an image",
    ),
    "cut image": (
        lambda root: (root / "images/0000047.jpg").write_bytes(b"\xff\xd8\xff\xe0"),
        r"0000047\.jpg: an unreadable image",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_wrong_is_named_and_nothing_is_written(
    root: Path, tmp_path: Path, case: str
) -> None:
    damage, message = DAMAGE[case]
    damage(root)
    with pytest.raises(InputError, match=message):
        prepare("stanford", root, tmp_path / "maps.h5")
    assert list(tmp_path.iterdir()) == [root]


def test_a_seed_where_lists_decide_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"seed=1 where .*splits lists"):
        prepare("stanford", root, tmp_path / "maps.h5", seed=1)


@pytest.mark.slow
@pytest.mark.skipif(
    "DISTSEG_STANFORD_ROOT" not in os.environ,
    reason="set DISTSEG_STANFORD_ROOT to the unpacked Stanford Background data set",
)
def test_real_data(tmp_path: Path) -> None:
    """All 715 images: byte-identical, every label pixel as in its text file, pixel shares as
    published.
    """
    root = Path(os.environ["DISTSEG_STANFORD_ROOT"])
    prepare("stanford", root, tmp_path / "maps.h5", workers=2)
    manifest = pack(tmp_path / "maps.h5", tmp_path / "shards", num_workers=2)
    assert check_every_pixel(root, tmp_path / "maps.h5", tmp_path / "shards") == 715
    splits = manifest.splits
    assert {name: split.num_samples for name, split in splits.items()} == {"train": 572, "val": 143}
    pixels = sum(np.array((split.void_pixels, *split.class_pixels)) for split in splits.values())
    shares = 100 * pixels / pixels.sum()
    assert [round(shares[0], 3), *np.round(shares[1:], 2)] == list(REAL_SHARES)
    readers = [ShardReader(tmp_path / "shards", split) for split in splits]
    assert len({reader.size(index) for reader in readers for index in range(len(reader))}) == 51
