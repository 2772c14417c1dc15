"""A checkpoint on the disk: finding it, and reading what it says without the run that wrote it.

A checkpoint is a folder checkpoints/step-00000500 of a run with safetensors files and state.json:
{"version", "state": {"step", ...}, "identity": {key: value}, "parts": {learner: [part, ...]}}.
See distseg/runs/checkpointer.py for how it gets there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distseg.runs.tensor_files import read
from shards.errors import InputError

VERSION = 1  # of the layout; another one is refused, not guessed at
FOLDER = "checkpoints"
STATE_FILE, BEST_FILE = "state.json", "best.json"


def published(directory: Path) -> list[Path]:
    """The complete checkpoints in a run's checkpoints/, oldest first."""
    # no looser pattern: a user may keep a copy beside them, which is not ours to count or remove
    paths = sorted(directory.glob("step-" + 8 * "[0-9]"))
    # state.json is written after all tensors: a folder without it was never finished
    return [path for path in paths if (path / STATE_FILE).is_file()]


def find(run_dir: Path, which: str) -> Path:
    """The checkpoint "last" or "best" of a run, or one by its step.

    Raises InputError when there is none.
    """
    directory = run_dir / FOLDER
    by_name = {path.name: path for path in published(directory)}
    if which == "last" and by_name:
        # by name: with eight digits that is by step
        return by_name[max(by_name)]
    # "best" before any was scored stays the word, which the error then shows
    wanted = str(read_best(directory).get("step", which)) if which == "best" else which
    name = f"step-{int(wanted):08d}" if wanted.isdecimal() else wanted
    if name in by_name:
        return by_name[name]
    steps = [str(int(name.removeprefix("step-"))) for name in by_name]
    got, there = f"no checkpoint {wanted!r} in {directory}", ", ".join(steps) or "none"
    # "best" is no way out of where nothing was scored
    action = f"name one of these steps, or last: {there}" if steps else "train first"
    raise InputError(got, f"last, best or a step (there: {there})", action)


def read_best(directory: Path) -> dict[str, Any]:
    """{"step", "mean_iou"} of the best one in a run's checkpoints/, {} when none was scored yet.

    Raises InputError when the file is damaged.
    """
    path = directory / BEST_FILE
    if not path.is_file():
        return {}
    try:
        best = json.loads(path.read_text())
        return {"step": int(best["step"]), "mean_iou": float(best["mean_iou"])}
    # not passed over as "none yet": the next score would then replace a better one
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: damaged ({error})", "the file that training wrote", "remove it"
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises InputError for a damaged one and another version."""
    try:
        meta = json.loads((path / STATE_FILE).read_text())
    except (OSError, ValueError):
        meta = None
    # one of another version may have other keys, and is not damaged
    is_whole = isinstance(meta, dict) and (
        "version" not in meta or {"state", "identity", "parts"} <= meta.keys()
    )
    if not is_whole:
        action = f"remove {path}: the checkpoint before it is then used"
        raise InputError(f"{path / STATE_FILE}: damaged", "a checkpoint of distseg", action)
    if meta.get("version") != VERSION:
        got = f"{path}: version {meta.get('version')}"
        raise InputError(got, f"version {VERSION}", "use the distseg that wrote it")
    return meta


def saved_precision(run_dir: Path) -> str | None:
    """The precision of a run's last checkpoint; None before there is one."""
    paths = published(run_dir / FOLDER)
    # what "auto" became: on other machines it could become something else, and the run would change
    return read_state(paths[-1])["identity"].get("precision") if paths else None


def read_network(path: Path, network: str) -> tuple[str, dict[str, Tensor]]:
    """The part of a checkpoint that stands for a network, and its tensors.

    network: "segmentor", of which the EMA weights ("ema") are taken where there are any, or
    "discriminator". Raises InputError where the run had none.
    """
    parts = read_state(path)["parts"]
    # EMA weights are what the run was evaluated with
    part = "ema" if network == "segmentor" and "ema" in parts else network
    if part not in parts:
        action = f"write {network}.init=random, or name a run that had one"
        raise InputError(f"{path} has no {network}", f"a run with a {network}", action)
    return part, read(path, f"{part}.network")


def load_segmentor(path: Path, network: torch.nn.Module) -> str:
    """Copy a checkpoint's segmentor into a network.

    Its EMA weights where there are any. Returns which: "ema" or "segmentor". Raises InputError when
    the network is another than the checkpoint's.
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
