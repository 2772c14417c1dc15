"""Random access to the samples of a split, straight from the tars, every byte checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib  # its crc32 takes a tenth of the time of zlib's

from shards.errors import DamageError, InputError
from shards.index import Entry, Indices
from shards.manifest import ShardInfo
from shards.source import open_source
from shards.storage import retried


# undecoded: what is read here is decoded and warped by the caller's threads, in one go
@dataclass(frozen=True)
class RawSample:
    """A sample as stored: key, image file bytes, label PNG bytes (None when unlabelled)."""

    key: str
    image: bytes
    label: bytes | None


class ShardReader:
    """The samples of one split in packed order; safe to share between threads and to send to other
    processes.

    location: a folder, or a URL (http, https, s3, gs), whose shards are kept in cache_dir, at most
    cache_bytes of them (shards.cache has the defaults). Raises InputError at construction when
    there is no manifest, the split is not there, or (of a split that is not too large to look, see
    shards.index) a local shard is missing or of another length; at `read` when a member's bytes are
    not the ones that were packed, or a remote shard cannot be had. verify: whether shards and
    indices in a folder are compared with the manifest; else `verify` does it, on one process of
    many.
    """

    def __init__(
        self,
        location: str | Path,
        split: str,
        *,
        cache_dir: str = "",
        cache_bytes: float = 0,
        verify: bool = True,
    ):
        self.location, self.split = location, split
        # manifest, split, indices: the cheap checks first, and all of them before a rank or a GPU
        # is touched
        self._source = open_source(location, cache_dir, cache_bytes)
        self.manifest = self._source.manifest()
        self.classes = self.manifest.classes
        if split not in self.manifest.splits:
            there = ", ".join(self.manifest.splits)
            raise InputError(
                f"no split {split!r} in {location}", f"one of: {there}", "correct the split's name"
            )
        self._shards = self.manifest.splits[split].shards
        # of a set of millions of samples no index is read yet
        self._entries = Indices(self._source, self._shards, verify=verify)

    def verify(self) -> None:
        """Compare shards and indices in a folder with the manifest. Raises InputError."""
        self._entries.verify()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def keys(self) -> list[str]:
        """Names of the samples, in packed order."""
        return [entry.key for entry in self._entries]

    def key(self, index: int) -> str:
        """Name of a sample."""
        return self._entries[index].key

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a sample, without reading it."""
        return self._entries[index].size

    def fingerprint(self, index: int) -> tuple[str, int, int]:
        """Key of a sample, and bytes and crc32 of its image's file, without reading it."""
        entry = self._entries[index]
        _, num_bytes, crc32 = entry.image
        return entry.key, num_bytes, crc32

    def content_sha256(self) -> str:
        """Identity of what the split holds: keys, images, classes and how many pixels each has.

        The same however it was packed: into other shards, under another name. Reads no sample.
        """
        split, digest = self.manifest.splits[self.split], hashlib.sha256()
        about = (self.classes.names, split.class_pixels, split.void_pixels)
        digest.update(json.dumps(about).encode())
        # without the labels' own bytes, which another compressor writes otherwise; and sorted, as
        # the order of packing changes no score
        for line in sorted((entry.key, *entry.image[1:]) for entry in self._entries):
            digest.update(json.dumps(line).encode())
        return digest.hexdigest()

    @property
    def unlabelled(self) -> list[str]:
        """Keys of the samples without a label."""
        if all(shard.num_unlabelled == 0 for shard in self._shards):
            return []  # without a look at the indices
        return [entry.key for entry in self._entries if entry.label is None]

    @property
    def shard_sizes(self) -> list[int]:
        """Number of samples in each shard of the split, in packed order."""
        return [shard.num_samples for shard in self._shards]

    def shard_of(self, indices: Sequence[int]) -> np.ndarray:
        """Number of the shard that each of these samples lies in."""
        return self._entries.shard_of(indices)

    def class_pixels(self) -> np.ndarray:
        """(samples, classes) int64: pixels of each class in each sample, 0 where it has no label.
        Reads no label.

        Raises InputError for shards of a pack that did not count them.
        """
        counts = np.zeros((len(self), self.classes.num_classes), np.int64)  # (samples, classes)
        for index, pixels in enumerate(self._entries.pixels()):
            for value, count in (pixels or {}).items():
                if int(value) < self.classes.num_classes:  # the other one is void
                    counts[index, int(value)] = count
        return counts

    def read(self, index: int, *, with_label: bool = True) -> RawSample:
        """The bytes of a sample.

        Raises InputError, naming sample and shard, where their crc32 differs, and StorageError
        where the shard, which was there, could not be read for long.
        """
        for again in (True, False):
            try:
                return self._read(self._entries[index], with_label)
            except (OSError, DamageError) as error:
                # a cached copy that is damaged has been thrown away, and comes anew
                if not (again and isinstance(error, DamageError)):
                    got = f"{self.place(index)}: {error}"
                    raise InputError(got, "the shard as packed", "copy or pack it again") from None
        raise AssertionError("unreachable")

    def find(self, file: str) -> bytes | None:
        """All of a small file beside the manifest, where there is one."""
        return self._source.find(file)

    def expect(self, indices: Sequence[int]) -> None:
        """Say that these samples will be read soon, in this order.

        Shards that are far away are fetched ahead.
        """
        self._source.expect(self._shards_of(indices))

    def used(self, indices: Sequence[int]) -> None:
        """Say that another process has read these, so that what was expected after them may be
        fetched.
        """
        self._source.used(self._shards_of(indices))

    def tell(self, moved: Callable[[], None]) -> None:
        """Call `moved`, from any thread of this process, whenever more of a shard that is far away
        has come.
        """
        self._source.tell(moved)

    def place(self, index: int) -> str:
        """Name of a sample and of the shard it lies in, for messages."""
        entry = self._entries[index]
        return f"sample {entry.key} in {self._source.place(self._shards[entry.shard].file)}"

    def _shards_of(self, indices: Sequence[int]) -> list[ShardInfo]:
        """Each once, in the order of first use."""
        # a dict, since a set would lose the order, by which they are fetched ahead
        return [self._shards[number] for number in dict.fromkeys(self.shard_of(indices).tolist())]

    def _read(self, entry: Entry, with_label: bool) -> RawSample:
        shard = self._shards[entry.shard]

        def read() -> RawSample:
            # opened once for both members: in between, a cached shard could be removed to make room
            with self._source.open(shard) as descriptor:
                image, label = _member(descriptor, entry.image), None
                if with_label and entry.label is not None:
                    label = _member(descriptor, entry.label)
            return RawSample(entry.key, image, label)

        # expected: it was there when this reader was made
        return retried(Path(self._source.place(shard.file)), read, expected=True)


def _member(descriptor: int, where: tuple[int, int, int]) -> bytes:
    offset, length, crc32 = where
    # pread has no position to move: threads share the descriptor without a lock
    content = os.pread(descriptor, length, offset)
    # a file that was cut off gives fewer bytes, and no error
    if len(content) != length or isal_zlib.crc32(content) != crc32:
        raise DamageError("its bytes are not the ones that were packed")
    return content
