"""The comparison of arms: its runs can be configured, and its intervals are Student's."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from scipy import stats

from benchmarks import accuracy
from benchmarks.accuracy import PLANS, classes_table, finished, interval, table
from distseg.cli import main
from distseg.config import loading
from tests.test_train import SMALL


@pytest.mark.parametrize("name", PLANS)
def test_every_arm_is_a_configuration_of_its_own(name: str) -> None:
    plan = PLANS[name]
    told = ["data.shards=unused", "seed=1", "run_dir=none"]
    # an arm's own words count
    loaded = [loading.load([*told, *plan.common, *words]) for words in plan.arms.values()]
    assert loaded[0].mode == "supervised"
    assert len({str(config) for config in loaded}) == len(loaded)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    before, after = [60.0, 62.5, 59.1, 61.0], [62.0, 63.0, 62.2, 61.5]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean, half = interval(differences)
    low, high = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)
    assert math.isnan(interval([1.0])[1])


def scores(iou: float, sky: float = 0.5) -> dict[str, float]:
    fixed = {"val/pixel_accuracy": 0.8, "val/boundary_f1": 0.4}
    return {"val/mean_iou": iou, "val/iou/sky": sky, "val/iou/water": 0.25} | fixed


FOUND = {
    "plain": {0: scores(0.5), 1: scores(0.6)},
    "more": {0: scores(0.53, 0.55), 1: scores(0.61, 0.47), 2: scores(0.9)},
    "not run": {},
}


def test_the_table_compares_the_seeds_that_both_have() -> None:
    assert table(FOUND, "plain")[2:] == [
        "| plain | 0, 1 | 55.0 | 80.0 | 40.0 |  |  |  |",
        "| more | 0, 1 | 57.0 | 80.0 | 40.0 | +2.0 ± 12.7 | +0.0 ± 0.0 | +0.0 ± 0.0 |",
    ]


def test_the_table_of_classes_has_the_change_of_each() -> None:
    assert classes_table(FOUND, "plain") == [
        "| IoU of a class; of others over plain (95 %) | sky | water |",
        "|---|---|---|",
        "| plain | 50.0 | 25.0 |",
        "| more | +1.0 ± 50.8 | +0.0 ± 0.0 |",
    ]


def test_a_run_is_trained_and_scored_once(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def call(words: list[str], run_dir: Path, threads: int | None) -> None:
        called.append(words[1])
        assert main([words[1].removeprefix("distseg."), *words[2:]]) == 0

    monkeypatch.setattr(accuracy, "_call", call)
    words = [*SMALL, "steps=2", "evaluate.every_steps=0", "evaluate.num_pictures=0"]
    words += ["mode=supervised", f"data.shards={toy_shards}"]
    first = accuracy.run(words, tmp_path / "run")
    assert called == ["distseg.train", "distseg.evaluate"]
    # training's own scores, and those that it leaves out
    assert first["step"] == 2 and set(accuracy.SCORES) <= first.keys()
    # of another view, and before it by name
    (outlines,) = (tmp_path / "run").glob("evaluation-step-*-val.json")
    other = json.loads(outlines.read_text()) | {"horizontal_flip": True, "val/boundary_f1": 2.0}
    outlines.with_name(f"{outlines.stem}-flip.json").write_text(json.dumps(other))
    assert accuracy.run(words, tmp_path / "run") == first
    assert len(called) == 2


def test_after_a_run_that_failed_none_begins(capsys: pytest.CaptureFixture[str]) -> None:
    begun: list[tuple[str, int]] = []

    def one(name: str, seed: int) -> dict[str, float]:
        begun.append((name, seed))
        if (name, seed) == ("b", 0):
            raise SystemExit("b-0 failed")
        if seed > 0:
            time.sleep(0.3)  # as a run takes longer than to hear of one that failed
        return scores(0.5)

    todo = [(name, seed) for seed in range(3) for name in "ab"]
    done = finished(todo, one, 1)
    assert next(done) == ("a", 0, scores(0.5))
    with pytest.raises(SystemExit, match="b-0 failed"):
        list(done)
    # the worker may have taken the next before it was told
    assert begun[:2] == todo[:2] and len(begun) < 5
    assert "run 1 of 6 (a, seed 0): mIoU 50.0; all by" in capsys.readouterr().out
