"""Schedules against their formulas."""

from __future__ import annotations

import pytest

from distseg.config import AlternationConfig, ScheduleConfig
from distseg.schedules import Phase, lr_factor, phase


def test_poly_is_its_formula_and_ends_at_zero() -> None:
    schedule = ScheduleConfig("poly", power=0.9)
    for step in (0, 1, 50, 99):
        assert lr_factor(step, 100, schedule) == pytest.approx((1 - step / 100) ** 0.9, abs=1e-15)
    assert lr_factor(100, 100, schedule) == 0.0


def test_warmup_rises_linearly_and_reaches_the_schedule() -> None:
    schedule = ScheduleConfig("constant", warmup_steps=4)
    assert [lr_factor(step, 100, schedule) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_simultaneous_updates_both_at_every_step() -> None:
    assert {phase(step, AlternationConfig()) for step in range(50)} == {Phase(True, True)}


def test_blocks_update_one_network_at_a_time_in_blocks() -> None:
    alternation = AlternationConfig("blocks", segmentor=3, discriminator=2)
    turns = ["S" if phase(step, alternation).segmentor else "D" for step in range(12)]
    assert "".join(turns) == "SSSDDSSSDDSS"
    assert all(phase(step, alternation).segmentor != phase(step, alternation).discriminator for step in range(12))
