"""Shards have the same bytes whoever writes them, plain webdataset reads them, and damage is always
seen.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import toy_samples
from PIL import Image

import shards.pack
from shards.errors import InputError
from shards.manifest import Manifest
from shards.maps import MapsReader, MapsWriter, write_maps
from shards.pack import pack
from shards.reader import ShardReader
from shards.sample import IGNORE_INDEX, STANFORD, Sample, decode_image
from shards.verified import is_verified, withdraw


def mixed_samples() -> list[Sample]:
    """The toy samples, one of them a PNG original, one without a label."""
    samples = toy_samples()
    file = io.BytesIO()
    Image.fromarray(decode_image(samples[1].image)).save(file, "PNG")
    samples[1] = replace(samples[1], image=file.getvalue())
    samples[4] = replace(samples[4], label=None)
    return samples


def write(path: Path, samples: list[Sample], name: str = "toy blobs") -> Path:
    write_maps(path, name, STANFORD, samples, len(samples))
    return path


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("maps") / "maps.h5", mixed_samples())


@pytest.fixture(scope="module")
def packed(maps: Path) -> Path:
    """Three training shards and two validation shards."""
    pack(maps, maps.parent / "packed", samples_per_shard=3)
    return maps.parent / "packed"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bytes_do_not_depend_on_the_number_of_workers(
    maps: Path, packed: Path, tmp_path: Path, num_workers: int
) -> None:
    pack(maps, tmp_path, samples_per_shard=3, num_workers=num_workers)
    assert contents(tmp_path) == contents(packed)


def test_plain_webdataset_reads_the_shards(packed: Path) -> None:
    shards_of = {name: sorted(map(str, packed.glob(f"{name}-*.tar"))) for name in ("train", "val")}
    assert {name: len(found) for name, found in shards_of.items()} == {"train": 3, "val": 2}
    read = [
        row
        for found in shards_of.values()
        for row in webdataset.WebDataset(found, shardshuffle=False)
    ]
    for row, sample in zip(read, mixed_samples(), strict=True):
        kind = "image.png" if sample.key == "toy_01" else "jpg"
        assert row["__key__"] == sample.key
        assert row[kind] == sample.image
        assert json.loads(row["json"]) == {"source_id": sample.source_id, "split": sample.split}
        if sample.label is None:
            assert "png" not in row
        else:
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(row["png"]))), sample.label
            )


def test_manifest_counts_every_pixel(packed: Path) -> None:
    manifest = Manifest.load(packed)
    assert (manifest.name, manifest.classes) == ("toy blobs", STANFORD)
    for name, split in manifest.splits.items():
        samples = [sample for sample in mixed_samples() if sample.split == name]
        labels = [sample.label.ravel() for sample in samples if sample.label is not None]
        counts = np.bincount(np.concatenate(labels), minlength=256)
        assert split.num_samples == len(samples) == sum(shard.num_samples for shard in split.shards)
        unlabelled = sum(sample.label is None for sample in samples)
        assert sum(shard.num_unlabelled or 0 for shard in split.shards) == unlabelled
        assert (list(split.class_pixels), split.void_pixels) == (
            list(counts[:8]),
            counts[IGNORE_INDEX],
        )
    manifest.verify(packed)


def test_packing_again_leaves_no_stale_shard(maps: Path, packed: Path, tmp_path: Path) -> None:
    pack(maps, tmp_path, samples_per_shard=1)
    (tmp_path / "notes.txt").write_text("mine")
    pack(maps, tmp_path, samples_per_shard=3)
    assert contents(tmp_path) == contents(packed) | {"notes.txt": b"mine"}


def test_shards_of_something_else_are_not_touched(maps: Path, packed: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.h5", toy_samples(), name="other")
    for case in ("another data set", "no manifest", "damaged manifest"):
        out = tmp_path / case
        shutil.copytree(packed, out)
        if case == "no manifest":
            (out / "manifest.json").unlink()
        if case == "damaged manifest":
            (out / "manifest.json").write_text("{}")
        before = contents(out)
        with pytest.raises(InputError, match="empty it first"):
            pack(other, out)
        assert contents(out) == before
        pack(other, out, overwrite=True)
        assert Manifest.load(out).name == "other"
        assert {path.name for path in out.glob("*.tar")} == {"train-000000.tar", "val-000000.tar"}
    with pytest.raises(InputError, match="is a file"):
        pack(maps, other)


def broken(sample: Sample) -> Sample:
    """The header is sound, so only a whole decode sees it."""
    middle = len(sample.image) // 2
    return replace(sample, image=sample.image[:middle] + sample.image[-2:])


def test_failed_pack_leaves_the_earlier_one(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    samples = mixed_samples()
    bad = write(tmp_path / "bad.h5", [*samples[:9], broken(samples[9]), *samples[10:]])
    with pytest.raises(InputError, match="toy_09: an unreadable image") as caught:
        pack(bad, out)
    # the way it leaves a worker
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert contents(out) == contents(packed)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    with pytest.raises(InputError, match="disk full"):
        pack(bad, out)
    assert contents(out) == contents(packed)


def test_too_little_space_is_seen_before_anything_is_written(
    maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=maps.stat().st_size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="MB free"):
        pack(maps, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_take_less_space_than_was_asked_for(
    maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(shards.pack, "check_space", lambda _, num_bytes: asked.append(num_bytes))
    pack(maps, tmp_path, samples_per_shard=1)
    assert sum(map(len, contents(tmp_path).values())) <= asked[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB: the earlier pack fits, with less than another beside it."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk, and not in every container")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_leaves_the_earlier_pack(
    packed: Path, maps: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one, that fills up while shards are written.

    Another process took what check_space had found free.
    """
    out = small_disk / "out"
    shutil.copytree(packed, out)
    monkeypatch.setattr(shards.pack, "check_space", lambda *_: None)
    for num_workers in (0, 2):
        with pytest.raises(InputError, match="disk full") as caught:
            pack(maps, out, samples_per_shard=4, num_workers=num_workers)
        assert contents(out) == contents(packed)
        assert not open_files(small_disk), f"with the frames of {caught.value!r}"
    shutil.rmtree(out)
    (small_disk / "other").write_bytes(bytes(150_000))
    with pytest.raises(InputError, match="disk full") as caught:
        pack(maps, out, samples_per_shard=4)
    assert not out.exists() or not list(out.iterdir())
    assert not open_files(small_disk), f"with the frames of {caught.value!r}"


def open_files(folder: Path) -> list[str]:
    """Files in a folder that this process has open, removed ones too."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of this listing
            links.append(os.readlink(descriptor))
    return [path for path in links if path.startswith(f"{folder}/")]


def pack_killed(maps: Path, out: Path, at: int) -> bool:
    """Pack in a child process that is killed at its `at`-th rename; False when there were fewer."""
    child = os.fork()
    if child == 0:
        left, rename = [at], os.replace

        def replace_or_die(source: object, target: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = replace_or_die
        pack(maps, out, samples_per_shard=4)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def read_all(directory: Path) -> list[tuple[str, bytes, bytes | None]]:
    """Everything in every split, by all the checks that there are."""
    manifest = Manifest.load(directory)
    manifest.verify(directory)
    readers = [ShardReader(directory, split) for split in manifest.splits]
    raws = [reader.read(index) for reader in readers for index in range(len(reader))]
    return [(raw.key, raw.image, raw.label) for raw in raws]


def test_killed_pack_is_whole_or_refused_and_packing_again_repairs_it(
    maps: Path, tmp_path: Path
) -> None:
    """Killed at every rename: readers see the earlier pack, the new one, or an InputError."""
    earlier = write(tmp_path / "earlier.h5", toy_samples()[::-1])
    pack(maps, tmp_path / "new", samples_per_shard=4)
    pack(earlier, tmp_path / "old", samples_per_shard=3)
    wholes = [read_all(tmp_path / "new"), read_all(tmp_path / "old")]
    out, at, refused, unrecorded = tmp_path / "out", 1, 0, 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        if not pack_killed(maps, out, at):
            break
        try:
            assert read_all(out) in wholes
        except InputError:
            refused += 1
        # between the manifest and its record the pack is whole, but training asks for an inspection
        else:
            unrecorded += not is_verified(out, Manifest.load(out))
        pack(maps, out, samples_per_shard=4)
        assert contents(out) == contents(tmp_path / "new")
        at += 1
    assert unrecorded == 1
    assert at > 14 and refused > 0  # 3 shards, 3 indices and a manifest, each written and moved


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_packing_unchanged_maps_does_nothing_and_mends_what_is_damaged(
    packed: Path, maps: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    before = times(out)
    assert pack(maps, out, samples_per_shard=3) == Manifest.load(out)
    assert times(out) == before
    withdraw(out)  # lost while copying, say
    pack(maps, out, samples_per_shard=3)
    assert contents(out) == contents(packed)
    damaged = bytearray((out / "train-000001.tar").read_bytes())
    damaged[700] ^= 4
    (out / "train-000001.tar").write_bytes(damaged)
    pack(maps, out, samples_per_shard=3)
    assert contents(out) == contents(packed)
    manifest = json.loads((out / "manifest.json").read_text())
    for source in manifest["sources"].values():  # as guarded as all the rest
        (out / "manifest.json").write_text(json.dumps(manifest).replace(source, source[::-1]))
        with pytest.raises(InputError, match="damaged"):
            Manifest.load(out)


def test_a_manifest_from_before_sources_keeps_its_identity(
    packed: Path, maps: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "out")
    whole = Manifest.load(packed)
    earlier = replace(whole, sources={})
    earlier.save(tmp_path / "out")
    assert earlier.sha256 == whole.sha256 == Manifest.load(tmp_path / "out").sha256
    assert "left_out" not in (tmp_path / "out" / "manifest.json").read_text()


def more(path: Path, split: str, keys: str = "more") -> Path:
    samples = [
        replace(sample, key=f"{keys}_{index:02d}", split=split)
        for index, sample in enumerate(toy_samples())
    ]
    return write(path, samples)


def test_an_appended_split_leaves_the_others_as_they_were(
    packed: Path, maps: Path, tmp_path: Path
) -> None:
    out, extra = tmp_path / "out", more(tmp_path / "extra.h5", "test")
    shutil.copytree(packed, out)
    about_all = {"manifest.json", "verified.json"}
    there = {name: time for name, time in times(out).items() if name not in about_all}
    pack(extra, out, samples_per_shard=5, append=True)
    assert {name: time for name, time in times(out).items() if name in there} == there
    read_all(out)
    reader, expected = ShardReader(out, "test"), toy_samples()
    assert [reader.read(index).image for index in range(len(reader))] == [
        sample.image for sample in expected
    ]
    assert Manifest.load(out).splits["train"] == Manifest.load(packed).splits["train"]
    after = times(out)
    pack(extra, out, samples_per_shard=5, append=True)  # the same commands again
    pack(maps, out, samples_per_shard=3)
    assert times(out) == after
    withdraw(out)
    pack(maps, out, samples_per_shard=3)
    assert not is_verified(out, Manifest.load(out))  # these maps say nothing of the other split
    with pytest.raises(InputError, match=r"splits from several maps: .*test"):
        pack(maps, out, samples_per_shard=2)  # would lose the split
    manifest = Manifest.load(out)  # likewise where the first pack was one without sources
    replace(manifest, sources={"test": manifest.sources["test"]}).save(out)
    with pytest.raises(InputError, match=r"splits from several maps: .*test"):
        pack(maps, out, samples_per_shard=3)


def test_samples_that_were_left_out_are_added_up(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "out")
    for split, bad in (("test", ["a", "b"]), ("extra", ["c"])):
        samples = [
            replace(sample, key=f"{split}_{index:02d}", split=split)
            for index, sample in enumerate(toy_samples())
        ]
        with MapsWriter.publishing(tmp_path / "extra.h5", "toy blobs", STANFORD) as writer:
            for sample in samples:
                writer.add(sample)
            writer.left_out |= dict.fromkeys(bad, "no image")
        pack(tmp_path / "extra.h5", tmp_path / "out", append=True)
    assert Manifest.load(tmp_path / "out").left_out == 3


@pytest.mark.parametrize("verified", [True, False])
def test_appending_vouches_for_its_own_shards_only(
    packed: Path, tmp_path: Path, verified: bool
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    if not verified:  # `distseg inspect` found damage, say
        withdraw(out)
    pack(more(tmp_path / "extra.h5", "test"), out, append=True)
    assert is_verified(out, Manifest.load(out)) == verified


@pytest.mark.parametrize(
    ("split", "keys", "classes", "message"),
    [
        ("val", "more", STANFORD, "split 'val' is in"),
        ("test", "toy", STANFORD, "8 keys are in .* toy_00 in train"),
        (
            "test",
            "more",
            replace(STANFORD, names=tuple(reversed(STANFORD.names))),
            "has the classes sky, tree",
        ),
        # the colours alone
        (
            "test",
            "more",
            replace(STANFORD, palette=tuple(reversed(STANFORD.palette))),
            "has the classes sky, tree",
        ),
    ],
)
def test_what_cannot_be_appended(
    packed: Path, tmp_path: Path, split: str, keys: str, classes, message: str
) -> None:
    extra, out = more(tmp_path / "extra.h5", split, keys), tmp_path / "out"
    with MapsReader(extra) as reader:
        samples = [reader.read(key) for key in reader.splits[split]]
    write_maps(extra, "toy blobs", classes, samples, len(samples))
    shutil.copytree(packed, out)
    with pytest.raises(InputError, match=message):
        pack(extra, out, append=True)
    assert contents(out) == contents(packed)
