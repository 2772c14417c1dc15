"""Tensors on the disk as safetensors.

In one file, or in one for each slice where the ranks hold slices.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distseg.parallel.slices import Slice, of_same_slice, slice_of
from shards.errors import InputError

SUFFIX = ".safetensors"
SLICES_KEY = "slices"  # in a file's header: {tensor: [first row, rows of the whole tensor]}


@dataclass
class TensorFile:
    """A file to be written: what this rank holds of some tensors, copied to host memory."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    # first row, rows of the whole tensor
    slices: dict[str, tuple[int, int]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it, and wait until it is on the disk. Raises OSError or SafetensorError."""
        path = folder / (self.name + SUFFIX)
        # not `save`: it would hold Python's lock, and so training, for seconds
        save_file(
            self.tensors, path, {SLICES_KEY: json.dumps(self.slices)} if self.slices else None
        )
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_host(
    parts: Mapping[str, Mapping[str, Tensor]], rank: int, world_size: int
) -> tuple[list[TensorFile], Any]:
    """The files of this rank, and a function that returns when the device has copied all into them.

    parts: {"segmentor.network": {name: tensor}, ...}, the same on every rank but for the slices it
    holds. Every file has one writer, and all ranks about as much to write. The tensors may change
    as soon as this has returned.
    """
    held = {
        part: {name: slice_of(tensor) for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    files, on_device = [], False
    for part, first in _writers(held, world_size).items():
        count = _num_files(held[part])
        if not first <= rank < first + count:
            continue
        file = TensorFile(part if count == 1 else f"{part}.{rank - first + 1}-of-{count}")
        for name, piece in held[part].items():
            if piece.count == 1 and rank > first:
                continue  # whole tensors among slices are in the first file
            on_device = on_device or piece.rows.is_cuda
            host = torch.empty(
                piece.rows.shape, dtype=piece.rows.dtype, pin_memory=piece.rows.is_cuda
            )
            file.tensors[name] = host.copy_(piece.rows, non_blocking=True)
            if piece.count > 1:
                file.slices[name] = piece.start, piece.shape[0]
        files.append(file)
    return files, _copied(on_device)


def _copied(on_device: bool) -> Callable[[], None]:
    if not on_device:
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def _num_files(tensors: Mapping[str, Slice]) -> int:
    return max((piece.count for piece in tensors.values()), default=1)


def _writers(held: Mapping[str, Mapping[str, Slice]], world_size: int) -> dict[str, int]:
    """For each part the first of the ranks that write its files, one each.

    The largest parts to the idlest ranks.
    """
    load = [0] * world_size

    def num_bytes(part: str) -> int:
        return sum(torch.Size(p.shape).numel() * p.rows.element_size() for p in held[part].values())

    chosen = {}
    for part in sorted(held, key=num_bytes, reverse=True):
        # slices 0 to count - 1 are on ranks k * count and those after it
        count = _num_files(held[part])
        first = min(range(0, world_size, count), key=lambda start: sum(load[start : start + count]))
        for rank in range(first, first + count):
            load[rank] += num_bytes(part) // count
        chosen[part] = first
    return chosen


def read(folder: Path, part: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a part, from however many files; of those that are slices in `like`, this
    rank's slice.

    Raises InputError for a damaged file, a missing one, and a tensor of another shape than in
    `like`.
    """
    try:
        with ExitStack() as opened:
            files = [
                opened.enter_context(safe_open(path, framework="pt"))
                for path in _paths(folder, part)
            ]
            pieces: dict[str, list[tuple[int, Any]]] = {}
            for file in files:
                starts = json.loads((file.metadata() or {}).get(SLICES_KEY, "{}"))
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    pieces.setdefault(name, []).append((starts.get(name, [0])[0], file))
            return {
                name: _joined(name, sorted(found, key=_start), like)
                for name, found in pieces.items()
            }
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        action = f"remove {folder}: the checkpoint before it is then used"
        raise InputError(f"{folder}: {part}: {error}", "a whole checkpoint", action) from None


def _start(piece: tuple[int, Any]) -> int:
    return piece[0]


def _paths(folder: Path, part: str) -> list[Path]:
    """The files of a part in order. Raises ValueError when one is missing."""
    whole = folder / (part + SUFFIX)
    if whole.is_file():
        return [whole]
    pattern = re.compile(re.escape(part) + r"\.(\d+)-of-(\d+)" + re.escape(SUFFIX))
    found = {
        int(m[1]): (int(m[2]), path)
        for path in folder.iterdir()
        if (m := pattern.fullmatch(path.name))
    }
    missing = (
        set(range(1, max((count for count, _ in found.values()), default=1) + 1)) - found.keys()
    )
    if missing:
        raise ValueError(f"file {min(missing)} is missing" if found else "there is no such file")
    return [found[index][1] for index in sorted(found)]


def _joined(name: str, pieces: list[tuple[int, Any]], like: Mapping[str, Tensor] | None) -> Tensor:
    """A tensor, or this rank's slice of it, from the files that hold its rows."""
    wanted = None if like is None or name not in like else like[name]
    if len(pieces) == 1 and (wanted is None or slice_of(wanted).count == 1):
        found = pieces[0][1].get_tensor(name)
        _check_shape(name, tuple(found.shape), wanted)
        # FSDP's tensors are of their own kind even where one rank holds all their rows
        return found if wanted is None else of_same_slice(found.to(wanted.device), wanted)
    rows = [file.get_slice(name) for _, file in pieces]
    lengths = [piece.get_shape()[0] for piece in rows]
    total = sum(lengths)
    _check_shape(name, (total, *rows[0].get_shape()[1:]), wanted)
    own = None if wanted is None else slice_of(wanted)
    begin, end = (0, total) if own is None else (own.start, own.start + own.rows.shape[0])
    taken: list[Tensor] = []
    for (start, _), piece, length in zip(pieces, rows, lengths, strict=True):
        low, high = max(begin, start), min(end, start + length)
        if low < high or (begin == end and not taken):
            taken.append(piece[max(0, low - start) : max(0, high - start)])
    joined = torch.cat(taken)
    return joined if wanted is None else of_same_slice(joined.to(wanted.device), wanted)


def _check_shape(name: str, shape: tuple[int, ...], wanted: Tensor | None) -> None:
    if wanted is not None and shape != tuple(wanted.shape):
        got = f"the checkpoint's {name} of shape {shape}"
        raise InputError(
            got, f"{tuple(wanted.shape)}", "choose another run_dir, or the run's own settings"
        )
