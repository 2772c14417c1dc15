"""Tensors on the disk as safetensors.

In one file, or in one for each shard where the ranks hold parameter shards.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distseg.parallel.parameter_shards import ParameterShard, shard_of, sharded_like
from shards.errors import InputError
from shards.storage import is_passing, listed

SUFFIX = ".safetensors"
SLOWEST_DISK = 10e6  # bytes per second; one that takes fewer may count as stuck
SIGN_SECONDS = 1.0  # between signs of life while a large file is written
# in a file's header: {tensor: [first row, rows of the full tensor]}; the word is the format's
SHARDS_KEY = "slices"

Shards = Mapping[str, ParameterShard]  # of the tensors of a part, by name


class DamagedCheckpoint(InputError):
    """A checkpoint that is not what was written; the one before it may be sound."""


@dataclass
class TensorFile:
    """A file to be written: what this rank holds of some tensors, copied to host memory."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    # first row, rows of the full tensor
    shards: dict[str, tuple[int, int]] = field(default_factory=dict)

    def write(self, folder: Path, moved: Callable[[], None] = lambda: None) -> None:
        """Write it, and wait until it is on the disk. moved: called again and again meanwhile, for
        as long as a slow disk may take. Raises OSError or SafetensorError.
        """
        path = folder / (self.name + SUFFIX)
        header = {SHARDS_KEY: json.dumps(self.shards)} if self.shards else None
        num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        with _told_for(num_bytes / SLOWEST_DISK, moved):
            # not `save`: it would hold Python's lock, and so training, for seconds
            save_file(self.tensors, path, header)
            # safetensors does not sync, and a rename can reach the disk before the content
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def _told_for(seconds: float, moved: Callable[[], None]) -> Iterator[None]:
    """Within it `moved` is called every second, for so many seconds at most."""
    # by the clock: how far a sync has come the system does not say, and one that has lasted longer
    # than this may be stuck
    end, is_over = time.monotonic() + seconds, threading.Event()

    def tell() -> None:
        while not is_over.wait(SIGN_SECONDS) and time.monotonic() < end:
            moved()

    thread = threading.Thread(target=tell, name="slow disk", daemon=True)
    if seconds > SIGN_SECONDS:  # most files are small
        thread.start()
    try:
        yield
    finally:
        is_over.set()


def to_host(
    parts: Mapping[str, Mapping[str, Tensor]], rank: int, world_size: int
) -> tuple[list[TensorFile], Callable[[], None]]:
    """The files of this rank, and a function that returns when the device has copied all into them.

    parts: {"segmentor.network": {name: tensor}, ...}, the same on every rank but for the shards it
    holds. Every file has one writer, and all ranks about as much to write. The tensors may change
    as soon as this has returned.
    """
    shards: dict[str, Shards] = {}
    for part, tensors in parts.items():
        shards[part] = {name: shard_of(tensor) for name, tensor in tensors.items()}
    files, is_on_gpu = [], False
    # by shapes alone, so that all ranks come to the same without a message
    for part, first_rank in _first_writers(shards, world_size).items():
        count = _num_files(shards[part])
        index = rank - first_rank
        if 0 <= index < count:
            files.append(_host_copy(part, shards[part], index, count))
            is_on_gpu |= any(shard.rows.is_cuda for shard in shards[part].values())
    return files, _until_copied(is_on_gpu)


def _host_copy(part: str, shards: Shards, index: int, count: int) -> TensorFile:
    """File `index` (from 0) of the `count` of a part, with copies that may still be under way."""
    file = TensorFile(part if count == 1 else f"{part}.{index + 1}-of-{count}")
    for name, shard in shards.items():
        if shard.count == 1 and index > 0:
            continue  # full tensors among shards are in the first file
        rows = shard.rows
        # contiguous, as the format asks for, whatever the layout on the device
        # pinned, or the copy would be waited for
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        file.tensors[name] = host.copy_(rows, non_blocking=True)
        if shard.count > 1:
            file.shards[name] = shard.start, shard.shape[0]
    return file


def _until_copied(is_on_gpu: bool) -> Callable[[], None]:
    """Waits for the copies that the device has been given so far, and for nothing after them."""
    if not is_on_gpu:
        return lambda: None
    # not synchronize(): the device is given the next steps in the meantime
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def _num_files(shards: Shards) -> int:
    return max((shard.count for shard in shards.values()), default=1)


def _num_bytes(shards: Shards) -> int:
    """Of the full tensors."""
    return sum(
        torch.Size(shard.shape).numel() * shard.rows.element_size() for shard in shards.values()
    )


def _first_writers(shards: Mapping[str, Shards], world_size: int) -> dict[str, int]:
    """For each part the first of the ranks that write its files, one each.

    The largest parts to the idlest ranks.
    """
    load = [0] * world_size
    first_ranks = {}
    # the largest first: one that came last would spoil the balance
    for part in sorted(shards, key=lambda part: _num_bytes(shards[part]), reverse=True):
        # shards 0 to count - 1 are on ranks k * count and those after it
        count = _num_files(shards[part])
        starts = range(0, world_size, count)
        first = min(starts, key=lambda start: sum(load[start : start + count]))
        # shares of bytes and not of files, which differ by orders of magnitude
        for rank in range(first, first + count):
            load[rank] += _num_bytes(shards[part]) // count
        first_ranks[part] = first
    return first_ranks


class Part:
    """The files of a part of a checkpoint, each opened when something of it is asked for: a rank
    that wants its own rows opens one or two, however many ranks have written it.

    names: of the files in the folder that there are; None: it is listed. A context. Raises
    DamagedCheckpoint for a damaged file and a missing one.
    """

    def __init__(self, folder: Path, part: str, names: Collection[str] | None = None):
        self._where = f"{folder}: {part}"
        self._folder, self._opened = folder, ExitStack()
        self._files: dict[int, Any] = {}  # as safe_open gives them, by their place
        # of the tensors in shards: {name: (first row, rows of the full tensor)} of each file
        self._shards: dict[int, dict[str, tuple[int, int]]] = {}
        with self._damage():
            self._paths = _paths(folder, part, listed(folder) if names is None else names)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    # which is why the first is opened by every rank, and no other one has to be
    def names(self) -> list[str]:
        """Of all tensors: the first file has those that are full, and rows of every other one."""
        return list(self._file(0).keys())

    def open_all(self) -> None:
        """Look at headers and lengths of all files."""
        for place in range(len(self._paths)):
            self._file(place)

    def tensor(self, name: str, like: Tensor | None) -> Tensor:
        """A tensor, or of one that is sharded in `like` this rank's rows.

        Raises InputError for one of another shape.
        """
        first, is_whole = self._file(0), like is None or shard_of(like).count == 1
        if is_whole and name not in self._shards[0]:
            with self._damage():
                found = first.get_tensor(name)
            _check_shape(name, tuple(found.shape), like)
        else:
            found = self._rows(name, like)
        # FSDP's tensors are of their own kind even where one rank holds all their rows
        return found if like is None else sharded_like(found.to(like.device), like)

    def _rows(self, name: str, like: Tensor | None) -> Tensor:
        """Of a tensor the rows that this rank holds of `like`; without it, all."""
        with self._damage():
            stored = self._file(0).get_slice(name)
            shape = tuple(stored.get_shape())
            if name in self._shards[0]:
                # what all files have together
                shape = (self._shards[0][name][1], *shape[1:])
            _check_shape(name, shape, like)
            total = shape[0]
            begin, end = (0, total) if like is None else _own_rows(like)
            taken, at = [], begin
            for place in self._places_of(name, total, begin, end):
                # slices: a rank reads its rows, and not the whole tensor
                rows, start = self._file(place).get_slice(name), self._start(place, name)
                last = min(end, start + rows.get_shape()[0])
                if start <= at < last:
                    taken.append(rows[at - start : last - start])
                    at = last
            if at < end:
                raise ValueError(f"no file has rows {at} to {end - 1} of {name}")
            # a rank that holds no row still needs the type and the other dimensions
            return torch.cat(taken) if taken else stored[0:0]

    def _places_of(self, name: str, total: int, begin: int, end: int) -> range:
        """The files that have these rows of so many."""
        if name not in self._shards[0]:
            return range(1)
        # as FSDP cuts, which is how they were written: as many rows each, rounded up
        rows_per_file = max(1, -(-total // len(self._paths)))
        return range(begin // rows_per_file, -(-end // rows_per_file) if end > begin else 0)

    def _start(self, place: int, name: str) -> int:
        self._file(place)
        return self._shards[place][name][0] if name in self._shards[0] else 0

    def _file(self, place: int) -> Any:
        # kept open to the end: slices are read from the mapped files when they are asked for
        if place not in self._files:
            with self._damage():
                file = self._opened.enter_context(safe_open(self._paths[place], framework="pt"))
                self._shards[place] = json.loads((file.metadata() or {}).get(SHARDS_KEY, "{}"))
            self._files[place] = file
        return self._files[place]

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """What goes wrong within is damage, unless a disk may come back."""
        try:
            yield
        except (FileNotFoundError, SafetensorError, ValueError, KeyError) as error:
            # which is a ValueError, and says more already; or no damage, but a disk that may return
            if isinstance(error, InputError) or is_passing(error, self._folder):
                raise
            got = f"{self._where}: {error}"
            raise DamagedCheckpoint(got, "a whole checkpoint", "choose the one before it") from None


def read(
    folder: Path,
    part: str,
    like: Mapping[str, Tensor] | None = None,
    names: Collection[str] | None = None,
    moved: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """The tensors of a part, from however many files; of those that are sharded in `like`, this
    rank's shard.

    names: of the files in the folder, where they are known. moved: called at each tensor. Raises
    DamagedCheckpoint for a damaged file and a missing one, and InputError for tensors of other
    names or shapes than in `like`.
    """
    with Part(folder, part, names) as opened:
        tensors = {}
        found = opened.names()
        if like is not None:
            _check_names(f"{folder}: {part}", found, like.keys())
        for name in found:
            tensors[name] = opened.tensor(name, None if like is None else like[name])
            moved()
        return tensors


def check_readable(folder: Path, part: str) -> None:
    """Raise DamagedCheckpoint where a file of a part is missing or cut short."""
    with Part(folder, part) as opened:
        opened.open_all()


def _paths(folder: Path, part: str, names: Collection[str]) -> list[Path]:
    """The files of a part in order. Raises ValueError when one is missing."""
    # saved by one rank, or as full tensors
    if part + SUFFIX in names:
        return [folder / (part + SUFFIX)]
    pattern = re.compile(re.escape(part) + r"\.(\d+)-of-(\d+)" + re.escape(SUFFIX))
    found: dict[int, Path] = {}
    count = 1
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            found[int(match[1])] = folder / name
            # how many there were, by any of their names: the last may be missing
            count = max(count, int(match[2]))
    missing = set(range(1, count + 1)) - found.keys()
    if missing:
        raise ValueError(f"file {min(missing)} is missing" if found else "there is no such file")
    return [found[index] for index in sorted(found)]


def _own_rows(like: Tensor) -> tuple[int, int]:
    """The first row that this rank holds of a tensor, and the one behind its last."""
    shard = shard_of(like)
    return shard.start, shard.start + shard.rows.shape[0]


def _check_names(part: str, found: Collection[str], wanted: Collection[str]) -> None:
    different = sorted(set(found) ^ set(wanted))
    if different:
        got = f"{part}: {', '.join(different[:4])} in only one of checkpoint and run"
        raise InputError(
            got, "the same network and optimizer", "choose another run_dir, or the run's settings"
        )


def _check_shape(name: str, shape: tuple[int, ...], like: Tensor | None) -> None:
    if like is not None and shape != tuple(like.shape):
        raise InputError(
            f"the checkpoint's {name} of shape {shape}",
            f"{tuple(like.shape)}",
            "choose another run_dir, or the run's own settings",
        )
