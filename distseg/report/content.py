"""What a report shows, read from run directories.

Only files that are there are used, whatever version wrote them.
"""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from distseg.config.compare import setting
from distseg.config.names import with_full_names
from distseg.evaluate.summary import of_seeds, spread
from distseg.runs import attempts
from distseg.tracking.health import Health
from distseg.tracking.tracker import ENVIRONMENT_FILE, METRICS_FILE, read_metrics
from distseg.tracking.verdicts import NAMED
from shards.errors import InputError

MAX_POINTS = 1200  # of a curve: more than a screen has; longer ones become means of neighbours
PANEL_PX, PANEL_QUALITY = 1400, 82  # of the pictures in the page, which have text in them
_NO_SERIES = ("step", "time", "images")
SCORES = ("mean_iou", "pixel_accuracy", "mean_class_accuracy", "frequency_weighted_iou")
_IOU = "val/iou/"

Run = dict[str, Any]
Curve = tuple[list[int], list[float | None]]  # steps, values


def collect_all(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """All that the page needs, as plain JSON values: runs, their groups with means, and how they
    differ.

    Raises InputError for a run that is named twice.
    """
    for place, path in enumerate(run_dirs):
        if path.resolve() in (other.resolve() for other in run_dirs[:place]):
            raise InputError(f"{path} twice", "each run once", "name it once")
    runs = [collect(path) for path in run_dirs]
    thin(runs)
    for run, name in zip(runs, distinct_names(run_dirs), strict=True):
        run["name"] = name
    groups = grouped(runs)
    checks = {
        name: {"title": c.title, "meaning": c.meaning, "advice": c.advice}
        for name, c in NAMED.items()
    }
    return {"runs": runs, "groups": groups, "differences": differences(runs), "checks": checks}


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Each path's last part, with as many parts before it as all need to differ.

    The paths are distinct.
    """
    parts = [path.resolve().parts for path in paths]
    counts = range(1, max(len(p) for p in parts) + 1)
    named = (["/".join(p[-count:]) for p in parts] for count in counts)
    return next(names for names in named if len(set(names)) == len(names))


def collect(run_dir: Path) -> Run:
    """One run. Raises InputError where there is no metrics.jsonl that can be read."""
    rows = read_metrics(run_dir / METRICS_FILE)
    saved = _yaml(run_dir / "config.yaml")
    config = flat(with_full_names(saved) if isinstance(saved, dict) else {})
    evaluation = _json(run_dir / "evaluation.json")
    iou = [row for row in rows if any(name.startswith(_IOU) for name in row)]
    classes = [
        name.removeprefix(_IOU) for name in (iou[-1] if iou else {}) if name.startswith(_IOU)
    ]
    scores = next((row for row in reversed(rows) if "val/mean_iou" in row), {}) | evaluation
    last = max((row["step"] for row in rows), default=0)
    return {
        "mode": config.get("mode"),
        "preset": config.get("preset"),
        "seed": config.get("seed"),
        "step": last,
        "steps": config.get("steps"),
        "minutes": _minutes(rows),
        "is_finished": bool(evaluation)
        and evaluation.get("step", last) == config.get("steps", last),
        "scores": {name: _plain(scores.get(f"val/{name}")) for name in SCORES},
        "num_images": scores.get("num_images"),
        "series": series(rows),
        "classes": classes,
        "iou": [
            {"step": row["step"], "values": [_plain(row.get(_IOU + name)) for name in classes]}
            for row in iou
        ],
        "confusion": _confusion(run_dir, classes),
        "samples": samples(run_dir / "pictures" / "samples"),
        "health": lanes(rows),
        "attempts": starts(run_dir),
        "environment": flat(_json(run_dir / ENVIRONMENT_FILE)),
        "config": config,
    }


def series(rows: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """{metric: (steps, values)} of all that is a curve; a value that is not finite is None."""
    found: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            if (
                name not in _NO_SERIES
                and not name.startswith((_IOU, "health/"))
                and isinstance(value, (int, float))
            ):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(_plain(value))
    return found


def thin(runs: Sequence[Run]) -> None:
    """Replace every metric that has more than MAX_POINTS in some run by means, on one grid of steps
    for all runs.
    """
    for name in {name for run in runs for name in run["series"]}:
        having = [run["series"] for run in runs if name in run["series"]]
        if max(len(curves[name][0]) for curves in having) > MAX_POINTS:
            width = _round(max(curves[name][0][-1] for curves in having) / MAX_POINTS)
            for curves in having:
                steps, values = curves[name]
                curves[name] = thinned(steps, values, width)


def thinned(steps: list[int], values: list[float | None], width: int) -> Curve:
    """Means over `width` steps, at the last of them or of the run.

    None for one with a value that is not finite.
    """
    parts: dict[int, list[float | None]] = {}
    for step, value in zip(steps, values, strict=True):
        parts.setdefault(min(-(-step // width) * width, steps[-1]), []).append(value)
    return list(parts), [_mean(part) for part in parts.values()]


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return _plain(statistics.fmean(there)) if len(there) == len(values) else None


def _round(value: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is no smaller."""
    power = 10 ** max(0, math.floor(math.log10(value)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def lanes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every verdict whose signal is in the run's rows: from which step to which it held (to
    None: still does).

    judged_from: the step from which on there were rows enough to tell, None where there are not.
    """
    health = Health(rows)
    spans: dict[str, list[dict[str, Any]]] = {
        name.removeprefix("health/"): [] for name in health.flags()
    }
    for event in health.events:
        if event.raised:
            spans[event.name].append(
                {"from": event.step, "to": None, "since": event.since, "detail": event.detail}
            )
        else:
            spans[event.name][-1]["to"] = event.step
    return [
        {"name": name, "judged_from": health.judged_from.get(name), "spans": spans[name]}
        for name in spans
    ]


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """One row for each attempt, with times in the time zone of the machine that makes the report."""
    found = attempts.read(run_dir)
    rows = []
    for attempt in found:
        may_run = attempt.ended is None and attempt is found[-1]
        rows.append(
            {
                "label": attempt.label,
                "started": _local(attempt.started),
                "ended": _local(attempt.ended),
                "hosts": ", ".join(attempt.hosts),
                "ranks": attempt.world_size,
                "from step": attempt.first_step,
                "to step": attempt.last_step,
                "outcome": "running or killed" if may_run else attempt.outcome,
                "reason": attempt.reason,
            }
        )
    return rows


def _local(seconds: float | None) -> str | None:
    return (
        None
        if seconds is None
        else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    )


def grouped(runs: list[Run]) -> list[dict[str, Any]]:
    """Runs whose configurations differ in nothing but the seed and where they ran, with the mean of
    finished ones.

    note: over how many runs the mean is taken, and why over no more.
    """
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        kept = json.dumps(setting(run["config"]), sort_keys=True, default=str)
        groups.setdefault(kept, []).append(index)
    found = []
    for members in groups.values():
        own = [runs[i] for i in members]
        finished = [run for run in own if run["is_finished"]]
        scores = {name: _mean_and_spread(finished, name) for name in SCORES}
        found.append(
            {
                "runs": members,
                "name": _common_name(own),
                "note": _note(own, finished),
                "scores": scores,
            }
        )
    return found


def _common_name(runs: list[Run]) -> str:
    seeds = ", ".join(dict.fromkeys(str(run["seed"]) for run in runs))
    return (
        runs[0]["name"]
        if len(runs) == 1
        else f"{runs[0]['preset'] or 'run'}, {runs[0]['mode']}, seeds {seeds}"
    )


def _note(runs: list[Run], finished: list[Run]) -> str:
    notes = [f"n = {len(finished)} of {len(runs)}"]
    others = [run["name"] for run in runs if run not in finished]
    if others:
        notes.append(f"{_listed(others)} {'is' if len(others) == 1 else 'are'} not finished")
    for seed in dict.fromkeys(run["seed"] for run in finished):
        same = [run["name"] for run in finished if run["seed"] == seed]
        if len(same) > 1:
            notes.append(f"{_listed(same)} have seed {seed} and count as one")
    return "; ".join(notes)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _mean_and_spread(runs: list[Run], name: str) -> dict[str, Any]:
    """Mean and sample standard deviation of a score over distinct seeds.

    None where a run lacks the score.
    """
    values = [run["scores"][name] for run in runs]
    if not values or None in values:
        return {"mean": None, "spread": None, "count": 0}
    each = of_seeds([run["seed"] for run in runs], values)
    return {
        "mean": statistics.fmean(each),
        "spread": spread(each) if len(each) > 1 else None,
        "count": len(each),
    }


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """The configuration keys in which the runs differ, with each run's value (None.

    It has no such key).
    """
    keys = sorted({key for run in runs for key in run["config"]})
    found = [{"key": key, "values": [run["config"].get(key) for run in runs]} for key in keys]
    different = [row for row in found if any(value != row["values"][0] for value in row["values"])]
    return [row for row in different if row["key"] != "run_dir"]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted keys; lists as text."""
    found: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = (
                json.dumps(value) if isinstance(value, (list, dict)) else value
            )
    return found


def samples(folder: Path) -> list[dict[str, str]]:
    """The panels of validation images, as data URLs."""
    found = []
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        if picture.width > PANEL_PX:
            height_px = round(picture.height * PANEL_PX / picture.width)
            picture = picture.resize((PANEL_PX, height_px), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=PANEL_QUALITY)
        found.append(
            {
                "key": path.stem,
                "url": "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode(),
            }
        )
    return found


def _confusion(run_dir: Path, classes: list[str]) -> dict[str, Any] | None:
    """The confusion matrix of training's evaluation or else of the newest other one that has it for
    these classes.

    matrix: rows = truth; file, split and step: what it was found by, None where the file does not
    say.
    """
    others = sorted(
        run_dir.glob("evaluation-*.json"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in [run_dir / "evaluation.json", *others]:
        document = _json(path)
        names = [name.removeprefix(_IOU) for name in document if name.startswith(_IOU)]
        if document.get("confusion") and names == classes:
            about = {
                "file": path.name,
                "split": document.get("split"),
                "step": document.get("step"),
            }
            return about | {"matrix": document["confusion"]}
    return None


def _minutes(rows: list[dict[str, Any]]) -> float | None:
    """Time spent in training steps.

    Seconds a step times steps, so that breaks between attempts do not count.
    """
    total, before = 0.0, 0
    for row in rows:
        if "step_seconds" in row:
            total, before = total + row["step_seconds"] * (row["step"] - before), row["step"]
    return total / 60 if before else None


def _plain(value: Any) -> float | None:
    """For JSON, which has no word for what is not finite."""
    return (
        float(f"{value:.6g}") if isinstance(value, (int, float)) and math.isfinite(value) else None
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
