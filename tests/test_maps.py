"""What goes into HDF5 maps comes out again; a file that is not whole is never taken for one."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import toy_samples

from shards.errors import InputError
from shards.maps import MapsReader, read_older_label, write_maps
from shards.sample import IGNORE_INDEX, STANFORD, Sample, to_one_hot

ZSTD = 32015  # its number among HDF5's registered filters


def equal(first: Sample, second: Sample) -> bool:
    same_label = (first.label is None) == (second.label is None)
    if first.label is not None and second.label is not None:
        same_label = np.array_equal(first.label, second.label)
    return same_label and replace(first, label=None) == replace(second, label=None)


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    samples = toy_samples()
    samples.append(replace(samples[0], key="without_label", label=None))
    assert write_maps(tmp_path / "maps.h5", "toy blobs", STANFORD, samples, len(samples)) == 13
    return tmp_path / "maps.h5"


def test_samples_come_back(maps: Path) -> None:
    with MapsReader(maps) as reader:
        assert (reader.name, reader.classes, len(reader)) == ("toy blobs", STANFORD, 13)
        expected = [sample.key for sample in toy_samples()]
        assert reader.splits == {"train": [*expected[:8], "without_label"], "val": expected[8:]}
        for sample in toy_samples():
            assert equal(reader.read(sample.key), sample)
        assert reader.read("without_label").label is None


def test_label_map_is_one_hot_in_one_compressed_chunk(maps: Path) -> None:
    sample = toy_samples()[2]
    with MapsReader(maps) as reader:
        label_map = reader.label_map(sample.key)
    np.testing.assert_array_equal(label_map, to_one_hot(sample.label, 8))
    np.testing.assert_array_equal(label_map.sum(axis=0) == 0, sample.label == IGNORE_INDEX)
    with h5py.File(maps) as file:
        stored = file[sample.key]["label_map"]
        assert stored.dtype == np.uint8 and stored.chunks == stored.shape
        assert stored.id.get_storage_size() < stored.nbytes / 4
        assert ZSTD in [stored.id.get_create_plist().get_filter(index)[0] for index in range(2)]


def test_layout_is_plain_hdf5(maps: Path) -> None:
    """Everything is there for a reader that knows nothing of this package."""
    sample = toy_samples()[9]
    with h5py.File(maps) as file:
        assert len(file) == 13 and (file.attrs["version"], file.attrs["name"]) == (1, "toy blobs")
        assert tuple(file.attrs["class_names"]) == STANFORD.names
        np.testing.assert_array_equal(file.attrs["palette"], STANFORD.palette)
        group = file[sample.key]
        assert dict(group.attrs) == {"split": "val", "source_id": sample.source_id}
        assert group["image"].dtype == np.uint8 and group["image"][()].tobytes() == sample.image
        assert sorted(file["without_label"]) == ["image"]


def test_an_open_reader_can_be_sent_to_another_process(maps: Path) -> None:
    reader = MapsReader(maps)
    key = reader.splits["val"][0]
    first = reader.read(key)
    assert equal(pickle.loads(pickle.dumps(reader)).read(key), first)


def test_damaged_bytes_are_found(maps: Path) -> None:
    """Every flipped bit in an image or a label map is an InputError that names the sample."""
    key, whole, rng = toy_samples()[0].key, maps.read_bytes(), np.random.default_rng(2)
    with h5py.File(maps) as file:
        stored = [file[key][name].id.get_chunk_info(0) for name in ("image", "label_map")]
    for trial in range(60):
        damaged, info = bytearray(whole), stored[trial % 2]
        damaged[info.byte_offset + rng.integers(info.size)] ^= 1 << rng.integers(8)
        maps.write_bytes(damaged)
        with MapsReader(maps) as reader, pytest.raises(InputError, match=key):
            reader.read(key)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated_file_is_refused(maps: Path, share: float) -> None:
    maps.write_bytes(maps.read_bytes()[: int(share * maps.stat().st_size)])
    with pytest.raises(InputError, match=r"maps\.h5"):
        MapsReader(maps)


def test_map_that_is_not_one_hot_is_refused(maps: Path) -> None:
    key = toy_samples()[0].key
    with h5py.File(maps, "r+") as file:
        file[key]["label_map"][:, 0, 0] = 1
    with (
        MapsReader(maps) as reader,
        pytest.raises(InputError, match=f"{key}: a label map that is not one-hot"),
    ):
        reader.read(key)


def test_what_is_not_maps_is_refused(tmp_path: Path, maps: Path) -> None:
    with pytest.raises(InputError, match="distseg prepare"):
        MapsReader(tmp_path / "absent.h5")
    with pytest.raises(InputError, match="distseg prepare ohe"):
        MapsReader(tmp_path)
    with MapsReader(maps) as reader, pytest.raises(InputError, match="no_such_key"):
        reader.read("no_such_key")
    with h5py.File(maps, "r+") as file:
        file.attrs["version"] = 0
    with pytest.raises(InputError, match="version 0"):
        MapsReader(maps)
    with h5py.File(tmp_path / "older.h5", "w") as file:
        file["OHE"] = np.zeros((8, 4, 4))
    with pytest.raises(InputError, match="distseg prepare ohe"):
        MapsReader(tmp_path / "older.h5")


def test_failed_write_leaves_the_earlier_file(maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, samples = maps.read_bytes(), toy_samples()
    bad = replace(samples[3], label=np.full_like(samples[3].label, 8))
    for content, message in (
        ([*samples[:3], bad], f"{bad.key}: label 8"),
        ([*samples, samples[0]], f"two samples with the key '{samples[0].key}'"),
        ([], "no samples"),
    ):
        with pytest.raises(InputError, match=message):
            write_maps(maps, "toy blobs", STANFORD, content, len(content))
    assert maps.read_bytes() == before
    assert list(maps.parent.iterdir()) == [maps]  # nothing half-written beside it


def test_full_disk_is_one_error_wherever_it_strikes(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 itself ends in a segmentation fault if it cannot write what it holds at closing."""
    before, samples, write = maps.read_bytes(), toy_samples(), os.write
    left = 0

    def limited(descriptor: int, content: memoryview) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, content[:left])
        left -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    for free in (*range(0, len(before) // 2, 9973), len(before) // 2):
        left = free
        with pytest.raises(InputError, match="disk full"):
            write_maps(maps, "toy blobs", STANFORD, samples, len(samples))
        assert maps.read_bytes() == before
        assert list(maps.parent.iterdir()) == [maps]


def test_leftover_of_a_killed_writer_is_removed(maps: Path) -> None:
    before = maps.read_bytes()
    leftover = maps.with_name(f".partial-4194305-{maps.name}")
    leftover.write_bytes(before[:1000])
    write_maps(maps, "toy blobs", STANFORD, toy_samples(), 12)
    assert list(maps.parent.iterdir()) == [maps]


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int32, bool])
@pytest.mark.parametrize("channels_first", [True, False])
def test_older_layout_in_either_order_and_any_type(
    tmp_path: Path, dtype: type, channels_first: bool
) -> None:
    label = toy_samples()[0].label
    label_map = to_one_hot(label, 8).astype(dtype)
    with h5py.File(tmp_path / "h5py_0000047.regions.txt", "w") as file:
        stored = label_map if channels_first else np.moveaxis(label_map, 0, 2)
        file.create_dataset("OHE", data=stored, compression="gzip", compression_opts=9)
    found, num_classes = read_older_label(tmp_path / "h5py_0000047.regions.txt", label.shape)
    np.testing.assert_array_equal(found, label)
    assert num_classes == 8


def test_older_cube_is_read_in_the_order_that_is_one_hot(tmp_path: Path) -> None:
    label = np.random.default_rng(0).integers(0, 8, (8, 8)).astype(np.uint8)
    with h5py.File(tmp_path / "cube.h5", "w") as file:
        file["OHE"] = np.moveaxis(to_one_hot(label, 8), 0, 2)
    np.testing.assert_array_equal(read_older_label(tmp_path / "cube.h5", (8, 8))[0], label)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones((8, 4, 5)), "not one-hot"),
        (np.full((8, 4, 5), 0.5), "not one-hot"),
        (np.zeros((8, 5, 4)), r"shape \(8, 5, 4\) for an image of \(4, 5\)"),
        (np.zeros((4, 5)), r"shape \(4, 5\)"),
    ],
)
def test_older_map_that_does_not_fit(tmp_path: Path, content: np.ndarray, message: str) -> None:
    with h5py.File(tmp_path / "map.h5", "w") as file:
        file["OHE"] = content
    with pytest.raises(InputError, match=message):
        read_older_label(tmp_path / "map.h5", (4, 5))


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_maps_that_another_process_writes_to_are_not_called_damaged(maps: Path) -> None:
    command = [sys.executable, "-S", "-c", HOLDER, str(maps)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        reader = MapsReader.__new__(MapsReader)
        reader.path, reader._file = maps, None
        # when a file is opened, and in a worker that opens it later
        for read in (lambda: MapsReader(maps), lambda: reader.read("toy_00")):
            with pytest.raises(InputError, match=rf"open for writing in process {holder.pid} "):
                read()
        holder.communicate()
    assert len(MapsReader(maps)) == 13


def test_a_mark_that_a_killed_writer_left_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    if os.fork() == 0:
        file = h5py.File(path, "w", libver="latest")
        file.attrs["a"] = 1
        file.flush()
        os._exit(0)
    os.wait()
    with pytest.raises(InputError, match=r"(?s)no process here.*h5clear"):
        MapsReader(path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    number: int, maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(f"Unable to open file (unable to lock file, errno = {number}, error = 'x')")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(InputError, match=r"(?s)has no locks.*HDF5_USE_FILE_LOCKING=FALSE"):
        MapsReader(maps)


def test_a_lock_of_another_machine_is_told_apart(
    maps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.holders.processes_with", lambda path: [])
    with maps.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"(?s)another user or machine.*LOCKING=FALSE"):
            MapsReader(maps)


def test_maps_above_the_size_of_a_chunk_are_stored_and_checked_by_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = toy_samples()
    monkeypatch.setattr("shards.maps.MAX_CHUNK", 1000)
    write_maps(tmp_path / "maps.h5", "large", STANFORD, samples, len(samples))
    with MapsReader(tmp_path / "maps.h5") as reader:
        assert all(equal(reader.read(sample.key), sample) for sample in samples)
        np.testing.assert_array_equal(
            reader.label_map(samples[2].key), to_one_hot(samples[2].label, 8)
        )
    for value in (1, 2):
        with h5py.File(tmp_path / "maps.h5", "r+") as file:
            assert file[samples[0].key]["label_map"].chunks[0] == 1
            file[samples[0].key]["label_map"][:2, 0, 0] = value
        with (
            MapsReader(tmp_path / "maps.h5") as reader,
            pytest.raises(InputError, match="not one-hot"),
        ):
            reader.read(samples[0].key)
