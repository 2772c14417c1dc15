"""The catalogue of metrics: it knows all that runs write, and a user's own by their prefix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distseg.tracking import catalogue
from distseg.tracking.catalogue import FAMILIES, METRICS, PANELS, SCORES, metric, panels_of

RECORDED = sorted((Path(__file__).parent / "data" / "health").glob("*.jsonl"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_every_metric_of_recorded_runs_has_a_title_and_a_unit(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = {name for row in rows for name in row} - {"step", "time"}
    unknown = [name for name in names if not metric(name).unit]
    assert names and not unknown


def test_names_are_distinct_and_every_panel_has_a_metric() -> None:
    assert len({one.name for one in METRICS}) == len(METRICS)
    assert len({panel.title for panel in PANELS}) == len(PANELS)
    drawn = [one.panel for one in (*METRICS, *FAMILIES)]
    assert all(panel in drawn for panel in PANELS)
    assert {one.panel for one in (*METRICS, *FAMILIES)} - {None} <= set(PANELS)


def test_a_users_own_loss_term_is_drawn_and_stands_on_the_line_without_an_entry() -> None:
    term = metric("loss/soft_dice")
    assert (term.title, term.label, term.short) == ("soft dice term", "soft dice", "soft dice")
    names = ["loss/soft_dice", "loss/segmentor", "weight/soft_dice", "loss/b"]
    found = {panel.title: [one.name for one in metrics] for panel, metrics in panels_of(names)}
    assert found == {
        "Segmentor": ["loss/segmentor"],
        "Other terms, unweighted": ["loss/soft_dice", "loss/b"],
        "Weights of the terms": ["weight/soft_dice"],
    }
    assert metric("val/iou/a {} b_c").title == "IoU of a {} b_c", "a class's name stays as it is"
    assert metric("anything").title == "anything" and metric("anything").panel is None


def test_runs_of_several_forms_have_no_level_but_one_that_they_share() -> None:
    names = ["loss/discriminator_fake", "loss/adversarial"]

    def drawn(*forms: str) -> list[tuple[str, float | None]]:
        panels = [panel for panel, _ in panels_of(names, forms)]
        return [(one.unit, one.reference and round(one.reference[0], 3)) for one in panels]

    assert drawn("hinge") == [("loss", 1.0), ("loss", 0.0)]
    assert drawn("hinge", "non_saturating") == [("loss", None)] * 2
    assert drawn("saturating", "non_saturating") == [("loss, nats", 0.693), ("loss, nats", None)]


def test_values_are_printed_by_their_unit() -> None:
    assert metric("val/mean_iou").text(0.1234) == "12.3%"
    assert metric("loss/segmentor").text(0.12345) == "0.123"
    assert metric("memory_bytes").text(9.1e9) == "9.10 GB"
    assert metric("val/num_pixels").text(1234567) == "1,234,567"
    assert metric("val/mean_iou").text(None) == "–"


def test_the_best_follows_the_direction() -> None:
    values = [0.3, None, 0.7, float("nan")]
    assert metric("val/mean_iou").best(values) == 0.7
    assert metric("val/calibration_error").best(values) == 0.3
    assert metric("loss/adversarial").best(values) is None  # neither is better
    assert metric("val/mean_iou").best([None]) is None
    assert all(score.better for score in SCORES)
    assert catalogue.ordered(["val/mean_iou", "x", "loss/segmentor"])[0].name == "loss/segmentor"
