"""The comparison of arms: its runs can be configured, and its intervals are Student's."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from benchmarks.accuracy import PLANS, interval, table
from distseg.config import loading


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


def test_the_table_compares_the_seeds_that_both_have() -> None:
    def scores(iou: float) -> dict[str, float]:
        return {"val/mean_iou": iou, "val/pixel_accuracy": 0.8}

    found = {
        "plain": {0: scores(0.5), 1: scores(0.6)},
        "more": {0: scores(0.53), 1: scores(0.61), 2: scores(0.9)},
        "not run": {},
    }
    rows = table(found)
    assert rows[2:] == [
        "| plain | 0, 1 | 55.0 | 80.0 |  |  |",
        "| more | 0, 1 | 57.0 | 80.0 | +2.0 ± 12.7 | +0.0 ± 0.0 |",
    ]
