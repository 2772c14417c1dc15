"""Verdicts on made-up and on recorded rows.

The right one, at the right step, and none on a healthy run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distseg.cli import main
from distseg.config.loading import to_dict
from distseg.config.names import flattened
from distseg.config.schema import Config, TrackingConfig
from distseg.tracking.catalogue import RATIO
from distseg.tracking.health import Health
from distseg.tracking.tracker import open_tracker, read_metrics
from distseg.tracking.verdicts import CHECKS, NAMED
from tests.ranks import leave_out
from tests.test_train import SEMI, SMALL

RECORDED = Path(__file__).parent / "data" / "health"  # see its README


def healthy(step: int) -> dict[str, Any]:
    """A row as a good run logs it."""
    row = {"step": step, "loss/segmentor": 0.5, "loss/cross_entropy": 0.45, "loss/adversarial": 1.8}
    row |= {
        "loss/discriminator_real": 0.3,
        "loss/discriminator_fake": 0.25,
        "discriminator/accuracy": 0.88,
    }
    row |= {"consistency/confident_share": 0.4, "weight/consistency": 1.0}
    row |= {"consistency/class_share/sky": 0.4, "consistency/class_share/road": 0.3}
    row |= {"consistency/labelled_share/sky": 0.3, "consistency/labelled_share/road": 0.4}
    row |= {"held_out/agreement": 0.8, "held_out/confident_agreement": 0.95}
    row |= {"held_out/confident_share": 0.5}
    row |= {"adaptation/source_entropy": 0.1, "adaptation/target_entropy": 0.12}
    row |= {"semi/mask_share": 0.2, "weight/adversarial": 0.05, RATIO: 0.2, "skips/segmentor": 0.0}
    return row | {
        "step_seconds": 1.0,
        "data_wait_seconds": 0.01,
        "ranks/slowest": 2.0,
        "ranks/slowest_ratio": 1.05,
        "checkpoint/copy_failures": 0.0,
    }


BAD: dict[str, dict[str, Any]] = {
    "discriminator_has_won": {"loss/discriminator_fake": 0.02, "discriminator/accuracy": 0.99},
    "domains_are_told_apart": {"loss/discriminator_fake": 0.02, "discriminator/accuracy": 0.99},
    "discriminator_is_blind": {
        "loss/discriminator_real": 0.693,
        "loss/discriminator_fake": 0.694,
        "discriminator/accuracy": 0.5,
    },
    "no_influence": {RATIO: 1.3e-4},
    "mask_is_empty": {"semi/mask_share": 0.0},
    "teacher_is_unsure": {"consistency/confident_share": 0.0},
    "class_never_kept": {"consistency/class_share/road": 0.0},
    "pseudo_labels_collapse": {
        "consistency/class_share/sky": 0.99,
        "consistency/class_share/road": 0.01,
    },
    "teacher_is_overconfident": {
        "held_out/confident_share": 0.97,
        "held_out/confident_agreement": 0.5,
    },
    "agreement_falls": {"held_out/agreement": 0.65},
    "not_finite": {"loss/adversarial": math.nan},
    "exploding": {"loss/cross_entropy": 300.0},
    "class_never_predicted": {"val/mean_iou": 0.4, "val/never_predicted/car": 0.013},
    "target_loses_class": {"val/mean_iou": 0.4, "source/predicted_share/car": 0.02}
    | {"val/predicted_share/car": 0.0},
    "target_collapses": {"adaptation/target_entropy": 0.01, "discriminator/accuracy": 0.52},
    "data_starved": {"data_wait_seconds": 0.3},
    "slow_rank": {"ranks/slowest_ratio": 1.5},
    "not_copied": {"checkpoint/copy_failures": 1.0},
}


# of runs of another mode
CONFIGS = {"domains_are_told_apart": {"mode": "domain_adaptation"}}


def names(health: Health) -> set[str]:
    return set(health.on)


def test_every_check_is_tested_here() -> None:
    assert BAD.keys() == NAMED.keys()


# they count classes over rows, and have tests of their own
COUNTED = ("class_never_predicted", "class_never_kept", "target_loses_class")
BY_STEP = [name for name in BAD if name not in COUNTED]


@pytest.mark.parametrize("name", BY_STEP)
def test_a_verdict_is_raised_alone_when_enough_rows_say_so_and_cleared_when_they_no_longer_do(
    name: str,
) -> None:
    rows = (healthy(step) for step in range(10, 310, 10))
    check, health = NAMED[name], Health(rows, CONFIGS.get(name))
    assert not health.events and set(health.flags().values()) == {0.0}
    step, raised_at = 300, None
    while raised_at is None and step < 700:
        step += 10
        raised_at = step if health.update(healthy(step) | BAD[name]) else None
    assert names(health) == {name} and health.flags()[f"health/{name}"] == 1.0
    (event,) = health.events
    assert event.raised and event.step == raised_at <= 300 + max(
        10 * (check.num_rows + 1), check.num_steps
    )  # one more: another rank before
    assert raised_at - event.since == max(10 * (check.num_rows - 1), check.num_steps)
    assert check.title in event.text() and check.advice in event.text()
    while name in health.on and step < 1000:
        step += 10
        health.update(healthy(step))
    assert [event.raised for event in health.events] == [True, False] and not health.on
    assert step - raised_at <= 10 * (check.clear_rows + 1)


@pytest.mark.parametrize("name", [name for name in BAD if NAMED[name].num_rows > 1])
def test_a_single_bad_row_and_a_signal_between_the_bounds_change_nothing(name: str) -> None:
    rows = (healthy(step) for step in range(10, 210, 10))
    check, health = NAMED[name], Health(rows, CONFIGS.get(name))
    near = healthy(210) | {
        key: healthy(0)[key] + (bad - healthy(0)[key]) / 5 for key, bad in BAD[name].items()
    }
    assert not health.update(near)
    between = math.sqrt(check.raise_at * check.clear_at)
    keys = {
        "data_starved": "data_wait_seconds",
        "no_influence": RATIO,
        "mask_is_empty": "semi/mask_share",
        "teacher_is_unsure": "consistency/confident_share",
    }
    keys |= {"slow_rank": "ranks/slowest_ratio", "discriminator_has_won": "loss/discriminator_fake"}
    keys |= {"domains_are_told_apart": "loss/discriminator_fake"}
    if name not in keys:
        return
    row = healthy(0) | BAD[name] | {keys[name]: between}
    for step in range(220, 520, 10):  # not raised ...
        health.update(row | {"step": step})
    assert name not in health.on
    for step in range(520, 820, 10):
        health.update(healthy(step) | BAD[name])
    assert name in health.on
    for step in range(820, 1120, 10):  # ... and not cleared
        health.update(row | {"step": step})
    assert name in health.on


def test_classes_that_no_confident_pixel_has_for_long_are_named_with_their_share() -> None:
    def row(step: int, kept: float, confident: float = 0.4) -> dict[str, Any]:
        shares = {"sky": (0.3, 0.9), "sign": (0.001, 0.0), "boat": (0.01, kept), "ship": (0.02, 0)}
        found = healthy(step) | {"consistency/confident_share": confident}
        for name, (labelled, share) in shares.items():
            found[f"consistency/labelled_share/{name}"] = labelled
            found[f"consistency/class_share/{name}"] = share
        return found

    # not yet, and not while the teacher is sure of few pixels: anything is missing among them
    assert not Health([row(step, 0.0, 0.04) for step in range(10, 400, 10)]).events
    health = Health([row(step, 0.0) for step in range(10, 210, 10)])
    assert not health.events and health.flags()["health/class_never_kept"] == 0.0
    (event,) = health.update(row(210, 0.0))
    # the signs are too few to be missed
    assert event.since == 10 and event.detail == "ship 2.00%, boat 1.00% of the labelled pixels"
    # a boat that is seen ends the row of boats alone
    assert not health.update(row(220, 0.01)) and names(health) == {"class_never_kept"}
    (event,) = health.update(row(230, 0.01) | {"consistency/class_share/ship": 0.01})
    assert not event.raised and not health.on
    assert not health.update(row(240, 0.0))


def test_a_teacher_that_does_not_teach_is_not_blamed() -> None:
    """At the start an average is of untrained weights, whatever the term."""
    rows = [healthy(step) | {"consistency/confident_share": 0.0} for step in (10, 20, 30)]
    for row in rows[1:]:
        row |= {"held_out/agreement": 0.3, "held_out/confident_share": 1.0}
        row["held_out/confident_agreement"] = 0.3
    assert not Health(rows).events
    for row in rows:
        row["consistency/confident_share"] = 0.4
    assert names(Health(rows)) == {"agreement_falls", "teacher_is_overconfident"}
    # its term has no weight yet
    for row in rows:
        row["weight/consistency"] = 0.0
    assert not Health(rows).events


def test_a_teacher_of_whom_all_pixels_are_taken_is_not_called_sure_of_them() -> None:
    """At threshold 0 being sure of wrong ones is being wrong, which `agreement_falls` tells."""
    sure = {"consistency/confident_share": 1.0, "held_out/confident_share": 1.0}
    sure |= {"held_out/confident_agreement": 0.6}
    rows = [healthy(step) | sure for step in range(10, 100, 10)]
    assert not Health(rows, MEANS | {"consistency.threshold": 0.0}).events
    assert names(Health(rows, MEANS)) == {"teacher_is_overconfident"}


def test_classes_that_no_prediction_has_for_long_are_named_with_their_share() -> None:
    def evaluation(step: int, **missed: float) -> dict[str, Any]:
        shares = {f"val/never_predicted/{name}": share for name, share in missed.items()}
        return {"step": step, "val/mean_iou": 0.4, **shares}

    health = Health()
    # rare ones come late: in two evaluations, or within some steps, nothing is said
    health.update(evaluation(50, car=0.013, sign=0.002, sea=0.3))
    health.update(evaluation(150, car=0.013, sign=0.002))
    health.update(healthy(160))
    health.update(evaluation(200, car=0.013, sign=0.002))
    assert not health.events and health.flags()["health/class_never_predicted"] == 0.0
    (event,) = health.update(evaluation(250, car=0.013, sign=0.002, sea=0.3))
    said = "a class is never predicted (car 1.30%, sign 0.20% of the labels), since step 50."
    assert event.text().startswith(f"health: {said}") and event.step == 250
    health.update(evaluation(300, sign=0.002))
    assert names(health) == {"class_never_predicted"}
    health.update(evaluation(350))
    assert not health.on


def test_a_class_that_the_target_loses_is_named_with_what_the_source_has_of_it() -> None:
    def evaluation(step: int, car: float, on_source: float = 0.02) -> dict[str, Any]:
        row = {"step": step, "val/mean_iou": 0.4, "val/predicted_share/sky": 0.5}
        row |= {"source/predicted_share/car": on_source, "source/predicted_share/sky": 0.5}
        return row | {"val/predicted_share/car": car}

    health = Health()
    # as a class that is pushed out: less at every evaluation, then none
    for step, car in ((100, 0.02), (200, 0.004), (300, 5e-5), (400, 1e-5)):
        health.update(evaluation(step, car))
        health.update(healthy(step + 10))
    assert not health.events and health.flags()["health/target_loses_class"] == 0.0
    (event,) = health.update(evaluation(500, 0.0, 0.05))
    said = "the target loses a class (car 3.00% of the predictions for the source), since step 300."
    assert event.text().startswith(f"health: {said}")
    health.update(evaluation(600, 0.003))
    assert not health.on
    # other data than the source alone was trained for lack what they lack
    rows = [evaluation(step, 0.0) for step in range(100, 2000, 100)]
    for mode, found in (("supervised", 0), ("consistency", 1), ("domain_adaptation", 1)):
        assert len(Health(rows, {"mode": mode}).events) == found
    # validated on other data, and without a target
    assert not Health(rows, {"mode": "semi_supervised", "data.unlabelled_shards": []}).events
    # rarer there, or as rare in both, is no loss
    for car, on_source in ((0.001, 0.05), (0.0, 1e-4)):
        rows = [evaluation(step, car, on_source) for step in range(100, 2000, 100)]
        assert not Health(rows).events


def test_a_target_whose_entropy_falls_is_told_where_the_discriminator_teaches_nothing() -> None:
    def row(step: int, target: float, accuracy: float | None) -> dict[str, Any]:
        # the source's falls, as it does while labels are learned
        source = max(0.05, 0.9 - step / 300)
        of_domains = {"adaptation/source_entropy": source, "adaptation/target_entropy": target}
        judged = {} if accuracy is None else {"discriminator/accuracy": accuracy}
        return {"step": step} | judged | of_domains

    steps = range(10, 610, 10)
    # as it should be: both fall together, to a discriminator at chance
    for accuracy in (0.5, None):
        assert not Health(row(s, 1.1 * max(0.05, 0.9 - s / 300), accuracy) for s in steps).events
    # surer than the source by half, which strong views of the source may explain
    assert not Health(row(s, 0.5 * max(0.05, 0.9 - s / 300), 0.5) for s in steps).events
    # MinEnt and self-training have none that would hold it back
    for accuracy in (0.47, 0.997, None):
        health = Health(row(s, 0.9 * 0.98 ** (s / 2), accuracy) for s in steps)
        assert names(health) == {"target_collapses"}
    # one that sees the difference works against it
    assert not Health(row(s, 0.9 * 0.98 ** (s / 2), 0.8) for s in steps).events


def test_a_rank_that_is_slow_is_named_and_ranks_that_take_turns_are_not() -> None:
    health = Health(healthy(step) | BAD["slow_rank"] for step in range(10, 310, 10))
    assert [(event.name, event.detail) for event in health.events] == [("slow_rank", "rank 2")]
    assert "(rank 2)" in health.events[0].text()
    turns = [
        healthy(step) | BAD["slow_rank"] | {"ranks/slowest": float(step // 10 % 2)}
        for step in range(10, 310, 10)
    ]
    assert not Health(turns).events


def test_skips_of_a_loss_scale_that_finds_its_size_are_no_fault_and_others_are() -> None:
    rows = [healthy(step) | {"skips/segmentor": step // 60 * 1.0} for step in range(10, 310, 10)]
    assert [event.name for event in Health(rows).events if event.raised] == ["not_finite"]
    assert not Health(row | {"loss_scale/segmentor": 1024.0} for row in rows).events
    many = [
        healthy(step) | {"skips/segmentor": step * 0.5, "loss_scale/segmentor": 1.0}
        for step in (10, 20)
    ]
    assert names(Health(many)) == {"not_finite"}


def test_what_a_run_does_not_have_is_not_judged() -> None:
    supervised = {
        "loss/segmentor": 1.0,
        "loss/cross_entropy": 1.0,
        "step_seconds": 1.0,
        "data_wait_seconds": 0.0,
    }
    health = Health({"step": step, **supervised} for step in range(10, 510, 10))
    assert health.flags() == {
        "health/not_finite": 0.0,
        "health/data_starved": 0.0,
        "health/exploding": 0.0,
    }
    watching = [
        healthy(step) | {"weight/adversarial": 0.0, RATIO: 0.0} for step in range(10, 510, 10)
    ]
    assert not Health(watching).events  # adv_weight=0 is asked for


def test_a_resumed_run_judges_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    rows = [
        healthy(step) | (BAD["mask_is_empty"] if 100 < step <= 180 else {})
        for step in range(10, 310, 10)
    ]
    whole = Health(rows)
    assert [(event.raised, event.step) for event in whole.events] == [(True, 150), (False, 230)]
    off = TrackingConfig(wandb="disabled")
    # two restarts, steps done again
    for start, end, stopped_at in ((0, 14, None), (12, 21, 120), (18, 30, 180)):
        tracker = open_tracker(tmp_path, off, {}, stopped_at, True)
        changed = [
            event
            for row in rows[start:end]
            for event in tracker.log(row["step"], without_step(row))
        ]
        assert changed == [
            event
            for event in whole.events
            if rows[start]["step"] <= event.step <= rows[end - 1]["step"]
        ]
        tracker.finish(0 if end == 30 else 1)
    saved = json.loads((tmp_path / "health.json").read_text())
    assert saved["step"] == 300 and saved["now"] == []
    assert [(event["name"], event["step"], event["raised"]) for event in saved["events"]] == [
        (event.name, event.step, event.raised) for event in whole.events
    ]
    written = {
        row["step"]: row["health/mask_is_empty"] for row in read_metrics(tmp_path / "metrics.jsonl")
    }
    on = [step for step, flag in written.items() if flag]
    assert on == list(range(whole.events[0].step, whole.events[1].step, 10)) and len(written) == 30


def without_step(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step"}


def test_what_holds_now_is_on_disk_with_what_to_try(tmp_path: Path) -> None:
    health = Health(healthy(step) | BAD["not_finite"] for step in (10, 20))
    health.save(tmp_path / "health.json")
    (now,) = json.loads((tmp_path / "health.json").read_text())["now"]
    assert (now["name"], now["step"], now["since"]) == ("not_finite", 10, 10)
    assert now["meaning"] and now["advice"] and now["title"] == NAMED["not_finite"].title


PLANTED = {
    "dead": {"discriminator_is_blind", "no_influence"},
    "wins": {"discriminator_has_won", "mask_is_empty"},  # one that has won believes nothing
    "empty_mask": {"mask_is_empty"},
    "healthy": set(),
    # 1.3 % of the labels: a teacher of 71 images never sees them, and nor does the network
    "teacher": {"class_never_kept", "class_never_predicted"},
    "collapse": {
        *("pseudo_labels_collapse", "class_never_kept", "class_never_predicted"),
    },
}


@pytest.mark.parametrize("name", PLANTED)
def test_real_runs_with_a_planted_fault_get_its_verdict_and_no_other(name: str) -> None:
    config = {"consistency.threshold": 0.0} if name == "collapse" else {}
    health = Health(read_metrics(RECORDED / f"{name}.jsonl"), config)
    assert names(health) == PLANTED[name] == {event.name for event in health.events}


def test_nothing_is_found_in_real_runs_that_ended_well() -> None:
    paths = sorted(RECORDED.glob("preset_*.jsonl"))
    assert len(paths) == 6
    for path in paths:
        health = Health(read_metrics(path))
        assert not health.events and len(health.flags()) >= 4, path.name


def test_bounds_leave_room_between_them() -> None:
    for check in CHECKS:
        assert (
            check.raise_at != check.clear_at
            and check.meaning.endswith((".", ")"))
            and check.advice.endswith(".")
        )


def test_a_toy_run_with_an_empty_mask_says_so_in_the_terminal_and_on_the_disk(
    toy_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_out(monkeypatch.setattr)
    arguments = [
        *SMALL,
        *SEMI,
        "semi.threshold=1",
        "semi.start_step=0",
        "evaluate.every_steps=0",
        "ema_decay=0",
    ]
    arguments += ["discriminator.options.head=patch", "evaluate.num_pictures=0", "steps=9"]
    assert (
        main(["train", *arguments, f"data.shards={toy_shards}", f"run_dir={tmp_path / 'run'}"]) == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("health: the confidence mask is empty, since step 1.") == 1
    assert "Lower semi.threshold" in printed
    rows = [
        row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/segmentor" in row
    ]
    assert [row["health/mask_is_empty"] for row in rows] == [0.0] * 4 + [1.0] * 5
    (now,) = json.loads((tmp_path / "run" / "health.json").read_text())["now"]
    assert (now["name"], now["step"], now["since"]) == ("mask_is_empty", 5, 1)
    for name in (
        RATIO,
        "discriminator/on_real",
        "discriminator/logit_gap",
        "weight/semi",
        "memory_bytes",
    ):
        assert all(name in row for row in rows), name
    assert (tmp_path / "run" / "tables" / "classes-step-00000009.csv").is_file()
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 1


def of_loss(step: int, value: float) -> dict[str, Any]:
    return {"step": step, "loss/cross_entropy": value, "loss/segmentor": value}


MEANS = flattened(to_dict(Config()))  # of a run that changes nothing: losses are means


@pytest.mark.parametrize(("form", "undecided"), [("hinge", 1.0), ("least_squares", 0.25)])
def test_a_discriminator_is_judged_by_its_form_of_loss(form: str, undecided: float) -> None:
    config = MEANS | {"loss.adv_form": form}

    def told(loss: float, accuracy: float) -> set[str]:
        both = {"loss/discriminator_real": loss, "loss/discriminator_fake": loss}
        more = {"discriminator/accuracy": accuracy}
        return names(Health([{"step": 10 * n} | both | more for n in range(1, 31)], config))

    assert told(undecided, 0.5) == {"discriminator_is_blind"}
    config["mode"] = "adversarial"
    assert told(undecided, 0.5) == {"discriminator_is_blind"}
    # where it tells domains apart, to see no difference is what it is there for
    config["mode"] = "domain_adaptation"
    assert told(undecided, 0.5) == set()
    assert told(0.05 * undecided, 0.95) == {"domains_are_told_apart"}
    config["mode"] = "adversarial"
    assert told(0.05 * undecided, 0.95) == {"discriminator_has_won"}
    assert told(0.6 * undecided, 0.8) == set()


@pytest.mark.parametrize("value", [1e6, 1e20, 1e33])
def test_an_explosion_is_told_before_it_is_infinite(value: float) -> None:
    for rows in ([of_loss(1, 2.1), of_loss(2, value)], [of_loss(10, value)]):
        # from the first row on it is known by what an untrained network has
        assert names(Health(rows, config=MEANS)) == {"exploding"}
    assert names(Health([of_loss(1, 2.1), of_loss(2, value)])) == {"exploding"}
    grown = [of_loss(step, 3.0 * 10.0**step) for step in range(5)]
    assert [event.step for event in Health(grown).events] == [2]


def test_sums_over_pixels_and_small_losses_that_come_back_are_no_explosion() -> None:
    sums = [of_loss(step, value) for step, value in enumerate((1.6e6, 9e5, 4e4, 1.2e6))]
    assert not Health(sums).events
    # a discriminator that was sure, and is mistaken for once
    rows = [{"step": step, "loss/discriminator_fake": 0.7} for step in range(5)]
    rows += [{"step": step, "loss/discriminator_fake": 1e-6} for step in range(5, 50)]
    rows += [{"step": 50, "loss/discriminator_fake": 60.0}]
    assert not Health(rows, MEANS).events
