"""A folder of the older one-hot files becomes the same maps as its labels do."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import toy_samples

from shards.errors import InputError
from shards.maps import MapsReader
from shards.prepare import prepare
from shards.sample import STANFORD, to_one_hot


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve JPEG files; their float64 maps alternate between the two orders and three ways to name
    them.
    """
    root = tmp_path / "traindata"
    for folder in ("images", "h5py"):
        (root / folder).mkdir(parents=True)
    names = ("h5py_{}.regions.txt", "{}.h5", "{}.hdf5")
    for index, sample in enumerate(toy_samples()):
        (root / "images" / f"{sample.key}.jpg").write_bytes(sample.image)
        label_map = to_one_hot(sample.label, 8).astype(np.float64)
        stored = label_map if index % 2 else np.moveaxis(label_map, 0, 2)
        with h5py.File(root / "h5py" / names[index % 3].format(sample.key), "w") as file:
            file.create_dataset("OHE", data=stored, compression="gzip", compression_opts=9)
    return root


def test_labels_and_images_come_through(root: Path, tmp_path: Path) -> None:
    prepare("ohe", root, tmp_path / "maps.h5", seed=3)
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.classes == STANFORD
        assert {name: len(keys) for name, keys in reader.splits.items()} == {"train": 10, "val": 2}
        for expected in toy_samples():
            sample = reader.read(expected.key)
            assert sample.image == expected.image
            np.testing.assert_array_equal(sample.label, expected.label)


def test_other_numbers_of_classes_get_names_and_colours(root: Path, tmp_path: Path) -> None:
    for path in (root / "h5py").iterdir():
        with h5py.File(path, "r+") as file:
            stored = file["OHE"][()]
            del file["OHE"]
            channel = 0 if stored.shape[0] == 8 else 2
            file["OHE"] = np.concatenate([stored, np.zeros_like(stored)], axis=channel)
    prepare("ohe", root, tmp_path / "maps.h5")
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert reader.classes.names == tuple(f"class-{index}" for index in range(16))
        assert len(set(reader.classes.palette)) == 16


@pytest.mark.parametrize("case", ["no map", "no image", "two hot", "other classes", "other file"])
def test_what_is_wrong_is_named(root: Path, tmp_path: Path, case: str) -> None:
    path = root / "h5py" / "toy_04.h5"
    if case == "no map":
        path.unlink()
    if case == "no image":
        (root / "images" / "toy_04.jpg").unlink()
    if case == "two hot":
        with h5py.File(path, "r+") as file:
            file["OHE"][:2, :2, :] = 1
    if case == "other classes":
        with h5py.File(path, "w") as file:
            file["OHE"] = np.zeros((7, *toy_samples()[4].label.shape))
    if case == "other file":
        path.rename(root / "h5py" / "toy_04.npz")
    with pytest.raises(InputError, match="toy_04"):
        prepare("ohe", root, tmp_path / "maps.h5")
    assert not (tmp_path / "maps.h5").exists()
