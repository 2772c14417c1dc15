"""Going on with a run: refused, it is as it was; damaged, it goes on from what is sound."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import distseg
from distseg.distributed.watchdog import Watchdog
from distseg.evaluate.evaluator import Evaluator
from distseg.runs.checkpoint import read_best, read_state
from distseg.tracking.tracker import read_metrics
from shards.errors import InputError
from shards.maps import write_maps
from shards.pack import pack
from shards.sample import STANFORD
from tests.conftest import toy_samples
from tests.ranks import leave_out
from tests.tiny import SETTINGS
from tests.tiny import contents as tensors


def train(shards: Path, run_dir: Path, **keys: Any) -> Any:
    """Two steps, with a checkpoint of each; or what is left of them."""
    overrides = [f"data.shards={shards}", f"run_dir={run_dir}", "checkpoint.every_steps=1"]
    return distseg.fit(overrides, **SETTINGS | keys)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module", autouse=True)
def bare_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch.setattr)
        yield


@pytest.fixture(scope="module")
def finished(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(toy_shards, tmp_path_factory.mktemp("resuming") / "run").run_dir


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data without one of the images."""
    folder = tmp_path_factory.mktemp("other")
    samples = toy_samples()[1:]
    write_maps(folder / "maps.h5", "toy blobs", STANFORD, samples, total=len(samples))
    pack(folder / "maps.h5", folder / "shards")
    return folder / "shards"


def test_a_resume_on_other_data_is_refused_and_changes_nothing(
    run: Path, other_shards: Path
) -> None:
    before = contents(run)
    with pytest.raises(InputError, match="manifest_sha256 is"):
        train(other_shards, run, steps=9, extend=True)
    assert contents(run) == before


def test_a_resume_without_the_space_for_it_changes_nothing(
    run: Path, toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(InputError, match="MB free"):
        train(toy_shards, run, steps=9, extend=True)
    assert contents(run) == before


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
    run: Path,
    finished: Path,
    toy_shards: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signs: list[str] = []
    monkeypatch.setattr(Watchdog, "keep_alive", lambda self: signs.append(self._activity))
    optimizer = "checkpoints/step-00000002/segmentor.optimizer.safetensors"
    data = bytearray((run / optimizer).read_bytes())
    data[-5] ^= 4
    (run / optimizer).write_bytes(data)
    with pytest.raises(InputError, match=r"segmentor\.optimizer.*\n.*\n.*by its step: 1$"):
        distseg.load(run)
    train(toy_shards, run)
    said = capsys.readouterr().out
    assert "segmentor.optimizer.safetensors is not as it was written" in said
    assert "goes on from step 1: 1 step is done again" in said
    newest = "checkpoints/step-00000002"
    assert tensors(run / newest) == tensors(finished / newest)
    assert (run / "checkpoints/damaged-step-00000002").is_dir()
    # a disk may take longer for each of them than other ranks wait
    assert {"verifying checkpoints", "loading a checkpoint", "step 2, saving"} <= {*signs}


def test_what_was_loaded_needs_the_checkpoint_no_more(run: Path) -> None:
    trained = distseg.load(run, 1)
    shutil.rmtree(trained.path)
    assert trained.evaluate(quick=True)["step"] == trained.step == 1


def test_plateaus_are_those_of_the_checkpoint_where_the_metrics_are_lost(
    toy_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = Evaluator.named
    # never lower
    monkeypatch.setattr(Evaluator, "named", lambda self: named(self) | {"val/loss": 1.0})
    keys: dict[str, Any] = {"evaluate": {"num_pictures": 0, "every_steps": 1}, "steps": 3}
    keys["schedule"] = {"name": "plateau", "plateau_patience": 1}
    train(toy_shards, tmp_path / "whole", **keys)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-00000003")
    (run / "metrics.jsonl").unlink()
    train(toy_shards, run, **keys)
    rates = [
        row["lr/segmentor"] / 1e-3
        for name in ("whole", "run")
        for row in read_metrics(tmp_path / name / "metrics.jsonl")
        if "lr/segmentor" in row
    ]
    assert rates == pytest.approx([1, 1, 0.5, 0.5])
    newest = "checkpoints/step-00000003"
    assert tensors(run / newest) == tensors(tmp_path / "whole" / newest)
    assert read_state(run / newest).state["evaluations"] == [
        [step, 1.0, {"scales": [1.0], "horizontal_flip": False, "precision": "fp32"}]
        for step in (1, 2)
    ]
    # another view: the best score was no better, and no worse
    keys["evaluate"] |= {"horizontal_flip": True}
    train(toy_shards, run, **keys | {"steps": 4, "extend": True})
    assert "to {'scales': [1.0], 'horizontal_flip': True" in capsys.readouterr().out
    best = read_best(run / "checkpoints")
    assert best["step"] == 4 and best["view"]["horizontal_flip"]
