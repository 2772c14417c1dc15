"""No name that comes from a file of data leads out of the folder that it is used in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shards.errors import InputError
from shards.manifest import Manifest, sha256_of
from shards.maps import MapsReader
from shards.names import MAX_BYTES, check_name, is_name
from shards.pack import pack
from shards.reader import ShardReader

BAD = ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\ud800"]
BAD += ["a\u2028b", "x" * (MAX_BYTES + 1), "é" * (MAX_BYTES // 2 + 1)]
GOOD = ["a", "x" * MAX_BYTES, "..a", "a..b", "Bild 1", "Aufnahme\u202fum\xa0neun", "画像", "👩‍🚀"]


@pytest.fixture
def directory(toy_shards: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(toy_shards, tmp_path / "deep" / "shards")
    return tmp_path / "deep" / "shards"


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_is_refused(name: str) -> None:
    assert not is_name(name) and not is_name(None) and not is_name(7)
    with pytest.raises(InputError, match=r"(?s)shard '.*without \"/\"") as caught:
        check_name(name, "shard", "pack again")
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_what_is_a_name_can_be_a_file(name: str, tmp_path: Path) -> None:
    assert check_name(name, "key", "") == name
    # the longest name around one that is used: a process id and an ending
    path = tmp_path / f".partial-4194304-{name}.png"
    path.write_text("")
    assert path.parent == tmp_path


def forged(directory: Path, **changes: Any) -> Manifest:
    """The manifest with another first shard of train, and a checksum that fits."""
    manifest = Manifest.load(directory)
    train = manifest.splits["train"]
    shards = (replace(train.shards[0], **changes), *train.shards[1:])
    splits = manifest.splits | {"train": replace(train, shards=shards)}
    replace(manifest, splits=splits).save(directory)
    return manifest


@pytest.mark.parametrize("name", ["../victim.tar", "{parent}/victim.tar", "notes.txt"])
def test_a_manifest_makes_pack_delete_nothing_of_others(
    name: str, directory: Path, toy_shards: Path
) -> None:
    victims = [directory.parent / "victim.tar", directory / "notes.txt"]
    for victim in victims:
        victim.write_text("mine")
    forged(directory, file=name.format(parent=directory.parent))
    with pytest.raises(InputError, match=r"manifest\.json: damaged \(.*shard "):
        pack(toy_shards.parent / "maps.h5", directory, samples_per_shard=4)
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        ShardReader(directory, "train")
    pack(toy_shards.parent / "maps.h5", directory, samples_per_shard=4, overwrite=True)
    assert [victim.read_text() for victim in victims] == ["mine", "mine"]


def test_pack_leaves_a_shard_that_is_not_called_as_its_own(
    directory: Path, toy_shards: Path
) -> None:
    (directory / "train-000000.tar").rename(directory / "holidays.tar")
    forged(directory, file="holidays.tar")
    with pytest.raises(InputError, match=r"holidays\.tar"):
        pack(toy_shards.parent / "maps.h5", directory, samples_per_shard=4)
    pack(toy_shards.parent / "maps.h5", directory, samples_per_shard=4, overwrite=True)
    assert (directory / "holidays.tar").is_file()


def _renamed(content: dict[str, Any]) -> None:
    content["splits"]["../x"] = content["splits"].pop("val")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "'../x'": lambda content: content.update(name="../x"),
    "split '../x'": _renamed,
    "'../../../x' where a count": lambda content: content["splits"]["val"]["shards"][0].update(
        num_bytes="../../../x"
    ),
    "sha256 '../x'": lambda content: content["splits"]["val"]["shards"][0].update(sha256="../x"),
    "named twice": lambda content: content["splits"]["val"]["shards"][0].update(
        file="train-000000.tar"
    ),
    "its shards have others": lambda content: content["splits"]["val"].update(num_samples=3),
    "'-1' where a count": lambda content: content.update(left_out=-1),
    "class name 7": lambda content: content["classes"]["names"].__setitem__(0, 7),
    "class name 'a\\x1b[31m'": lambda content: content["classes"]["names"].__setitem__(
        0, "a\x1b[31m"
    ),
    "8 classes": lambda content: content["splits"]["val"].update(class_pixels=[1]),
}


@pytest.mark.parametrize("said", CHANGES)
def test_every_field_of_a_manifest_is_checked(said: str, directory: Path) -> None:
    content = json.loads((directory / "manifest.json").read_text())
    CHANGES[said](content)
    with pytest.raises(InputError, match=r"here: damaged \(.*") as caught:
        Manifest.parse(json.dumps(content).encode(), "here", "pack again")
    assert said in caught.value.got


INDEX = {
    "is no name": {"key": "../../x"},
    "no name": {"key": "x\n"},
    "has no image": {"members": {}},
    "has the size": {"height": 0},
    "lies outside": {"members": {"jpg": [512, 2**70, 0]}},
    "lies outside of": {"members": {"jpg": [512, -1, 0]}},
    "no crc32": {"members": {"jpg": [512, 1, 2**70]}},
    "without key": {"members": None},
}


@pytest.mark.parametrize("said", INDEX)
def test_every_field_of_a_member_index_is_checked(said: str, directory: Path) -> None:
    path = directory / "train-000000.index.json"
    samples = json.loads(path.read_text())
    samples[1] |= INDEX[said]
    path.write_text(json.dumps(samples))
    forged(directory, index_sha256=sha256_of(path))
    with pytest.raises(InputError, match=rf"train-000000\.index\.json: .*{said}"):
        ShardReader(directory, "train")


def test_an_index_that_is_no_list_is_named(directory: Path) -> None:
    path = directory / "train-000000.index.json"
    for text in ("{}", "[" * 100_000, "[1]", "\xff"):
        path.write_text(text)
        forged(directory, index_sha256=sha256_of(path))
        with pytest.raises(InputError, match=r"train-000000\.index\.json: "):
            ShardReader(directory, "train")


def _to_other_file(file: h5py.File) -> None:
    del file["toy_00"]
    file["toy_00"] = h5py.ExternalLink("secret.h5", "toy_00")


def _to_other_bytes(file: h5py.File) -> None:
    del file["toy_00/image"]
    file["toy_00"].create_dataset(
        "image", (4,), np.uint8, external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)]
    )


def _as_text(file: h5py.File) -> None:
    del file["toy_00/image"]
    file["toy_00/image"] = "no bytes"


def _as_group(file: h5py.File) -> None:
    del file["toy_00/image"]
    file["toy_00"].create_group("image")


def _vast(name: str, shape: tuple[int, ...]) -> Callable[[h5py.File], object]:
    """Of a shape that takes no space on the disk, and all the memory that there is."""

    def change(file: h5py.File) -> None:
        del file["toy_00"][name]
        file["toy_00"].create_dataset(name, shape, np.uint8, chunks=(1,) * len(shape))

    return change


MAPS: dict[str, Callable[[h5py.File], object]] = {
    "the name": lambda file: file.attrs.update(name="../x"),
    "split": lambda file: file.attrs.update(splits=json.dumps({"../x": ["toy_00"]})),
    "key": lambda file: file.attrs.update(splits=json.dumps({"train": ["../toy_00"]})),
    "no attribute": lambda file: file.attrs.update(splits="[1]"),
    "no group of this file": _to_other_file,
    "lies in another file": _to_other_bytes,
    "toy_00: not readable": _as_text,
    "or is no data set": _as_group,
    "image of shape": _vast("image", (2**40,)),
    "label_map of shape": _vast("label_map", (8, 2**20, 2**20)),
    "listed twice": lambda file: file.attrs.update(
        splits=json.dumps({"train": ["toy_00", "toy_00"]})
    ),
}


@pytest.mark.parametrize("said", MAPS)
def test_maps_name_nothing_outside_of_themselves(
    said: str, toy_shards: Path, tmp_path: Path
) -> None:
    shutil.copy(toy_shards.parent / "maps.h5", tmp_path / "maps.h5")
    shutil.copy(toy_shards.parent / "maps.h5", tmp_path / "secret.h5")
    with h5py.File(tmp_path / "maps.h5", "r+") as file:
        MAPS[said](file)
    with pytest.raises(InputError, match=rf"maps\.h5: .*{said}"):
        MapsReader(tmp_path / "maps.h5").read("toy_00")
    assert not (tmp_path / "x-000000.tar").exists()
