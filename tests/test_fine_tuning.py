"""Frozen parts under every strategy, and runs that are trained on."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distseg.cli import main
from distseg.config import loading
from distseg.config.schema import ScheduleConfig
from distseg.distributed.ranks import Ranks, on_main
from distseg.models import build_segmentor
from distseg.models.freezing import freeze
from distseg.runs.ledger import Ledger
from distseg.runs.tensor_files import read
from distseg.tracking.tracker import read_metrics
from distseg.train import run
from distseg.train.networks import build_networks
from distseg.train.schedules import lr_factor
from shards.errors import InputError
from tests.ranks import run_ranks
from tests.tiny import SETTINGS, contents, no_curves

FREEZE = {"segmentor.freeze": ["encoder", "classifier.0*"]}
FROZEN = ("encoder.", "classifier.0")
# (of ZeRO's stages 1 and 2, which are one class of DeepSpeed's, the one that parts more)
STRATEGIES = [("fsdp", 0), *(("deepspeed", stage) for stage in (0, 2, 3))]


def test_patterns_match_names_and_whole_parts() -> None:
    network = build_segmentor("multiscale", 3, init="random", norm="batch", hidden=8).train()
    freeze(network, ["encoder.[04]", "*.9.bias"])
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    names = {name for name, _ in network.named_parameters()}
    assert names - trained == {"encoder.0.weight", "encoder.4.weight", "encoder.9.bias"}
    # the layer still learns its scale, so its statistics move
    assert network.encoder[9].training and network.encoder[1].training
    freeze(network, ["encoder"])
    assert not any(network.train().encoder[index].training for index in (1, 5, 9))
    assert network.classifier[1].training
    with pytest.raises(InputError, match="something to train"):
        freeze(network, ["encoder", "classifier"])


def _train(ranks: Ranks, keys: dict[str, Any]) -> None:
    """A run on the ranks of a test, which has joined them already."""
    config = loading.load(loading.arguments(keys))
    run._train_on(ranks, config, run.check(config, ranks.world_size), Ledger())


def settings(shards: Path, run_dir: Path, **keys: Any) -> dict[str, Any]:
    keys = SETTINGS | FREEZE | {"steps": 2, "checkpoint.every_steps": 1} | keys
    return keys | {
        "data.shards": shards,
        "run_dir": run_dir,
        "segmentor_optimizer.weight_decay": 0.1,
    }


def last_checkpoint(keys: dict[str, Any]) -> Path:
    return keys["run_dir"] / "checkpoints" / f"step-{keys['steps']:08d}"


@no_curves()
def _train_each(ranks: Ranks, runs: list[dict[str, Any]]) -> None:
    """Each run to its end, and once more from the checkpoint before its last."""
    for keys in runs:
        _train(ranks, keys)
        on_main(ranks, functools.partial(_keep_and_remove, last_checkpoint(keys)))
        _train(ranks, keys)


def _keep_and_remove(checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.parent.parent / "first")
    shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def runs(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """The run directory of each strategy, all trained by the same two processes."""
    folder = tmp_path_factory.mktemp("strategies")
    all_keys = {}
    for strategy, stage in [("ddp", 0), *STRATEGIES]:
        if strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
            continue
        keys: dict[str, Any] = {"parallel.strategy": strategy, "parallel.zero_stage": stage}
        keys |= {"ema_decay": 0} if stage == 3 else {}
        all_keys[strategy, stage] = settings(toy_shards, folder / f"{strategy}{stage}", **keys)
    run_ranks(2, _train_each, list(all_keys.values()))
    return {name: keys["run_dir"] for name, keys in all_keys.items()}


@pytest.fixture(scope="module")
def ddp(runs: dict[Any, Path]) -> Path:
    """The last checkpoint of an uninterrupted run on two ranks with a frozen encoder."""
    return runs["ddp", 0] / "first"


def test_frozen_parts_stay_to_the_bit_and_have_no_optimizer_state(ddp: Path) -> None:
    config = loading.from_file(ddp.parent / "config.yaml")
    first = build_networks(config, 8).segmentor.state_dict()
    last = load_file(ddp / "segmentor.network.safetensors")
    for name, tensor in last.items():
        is_frozen = name.startswith(FROZEN)
        assert torch.equal(tensor, first[name]) == is_frozen, name
    averaged = load_file(ddp / "ema.network.safetensors")
    assert all(torch.equal(averaged[n], first[n]) for n in first if n.startswith(FROZEN))
    states = load_file(ddp / "segmentor.optimizer.safetensors")
    assert {name.split("/", 1)[1] for name in states} == {
        f"classifier.{part}" for part in ("1.weight", "1.bias", "4.weight", "4.bias")
    }


def test_a_run_with_frozen_parts_resumes_to_the_same_bits(runs: dict[Any, Path], ddp: Path) -> None:
    again = last_checkpoint({"run_dir": runs["ddp", 0], "steps": 2})
    assert contents(again) == contents(ddp)


@pytest.mark.parametrize(("strategy", "stage"), STRATEGIES)
def test_every_strategy_freezes_alike(
    runs: dict[Any, Path], ddp: Path, strategy: str, stage: int
) -> None:
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed")
    checkpoint = runs[strategy, stage] / "first"
    expected = load_file(ddp / "segmentor.network.safetensors")
    for name, tensor in read(checkpoint, "segmentor.network").items():
        if name.startswith(FROZEN):
            assert torch.equal(tensor, expected[name]), name
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    names = {name.split("/", 1)[1] for name in read(checkpoint, "segmentor.optimizer")}
    assert len(names) == 4 and not any(name.startswith(FROZEN) for name in names)
    # the same command goes on from its own checkpoint
    again = last_checkpoint({"run_dir": runs[strategy, stage], "steps": 2})
    for name, tensor in read(again, "segmentor.network").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def train(shards: Path, run_dir: Path, **keys: Any) -> Path:
    done = run.fit(**SETTINGS | {"data.shards": shards, "run_dir": run_dir} | keys)
    return done.run_dir / "checkpoints" / f"step-{done.step:08d}"


@no_curves()
def test_a_run_that_is_extended_is_one_that_was_always_so_long(
    toy_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    whole = train(toy_shards, tmp_path / "whole", steps=3)
    run_dir = tmp_path / "run"
    train(toy_shards, run_dir, steps=2)
    with pytest.raises(InputError, match="write extend=true to train on to step 3"):
        train(toy_shards, run_dir, steps=3)
    with pytest.raises(InputError, match="extend=true with steps=1"):
        train(toy_shards, run_dir, steps=1, extend=True)
    capfd.readouterr()
    assert contents(train(toy_shards, run_dir, steps=3, extend=True)) == contents(whole)
    printed = re.sub(r"\s+", " ", "".join(capfd.readouterr()))
    assert "extended from 2 to 3 steps; its history stays" in printed
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss/segmentor" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "val/mean_iou" in line] == [2, 3]
    assert json.loads((run_dir / "evaluation.json").read_text())["step"] == 3
    # from now on it is a run of three steps, with or without the key
    keys = SETTINGS | {"data.shards": toy_shards, "run_dir": run_dir, "steps": 3}
    assert main(["train", *loading.arguments(keys)]) == 0


@no_curves()
def test_a_poly_run_is_extended_and_its_headline_counts_the_parameters_that_train(
    toy_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    keys = FREEZE | {"schedule": "poly", "evaluate.every_steps": 0}
    train(toy_shards, tmp_path / "run", **keys, steps=2)
    network = build_segmentor("multiscale", 8, init="random", norm="batch", hidden=8)
    counts = {name: p.numel() for name, p in network.named_parameters()}
    own = sum(count for name, count in counts.items() if not name.startswith(FROZEN))
    printed = re.sub(r"\s+", " ", "".join(capfd.readouterr()))
    assert f"{own:,} of {sum(counts.values()):,} parameters of the segmentor train" in printed

    # the rates are those of a longer run
    train(toy_shards, tmp_path / "run", **keys, steps=4, extend=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = [line["lr/segmentor"] / 1e-3 for line in lines if "lr/segmentor" in line]
    poly = ScheduleConfig(name="poly")
    expected = [lr_factor(step, 2 if step < 2 else 4, poly) for step in range(4)]
    assert rates == pytest.approx(expected, rel=1e-6)
    printed = re.sub(r"\s+", " ", "".join(capfd.readouterr()))
    assert f"the learning rate at step 2 is {expected[2]:.3g} of its base, not 0" in printed
