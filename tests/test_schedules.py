"""Schedules against their formulas."""

from __future__ import annotations

import math

import pytest

from distseg.config import loading
from distseg.config.schema import Config, ScheduleConfig
from distseg.train.schedules import Phase, lr_factor, num_plateaus, phase, stops_early
from distseg.train.validation import Evaluation, ValidationHistory


def config_of(*overrides: str) -> Config:
    return loading.load(["data.shards=unused", "loss.adv_weight=0.5", *overrides])


def test_poly_is_its_formula_and_ends_at_zero() -> None:
    schedule = ScheduleConfig("poly", power=0.9)
    for step in (0, 1, 50, 99):
        assert lr_factor(step, 100, schedule) == pytest.approx((1 - step / 100) ** 0.9, abs=1e-15)
    assert lr_factor(100, 100, schedule) == 0.0


def test_warmup_rises_linearly_and_reaches_the_schedule() -> None:
    schedule = ScheduleConfig("constant", warmup_steps=4)
    assert [lr_factor(step, 100, schedule) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_plateau_halves_after_so_many_evaluations_without_a_lower_loss() -> None:
    schedule = ScheduleConfig("plateau", plateau_factor=0.5, plateau_patience=2)
    losses = [3.0, 2.0, 2.5, 2.0, 2.1, 1.0, 1.5, math.nan, 1.5, 1.5]
    #                        ^ 2nd without   ^ new best   ^ 2nd      ^ 2nd again
    plateaus = [num_plateaus(losses[:n], 2) for n in range(len(losses) + 1)]
    factors = [lr_factor(0, 100, schedule, number) for number in plateaus]
    assert factors == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert num_plateaus(losses, 100) == 0


def test_losses_of_different_views_are_not_compared() -> None:
    schedule = ScheduleConfig("plateau", plateau_patience=2, early_stop_patience=3)
    history = ValidationHistory(schedule, [])
    one, other = {"scales": [1.0]}, {"scales": [1.0, 1.5]}
    # in the other view none is below 1.0; in its own it falls, but for the last three
    losses = [(1.0, one), (2.0, one), (2.0, one), (9.0, other), (8.0, other), (8.0, other)]
    losses += [(8.5, other), (8.5, other)]
    told = [history.add(Evaluation(step, *each)) for step, each in enumerate(losses)]
    assert [len(lines) for lines in told] == [0, 0, 1, 0, 0, 0, 1, 1]
    assert history.num_plateaus == 2 and history.stops_early


def test_early_stopping_counts_evaluations_since_the_best() -> None:
    schedule = ScheduleConfig("constant", early_stop_patience=3)
    losses = [3.0, 2.0, 2.5, 2.0, math.nan, 1.9]
    assert [stops_early(losses[:n], schedule) for n in range(7)] == [False] * 5 + [True, False]
    assert not stops_early([1.0] * 50, ScheduleConfig("constant"))
    # without a number yet there is no best to wait from: one evaluation more than the patience
    assert [stops_early([math.nan] * n, schedule) for n in range(6)] == [False] * 4 + [True] * 2


def test_simultaneous_updates_both_at_every_step() -> None:
    weights = {"cross_entropy": 1.0, "auxiliary": 0.4, "adversarial": 0.5}
    expected = Phase(True, True, adversary=True, weights=weights)
    assert all(phase(step, config_of()) == expected for step in range(50))


def test_blocks_update_one_network_at_a_time_in_blocks() -> None:
    config = config_of(
        "alternation=blocks", "alternation.segmentor=3", "alternation.discriminator=2"
    )
    phases = [phase(step, config) for step in range(12)]
    assert "".join("S" if now.segmentor else "D" for now in phases) == "SSSDDSSSDDSS"
    assert all(now.segmentor != now.discriminator and now.adversary for now in phases)
    of_adversary = [now.weights.get("adversarial") for now in phases]
    assert of_adversary == [0.5 if now.segmentor else None for now in phases]


def test_the_adversary_starts_late_and_warms_up() -> None:
    config = config_of("loss.adv_start_step=3", "loss.adv_warmup_steps=4", "alternation=blocks")
    config.alternation.segmentor, config.alternation.discriminator = 5, 1
    weights = [phase(step, config).weights.get("adversarial", 0) for step in range(9)]
    assert weights == [0, 0, 0, 0.125, 0.25, 0.375, 0.5, 0.5, 0]
    assert [phase(step, config).adversary for step in range(4)] == [False, False, False, True]
    assert phase(8, config) == Phase(segmentor=False, discriminator=True, adversary=True)


def test_in_the_segmentors_turn_an_adversary_without_weight_is_not_asked() -> None:
    now = phase(0, config_of("alternation=blocks", "loss.adv_weight=0"))
    assert now.segmentor and not now.adversary and "adversarial" not in now.weights
    assert phase(0, config_of("loss.adv_weight=0")).adversary  # it watches, and learns
    # a term beside the built-in ones may go by what it says
    asked = phase(0, config_of("alternation=blocks", "loss.adv_weight=0", "loss.terms.dice=1"))
    assert asked.adversary


def test_terms_on_unlabelled_images_begin_at_their_steps() -> None:
    config = config_of("mode=semi_supervised", "semi.start_step=4", "semi.adv_start_step=2")
    names = ("adversarial_unlabelled", "semi")
    weights = [tuple(phase(step, config).weights[name] for name in names) for step in range(6)]
    assert weights == [(0, 0), (0, 0), (0.001, 0), (0.001, 0), (0.001, 0.1), (0.001, 0.1)]
    assert "semi" not in phase(9, config_of("semi.start_step=0")).weights  # of another mode


def test_a_teachers_views_are_seen_in_the_discriminators_blocks_too() -> None:
    words = ["mode=semi_supervised", "alternation=blocks", "ema_decay=0.9"]
    words += ["alternation.segmentor=1", "alternation.discriminator=1", "consistency.weight=1"]
    config = config_of(*words, "consistency.start_step=2")
    found = [phase(step, config) for step in range(5)]
    assert [now.taught for now in found] == [False, False, True, True, True]
    assert [now.discriminator for now in found] == [False, True, False, True, False]


def test_further_terms_begin_at_their_steps_and_warm_up() -> None:
    settings = ["loss.terms.dice={weight: 0.8, start_step: 2, warmup_steps: 4}"]
    config = loading.load(["data.shards=unused", "mode=supervised", *settings])
    weights = [phase(step, config).weights["dice"] for step in range(8)]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_supervised_mode_never_has_an_adversary() -> None:
    config = loading.load(["data.shards=unused", "mode=supervised"])
    weights = {"cross_entropy": 1.0, "auxiliary": 0.4}
    assert phase(7, config) == Phase(segmentor=True, discriminator=False, weights=weights)
