"""A profile of chosen steps, and what is said when a GPU's memory has not been enough."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import distseg
from distseg.config import loading
from distseg.config.rules.running import profiled_steps
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks
from distseg.runs import attempts, goodput
from distseg.train.out_of_memory import advice
from distseg.train.profiling import StepProfiler, check_ranks
from distseg.train.trainer import Trainer
from shards.errors import InputError
from tests.ranks import leave_out, run_ranks
from tests.tiny import SETTINGS


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    leave_out(monkeypatch.setattr)
    yield


def train(shards: Path, run_dir: Path, **keys: Any) -> Any:
    return distseg.fit([f"data.shards={shards}", f"run_dir={run_dir}"], **SETTINGS | keys)


def test_chosen_steps_are_traced_with_their_sections_and_the_time_is_booked(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(toy_shards, tmp_path / "run", steps=4, profile={"steps": "2:3"})
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {
        "steps-2-3-rank-0.json.gz",
        "steps-2-3-rank-0.txt",
    }
    with gzip.open(folder / "steps-2-3-rank-0.json.gz") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"]]
    # both networks' updates, in each of two steps, of which neither is logged
    assert events.count("distseg/optimizer") == 4 and events.count("distseg/backward") == 2
    table = (folder / "steps-2-3-rank-0.txt").read_text()
    assert "Self CPU" in table and "convolution" in table
    output = capsys.readouterr().out
    assert f"profile: {folder}/steps-2-3-rank-0.json.gz" in output
    found = goodput.of_run(tmp_path / "run")
    assert found is not None and f"goodput {found.share():.1%} of 0:00:" in output
    assert abs(found.share("unknown")) < 0.02 and found.seconds["evaluation"] > 0
    (attempt,) = attempts.read(tmp_path / "run")
    assert attempt.ended is not None and attempt.began is not None
    assert found.wall_seconds == pytest.approx(attempt.ended - attempt.began, abs=0.01)


def test_a_profile_that_cannot_be_whole_is_none(tmp_path: Path) -> None:
    ranks, settings = distseg_ranks(), config("profile.steps=2:3").profile
    profiler = StepProfiler(settings, ranks, tmp_path)
    profiler.before(1)
    assert not profiler.is_running
    profiler.before(2)
    assert profiler.is_running and profiler.after(2) is None
    profiler.close()  # as of a run that was stopped
    assert profiler.after(3) is None and not list(tmp_path.iterdir())
    (tmp_path / "profile").touch()  # no folder can be made
    profiler.before(2)
    assert profiler.after(3) is None, "and the training goes on"
    elsewhere = StepProfiler(
        config("profile.steps=2:3", "profile.ranks=[1]").profile, ranks, tmp_path
    )
    elsewhere.before(2)
    assert not elsewhere.is_running


def profile_a_sum(ranks: Ranks, folder: Path) -> str:
    """What the profiler writes to the process's own stderr, past Python."""
    with (folder / "said").open("w") as file:
        os.dup2(file.fileno(), 2)
    profiler = StepProfiler(config("profile.steps=1:1").profile, ranks, folder)
    profiler.before(1)
    torch.ones(3).sum()
    assert profiler.after(1) is not None
    return (folder / "said").read_text()


def test_the_profiler_writes_nothing_into_the_log(tmp_path: Path) -> None:
    # in a process of its own, since the first use in a process decides
    assert run_ranks(1, profile_a_sum, tmp_path) == [""]


def distseg_ranks() -> Ranks:
    return Ranks(0, 1, 0, torch.device("cpu"))


def config(*overrides: str) -> Config:
    return loading.load(["preset=voc", "data.shards=nowhere", *overrides])


@pytest.mark.parametrize("text", ["10", "0:3", "4:3", "a:b", "1:2:3", "-1:3"])
def test_steps_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"profile.steps={text}"):
        profiled_steps(text)


def test_steps_and_ranks_that_the_run_has_not_are_refused() -> None:
    assert list(profiled_steps("10:13")) == [10, 11, 12, 13]
    with pytest.raises(InputError, match=r"profile\.steps=9:11 of 10 steps"):
        config("steps=10", "profile.steps=9:11")
    chosen = config("profile.steps=1:2", "profile.ranks=[4,9]").profile
    check_ranks(chosen, 5)
    with pytest.raises(InputError, match="ranks from 0 to 3"):
        check_ranks(chosen, 4)


@pytest.mark.parametrize("has_snapshot", [True, False])
def test_a_gpu_out_of_memory_leaves_a_snapshot_and_says_which_keys_need_less(
    toy_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    has_snapshot: bool,
) -> None:
    def fail(self: Trainer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "train_step", fail)
    if has_snapshot:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(
            torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"blocks")
        )
        # what restores a caller's generators asks for them where CUDA is in use
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)
    with pytest.raises(torch.OutOfMemoryError):
        train(toy_shards, tmp_path / "run")
    said = capsys.readouterr().err
    path = tmp_path / "run" / "profile" / "out-of-memory-rank-0.pickle"
    assert "is out of memory at step 1 (steps)" in said
    assert "to need less: gradient_accumulation_steps=2 (" in said
    assert (f"what held it: {path}" in said) == has_snapshot == path.is_file()
    (attempt,) = attempts.read(tmp_path / "run")
    assert attempt.outcome == "failed" and attempt.reason.startswith("OutOfMemoryError: CUDA")


@pytest.mark.parametrize(
    ("overrides", "world_size", "part", "expected"),
    [
        (
            ["batch_size=12", "precision=fp32", "data.crop_px=321"],
            4,
            "steps",
            [
                ("gradient_accumulation_steps=3", "a new run_dir"),
                ("precision=bf16", "a new run_dir"),
                ("parallel.strategy=fsdp", "the same run goes on"),
                ("data.crop_px=224", "a new run_dir"),
            ],
        ),
        # one image a rank is no more divided; 2 x 2 x 2 are, and unlabelled ones with them
        (["batch_size=4", "precision=bf16"], 4, "data", [("parallel.strategy=fsdp", "the same")]),
        (
            [
                *("batch_size=8", "gradient_accumulation_steps=2", "mode=semi_supervised"),
                *("data.labelled=1/2", "semi.batch_size=16", "precision=bf16"),
            ],
            2,
            "steps",
            [("gradient_accumulation_steps=4", "new"), ("parallel.strategy=fsdp", "the same")],
        ),
        (
            [
                *("parallel.strategy=deepspeed", "parallel.zero_stage=2"),
                *("batch_size=1", "precision=bf16"),
            ],
            1,
            "steps",
            [],
        ),
        (
            ["evaluate.scales=[0.5,1.0,2.0]"],
            2,
            "evaluation",
            [("evaluate.window_px=512", "the same"), ("evaluate.scales=[0.5, 1.0]", "the same")],
        ),
    ],
)
def test_advice_names_keys_that_the_run_can_take(
    overrides: list[str], world_size: int, part: str, expected: list[tuple[str, str]]
) -> None:
    found = list(advice(config(*overrides), world_size, part))
    for line, (key, may_go_on) in zip(found, expected, strict=False):
        assert line.startswith(f"{key} (") and may_go_on in line
    # smaller images come last, where nothing else is named
    rest = [line.partition("=")[0] for line in found[len(expected) :]]
    assert rest in ([], ["data.crop_px"])
    for line in found:
        config(*overrides, line.partition(" (")[0].replace(" ", ""))  # a value that is taken
