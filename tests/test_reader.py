"""The reader gives exactly the packed bytes or an InputError that names what is damaged."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import toy_samples

import shards.index
from distseg.config import loading
from distseg.distributed.ranks import Ranks
from distseg.evaluate.run import data_suffix
from distseg.train.inputs import open_data
from shards.errors import InputError
from shards.manifest import Manifest, sha256_of
from shards.maps import MapsReader, write_maps
from shards.pack import pack
from shards.reader import RawSample, ShardReader
from shards.sample import STANFORD, decode_label
from shards.source import LocalSource
from shards.verified import check_verified
from tests.ranks import run_ranks


@pytest.fixture
def directory(toy_shards: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(toy_shards, tmp_path / "shards")
    return tmp_path / "shards"


def read_all(directory: Path) -> list[RawSample]:
    readers = [ShardReader(directory, split) for split in ("train", "val")]
    return [reader.read(index) for reader in readers for index in range(len(reader))]


def test_gives_what_was_packed(toy_shards: Path) -> None:
    for split in ("train", "val"):
        reader = ShardReader(toy_shards, split)
        samples = [sample for sample in toy_samples() if sample.split == split]
        assert len(reader) == len(samples)
        for index, sample in enumerate(samples):
            raw = reader.read(index)
            assert (raw.key, raw.image) == (sample.key, sample.image) and reader.key(
                index
            ) == sample.key
            np.testing.assert_array_equal(decode_label(raw.label), sample.label)
            assert reader.size(index) == sample.label.shape


def test_threads_and_processes_read_the_same(toy_shards: Path) -> None:
    reader = ShardReader(toy_shards, "train")
    expected = [reader.read(index) for index in range(8)]
    order = np.random.default_rng(0).integers(0, 8, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, order)) == [expected[index] for index in order]
    assert pickle.loads(pickle.dumps(reader)).read(5) == expected[5]
    with multiprocessing.get_context("fork").Pool(2) as pool:  # descriptors are open already
        assert pool.map(reader.read, order[:50]) == [expected[index] for index in order[:50]]


def test_no_damage_goes_unseen(toy_shards: Path, directory: Path) -> None:
    """Flipped bits and truncations in all files.

    Verify sees each, the reader never gives other bytes.
    """
    expected, rng = read_all(toy_shards), np.random.default_rng(3)
    files = sorted(path.name for path in toy_shards.iterdir())
    assert "verified.json" in files
    unread = 0
    for trial in range(300):
        name = files[trial % len(files)]
        whole = (toy_shards / name).read_bytes()
        damaged = bytearray(whole)
        if trial % 4 == 0:
            del damaged[rng.integers(len(whole)) :]
        else:
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (directory / name).write_bytes(damaged)
        with pytest.raises(InputError):
            check_verified(ShardReader(directory, "train"))
            Manifest.load(directory).verify(directory)
        try:
            assert read_all(directory) == expected
        except InputError as error:
            assert name.split(".")[0] in str(error)
        else:
            unread += 1
            # a bit in a tar header or its padding, which the reader never reads, or in the record
            # that training reads
            assert name.endswith(".tar") or name == "verified.json"
        (directory / name).write_bytes(whole)
    assert read_all(directory) == expected
    assert unread < 100


def test_damage_names_sample_and_shard(directory: Path) -> None:
    reader = ShardReader(directory, "train")
    path = directory / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[content.index(reader.read(4).image) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"sample toy_04 in .*train-000001\.tar"):
        ShardReader(directory, "train").read(4)
    path.write_bytes(content[:2000])  # cut while it is open: no stale length is trusted
    with pytest.raises(InputError, match=r"train-000001\.tar"):
        reader.read(4)


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.index.json"])
def test_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(InputError, match=f"(?s){name}.*missing"):
        ShardReader(directory, "train")
    with pytest.raises(InputError, match=name):
        Manifest.load(directory).verify(directory)


def verify_on_two_machines(ranks: Ranks, directory: Path) -> tuple[str, int]:
    """What a rank is told, and how many indices it has hashed itself; 2 ranks a machine."""
    own = Ranks(ranks.rank, ranks.world_size, ranks.rank % 2, ranks.device)
    hashed, compare = [], LocalSource.indices
    config = loading.load([f"data.shards={directory}", "batch_size=4", "data.crop_px=32"])
    data = open_data(config, ranks.world_size)

    def counted(self: LocalSource, shards: Any, verify: bool = True) -> Any:
        hashed.extend(shards if verify else [])
        return compare(self, shards, verify)

    LocalSource.indices = counted  # type: ignore[method-assign]
    try:
        data.verify(own)
    except InputError as error:
        return error.got, len(hashed)
    return "", len(hashed)


def test_of_a_machines_ranks_one_compares_the_indices_and_all_are_told(directory: Path) -> None:
    sound = run_ranks(4, verify_on_two_machines, directory)
    assert [num_hashed > 0 for _, num_hashed in sound] == [True, False, True, False]
    assert {said for said, _ in sound} == {""}
    path = directory / "train-000001.index.json"
    content = path.read_text()
    # a number that could be one: nothing else would notice before the sample is read
    path.write_text(content.replace('"height": ', '"height": 1', 1))
    damaged = run_ranks(4, verify_on_two_machines, directory)
    assert len({said for said, _ in damaged}) == 1 and "not as packed" in damaged[1][0]


def test_no_manifest_gives_the_command(directory: Path) -> None:
    with pytest.raises(InputError, match=rf"name a data set in it: {directory}$"):
        Manifest.load(directory.parent)
    (directory / "manifest.json").unlink()
    with pytest.raises(InputError, match=rf"distseg pack {directory}\.h5 --out {directory}`"):
        ShardReader(directory, "train")


def test_what_is_no_shards_gives_the_commands_that_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = {
        "toy": "prepare toy --out data/toy.h5`, then `distseg pack data/toy.h5 --out data/toy`$",
        "voc": "prepare voc --root DIR --out data/voc.h5`, then",
        "mine": "prepare NAME --root DIR --out data/mine.h5`, then",
    }
    for name, command in commands.items():
        with pytest.raises(InputError, match=f"distseg {command}"):
            Manifest.load(Path("data", name))
    # maps that are there are made no second time
    Path("data").mkdir()
    Path("data/toy.h5").touch()
    with pytest.raises(InputError, match=r"make it: `distseg pack data/toy\.h5 --out data/toy`$"):
        Manifest.load(Path("data/toy"))
    # shards of a raw folder never come to lie among its images
    for raw, out in {"scenes": "data/scenes", "data/more": "data/more-shards"}.items():
        Path(raw, "images").mkdir(parents=True)
        found = rf"prepare folder --root {raw} --out {out}\.h5`, then `.* --out {out}`$"
        for refuses in (Manifest.load, MapsReader):
            with pytest.raises(InputError, match=found):
                refuses(Path(raw))
    Path("scenes/a.h5").touch()
    with pytest.raises(InputError, match="older layout"):
        MapsReader(Path("scenes"))


def test_manifest_of_another_version(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(InputError, match=r"version 2\n  needed: version 1"):
        ShardReader(directory, "train")


def test_absent_split_names_the_others(toy_shards: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)no split 'test'.*train, val"):
        ShardReader(toy_shards, "test")


def test_manifest_keeps_its_identity(directory: Path) -> None:
    manifest = Manifest.load(directory)
    manifest.save(directory)
    assert Manifest.load(directory) == manifest
    assert Manifest.load(directory).sha256 == manifest.sha256


def older(directory: Path) -> Path:
    """The shards as a pack wrote them that did not count pixels and unlabelled samples."""
    manifest = Manifest.load(directory)
    splits = {}
    for name, split in manifest.splits.items():
        infos = []
        for info in split.shards:
            path = directory / info.index_file
            entries = json.loads(path.read_text())
            path.write_text(
                json.dumps(
                    [{key: entry[key] for key in entry if key != "pixels"} for entry in entries]
                )
            )
            infos.append(replace(info, index_sha256=sha256_of(path), num_unlabelled=None))
        splits[name] = replace(split, shards=tuple(infos))
    replace(manifest, splits=splits).save(directory)
    assert "num_unlabelled" not in (directory / "manifest.json").read_text()
    return directory


def test_older_shards_are_read_but_cannot_balance_classes(
    toy_shards: Path, directory: Path
) -> None:
    assert read_all(older(directory)) == read_all(toy_shards)
    reader = ShardReader(directory, "train")
    assert reader.unlabelled == []
    with pytest.raises(InputError, match=r"(?s)train-000000\.index\.json.*distseg pack"):
        reader.class_pixels()


def test_of_a_large_split_only_some_indices_are_held(
    toy_shards: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_all(toy_shards)
    monkeypatch.setattr(shards.index, "MAX_INDEXED", 5)
    assert read_all(directory) == expected
    reader = ShardReader(directory, "train")
    assert not reader._entries._held  # nothing is read at the start
    order = np.random.default_rng(0).integers(0, 8, 300).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, order)) == [expected[index] for index in order]
    held = reader._entries._held
    assert sum(len(index.keys) for index in held.values()) == reader._entries._num_held <= 5
    content = (directory / "train-000002.index.json").read_text()
    (directory / "train-000002.index.json").write_text(content.replace("toy_07", "toy_70"))
    with pytest.raises(InputError, match=r"train-000002\.index\.json"):
        ShardReader(directory, "train").read(7)
    with pytest.raises(IndexError):
        reader.read(8)


def test_content_is_what_is_stored_not_how_it_was_packed(toy_shards: Path, tmp_path: Path) -> None:
    samples = toy_samples()
    changed = [replace(samples[8], label=np.zeros_like(samples[8].label)), *samples[9:]]
    other_image = [replace(samples[8], image=samples[0].image), *samples[9:]]
    sums = {split: ShardReader(toy_shards, split).content_sha256() for split in ("train", "val")}
    found = []
    for number, some in enumerate((samples, samples[::-1], changed, other_image)):
        maps, out = tmp_path / f"{number}.h5", tmp_path / str(number)
        write_maps(maps, f"name {number}", STANFORD, some, len(some))
        pack(maps, out, samples_per_shard=5)
        found.append(ShardReader(out, "val").content_sha256())
    assert found[:2] == [sums["val"]] * 2
    # the names of the files that their scores are written to
    one, other = (ShardReader(tmp_path / str(number), "val") for number in (0, 2))
    assert data_suffix(one, one.manifest.sha256) == ""
    assert data_suffix(one, "x") == f"-name 0-{sums['val'][:8]}" != data_suffix(other, "x")
    assert len({*sums.values(), *found}) == 4
