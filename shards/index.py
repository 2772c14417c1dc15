"""The member indices of a split.

Where every sample lies. Read at the start, or of large sets when they are needed.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.manifest import ShardInfo
from shards.names import is_name
from shards.source import Source
from shards.words import counted

MAX_INDEXED = 1_000_000  # samples whose places are held, at about 150 bytes each


@dataclass(frozen=True)
class Entry:
    """Where a sample's members are: [offset, bytes, crc32] each."""

    shard: int
    key: str
    size: tuple[int, int]
    image: tuple[int, int, int]
    label: tuple[int, int, int] | None


class _ShardIndex:
    """A member index as one array: a Python object a sample would take four times as much."""

    def __init__(self, content: bytes, place: str, num_bytes: int):
        samples = parsed(content, place)
        try:
            self.keys = [sample["key"] for sample in samples]
            numbers = [_numbers(sample) for sample in samples]
            # reshape: of no sample at all the array would be (0,)
            self.numbers = np.array(numbers, np.int64).reshape(-1, 8)
            sound = all(map(is_name, self.keys)) and _are_sound(self.numbers, num_bytes)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError, StopIteration):
            sound = False
        # together first, as a large set has millions; one by one only to say which it is
        problems = (problem_of(sample, num_bytes) for sample in samples) if not sound else ()
        problem = "" if sound else next(filter(None, problems), "numbers that are none")
        if problem:
            needed, action = "the index of the shard", "copy or pack it again"
            raise InputError(f"{place}: {problem}", needed, action)

    def entry(self, shard: int, place: int) -> Entry:
        height, width, *members = self.numbers[place].tolist()
        # no member begins at 0, where a tar's first header is
        label = tuple(members[3:]) if members[3] else None
        return Entry(shard, self.keys[place], (height, width), tuple(members[:3]), label)


class Indices:
    """Entries of the samples of a split in packed order, addressed by 0, 1, 2, ...; safe to share
    between threads.

    Up to max_indexed samples all indices are read at once, so that one that is missing or damaged
    is found before time is spent; of a larger split only when a sample of the shard is asked for,
    and those used last are kept. Raises InputError, naming the index, for one that is not as
    packed; with verify=False only where it cannot be one, until `verify` is called.
    """

    def __init__(
        self,
        source: Source,
        shards: Sequence[ShardInfo],
        max_indexed: int | None = None,
        verify: bool = True,
    ):
        self._source, self._shards = source, shards
        self._max_indexed = MAX_INDEXED if max_indexed is None else max_indexed
        # of each shard, and the end
        self.starts = np.cumsum([0, *(shard.num_samples for shard in shards)])
        self._forget()
        if len(self) <= self._max_indexed:
            for shard, content in enumerate(source.indices(shards, verify)):
                self._keep(shard, self._parsed(shard, content))

    def verify(self) -> None:
        """Compare those that were read at the start with what was packed. Raises InputError."""
        # of a larger split each is compared when it is read
        if len(self) <= self._max_indexed:
            for _ in self._source.indices(self._shards):
                pass

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shard_of(self, indices: Sequence[int]) -> np.ndarray:
        """Number of the shard that each sample lies in."""
        # right: the first sample of a shard belongs to it, and not to the one before
        return np.searchsorted(self.starts, np.asarray(indices), side="right") - 1

    def __getitem__(self, index: int) -> Entry:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(self.starts.searchsorted(index, side="right")) - 1
        return self._of(shard).entry(shard, index - int(self.starts[shard]))

    def __iter__(self) -> Iterator[Entry]:
        return (self[index] for index in range(len(self)))

    def pixels(self) -> Iterator[dict[str, int] | None]:
        """Pixels per label value of every sample, in order; None: unlabelled. From the indices, no
        label is read.

        Raises InputError for shards of a pack that did not count them.
        """
        # read once more, not held: asked for once, before training, and longer than the places
        for shard, content in zip(self._shards, self._source.indices(self._shards), strict=True):
            for sample in parsed(content, self._source.place(shard.index_file)):
                if "png" in sample["members"] and "pixels" not in sample:
                    got = (
                        f"{self._source.place(shard.index_file)}: no pixels per class and sample, "
                        "as older packs have"
                    )
                    raise InputError(
                        got,
                        "them, to balance the classes",
                        "run `distseg pack` again on the same maps",
                    )
                yield sample.get("pixels")

    def _of(self, shard: int) -> _ShardIndex:
        with self._lock:
            found = self._held.get(shard)
            if found is not None:
                self._held.move_to_end(shard)
                return found
        # outside of the lock: threads that read other shards do not wait for a far index; that two
        # may fetch the same one does no harm
        (content,) = self._source.indices([self._shards[shard]])
        found = self._parsed(shard, content)
        self._keep(shard, found)
        return found

    def _parsed(self, shard: int, content: bytes) -> _ShardIndex:
        info = self._shards[shard]
        return _ShardIndex(content, self._source.place(info.index_file), info.num_bytes)

    def _keep(self, shard: int, index: _ShardIndex) -> None:
        if len(index.keys) != self._shards[shard].num_samples:
            place = self._source.place(self._shards[shard].index_file)
            got = f"{place}: {counted(len(index.keys), 'sample')}"
            raise InputError(
                got, f"the manifest's {self._shards[shard].num_samples}", "pack the data again"
            )
        with self._lock:
            if shard not in self._held:
                self._held[shard] = index
                self._num_held += len(index.keys)
            # the one just asked for stays, even where it alone is above the bound
            while self._num_held > self._max_indexed and len(self._held) > 1:
                self._num_held -= len(self._held.popitem(last=False)[1].keys)

    def _forget(self) -> None:
        self._held: OrderedDict[int, _ShardIndex] = OrderedDict()  # least recently used first
        self._num_held, self._lock = 0, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            # a lock cannot be pickled, and a worker reads the few indices that it needs
            if name not in ("_held", "_num_held", "_lock")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _are_sound(numbers: np.ndarray, num_bytes: int) -> bool:
    """What `problem_of` asks of one sample, of (samples, 8) int64: sides, image, label."""
    sides, members = numbers[:, :2], numbers[:, 2:].reshape(-1, 3)
    offset, length, crc32 = members.T
    # an absent label is three zeros
    inside = (offset > 0) & (length >= 0) & (offset <= num_bytes - length) | ~members.any(1)
    in_range = (sides > 0).all() and (sides < 2**31).all() and (crc32 >= 0).all()
    return bool(inside.all() and in_range and (crc32 < 2**32).all())


def parsed(content: bytes, place: str) -> list[Any]:
    """The samples of a member index. Raises InputError for what is no list in JSON."""
    try:
        samples = json.loads(content)
        if isinstance(samples, list):
            return samples
        problem = f"{type(samples).__name__} instead of a list"
    # RecursionError: of brackets without end
    except (ValueError, RecursionError) as error:
        problem = f"no JSON ({error})"
    raise InputError(f"{place}: {problem}", "the index of the shard", "copy or pack it again")


def problem_of(sample: Any, num_bytes: int) -> str:
    """What is wrong with a line of a member index of a shard of so many bytes; "" for nothing.

    Whatever stands in a file that was damaged, or made by others, ends here.
    """
    try:
        key, members = sample["key"], sample["members"]
        if not is_name(key):
            return f"the key {repr(key)[:80]} is no name"
        if not {"jpg", "image.png"} & members.keys():
            return f"{key} has no image"
        sides = sample["height"], sample["width"]
        if not all(type(side) is int and 0 < side < 2**31 for side in sides):
            return f"{key} has the size {str(sides)[:80]}"
        names = sample.get("names", {})
        if not all(isinstance(names[kind], str) for kind in names):
            return f"{key} has members without names"
        for kind, (offset, length, crc32) in members.items():
            numbers = all(type(number) is int for number in (offset, length, crc32))
            # behind the tar's first header, and whole
            if not (numbers and 0 < offset <= offset + length <= num_bytes and length >= 0):
                return f"the .{kind} of {key} lies outside of the shard"
            # another number would not fit 64 bits, and no bytes have it
            if not 0 <= crc32 < 2**32:
                return f"the .{kind} of {key} has no crc32"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"a sample without key, size and members ({error!r})"[:160]
    return ""


def is_labelled(sample: dict[str, Any]) -> bool:
    """Whether the sample of a line of a member index has a label."""
    return "png" in sample["members"]


def _numbers(sample: dict[str, Any]) -> tuple[int, ...]:
    members = sample["members"]
    # an original that is a PNG is called .image.png, since .png is the label
    image = next(members[kind] for kind in ("jpg", "image.png") if kind in members)
    return (sample["height"], sample["width"], *image, *members.get("png", (0, 0, 0)))
