"""Checkpoints: whole or absent, equal when read back, pruned as asked, and only of this run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from distseg.distributed.ranks import Ranks
from distseg.models.weights import read_weights
from distseg.parallel import fsdp
from distseg.parallel.parameter_shards import ParameterShard
from distseg.runs import checkpoint, checkpointer, lease, tensor_files
from distseg.runs.checkpoint import Checkpoint
from distseg.runs.checkpointer import Checkpointer, newest, set_aside
from distseg.runs.sealed import seal, unseal, write_sealed
from distseg.runs.tensor_files import SUFFIX, DamagedCheckpoint, TensorFile, read
from distseg.train.ema import MovingAverage
from distseg.train.headline import about_checkpoints
from distseg.train.initial import initial_weights
from shards.errors import InputError
from tests.ranks import CONTEXT, run_ranks
from tests.test_engine import make_batch
from tests.test_fsdp import FSDP, HYBRID, gradients, make_pair

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


def last(run_dir: Path) -> Checkpoint:
    return checkpoint.verified(checkpoint.find(run_dir, "last"))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, 2, {"seed": 1}, RANKS)
    saved = Holder(0.0)
    saved.tensors["network"]["weight"].normal_()
    checkpoints.save({"segmentor": saved}, state(7))
    loaded = Holder(5.0)
    latest = newest(tmp_path, RANKS).sound
    assert latest is not None
    assert checkpoints.load(latest, {"segmentor": loaded}) == state(7)
    for name, tensor in saved.tensors["network"].items():
        assert torch.equal(tensor, loaded.tensors["network"][name])


@pytest.mark.parametrize("async_save", [False, True])
def test_keeps_the_last_ones_and_the_best(tmp_path: Path, async_save: bool) -> None:
    checkpoints = Checkpointer(tmp_path, 2, {}, RANKS, async_save=async_save)
    for step, mean_iou in ((10, 0.2), (20, 0.5), (30, 0.3), (40, 0.5), (50, 0.4)):
        checkpoints.save({"segmentor": Holder(step)}, state(step))
        checkpoints.mark_best(step, mean_iou)
    (tmp_path / "checkpoints" / "step-00000007-backup").mkdir()  # a user's own, not ours to remove
    assert names(tmp_path) == [
        "step-00000007-backup",
        "step-00000020",
        "step-00000040",
        "step-00000050",
    ]
    assert checkpoint.find(tmp_path, "best").name == "step-00000020"
    assert checkpoint.find(tmp_path, "last").name == "step-00000050"
    assert checkpoint.find(tmp_path, "40").name == "step-00000040"
    with pytest.raises(InputError, match="there: 20, 40, 50"):
        checkpoint.find(tmp_path, "30")


def test_the_best_is_that_of_one_view(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, 4, {}, RANKS)
    write_sealed(tmp_path / "checkpoints/best.json", {"step": 1, "mean_iou": 0.6})
    plain, flipped = ({"scales": [1.0], "horizontal_flip": flip} for flip in (False, True))
    # of an earlier version, which kept no view; then better ones of a view, and of another
    scores = [(2, 0.5, plain, 1), (3, 0.7, plain, 3), (4, 0.2, flipped, 4), (5, 0.1, flipped, 4)]
    for step, mean_iou, view, best in scores:
        checkpoints.save({"segmentor": Holder(step)}, state(step))
        checkpoints.mark_best(step, mean_iou, view=view)
        assert checkpoint.read_best(tmp_path / "checkpoints")["step"] == best


@pytest.mark.parametrize("crash_at", range(5))
def test_a_crash_at_any_point_of_saving_leaves_the_one_before(
    tmp_path: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpointer(tmp_path, 2, {}, RANKS)
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
    latest = newest(tmp_path, RANKS).sound
    assert latest is not None
    expected = {"step-00000001"} if crash_at < 4 else {"step-00000001", "step-00000002"}
    assert set(names(tmp_path)) == expected
    holder = Holder(0)
    checkpoints.load(latest, {"segmentor": holder})
    assert holder.tensors["network"]["count"] == (1 if crash_at < 4 else 2)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpointer(tmp_path, 2, {}, RANKS)
    checkpoints.save({"segmentor": Holder(1)}, state(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="disk full"):
        checkpoints.save({"segmentor": Holder(2)}, state(2))
    assert names(tmp_path) == ["step-00000001"]
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


def test_too_little_space_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(InputError, match="MB free"):
        Checkpointer(tmp_path / "not" / "yet", 2, {}, RANKS).check_space({"segmentor": Holder(1)})


def test_space_is_asked_for_all_that_will_be_kept_and_the_one_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sum(t.numel() * t.element_size() for t in Holder(1).tensors["network"].values())
    checkpoints, free = Checkpointer(tmp_path, 2, {}, RANKS), 4 * one  # two, the best, a new one
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    checkpoints.check_space({"segmentor": Holder(1)})
    with pytest.raises(InputError, match="MB free"):  # and one that is being copied
        Checkpointer(tmp_path, 2, {}, RANKS, num_leased=1).check_space({"segmentor": Holder(1)})
    free -= 1
    with pytest.raises(InputError, match="MB free"):
        checkpoints.check_space({"segmentor": Holder(1)})
    checkpoints.save({"segmentor": Holder(1)}, state(1))  # which takes its place already
    checkpoints.check_space({"segmentor": Holder(1)})


def test_a_step_that_is_saved_again_replaces_its_checkpoint_and_leftovers_go(
    tmp_path: Path,
) -> None:
    checkpoints, holder = Checkpointer(tmp_path, 2, {}, RANKS), Holder(0)
    checkpoints.save({"segmentor": Holder(1)}, state(5))
    left = tmp_path / "checkpoints" / ".partial-step-00000009"
    left.mkdir()  # of a run that was killed, and will not come to that step again
    checkpoints.save({"segmentor": Holder(2)}, state(5))
    checkpoints.load(last(tmp_path), {"segmentor": holder})
    assert holder.tensors["network"]["count"] == 2 and names(tmp_path) == ["step-00000005"]
    assert not left.exists()


def test_another_runs_checkpoint_is_refused_by_name_of_the_difference(tmp_path: Path) -> None:
    Checkpointer(tmp_path, 2, {"seed": 1}, RANKS).save({"segmentor": Holder(1)}, state(1))
    with pytest.raises(InputError, match="seed is 1, this run's is 2"):
        Checkpointer(tmp_path, 2, {"seed": 2}, RANKS).load(last(tmp_path), {"segmentor": Holder(0)})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, 2, {}, RANKS).save({"segmentor": Holder(1)}, state(1))
    file = path / "segmentor.network.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DamagedCheckpoint, match="segmentor"):
        last(tmp_path)
    meta, _ = unseal((path / "state.json").read_bytes())
    write_sealed(path / "state.json", meta | {"version": 99})
    with pytest.raises(InputError, match="version 99"):
        checkpoint.read_state(path)


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file, counted from its beginning."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def is_found(path: Path, world_size: int) -> bool:
    """Whether any of the ranks that verify a checkpoint finds it damaged."""
    found = 0
    for rank in range(world_size):
        try:
            checkpoint.verified(path, rank, world_size)
        except DamagedCheckpoint:
            found += 1
    return found > 0


def save_sharded(run_dir: Path) -> Path:
    """A checkpoint with a network in three files, as three ranks of FSDP write it."""
    path, files = run_dir / "checkpoints" / "step-00000005", {}
    path.mkdir(parents=True)
    for index in range(3):
        # the last rank has no row
        rows = torch.rand(2 if index < 2 else 0, 3)
        file = TensorFile(
            f"segmentor.network.{index + 1}-of-3", {"weight": rows}, {"weight": (2 * index, 4)}
        )
        file.write(path)
        name = file.name + SUFFIX
        files[name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    content = {"version": 1, "state": state(5), "identity": {}, "parts": {"segmentor": ["network"]}}
    write_sealed(path / "state.json", content | {"files": files})
    return path


@pytest.mark.parametrize("num_files", [1, 3, 8])
@pytest.mark.parametrize("num_readers", [1, 2, 5])
def test_a_rank_reads_its_rows_and_opens_the_files_that_have_them(
    num_files: int, num_readers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {f"{rows} rows": torch.rand(rows, 3) for rows in (1, 2, 7, 16)}
    cut = {name: list(cut_rows(len(rows), num_files)) for name, rows in whole.items()}
    for index in range(num_files):
        file = TensorFile(f"a.network.{index + 1}-of-{num_files}")
        for name, rows in whole.items():
            begin, end = cut[name][index]
            file.tensors[name], file.shards[name] = rows[begin:end].clone(), (begin, len(rows))
        if index == 0:
            file.tensors["count"] = torch.tensor(5.0)
        file.write(tmp_path)
    opened: list[Path] = []
    safe_open = tensor_files.safe_open

    def counted(path: Path, **options: Any) -> Any:
        opened.append(path)
        return safe_open(path, **options)

    monkeypatch.setattr(tensor_files, "safe_open", counted)
    monkeypatch.setattr(tensor_files, "sharded_like", lambda rows, like: rows)
    for rank in range(num_readers):
        opened.clear()
        monkeypatch.setattr(
            tensor_files,
            "shard_of",
            lambda like, rank=rank: shard_of_reader(like, rank, num_readers),
        )
        signs: list[int] = []
        names = {path.name for path in tmp_path.iterdir()}
        like = whole | {"count": torch.tensor(0.0)}
        found = read(tmp_path, "a.network", like, names, lambda: signs.append(1))  # noqa: B023
        for name, rows in whole.items():
            begin, end = list(cut_rows(len(rows), num_readers))[rank]
            assert torch.equal(found[name], rows[begin:end]), (rank, name)
        assert found["count"] == 5 and len(signs) == 5
        # those of each length at one end too many, and the first, whose header says what there is
        assert len(opened) <= min(num_files, -(-num_files // num_readers) + 3)
        assert len(opened) == len(set(opened))
    assert {name: rows.tolist() for name, rows in read(tmp_path, "a.network").items()} == {
        name: rows.tolist() for name, rows in like.items()
    } | {"count": 5.0}


def cut_rows(total: int, count: int) -> Iterator[tuple[int, int]]:
    """As FSDP cuts: rows from and to of each shard."""
    size = -(-total // count)
    for index in range(count):
        yield min(index * size, total), min((index + 1) * size, total)


def shard_of_reader(like: Tensor, rank: int, count: int) -> ParameterShard:
    if like.ndim == 0:
        return ParameterShard(like, ())
    begin, end = list(cut_rows(len(like), count))[rank]
    return ParameterShard(like[begin:end], tuple(like.shape), begin, rank, count)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_bit_flipped_anywhere_is_found(kind: str, tmp_path: Path) -> None:
    if kind == "full":
        holders = {"segmentor": Holder(1), "discriminator": Holder(2)}
        path = Checkpointer(tmp_path, 2, {"seed": 1}, RANKS).save(holders, state(5))
    else:
        path = save_sharded(tmp_path)
    assert not any(is_found(path, world_size) for world_size in (1, 2, 3, 4))
    rng = np.random.default_rng(0)
    for file in sorted(path.iterdir()):
        for bit in rng.choice(8 * file.stat().st_size, 6, replace=False).tolist():
            flip(file, bit)
            for world_size in (1, 2, 3, 4):
                assert is_found(path, world_size), (file, bit)
            flip(file, bit)
    assert checkpoint.verified(path).step == 5


def test_no_bit_of_a_sealed_file_can_change_and_none_turns_it_into_an_old_one() -> None:
    content = {"step": 5, "mean_iou": 0.25, "classes": ["a", "é"]}
    data = seal(content)
    assert unseal(data) == (content, True)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found, is_sealed = unseal(bytes(changed))
        except ValueError:
            continue
        # the seal's own name alone; so readers take nothing that has other keys than they know
        assert not is_sealed and found.keys() != content.keys()


@pytest.mark.parametrize(
    ("num_shards", "world_size", "of_rank"),
    [(1, 2, [[0], [0]]), (2, 4, [[0], [1], [0], [1]]), (4, 2, [[0, 2], [1, 3]])],
)
def test_each_rank_verifies_what_it_reads(
    num_shards: int, world_size: int, of_rank: list[list[int]]
) -> None:
    names = [f"segmentor.network.{i + 1}-of-{num_shards}.safetensors" for i in range(num_shards)]
    for rank, expected in enumerate(of_rank):
        found = [
            i for i, name in enumerate(names) if checkpoint._is_read_by(name, rank, world_size)
        ]
        assert found == expected
        assert checkpoint._is_read_by("discriminator.network.safetensors", rank, world_size)


def test_files_that_are_missing_or_too_many_and_another_steps_state_are_damage(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpointer(tmp_path, 3, {}, RANKS)
    first, second, third = (checkpoints.save({"a": Holder(n)}, state(n)) for n in (1, 2, 3))
    shutil.copy(first / "a.network.safetensors", first / "b.network.safetensors")
    (second / "a.network.safetensors").unlink()
    state_file = (first / "state.json").read_bytes()
    (third / "state.json").write_bytes(state_file)
    with pytest.raises(DamagedCheckpoint, match=r"b\.network\.safetensors is none of its files"):
        checkpoint.verified(first)
    with pytest.raises(DamagedCheckpoint, match=r"a\.network\.safetensors is missing"):
        checkpoint.verified(second)
    with pytest.raises(DamagedCheckpoint, match="it is of step 1"):
        checkpoint.verified(third)
    (third / "state.json").write_bytes(b"[" * 100_000)
    with pytest.raises(DamagedCheckpoint, match="nested too deeply"):
        checkpoint.verified(third)
    (third / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"state\.json is missing"):
        checkpoint.verified(third)
    (third / "state.json").mkdir()
    with pytest.raises(DamagedCheckpoint, match=r"state\.json is missing"):
        checkpoint.verified(third)


def test_a_checkpoint_of_a_version_without_checksums_loads_and_is_said_to_be_unverified(
    tmp_path: Path,
) -> None:
    path = Checkpointer(tmp_path, 2, {}, RANKS).save({"segmentor": Holder(1)}, state(1))
    content, _ = unseal((path / "state.json").read_bytes())
    del content["files"]
    (path / "state.json").write_text(json.dumps(content, indent=1))
    holder = Holder(0)
    Checkpointer(tmp_path, 2, {}, RANKS).load(last(tmp_path), {"segmentor": holder})
    assert (holder.tensors["network"]["weight"] == 1).all()
    assert "not verified" in last(tmp_path).caveat
    file = path / "segmentor.network.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DamagedCheckpoint, match=r"segmentor\.network"):
        last(tmp_path)


def test_first_weights_are_taken_from_no_damaged_checkpoint(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, 2, {}, RANKS).save({"segmentor": Holder(3)}, state(1))
    file = path / "segmentor.network.safetensors"
    assert initial_weights(str(file), "segmentor") == str(file)
    assert "not verified" not in initial_weights(str(tmp_path), "segmentor").source
    flip(file, 8 * file.stat().st_size - 1)
    for init in (str(file), str(tmp_path)):
        with pytest.raises(DamagedCheckpoint, match=file.name):
            initial_weights(init, "segmentor")


@pytest.mark.parametrize(
    ("domain", "adapts", "step"),
    [
        ("own", True, 1),
        ("other", False, 1),
        ("other", True, 2),
        ("target", False, 2),
        ("", True, 1),
    ],
)
def test_first_weights_are_of_the_last_where_labels_of_the_target_chose_the_best(
    tmp_path: Path, domain: str, adapts: bool, step: int
) -> None:
    checkpoints = Checkpointer(tmp_path, 2, {}, RANKS)
    by = {"data": "city", "split": "val", "domain": domain} if domain else {}
    for saved, mean_iou in ((1, 0.5), (2, 0.4)):
        checkpoints.save({"segmentor": Holder(saved)}, state(saved))
        checkpoints.mark_best(saved, mean_iou, by)
    if not by:  # as earlier versions wrote it
        write_sealed(tmp_path / "checkpoints/best.json", {"step": 1, "mean_iou": 0.5})
    found = initial_weights(str(tmp_path), "segmentor", adapts=adapts)
    assert (found.state["weight"] == step).all()
    told = ", its last, as labels of city chose the best"
    assert found.source == f"{tmp_path}, step {step}{told if step == 2 else ''}"
    # who asks for it gets it, and reads whose labels those were
    found = initial_weights(f"{tmp_path}@best", "segmentor", adapts=adapts)
    told = ", chosen by labels of the target (city, val)"
    assert found.source == f"{tmp_path}, step 1{told if domain == 'target' else ''}"


def test_a_best_score_that_is_damaged_is_met_before_time_is_spent(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, 2, {}, RANKS)
    checkpoints.save({"segmentor": Holder(1)}, state(1))
    checkpoints.mark_best(1, 0.5)
    flip(tmp_path / "checkpoints" / "best.json", 20)
    with pytest.raises(InputError, match=r"best\.json: damaged"):
        newest(tmp_path, RANKS)


def test_the_best_score_of_a_run_that_was_moved_is_written_nowhere(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path / "run", 2, {}, RANKS)
    checkpoints.save({"segmentor": Holder(1)}, state(1))
    (tmp_path / "run").rename(tmp_path / "moved")

    def gone() -> None:
        raise InputError("moved", "the directory", "move it back")

    checkpoints.check_folder = gone
    with pytest.raises(InputError, match="moved"):
        checkpoints.mark_best(1, 0.5)
    assert not (tmp_path / "run").exists()


def test_a_long_verification_gives_signs_of_life(tmp_path: Path) -> None:
    Checkpointer(tmp_path, 2, {}, RANKS).save({"segmentor": Holder(1)}, state(1))
    signs: list[None] = []
    assert newest(tmp_path, RANKS, lambda: signs.append(None)).sound is not None
    assert len(signs) == len(list(tmp_path.glob("checkpoints/*/*.safetensors")))


@pytest.mark.parametrize("async_save", [False, True])
def test_a_long_save_gives_signs_of_life(tmp_path: Path, async_save: bool) -> None:
    signs: list[None] = []
    checkpoints = Checkpointer(tmp_path, 2, {}, RANKS, async_save=async_save)
    checkpoints.moved = lambda: signs.append(None)
    path = checkpoints.save({"segmentor": Holder(1), "discriminator": Holder(2)}, state(1))
    checkpoints.wait()
    assert len(signs) == len(list(path.glob("*.safetensors"))) == 2


def test_a_large_file_gives_signs_of_life_for_as_long_as_a_slow_disk_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[float] = []
    began = time.monotonic()

    def fsync(descriptor: int) -> None:
        time.sleep(0.5)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(tensor_files, "SIGN_SECONDS", 0.01)
    file = TensorFile("large", {"weight": torch.zeros(1000)})
    for seconds, few, many in ((0.2, 1, 20), (100.0, 2, 51), (0.01, 0, 0)):
        signs.clear()
        monkeypatch.setattr(tensor_files, "SLOWEST_DISK", 4000 / seconds)
        file.write(tmp_path, lambda: signs.append(time.monotonic() - began))
        assert few <= len(signs) <= many, seconds
    time.sleep(0.05)
    assert not signs


def test_names_of_parts_cannot_leave_the_folder(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, 2, {}, RANKS).save({"segmentor": Holder(1)}, state(1))
    content, _ = unseal((path / "state.json").read_bytes())
    write_sealed(path / "state.json", content | {"parts": {"segmentor": ["../../network"]}})
    with pytest.raises(DamagedCheckpoint, match=r"\.\./\.\./network"):
        checkpoint.read_state(path)


def test_the_newest_sound_checkpoint_is_gone_on_from_and_damaged_ones_are_set_aside(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpointer(tmp_path, 3, {}, RANKS)
    for step in (10, 20, 30):
        checkpoints.save({"segmentor": Holder(step)}, state(step))
        checkpoints.mark_best(step, step / 100)
    for name in ("step-00000020", "step-00000030"):
        flip(tmp_path / "checkpoints" / name / "segmentor.network.safetensors", 999)
    found = newest(tmp_path, RANKS)
    assert found.sound is not None and found.sound.step == 10
    assert [path.name for path in found.damaged] == ["step-00000030", "step-00000020"]
    said = about_checkpoints(found)
    assert "step-00000030: segmentor.network.safetensors" in said[0]
    assert said[0].endswith("from step 10: 20 steps are done again")
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]
    (tmp_path / "checkpoints" / "damaged-step-00000020").mkdir()  # of an earlier time
    set_aside(found.damaged, RANKS)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "damaged-step-00000020",
        "damaged-step-00000020-2",
        "damaged-step-00000030",
        "step-00000010",
    ]  # and no best.json, which named step 30
    flip(tmp_path / "checkpoints" / "step-00000010" / "segmentor.network.safetensors", 999)
    with pytest.raises(InputError, match="begin at step 0"):
        newest(tmp_path, RANKS)


def test_a_checkpoint_that_is_read_is_kept_until_its_reader_ends(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, 1, {}, RANKS)
    checkpoints.save({"segmentor": Holder(1)}, state(1))
    with checkpoint.opened(tmp_path, "last") as found:
        for step in (2, 3):
            checkpoints.save({"segmentor": Holder(step)}, state(step))
        assert names(tmp_path) == ["step-00000001", "step-00000003"]
        assert float(read(found.path, "segmentor.network")["count"]) == 1
    checkpoints.save({"segmentor": Holder(4)}, state(4))
    assert names(tmp_path) == ["step-00000004"]
    # one that was killed renews it no more
    killed = tmp_path / "checkpoints" / "step-00000004" / ".lease-elsewhere-7-abc"
    killed.touch()
    checkpoints.save({"segmentor": Holder(5)}, state(5))
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    long_ago = time.time() - lease.EXPIRES_SECONDS - 60
    os.utime(killed, (long_ago, long_ago))
    checkpoints.save({"segmentor": Holder(6)}, state(6))
    assert names(tmp_path) == ["step-00000006"]


def test_a_lease_is_renewed_while_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEWED_SECONDS", 0.01)
    with lease.leased(tmp_path):
        (file,) = tmp_path.iterdir()
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 20
        while file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > 0
    assert not list(tmp_path.iterdir())
    with lease.leased(tmp_path / "of another user, not to be written to"):
        pass


def chain(ranks: Ranks, overrides: tuple[str, ...], start: Path | None, target: Path) -> Any:
    """Load a checkpoint, or train three steps, with one update left out; then save. What the
    average says as a teacher, of images that all ranks are shown.
    """
    fsdp.BLOCK_PARAMETERS = 3_000
    pair, config = make_pair(ranks, overrides)
    ema, teacher = (MovingAverage(pair.segmentor, 0.9, as_network=each) for each in (False, True))
    learners = {"segmentor": pair.segmentor, "discriminator": pair.discriminator, "ema": ema}
    learners["teacher"] = teacher
    checkpoints = Checkpointer(target, 2, {}, ranks, async_save=True)
    if start is not None:
        for learner in learners.values():  # nothing that is not loaded may pass for it
            for tensors in learner.state_dict().values():
                for tensor in tensors.values():
                    tensor.zero_()
        assert checkpoints.load(last(start), learners) == state(3)
    for step in range(0 if start is not None else 3):
        gradients(ranks, pair, config, step)
        if step == 2:
            next(pair.discriminator.network.parameters()).grad.fill_(float("nan"))
        pair.segmentor.step(1.0)
        pair.discriminator.step(1.0)
        ema.update()
        teacher.update()
    checkpoints.save(learners, state(3))
    checkpoints.wait()
    assert teacher.network is not None
    return pair.segmentor.infer(teacher.network, make_batch(9, torch.float64)[0]).numpy()


def _shard_of_network(folder: Path) -> Path:
    return folder / "segmentor.network.2-of-3.safetensors"


def test_every_strategy_on_any_number_of_ranks_loads_what_another_saved(tmp_path: Path) -> None:
    links = [(2, ()), (1, FSDP), (3, FSDP), (4, HYBRID), (2, ())]
    said: list[Any] = []
    for index, (num_ranks, overrides) in enumerate(links):
        start = tmp_path / str(index - 1) if index else None
        said += run_ranks(num_ranks, chain, overrides, start, tmp_path / str(index))
    first, last = (
        sorted(checkpoint.find(tmp_path / run, "last").glob("*.safetensors")) for run in ("0", "4")
    )
    assert len(first) == 10 and [path.name for path in first] == [path.name for path in last]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in last]
    assert float(read(first[0].parent, "discriminator.counters")["skips"]) == 1
    averages = [read(first[0].parent, f"{name}.network") for name in ("ema", "teacher")]
    assert all(torch.equal(tensor, averages[1][name]) for name, tensor in averages[0].items())
    # sharded or whole, a teacher that was loaded says what the one that was saved did
    for each in said:
        np.testing.assert_allclose(each, said[0], rtol=1e-12, atol=1e-12)
    sharded = checkpoint.find(tmp_path / "2", "last")
    assert len(list(sharded.glob("segmentor.optimizer.*-of-3.safetensors"))) == 3
    pieces = read(sharded, "segmentor.optimizer")
    assert all(
        torch.equal(tensor, pieces[name])
        for name, tensor in read(first[0].parent, "segmentor.optimizer").items()
    )
    whole, joined = (
        read(first[0].parent, "segmentor.network"),
        read_weights(_shard_of_network(sharded)),
    )
    # as segmentor.init reads it
    assert all(torch.equal(tensor, joined[name]) for name, tensor in whole.items())
    (sharded / "segmentor.network.3-of-3.safetensors").unlink()
    with pytest.raises(InputError, match=r"segmentor\.network\.3-of-3"):
        read_weights(_shard_of_network(sharded))
    (sharded / "segmentor.optimizer.2-of-3.safetensors").unlink()
    with pytest.raises(InputError, match=r"segmentor\.optimizer: file 2 is missing"):
        read(sharded, "segmentor.optimizer")


def test_writing_goes_on_beside_training_with_the_values_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpointer(tmp_path, 2, {}, RANKS, async_save=True)
    go, write = threading.Event(), TensorFile.write

    def slowly(file: TensorFile, folder: Path, moved: Any) -> None:
        assert go.wait(60)
        write(file, folder)

    monkeypatch.setattr(TensorFile, "write", slowly)
    holder = Holder(1)
    checkpoints.save({"segmentor": holder}, state(1))
    holder.tensors["network"]["weight"].fill_(7)  # the next steps
    assert names(tmp_path) == []
    go.set()
    checkpoints.wait()
    checkpoints.load(last(tmp_path), {"segmentor": holder})
    assert (holder.tensors["network"]["weight"] == 1).all()


def save_badly(ranks: Ranks, run_dir: Path, fault: str) -> tuple[str, bool]:
    """Two saves, the second of which fails on the last rank.

    What is raised by the third, and whether it was known.
    """
    checkpoints = Checkpointer(run_dir, 2, {}, ranks, async_save=True, timeout_seconds=1.0)
    learners = {"segmentor": Holder(1), "discriminator": Holder(2)}
    checkpoints.save(learners, state(1))
    checkpoints.wait()

    def write(file: TensorFile, folder: Path, moved: Any) -> None:
        if fault == "full":
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        time.sleep(3)

    if ranks.rank == ranks.world_size - 1:
        TensorFile.write = write  # type: ignore[method-assign]
    checkpoints.save(learners, state(2))
    while ranks.is_main and not checkpoints.failed:
        time.sleep(0.01)
    try:
        checkpoints.save(learners, state(3))
    except InputError as error:
        return str(error), hasattr(error, "raised_on_all_ranks")
    except RuntimeError as error:
        return str(error), hasattr(error, "raised_on_all_ranks")
    return "", False


@pytest.mark.parametrize(
    ("fault", "text"), [("full", "disk full at"), ("slow", "rank 1 has not written its part")]
)
def test_a_failure_on_one_rank_reaches_all_and_harms_no_checkpoint(
    fault: str, text: str, tmp_path: Path
) -> None:
    for said, is_known_to_all in run_ranks(2, save_badly, tmp_path, fault):
        assert text in said and is_known_to_all
    assert names(tmp_path) == ["step-00000001"]
    holder = Holder(0)
    Checkpointer(tmp_path, 2, {}, RANKS).load(last(tmp_path), {"segmentor": holder})
    assert (holder.tensors["network"]["weight"] == 1).all()


def load_badly(ranks: Ranks, run_dir: Path) -> tuple[str, bool]:
    """What is said of a checkpoint that one rank cannot read, which then none may have begun to
    load. One that is damaged for a single rank, none goes on from.
    """
    checkpoints, holder = Checkpointer(run_dir, 2, {}, ranks), Holder(0)

    def damaged_for_one(path: Path, *arguments: Any) -> Checkpoint:
        if path.name == "step-00000002" and ranks.rank == 1:
            raise DamagedCheckpoint("damaged here", "a whole checkpoint", "choose another")
        return checkpoint.verified(path, *arguments)

    checkpointer.verified = damaged_for_one
    found = newest(run_dir, ranks)
    assert found.sound is not None and found.sound.step == 1
    assert list(found.damaged.values()) == ["damaged here"]

    def damaged(*arguments: Any) -> Any:
        raise InputError("segmentor.network: damaged here", "a whole checkpoint", "remove it")

    if ranks.rank == 1:
        checkpointer.read = damaged
    try:
        checkpoints.load(found.sound, {"segmentor": holder})
    except InputError as error:
        assert (holder.tensors["network"]["weight"] == 0).all()
        return error.got, hasattr(error, "raised_on_all_ranks")
    return "", False


def test_what_one_rank_cannot_load_no_rank_loads(tmp_path: Path) -> None:
    for step in (1, 2):
        Checkpointer(tmp_path, 2, {}, RANKS).save({"segmentor": Holder(step)}, state(step))
    assert run_ranks(2, load_badly, tmp_path) == [("segmentor.network: damaged here", True)] * 2


def close_without_the_other(ranks: Ranks, run_dir: Path) -> float:
    """Seconds that closing takes while another rank, as if lost, has not written its part."""
    checkpoints = Checkpointer(run_dir, 2, {}, ranks, async_save=True, timeout_seconds=60.0)
    write = TensorFile.write

    def slowly(file: TensorFile, folder: Path, moved: Any) -> None:
        time.sleep(5)
        write(file, folder)

    if ranks.rank == 1:
        TensorFile.write = slowly  # type: ignore[method-assign]
    checkpoints.save({"segmentor": Holder(1), "discriminator": Holder(2)}, state(1))
    start = time.monotonic()
    checkpoints.give_up()
    checkpoints.close()
    return time.monotonic() - start


def test_closing_does_not_wait_for_a_lost_rank(tmp_path: Path) -> None:
    on_main, on_other = run_ranks(2, close_without_the_other, tmp_path)
    assert on_main < 4 < on_other
    assert names(tmp_path) == []


def die_writing(run_dir: Path) -> None:
    checkpoints = Checkpointer(run_dir, 2, {}, RANKS, async_save=True)
    checkpoints.save({"segmentor": Holder(1)}, state(1))
    checkpoints.wait()
    write = TensorFile.write

    def die(file: TensorFile, folder: Path, moved: Any) -> None:
        write(file, folder)
        os.kill(os.getpid(), signal.SIGKILL)

    TensorFile.write = die  # type: ignore[method-assign]
    checkpoints.save({"segmentor": Holder(2)}, state(2))
    checkpoints.wait()


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=die_writing, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == ["step-00000001"]
    assert (
        tmp_path / "checkpoints" / ".partial-step-00000002" / "segmentor.network.safetensors"
    ).is_file()
    checkpoints, holder = Checkpointer(tmp_path, 2, {}, RANKS), Holder(0)
    checkpoints.load(last(tmp_path), {"segmentor": holder})
    assert (holder.tensors["network"]["weight"] == 1).all()
    checkpoints.save({"segmentor": holder}, state(3))  # which clears the leftovers away
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000003",
    ]


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    Checkpointer(tmp_path, 2, {}, RANKS).save({"segmentor": Holder(1)}, state(1))
    other: Any = Holder(0)
    # to which the saved one could be broadcast
    other.tensors["network"]["weight"] = torch.zeros(4, 1, 2, 2)
    with pytest.raises(InputError, match=r"weight of shape \(4, 3, 2, 2\)"):
        Checkpointer(tmp_path, 2, {}, RANKS).load(last(tmp_path), {"segmentor": other})
