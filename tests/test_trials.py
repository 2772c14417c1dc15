"""The trials of a plan, against what the plan says."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from distseg.config import loading
from launchers.trials import EXAMPLE, expand, from_file
from shards.errors import InputError


def test_a_grid_is_every_combination_after_what_all_share() -> None:
    plan = {"base": ["preset=toy"], "grid": {"loss.adv_weight": [0, 0.01], "seed": [1, 2, 3]}}
    expected = [
        ["preset=toy", f"loss.adv_weight={weight}", f"seed={seed}"]
        for weight, seed in itertools.product([0, 0.01], [1, 2, 3])
    ]
    assert expand(plan) == expected


def test_equal_trials_are_run_once() -> None:
    assert expand({"grid": {"seed": [1, 1, 2]}}) == [["seed=1"], ["seed=2"]]
    assert len(expand({"random": {"count": 50, "values": {"seed": [1, 2]}}})) == 2


def test_parts_are_combined_each_with_each() -> None:
    plan = {"zip": {"a": [1, 2], "b": ["x", "y"]}, "list": [{"c": True}, {"d": None}]}
    assert expand(plan) == [
        ["a=1", "b=x", "c=true"],
        ["a=1", "b=x", "d=null"],
        ["a=2", "b=y", "c=true"],
        ["a=2", "b=y", "d=null"],
    ]


def test_random_draws_are_in_their_bounds_log_uniform_and_the_same_each_time() -> None:
    draw = {
        "count": 400,
        "seed": 3,
        "values": {"lr": {"low": 1e-5, "high": 1e-1, "log": True}, "seed": [0, 1]},
    }
    trials = expand({"random": draw})
    assert trials == expand({"random": draw}) and trials != expand({"random": draw | {"seed": 4}})
    rates = sorted(float(trial[0].removeprefix("lr=")) for trial in trials)
    assert rates[0] >= 1e-5 and rates[-1] <= 1e-1
    assert 5e-4 < rates[200] < 2e-3, "the median of log-uniform draws is the geometric mean, 1e-3"
    assert {trial[1] for trial in trials} == {"seed=0", "seed=1"}


def test_values_arrive_in_the_configuration_as_they_were(tmp_path: Path) -> None:
    values = {
        "evaluate.scales": [[0.5, 1.0]],
        "evaluate.horizontal_flip": [True],
        "tracking.group": [None],
    }
    values |= {"segmentor_optimizer.lr": [1e-4], "tracking.tags": [["a", "b c"]]}
    (overrides,) = expand({"base": ["preset=toy"], "grid": values})
    config = loading.load(overrides)
    assert (
        config.evaluate.scales == [0.5, 1.0]
        and config.evaluate.horizontal_flip is True
        and config.tracking.group is None
    )
    assert config.segmentor_optimizer.lr == 1e-4 and config.tracking.tags == ["a", "b c"]


def test_the_example_is_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(EXAMPLE)
    trials = expand(from_file(path))
    assert len(trials) == 4 * 2 * 2 * 8
    assert {loading.load(trial).ema_decay for trial in trials[::8]} == {0, 0.99}


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"gird": {"seed": [1]}}, "'gird'"),
        ({1: 2, "foo": 3}, "1 in the plan"),
        ({"grid": {"seed": 1}}, "lists of values"),
        ({"grid": {}}, "lists of values"),
        ({"zip": {"a": [1, 2], "b": [1]}}, "lists of one length"),
        ({"grid": {"seed": [1]}, "list": [{"seed": 2}]}, "seed in two parts"),
        ({"random": {"count": 0, "values": {"seed": [1]}}}, "count of at least 1"),
        (
            {"random": {"count": 2, "values": {"lr": {"low": 0, "high": 1, "log": True}}}},
            "0 < a < b",
        ),
        ({"base": "preset=toy", "grid": {"seed": [1]}}, "a list of key=value"),
    ],
)
def test_plans_that_cannot_be_read(plan: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        expand(plan)
