"""HDF5 maps into WebDataset shards: deterministic, checksummed, in parallel, the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from shards.errors import InputError
from shards.files import check_space, published, say, sync_folder, tracked
from shards.manifest import FILE_NAME, VERSION, Manifest, ShardInfo, SplitInfo, sha256_of
from shards.maps import MapsReader
from shards.processes import check_workers, mapped
from shards.reader import ShardReader
from shards.sample import (
    IGNORE_INDEX,
    Sample,
    check_sample,
    decode_image,
    encode_label,
    image_extension,
)
from shards.verified import is_verified, mark_verified
from shards.words import IS, counted

STAGING = ".packing"
# of what is written, for readers of the same manifest version; 2: pixels per sample in the indices
LAYOUT = 2
# ours alone: what else lies in the folder is never removed
SHARD_NAME = re.compile(r"[^./]+-\d{6}\.(tar|index\.json)")
# bytes, at most: three tar headers with padding and a sample's lines of the index; a tar's end and
# its manifest entry
MEMBER_OVERHEAD, TAR_OVERHEAD = 8192, 16384


# small and plain: it travels to a worker process, which reads the samples itself
@dataclass(frozen=True)
class _Task:
    """One shard to write."""

    split: str
    file: str
    keys: list[str]


@dataclass(frozen=True)
class _Written:
    """What a written shard adds to the manifest."""

    info: ShardInfo
    pixels: np.ndarray  # (256,) int64, by index


def pack(
    maps: Path,
    out: Path,
    *,
    samples_per_shard: int = 256,
    num_workers: int = 0,
    overwrite: bool = False,
    append: bool = False,
) -> Manifest:
    """Write <split>-<number>.tar shards, their member indices, then the manifest, and return it.

    The bytes depend on the maps and samples_per_shard alone, not on the number of worker processes
    (0: none). Members of a sample: .jpg (original bytes; .image.png for a PNG original), .png
    (label, see sample.encode_label; absent when unlabelled), .json. Everything is written in a
    folder beside the old shards and moved into place when it is complete, so that a pack that fails
    leaves an earlier one as it was. Where `out` holds just that already, whole, nothing is done.
    append: add the maps' splits to the shards there. Raises InputError for a damaged map, an
    unreadable image, too little disk space, or, unless `overwrite`, a directory that holds other
    shards; to append, for other classes, a split or a key that is there.
    """
    _check_options(samples_per_shard, num_workers, overwrite, append)
    reader = MapsReader(maps)
    sources = dict.fromkeys(sorted(reader.splits), source_of(maps, samples_per_shard))
    unchanged = _unchanged(out, sources)
    if unchanged is not None:
        _say_unchanged(out, unchanged, sources)
        return unchanged
    there = _extended(out, reader) if append else None
    earlier = set() if append else _earlier_shards(out, reader.name, overwrite)
    tasks: list[_Task] = []
    for name, keys in sorted(reader.splits.items()):
        tasks += _tasks(name, keys, samples_per_shard)
    overhead = len(reader) * MEMBER_OVERHEAD + len(tasks) * TAR_OVERHEAD
    check_space(out, maps.stat().st_size + overhead)  # labels take less as PNG than as maps
    reader.close()  # an open HDF5 file does not survive a fork; each worker opens it for itself
    with _staging(out) as staging:
        written = _write_all(reader, staging, tasks, num_workers)
        manifest = _manifest(reader, _splits(tasks, written, reader), sources)
        _publish(staging, out, manifest, earlier, there)
    return Manifest.load(out)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """The folder that shards are written in until all are whole; gone afterwards."""
    staging = out / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # of a pack that was killed
    try:
        yield staging
    finally:
        # also after an error: half-written shards would fill the disk that the error may be about
        shutil.rmtree(staging, ignore_errors=True)


def _check_options(samples_per_shard: int, num_workers: int, overwrite: bool, append: bool) -> None:
    check_workers(num_workers)
    if samples_per_shard < 1 or (overwrite and append):
        got = f"samples_per_shard={samples_per_shard}, overwrite={overwrite}, append={append}"
        raise InputError(
            got,
            "at least one sample per shard, and not both of the others",
            "correct samples_per_shard" if samples_per_shard < 1 else "leave out one of them",
        )


def _say_unchanged(out: Path, there: Manifest, sources: dict[str, str]) -> None:
    say(f"{out} holds these maps already: nothing to do")
    if there.splits.keys() == sources.keys() and not is_verified(out, there):
        # its bytes are those that a pack which looks at everything has written
        mark_verified(out, there)


def source_of(maps: Path, samples_per_shard: int) -> str:
    """Hex digits that are the same when packing gives the same bytes."""
    return hashlib.sha256(
        # by content, not by time: maps that were prepared again are the same bytes, and cost no
        # packing
        f"{sha256_of(maps)} {samples_per_shard} {VERSION}.{LAYOUT}".encode()
    ).hexdigest()


def _unchanged(out: Path, sources: dict[str, str]) -> Manifest | None:
    """The manifest in `out` when all of these splits are there, from the same sources and with
    every byte.
    """
    # a staging folder: a pack was killed, perhaps while it moved its shards over those of the
    # manifest
    if not (out / FILE_NAME).is_file() or (out / STAGING).is_dir():
        return None
    try:
        there = Manifest.load(out)
        if any(there.sources.get(split) != source for split, source in sources.items()):
            return None
        # every byte of them: else a shard that was cut off since would be kept by "nothing to do"
        there.verify(out)
    except InputError:
        return None  # damaged: packing again is the way to mend it
    return there


def _extended(out: Path, reader: MapsReader) -> Manifest:
    """The manifest in `out`, to which the splits of these maps can be added.

    Raises InputError when they cannot.
    """
    _check_own(out)
    there = Manifest.load(out)
    # the order, too: labels are indices into it, and would change their meaning in silence
    if there.classes != reader.classes:
        got = (
            f"{out} has the classes {', '.join(there.classes.names)}; "
            f"the maps {', '.join(reader.classes.names)}"
        )
        raise InputError(
            got, "the same names and colours, in the same order", "prepare the maps with those"
        )
    twice = sorted(there.splits.keys() & reader.splits.keys())
    if twice:
        raise InputError(
            f"split {twice[0]!r} is in {out} already", "a new split", "pack both into another --out"
        )
    # a key in two splits would mean that an image is trained on and validated on, or that two
    # images answer to one name in reports
    new = set(chain.from_iterable(reader.splits.values()))
    for split in there.splits:
        shared = sorted(new & set(ShardReader(out, split).keys))
        if shared:
            got = f"{counted(len(shared), 'key', verb=IS)} in {out} already, "
            got += f"the first: {shared[0]} in {split}"
            raise InputError(
                got, "each key in one split", "leave these samples out, or rename them"
            )
    return there


def _earlier_shards(out: Path, name: str, overwrite: bool) -> set[str]:
    """Files in `out` that this pack replaces.

    Raises InputError for shards that are not a pack of `name`.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "a directory", "choose another --out")
    _check_own(out)
    needed, action = (
        "an empty directory, or an earlier pack of the same data",
        "choose another --out, empty it first, or replace what is there with --overwrite",
    )
    named: set[str] = set()
    if (out / FILE_NAME).is_file() and not overwrite:
        try:
            there = Manifest.load(out)
        except InputError as error:
            raise InputError(error.got, needed, action) from None
        # by name, so that a second pack of other data into a folder by mistake destroys nothing
        if there.name != name:
            got = f"{out} holds the data set {there.name!r}, the maps are {name!r}"
            raise InputError(got, needed, action)
        # none: of a pack before there were sources
        if len({there.sources.get(split) for split in there.splits}) > 1:
            got = f"{out} holds splits from several maps: {', '.join(there.splits)}"
            raise InputError(
                got, needed, "choose another --out, or replace all of them with --overwrite"
            )
        named = _files_of(there)
    # by their form, since after a kill no manifest need name what lies here
    present = {path.name for path in out.glob("*") if SHARD_NAME.fullmatch(path.name)}
    # a pack was killed, perhaps while it moved its shards into place
    if overwrite or (out / STAGING).is_dir():
        return present
    foreign = sorted(path.name for path in out.glob("*.tar") if path.name not in named)
    if foreign:
        raise InputError(f"{out} holds {foreign[0]}, which no manifest there names", needed, action)
    return named


def _check_own(out: Path) -> None:
    """Raise InputError for tars that others wrote: nothing of theirs is replaced."""
    if not (out / FILE_NAME).is_file():
        return
    try:
        is_foreign = bool(Manifest.load(out).codes)
    except InputError:
        return  # damaged: told, or written over, elsewhere
    if is_foreign:
        got = f"{out} holds shards of others, which `distseg import` found there"
        raise InputError(got, "a folder of `distseg pack`'s own", "choose another --out")


def _publish(
    staging: Path, out: Path, manifest: Manifest, earlier: set[str], there: Manifest | None
) -> None:
    """Move the shards into place. An old manifest does not fit them: whole only with the new one.

    there: the manifest that these shards are appended to; it stays true until the new one replaces
    it. Its shards are not looked at again: all together are verified where they were.
    """
    is_sound = there is None or is_verified(out, there)
    named = _files_of(manifest)
    if there is not None:
        splits, sources = there.splits | manifest.splits, there.sources | manifest.sources
        manifest = replace(
            there, splits=splits, sources=sources, left_out=there.left_out + manifest.left_out
        )
    # saved before the first shard moves: a disk that is full stops here, with the old pack whole
    manifest.save(staging)
    for file in sorted(named):
        os.replace(staging / file, out / file)
    for file in earlier - named:  # plain webdataset globs would find them
        (out / file).unlink(missing_ok=True)
    # last: until here the old manifest, which does not fit any more, makes readers refuse the
    # folder; a kill leaves the staging folder, by which the next pack knows
    os.replace(staging / FILE_NAME, out / FILE_NAME)
    # the folder on the disk before the record: what says "verified" must never outlive a rename
    # that a power cut takes back
    sync_folder(out)
    if is_sound:
        mark_verified(out, manifest)  # every image was decoded and every label checked on the way
    else:
        say(
            f"the shards that were in {out} are not verified: "
            f"training will ask for `distseg inspect {out}`"
        )


def _files_of(manifest: Manifest) -> set[str]:
    """Shards and indices of a manifest that have the form of this module's names.

    Files of other names are others', whatever a manifest says: they are neither moved nor removed.
    """
    names: set[str] = set()
    for shard in manifest.shards():
        names |= {shard.file, shard.index_file}
    return {name for name in names if SHARD_NAME.fullmatch(name)}


def _tasks(split: str, keys: list[str], samples_per_shard: int) -> Iterator[_Task]:
    for number, start in enumerate(range(0, len(keys), samples_per_shard)):
        # six digits, as in webdataset's own lists of shards: train-{000000..000041}.tar
        yield _Task(split, f"{split}-{number:06d}.tar", keys[start : start + samples_per_shard])


def _write_all(
    reader: MapsReader, out: Path, tasks: list[_Task], num_workers: int
) -> list[_Written]:
    # a shard a task: no two processes share a file, and which of them wrote it changes no byte
    written = mapped(partial(_write_shard, reader, out), tasks, num_workers)
    return list(tracked(written, len(tasks), f"packing {out.parent.name}"))


def _write_shard(reader: MapsReader, out: Path, task: _Task) -> _Written:
    """Write one tar and its member index, each whole or not at all."""
    pixels, num_unlabelled = np.zeros(256, np.int64), 0  # (256,) int64
    about: dict[str, dict[str, Any]] = {}
    with published(out / task.file) as partial:
        # a fixed mtime, user and mode: the same samples give the same bytes. A file that TarWriter
        # opened itself it would leave open where the disk is full.
        with (
            partial.open("wb") as file,
            webdataset.TarWriter(file, encoder=False, mtime=0, compress=False) as tar,
        ):
            for key in task.keys:
                sample = reader.read(key)
                # checked once, here, so that training need not: what is packed can be decoded
                height, width = _check(sample, reader.classes.num_classes)
                about[key] = {"height": int(height), "width": int(width)}
                if sample.label is None:
                    num_unlabelled += 1
                else:
                    counts = np.bincount(sample.label.ravel(), minlength=256)
                    about[key]["pixels"] = {
                        str(value): int(counts[value]) for value in np.flatnonzero(counts)
                    }
                    pixels += counts
                tar.write(_members(sample))
        # read back from the file: offsets and crc32 of what lies there, not of what was meant
        index = _index(partial, about)
    path = out / task.file
    index_path = path.with_suffix(".index.json")
    with published(index_path) as partial:
        partial.write_text(json.dumps(index, indent=0, sort_keys=True) + "\n")
    # of the files as they lie on the disk, which are what a reader will compare
    checksums = (sha256_of(path), sha256_of(index_path))
    return _Written(
        ShardInfo(task.file, len(task.keys), path.stat().st_size, *checksums, num_unlabelled),
        pixels,
    )


def _check(sample: Sample, num_classes: int) -> tuple[int, int]:
    """Height and width of a sound sample.

    Decodes the whole image, which would else fail in training.
    """
    check_sample(sample, num_classes)
    try:
        return decode_image(sample.image).shape[:2]
    except InputError as error:
        raise InputError(f"{sample.key}: {error.got}", error.needed, error.action) from None


def _members(sample: Sample) -> dict[str, Any]:
    extension = image_extension(sample.image)
    members: dict[str, Any] = {
        "__key__": sample.key,
        # webdataset tells members apart by what follows the first dot: a PNG original must not take
        # the label's name
        "image.png" if extension == "png" else extension: sample.image,
    }
    if sample.label is not None:
        members["png"] = encode_label(sample.label)
    about: dict[str, Any] = {"source_id": sample.source_id, "split": sample.split}
    about |= {"origin": sample.origin} if sample.origin else {}
    members["json"] = json.dumps(about, sort_keys=True).encode()
    return members


def _index(path: Path, about: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per sample: key, what is told about it, and [offset, bytes, crc32] of each of its members."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            # at the first dot, as webdataset does; check_sample keeps dots out of keys
            key, _, kind = member.name.partition(".")
            content = tar.extractfile(member)
            assert content is not None  # every member is a file
            entry = samples.setdefault(key, {"key": key, **about[key], "members": {}})
            # a crc32 of each member: a reader that takes one sample cannot hash the whole shard,
            # and without one a flipped bit in a JPEG would be trained on
            entry["members"][kind] = [member.offset_data, member.size, zlib.crc32(content.read())]
    return list(samples.values())


def _manifest(
    reader: MapsReader, splits: dict[str, SplitInfo], sources: dict[str, str]
) -> Manifest:
    left_out = len(reader.left_out)
    return Manifest(VERSION, reader.name, reader.classes, splits, left_out, sources)


def _splits(
    tasks: list[_Task], written: list[_Written], reader: MapsReader
) -> dict[str, SplitInfo]:
    # sorted, as the tasks are: the manifest's bytes must not depend on the order in the maps
    shards: dict[str, list[_Written]] = {name: [] for name in sorted(reader.splits)}
    for task, shard in zip(tasks, written, strict=True):
        shards[task.split].append(shard)
    return {name: _split(of_split, reader) for name, of_split in shards.items()}


def _split(written: list[_Written], reader: MapsReader) -> SplitInfo:
    # (256,) by label value
    pixels = sum((shard.pixels for shard in written), np.zeros(256, np.int64)).tolist()
    infos = tuple(shard.info for shard in written)
    num_samples = sum(info.num_samples for info in infos)
    return SplitInfo(
        infos, num_samples, tuple(pixels[: reader.classes.num_classes]), pixels[IGNORE_INDEX]
    )
