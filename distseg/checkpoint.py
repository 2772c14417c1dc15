"""Checkpoints: directories of safetensors files, published whole, loaded without running code from them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from distseg.distributed import Ranks, on_main
from shards.errors import InputError
from shards.files import check_space, disk_full, published, sync_folder

VERSION = 1
STATE_FILE, BEST_FILE = "state.json", "best.json"


class Checkpoints:
    """The checkpoints of one run: save, load, prune.

    checkpoints/step-00000500/<learner>.<part>.safetensors and state.json, written in a hidden directory beside
    it and renamed when complete and on the disk: a checkpoint is there whole or not at all.
    `identity` holds what a checkpoint must agree on with the run that loads it (key -> value).
    """

    def __init__(self, run_dir: Path, keep_last: int, identity: dict[str, Any], ranks: Ranks):
        self.directory = run_dir / "checkpoints"
        self._keep_last, self._identity, self._ranks = keep_last, identity, ranks

    def save(self, learners: dict[str, Any], state: dict[str, Any]) -> Path:
        """Write and publish; called on every rank at the same step. Returns the checkpoint's directory."""
        target = self.directory / f"step-{state['step']:08d}"
        on_main(self._ranks, lambda: self._write(target, learners, state))
        return target

    def mark_best(self, step: int, mean_iou: float) -> None:
        """Tell the score of the checkpoint just saved; it is kept for as long as none is better. On every rank."""
        on_main(self._ranks, lambda: self._mark_best(step, mean_iou))

    def latest(self) -> Path | None:
        """The newest complete checkpoint; the main rank looks, for all."""
        return on_main(self._ranks, lambda: next(iter(reversed(_published(self.directory))), None))

    def load(self, path: Path, learners: dict[str, Any]) -> dict[str, Any]:
        """Copy a checkpoint into the learners; returns its state. Raises InputError when it is another run's."""
        meta = read_state(path)
        for key, value in self._identity.items():
            if meta["identity"].get(key) != value:
                got = f"{path}: {key} is {meta['identity'].get(key)!r}, this run's is {value!r}"
                raise InputError(got, "a checkpoint of the same data and settings", "choose another run_dir")
        for name, learner in learners.items():
            learner.load_state_dict({part: _read(path / f"{name}.{part}.safetensors") for part in meta["parts"][name]})
        return meta["state"]

    def check_space(self, learners: dict[str, Any]) -> None:
        """Raise InputError, on every rank, when the disk cannot hold what will be kept and one being written."""
        parts = [part for learner in learners.values() for part in learner.state_dict().values()]
        size = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.values())
        present = len(_published(self.directory))
        needed = size * max(1, self._keep_last + 2 - present)
        action = "free some space, choose another run_dir, or lower checkpoint.keep_last"
        on_main(self._ranks, lambda: check_space(self.directory, needed, action))

    def _write(self, target: Path, learners: dict[str, Any], state: dict[str, Any]) -> None:
        partial = self.directory / f".partial-{target.name}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            parts: dict[str, list[str]] = {}
            for name, learner in learners.items():
                for part, tensors in learner.state_dict().items():
                    _save(partial / f"{name}.{part}.safetensors", tensors)
                    parts.setdefault(name, []).append(part)
            meta = {"version": VERSION, "state": state, "identity": self._identity, "parts": parts}
            _write_synced(partial / STATE_FILE, json.dumps(meta, indent=1).encode())
            sync_folder(partial)
            shutil.rmtree(target, ignore_errors=True)  # the same step again, from a run that was set back
            os.replace(partial, target)
            sync_folder(self.directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise disk_full(target) from None
        self._prune()

    def _mark_best(self, step: int, mean_iou: float) -> None:
        if mean_iou > read_best(self.directory).get("mean_iou", -1.0):
            write_json(self.directory / BEST_FILE, {"step": step, "mean_iou": mean_iou})
        self._prune()

    def _prune(self) -> None:
        best_step = read_best(self.directory).get("step")
        for path in _published(self.directory)[: -self._keep_last]:
            if int(path.name.removeprefix("step-")) != best_step:
                shutil.rmtree(path)


def find(run_dir: Path, which: str) -> Path:
    """The checkpoint "last" or "best" of a run, or one by its step. Raises InputError when there is none."""
    directory = run_dir / "checkpoints"
    published = _published(directory)
    steps = {path.name: path for path in published}
    if which == "last" and published:
        return published[-1]
    if which == "best":
        which = str(read_best(directory).get("step", which))
    name = f"step-{int(which):08d}" if which.isdecimal() else which
    if name in steps:
        return steps[name]
    there = ", ".join(steps) or "none"
    raise InputError(f"no checkpoint {which!r} in {directory}", f"last, best or a step (there: {there})", "train first")


def read_best(directory: Path) -> dict[str, Any]:
    """{"step", "mean_iou"} of the best checkpoint in checkpoints/, or {} when none was scored yet."""
    path = directory / BEST_FILE
    if not path.is_file():
        return {}
    try:
        best = json.loads(path.read_text())
        return {"step": int(best["step"]), "mean_iou": float(best["mean_iou"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error})", "the file that training wrote", "remove it") from None


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises InputError when it is damaged or of another version."""
    try:
        meta = json.loads((path / STATE_FILE).read_text())
        whole = isinstance(meta, dict) and ("version" not in meta or {"state", "identity", "parts"} <= meta.keys())
    except (OSError, ValueError):
        whole = False
    if not whole:
        action = f"remove {path}: the checkpoint before it is then used"
        raise InputError(f"{path / STATE_FILE}: damaged", "a checkpoint of distseg", action)
    if meta.get("version") != VERSION:
        got = f"{path}: version {meta.get('version')}"
        raise InputError(got, f"version {VERSION}", "use the distseg that wrote it")
    return meta


def saved_precision(run_dir: Path) -> str | None:
    """The precision of a run's last checkpoint; None before there is one."""
    published = _published(run_dir / "checkpoints")
    return read_state(published[-1])["identity"].get("precision") if published else None


def load_segmentor(path: Path, network: torch.nn.Module) -> str:
    """Copy a checkpoint's segmentor into a network: the averaged one where there is one. Returns which."""
    which = "ema" if "ema" in read_state(path)["parts"] else "segmentor"
    tensors = _read(path / f"{which}.network.safetensors")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        got = f"{path}: {str(error).splitlines()[-1].strip()}"
        raise InputError(got, "the network that the run's config.yaml names", "restore config.yaml") from None
    return which


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    with published(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _published(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-" + 8 * "[0-9]") if (path / STATE_FILE).is_file())


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        action = f"remove {path.parent}: the checkpoint before it is then used"
        raise InputError(f"{path}: {error}", "a whole checkpoint", action) from None


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    # Serialised here and written below, so that a full disk is an OSError like any other; safetensors stores no
    # strides, hence contiguous.
    _write_synced(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
