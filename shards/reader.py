"""Random access to the samples of a split, straight from the tars, every byte checked."""

from __future__ import annotations

import json
import os
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.manifest import Manifest, ShardInfo, sha256_of


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: key, image file bytes, label PNG bytes (None when unlabelled)."""

    key: str
    image: bytes
    label: bytes | None


@dataclass(frozen=True)
class _Entry:
    """Where a sample's members are: [offset, bytes, crc32] each."""

    shard: int
    key: str
    size: tuple[int, int]
    image: tuple[int, int, int]
    label: tuple[int, int, int] | None


class ShardReader:
    """The samples of one split in packed order; safe to share between threads and to send to other processes.

    Raises InputError at construction when the directory has no manifest, the split is not there, or a shard
    is missing or of another length; at `read` when a member's bytes are not the ones that were packed.
    """

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = Path(directory), split
        self.manifest = Manifest.load(self.directory)
        self.classes = self.manifest.classes
        if split not in self.manifest.splits:
            there = ", ".join(self.manifest.splits)
            raise InputError(f"no split {split!r} in {self.directory}", f"one of: {there}", "correct the split's name")
        self._shards = self.manifest.splits[split].shards
        self._entries = [entry for number, info in enumerate(self._shards) for entry in self._load_index(number, info)]
        self._descriptors: dict[int, int] = {}
        self._owner, self._lock = os.getpid(), threading.Lock()

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

    @property
    def unlabelled(self) -> list[str]:
        """Keys of the samples without a label."""
        return [entry.key for entry in self._entries if entry.label is None]

    def read(self, index: int, *, with_label: bool = True) -> RawSample:
        """The bytes of a sample. Raises InputError, naming sample and shard, where their crc32 differs."""
        entry = self._entries[index]
        label = self._member(entry, entry.label) if with_label and entry.label is not None else None
        return RawSample(entry.key, self._member(entry, entry.image), label)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_descriptors", "_owner", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptors, self._owner, self._lock = {}, os.getpid(), threading.Lock()

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)

    def _member(self, entry: _Entry, where: tuple[int, int, int]) -> bytes:
        offset, length, crc32 = where
        try:
            content = os.pread(self._descriptor(entry.shard), length, offset)
        except OSError as error:
            raise self._damaged(entry, str(error)) from None
        if len(content) != length or zlib.crc32(content) != crc32:
            raise self._damaged(entry, "its bytes are not the ones that were packed")
        return content

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self.directory / self._shards[shard].file, os.O_RDONLY)
            return self._descriptors[shard]

    def _damaged(self, entry: _Entry, why: str) -> InputError:
        path = self.directory / self._shards[entry.shard].file
        return InputError(f"sample {entry.key} in {path}: {why}", "the shard as packed", "copy or pack it again")

    def _load_index(self, number: int, info: ShardInfo) -> list[_Entry]:
        path = self.directory / info.file
        if not path.is_file() or path.stat().st_size != info.num_bytes:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            raise InputError(f"{path}: {found}", f"{info.num_bytes} bytes, as packed", "copy or pack it again")
        index = self.directory / info.index_file
        if not index.is_file() or sha256_of(index) != info.index_sha256:
            raise InputError(f"{index}: missing or not as packed", "the index of the shard", "copy or pack it again")
        return [_entry(number, sample) for sample in json.loads(index.read_bytes())]


def _entry(shard: int, sample: dict[str, Any]) -> _Entry:
    members = sample["members"]
    image = next(members[kind] for kind in ("jpg", "image.png") if kind in members)
    label = tuple(members["png"]) if "png" in members else None
    return _Entry(shard, sample["key"], (sample["height"], sample["width"]), tuple(image), label)
