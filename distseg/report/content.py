"""What a report shows, read from run directories.

Only files that are there are used, whatever version wrote them.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from distseg.config.names import with_full_names
from distseg.evaluate import document
from distseg.report.comparison import (
    Curve,
    Run,
    check_distinct,
    differences,
    distinct_names,
    grouped,
    plain,
    thin,
)
from distseg.runs import attempts, goodput
from distseg.tracking.catalogue import (
    CLASS_IOU,
    HEALTH,
    MEAN_IOU,
    OF_CLASSES,
    SCORES,
    SOURCE_SHARE,
    STEP_SECONDS,
    TARGET_SHARE,
)
from distseg.tracking.health import Health
from distseg.tracking.tracker import ENVIRONMENT_FILE, METRICS_FILE, read_metrics

PANEL_PX, PANEL_QUALITY = 1400, 82  # of the pictures in the page, which have text in them
_NO_SERIES = ("step", "time", "images")


def collect_all(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """All that the page needs, as plain JSON values: runs, their groups with means, and how they
    differ.

    Raises InputError for a run that is named twice.
    """
    check_distinct(run_dirs)
    runs = [collect(path) for path in run_dirs]
    # after all are read, as one grid serves them all
    thin(runs)
    for run, name in zip(runs, distinct_names(run_dirs), strict=True):
        run["name"] = name
    return {"runs": runs, "groups": grouped(runs), "differences": differences(runs)}


def collect(run_dir: Path) -> Run:
    """One run. Raises InputError where there is no metrics.jsonl that can be read."""
    # the one file that a run must have; everything else may be missing in one that was stopped
    rows = read_metrics(run_dir / METRICS_FILE)
    saved = _yaml(run_dir / "config.yaml")
    # under today's names: a run of an earlier version compares with one of this
    config = flat(with_full_names(saved) if isinstance(saved, dict) else {})
    # of a run that is finished; until then the newest row with scores stands in for it
    evaluation = _evaluation(run_dir / "evaluation.json")
    evaluations = [row for row in rows if _classes(row)]
    # the newest row's, whose order is the classes' own
    classes = _classes(evaluations[-1] if evaluations else {})
    last = max((row["step"] for row in rows), default=0)
    # a run that was extended has an evaluation.json of its old end, and is not finished by it
    evaluated_at = evaluation.get("step", last) if evaluation else None
    scores = next((row for row in reversed(rows) if MEAN_IOU in row), {}) | evaluation
    return {
        "mode": config.get("mode"),
        "preset": config.get("preset"),
        "seed": config.get("seed"),
        "step": last,
        "steps": config.get("steps"),
        # the training's time, not the attempts': queues are no property of a method
        "minutes": _minutes(rows),
        "is_finished": evaluated_at is not None and evaluated_at == config.get("steps", last),
        "scores": {score.name: plain(scores.get(score.name)) for score in SCORES},
        "num_images": scores.get("num_images"),
        "series": series(rows),
        "classes": classes,
        "iou": [_class_iou(row, classes) for row in evaluations],
        "shares": _predicted_shares(scores, classes),
        "confusion": _confusion(run_dir, classes),
        "samples": samples(run_dir / "pictures" / "samples"),
        "taught": samples(run_dir / "pictures" / "pseudo_labels"),
        "health": health_spans(rows, config),
        "attempts": attempt_rows(run_dir),
        "goodput": goodput_of(run_dir),
        "environment": flat(_json(run_dir / ENVIRONMENT_FILE)),
        "config": config,
    }


def _classes(scores: dict[str, Any]) -> list[str]:
    return [name.removeprefix(CLASS_IOU) for name in scores if name.startswith(CLASS_IOU)]


def _class_iou(row: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    values = [plain(row.get(CLASS_IOU + name)) for name in classes]
    return {"step": row["step"], "values": values}


def _predicted_shares(scores: dict[str, Any], classes: list[str]) -> list[list[float | None]]:
    """Of each class among the predictions for the target and for the source; [] of one domain."""
    if not any(name.startswith(SOURCE_SHARE) for name in scores):
        return []
    prefixes = TARGET_SHARE, SOURCE_SHARE
    return [[plain(scores.get(prefix + name)) for prefix in prefixes] for name in classes]


def series(rows: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """{metric: (steps, values)} of all that is a curve; a value that is not finite is None."""
    found: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            is_curve = name not in _NO_SERIES and not name.startswith((*OF_CLASSES, HEALTH))
            if is_curve and isinstance(value, (int, float)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                # None, where JSON has no NaN: the curve has a gap there
                values.append(plain(value))
    return found


def health_spans(rows: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    """For every check whose signal is in the run's rows: from which step to which it held (to
    None: still does).

    judged_from: the step from which on there were rows enough to tell, None where there are not.
    """
    # judged anew by today's thresholds, whatever the run's own version wrote
    health = Health(rows, config)
    spans: dict[str, list[dict[str, Any]]] = {
        name.removeprefix(HEALTH): [] for name in health.flags()
    }
    for event in health.events:
        # the events of a check alternate: raised, cleared, raised
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


def attempt_rows(run_dir: Path) -> list[dict[str, Any]]:
    """One row for each attempt; times are in the zone of the machine that makes the report."""
    found = attempts.read(run_dir)
    rows = []
    for attempt in found:
        # the last one without an end may be going on; an earlier one cannot, as another has begun
        may_run = attempt.ended is None and attempt is found[-1]
        row: dict[str, Any] = {"label": attempt.label}
        row |= {"started": _local(attempt.started), "ended": _local(attempt.ended)}
        row |= {"hosts": ", ".join(attempt.hosts), "ranks": attempt.world_size}
        row |= {"from step": attempt.first_step, "to step": attempt.last_step}
        row["outcome"] = "running or killed" if may_run else attempt.outcome
        rows.append(row | {"reason": attempt.reason})
    return rows


def goodput_of(run_dir: Path) -> dict[str, Any] | None:
    """Where the run's time has gone, in shares by part; None of a run of an earlier version."""
    found = goodput.of_run(run_dir)
    if found is None:
        return None
    shares = {part: found.share(part) for part in goodput.PARTS}
    about = {"attempts": found.num_attempts, "wall_seconds": found.wall_seconds}
    return about | {"shares": shares}


def _local(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    # with the zone's name, as the page may be read in another one
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted keys; lists as text."""
    found: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            is_nested = isinstance(value, (list, dict))
            # as text: what is compared and shown is a cell
            found[f"{prefix}{key}"] = json.dumps(value) if is_nested else value
    return found


def samples(folder: Path) -> list[dict[str, str]]:
    """The panels of a folder's images, as data URLs."""
    found = []
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        if picture.width > PANEL_PX:
            height_px = round(picture.height * PANEL_PX / picture.width)
            # drawn larger than a page shows them
            picture = picture.resize((PANEL_PX, height_px), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=PANEL_QUALITY)
        url = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
        found.append({"key": path.stem, "url": url})
    return found


def _confusion(run_dir: Path, classes: list[str]) -> dict[str, Any] | None:
    """The confusion matrix of training's evaluation or else of the newest other one that has it for
    these classes.

    matrix: rows = truth; file, split and step: what it was found by, None where the file does not
    say.
    """
    # by the time of writing, since names sort by step and not by when they were made
    others = run_dir.glob("evaluation-*.json")
    newest_first = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [run_dir / "evaluation.json", *newest_first]:
        content = _evaluation(path)
        # only with the same classes: a matrix beside other names would be read wrongly
        if content.get("confusion") and _classes(content) == classes:
            about = {"file": path.name, "split": content.get("split"), "step": content.get("step")}
            return about | {"matrix": content["confusion"]}
    return None


def _minutes(rows: list[dict[str, Any]]) -> float | None:
    """Time spent in training steps.

    Seconds a step times steps, so that breaks between attempts do not count.
    """
    total, before = 0.0, 0
    for row in rows:
        # rows of evaluations have no time of a step
        if STEP_SECONDS in row:
            total, before = total + row[STEP_SECONDS] * (row["step"] - before), row["step"]
    return total / 60 if before else None


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        return document.read(path)
    # a file that is torn or missing takes its section away, not the page
    except (OSError, ValueError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
