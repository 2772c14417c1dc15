"""Checkpoints: whole or absent, equal when read back, pruned as asked, and only of this run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distseg import checkpoint
from distseg.checkpoint import Checkpoints
from distseg.distributed import Ranks
from shards.errors import InputError

RANKS = Ranks(0, 1, 0, torch.device("cpu"))


class Holder:
    """A learner of two tensors, one in channels_last."""

    def __init__(self, value: float):
        weight = torch.full((4, 3, 2, 2), value).to(memory_format=torch.channels_last)
        self.tensors = {"network": {"weight": weight, "count": torch.tensor(int(value))}}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return self.tensors

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, tensor in self.tensors["network"].items():
            tensor.copy_(state["network"][name])


def state(step: int) -> dict:
    return {"step": step}


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, {"seed": 1}, RANKS)
    saved = Holder(0.0)
    saved.tensors["network"]["weight"].normal_()
    checkpoints.save({"segmentor": saved}, state(7))
    loaded = Holder(5.0)
    latest = checkpoints.latest()
    assert latest is not None
    assert checkpoints.load(latest, {"segmentor": loaded}) == state(7)
    for name, tensor in saved.tensors["network"].items():
        assert torch.equal(tensor, loaded.tensors["network"][name])


def test_keeps_the_last_ones_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, {}, RANKS)
    for step, mean_iou in ((10, 0.2), (20, 0.5), (30, 0.3), (40, 0.5), (50, 0.4)):
        checkpoints.save({"segmentor": Holder(step)}, state(step))
        checkpoints.mark_best(step, mean_iou)
    (tmp_path / "checkpoints" / "step-00000007-backup").mkdir()  # a user's own, not ours to remove
    assert names(tmp_path) == ["step-00000007-backup", "step-00000020", "step-00000040", "step-00000050"]
    assert checkpoint.find(tmp_path, "best").name == "step-00000020"
    assert checkpoint.find(tmp_path, "last").name == "step-00000050"
    assert checkpoint.find(tmp_path, "40").name == "step-00000040"
    with pytest.raises(InputError, match="step-00000040"):
        checkpoint.find(tmp_path, "30")


@pytest.mark.parametrize("crash_at", range(5))
def test_a_crash_at_any_point_of_saving_leaves_the_one_before(
    tmp_path: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, 2, {}, RANKS)
    checkpoints.save({"segmentor": Holder(1)}, state(1))
    calls = 0
    fsync = os.fsync

    def crash(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > crash_at:
            raise KeyboardInterrupt  # not an Exception: nothing tidies up, as after a kill
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"segmentor": Holder(2), "discriminator": Holder(3)}, state(2))
    monkeypatch.undo()
    latest = checkpoints.latest()
    assert latest is not None
    expected = {"step-00000001"} if crash_at < 4 else {"step-00000001", "step-00000002"}
    assert set(names(tmp_path)) == expected
    holder = Holder(0)
    checkpoints.load(latest, {"segmentor": holder})
    assert holder.tensors["network"]["count"] == (1 if crash_at < 4 else 2)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, 2, {}, RANKS)
    checkpoints.save({"segmentor": Holder(1)}, state(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="disk full"):
        checkpoints.save({"segmentor": Holder(2)}, state(2))
    assert names(tmp_path) == ["step-00000001"]
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


def test_too_little_space_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(InputError, match="MB free"):
        Checkpoints(tmp_path / "not" / "yet", 2, {}, RANKS).check_space({"segmentor": Holder(1)})


def test_another_runs_checkpoint_is_refused_by_name_of_the_difference(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, 2, {"seed": 1}, RANKS).save({"segmentor": Holder(1)}, state(1))
    with pytest.raises(InputError, match="seed is 1, this run's is 2"):
        Checkpoints(tmp_path, 2, {"seed": 2}, RANKS).load(path, {"segmentor": Holder(0)})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, 2, {}, RANKS).save({"segmentor": Holder(1)}, state(1))
    file = path / "segmentor.network.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="segmentor"):
        Checkpoints(tmp_path, 2, {}, RANKS).load(path, {"segmentor": Holder(0)})
    meta = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(InputError, match="version 99"):
        checkpoint.read_state(path)
