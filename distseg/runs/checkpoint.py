"""Checkpoints: directories of safetensors files, published whole, loaded without running code from
them.

Not torch.distributed.checkpoint's: its metadata is pickled, and unpickling runs whatever code a
file contains.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from distseg.distributed.mailbox import Problem, Reports
from distseg.distributed.ranks import Ranks, on_each, on_main, shared_error
from distseg.runs.tensor_files import TensorFile, read, to_host
from shards.errors import InputError
from shards.files import check_space, disk_full, published, sync_folder

VERSION = 1
STATE_FILE, BEST_FILE = "state.json", "best.json"
FOLDER = "checkpoints"  # of a run directory


class Checkpoints:
    """The checkpoints of one run: save, load, prune.

    checkpoints/step-00000500/<learner>.<part>.safetensors and state.json, written by all ranks in a
    hidden directory beside it and renamed when complete and on the disk: a checkpoint is there
    whole or not at all. Of slices (FSDP), <part>.1-of-8 and so on; any number of ranks, under any
    strategy, reads either. `identity` holds what a checkpoint must agree on with the run that loads
    it (key -> value). async_save: the files are written while training goes on. What goes wrong
    then is raised by the next call of `save`, `mark_best` or `wait`, on every rank; `failed` tells
    before. timeout_seconds: how much longer than the main rank another may write.
    """

    def __init__(
        self,
        run_dir: Path,
        keep_last: int,
        identity: dict[str, Any],
        ranks: Ranks,
        *,
        async_save: bool = False,
        timeout_seconds: float = 300.0,
    ):
        self.directory = run_dir / "checkpoints"
        self._keep_last, self._identity, self._ranks = keep_last, identity, ranks
        self._async, self._timeout = async_save, timeout_seconds
        self._reports = Reports(ranks)
        self._round = 0  # saves so far
        self._thread: threading.Thread | None = None
        self._is_pending = False  # a save whose outcome nobody has asked for
        # what went wrong in it, as far as this rank knows: the main one all
        self._problem: Problem | None = None

    def save(self, learners: dict[str, Any], state: dict[str, Any]) -> Path:
        """Write and publish; called on every rank at the same step. Returns the checkpoint's
        directory.

        The tensors may change when this returns. Waits for the save before.
        """
        self.wait()
        target = self.directory / f"step-{state['step']:08d}"
        parts = {name: learner.state_dict() for name, learner in learners.items()}
        named = {
            f"{name}.{part}": tensors
            for name, of_it in parts.items()
            for part, tensors in of_it.items()
        }
        files, copied = to_host(named, self._ranks.rank, self._ranks.world_size)
        meta = {"version": VERSION, "state": state, "identity": self._identity}
        meta["parts"] = {name: list(of_it) for name, of_it in parts.items()}
        on_main(self._ranks, lambda: _raise(_problem(target, lambda: _clear(_partial(target)))))
        self._round += 1
        if self._async:
            # not a daemon: the interpreter waits for it before it ends
            self._thread = threading.Thread(
                target=self._write, args=(target, files, copied, meta), name="checkpoint"
            )
            self._thread.start()
        else:
            self._write(target, files, copied, meta)
        self._is_pending = True
        if not self._async:
            self.wait()
        return target

    def wait(self) -> None:
        """Until the last save is published.

        Raises what went wrong, on every rank. Called on every rank.
        """
        if not self._is_pending:
            return
        self.close()
        problem = on_main(self._ranks, lambda: self._problem)
        self._is_pending, self._problem = False, None
        _raise(problem)

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that the last save went wrong."""
        return self._problem is not None

    def give_up(self) -> None:
        """Wait for no other rank.

        It may be gone. What it has not written by now leaves the save incomplete.
        """
        self._reports.give_up()

    def close(self) -> None:
        """Let this rank's writing end, for better or worse."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def mark_best(self, step: int, mean_iou: float) -> None:
        """Tell the score of the checkpoint just saved.

        It is kept for as long as none is better. On every rank.
        """
        self.wait()
        on_main(self._ranks, lambda: self._mark_best(step, mean_iou))

    def latest(self) -> Path | None:
        """The newest complete checkpoint; the main rank looks, for all."""
        self.wait()
        return on_main(self._ranks, lambda: next(iter(reversed(_published(self.directory))), None))

    def load(self, path: Path, learners: dict[str, Any]) -> dict[str, Any]:
        """Copy a checkpoint into the learners; returns its state. Called on every rank.

        Raises InputError, on all of them, when it is another run's, or damaged for any rank.
        """
        meta = on_each(self._ranks, lambda: self._own_state(path))
        for name, learner in learners.items():
            own = learner.state_dict()
            reading = functools.partial(_read_parts, path, name, meta["parts"][name], own)
            learner.load_state_dict(on_each(self._ranks, reading))
        return meta["state"]

    def _own_state(self, path: Path) -> dict[str, Any]:
        """The state.json of a checkpoint of this run. Raises InputError when it is another's."""
        meta = read_state(path)
        for key, value in self._identity.items():
            if meta["identity"].get(key) != value:
                got = f"{path}: {key} is {meta['identity'].get(key)!r}, this run's is {value!r}"
                raise InputError(
                    got, "a checkpoint of the same data and settings", "choose another run_dir"
                )
        return meta

    def check_space(self, learners: dict[str, Any]) -> None:
        """Raise InputError, on every rank, when the disk cannot hold what will be kept and one
        being written.
        """
        parts = [part for learner in learners.values() for part in learner.state_dict().values()]
        size = sum(
            tensor.numel() * tensor.element_size() for part in parts for tensor in part.values()
        )
        present = len(_published(self.directory))
        needed = size * max(1, self._keep_last + 2 - present)
        action = "free some space, choose another run_dir, or lower checkpoint.keep_last"
        on_main(self._ranks, lambda: check_space(self.directory, needed, action))

    def _write(
        self,
        target: Path,
        files: list[TensorFile],
        copied: Callable[[], None],
        meta: dict[str, Any],
    ) -> None:
        """This rank's files; on the main rank, then the checkpoint's publication. Never raises."""
        problem = _problem(target, lambda: _write_files(_partial(target), files, copied))
        if self._ranks.is_main:
            reports = [problem, *self._reports.of_others(self._round, self._timeout)]
            problem = next((report for report in reports if report is not None), None)
            problem = problem or _problem(target, lambda: self._publish(target, meta))
            if problem is not None:
                shutil.rmtree(_partial(target), ignore_errors=True)
        else:
            self._reports.send(self._round, problem)
        self._problem = problem

    def _publish(self, target: Path, meta: dict[str, Any]) -> None:
        partial = _partial(target)
        _write_synced(partial / STATE_FILE, json.dumps(meta, indent=1).encode())
        sync_folder(partial)
        # the same step again, from a run that was set back
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        sync_folder(self.directory)
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


def _read_parts(
    path: Path, name: str, parts: list[str], own: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    return {part: read(path, f"{name}.{part}", own.get(part)) for part in parts}


def _partial(target: Path) -> Path:
    return target.with_name(f".partial-{target.name}")


def _clear(partial: Path) -> None:
    for left in partial.parent.glob(".partial-step-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_files(partial: Path, files: list[TensorFile], copied: Callable[[], None]) -> None:
    copied()
    for file in files:
        file.write(partial)


def _problem(target: Path, work: Callable[[], None]) -> Problem | None:
    """What went wrong in `work`; None: nothing."""
    try:
        work()
    except InputError as error:
        return {"got": error.got, "needed": error.needed, "action": error.action}
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors gives the system's error as text
        is_full = is_full or any(
            f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT)
        )
        if is_full:
            full = disk_full(target)
            return {"got": full.got, "needed": full.needed, "action": full.action}
        if isinstance(error, OSError | SafetensorError):
            got = f"{target} could not be written: {error}"
            return {
                "got": got,
                "needed": "a disk that takes files",
                "action": "then run the same command again",
            }
        return {"text": f"saving {target}: {type(error).__name__}: {error}"}
    return None


def find(run_dir: Path, which: str) -> Path:
    """The checkpoint "last" or "best" of a run, or one by its step.

    Raises InputError when there is none.
    """
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
    raise InputError(
        f"no checkpoint {which!r} in {directory}",
        f"last, best or a step (there: {there})",
        "train first",
    )


def read_best(directory: Path) -> dict[str, Any]:
    """{"step", "mean_iou"} of the best checkpoint in checkpoints/, or {} when none was scored yet."""
    path = directory / BEST_FILE
    if not path.is_file():
        return {}
    try:
        best = json.loads(path.read_text())
        return {"step": int(best["step"]), "mean_iou": float(best["mean_iou"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged ({error})", "the file that training wrote", "remove it"
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises InputError when it is damaged or of another version."""
    try:
        meta = json.loads((path / STATE_FILE).read_text())
        whole = isinstance(meta, dict) and (
            "version" not in meta or {"state", "identity", "parts"} <= meta.keys()
        )
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
    """Copy a checkpoint's segmentor into a network.

    The averaged one where there is one. Returns which.
    """
    which, tensors = read_network(path, "segmentor")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        got = f"{path}: {str(error).splitlines()[-1].strip()}"
        raise InputError(
            got, "the network that the run's config.yaml names", "restore config.yaml"
        ) from None
    return which


def read_network(path: Path, network: str) -> tuple[str, dict[str, Tensor]]:
    """The part of a checkpoint that stands for a network, and its tensors.

    network: "segmentor", of which the averaged one ("ema") is taken where there is one, or
    "discriminator". Raises InputError where the run had none.
    """
    parts = read_state(path)["parts"]
    part = "ema" if network == "segmentor" and "ema" in parts else network
    if part not in parts:
        action = f"write {network}.init=random, or name a run that had one"
        raise InputError(f"{path} has no {network}", f"a run with a {network}", action)
    return part, read(path, f"{part}.network")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    with published(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _published(directory: Path) -> list[Path]:
    return sorted(
        path for path in directory.glob("step-" + 8 * "[0-9]") if (path / STATE_FILE).is_file()
    )


def _raise(problem: Problem | None) -> None:
    """Raise the error of a problem that all ranks were told of; of None, nothing."""
    if problem is not None:
        raise shared_error(
            InputError(**problem) if "got" in problem else RuntimeError(problem["text"])
        )


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
