"""What a report shows, read from run directories: only files that are there are used, whatever version wrote them."""

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

from distseg import attempts
from distseg.health import Health
from distseg.tracking import ENVIRONMENT_FILE, METRICS_FILE, read_metrics
from distseg.verdicts import NAMED

MAX_POINTS = 1200  # of a curve: more than a screen has; longer ones become means of neighbours
PANEL_PX, PANEL_QUALITY = 1400, 82  # of the pictures in the page, which have text in them
_NO_SERIES = ("step", "time", "images")
# keys in which the runs of one group, whose mean is taken, may differ
_OF_ONE_GROUP = (
    *("seed", "run_dir", "device", "max_skips", "data.shards", "data.cache_", "data.num_threads"),
    *("tracking.", "checkpoint.", "parallel.", "evaluate.num_pictures", "data.allow_unverified"),
)
SCORES = ("mean_iou", "pixel_accuracy", "mean_class_accuracy", "frequency_weighted_iou")
_IOU = "val/iou/"

Run = dict[str, Any]


def collect_all(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """All that the page needs, as plain JSON values: runs, their groups with means, and how they differ."""
    runs = [collect(path) for path in run_dirs]
    for run, name in zip(runs, distinct_names(run_dirs), strict=True):
        run["name"] = name
    groups = grouped(runs)
    checks = {name: {"title": c.title, "meaning": c.meaning, "advice": c.advice} for name, c in NAMED.items()}
    return {"runs": runs, "groups": groups, "differences": differences(runs), "checks": checks}


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Each path's last part, with as many parts before it as all need to differ (the same path twice: a number)."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({index})" for index, p in enumerate(parts, 1)]


def collect(run_dir: Path) -> Run:
    """One run. Raises InputError where there is no metrics.jsonl that can be read."""
    rows = read_metrics(run_dir / METRICS_FILE)
    config = flat(_yaml(run_dir / "config.yaml"))
    evaluation = _json(run_dir / "evaluation.json")
    iou = [row for row in rows if any(name.startswith(_IOU) for name in row)]
    classes = [name.removeprefix(_IOU) for name in (iou[-1] if iou else {}) if name.startswith(_IOU)]
    scores = next((row for row in reversed(rows) if "val/mean_iou" in row), {}) | evaluation
    last = max((row["step"] for row in rows), default=0)
    return {
        "mode": config.get("mode"),
        "preset": config.get("preset"),
        "seed": config.get("seed"),
        "step": last,
        "steps": config.get("steps"),
        "minutes": _minutes(rows),
        "is_finished": bool(evaluation),
        "scores": {name: _plain(scores.get(f"val/{name}")) for name in SCORES},
        "num_images": scores.get("num_images"),
        "series": series(rows),
        "classes": classes,
        "iou": [{"step": row["step"], "values": [_plain(row.get(_IOU + name)) for name in classes]} for row in iou],
        "confusion": _confusion(run_dir, evaluation, classes),
        "samples": samples(run_dir / "pictures" / "samples"),
        "health": lanes(rows),
        "attempts": starts(run_dir),
        "environment": flat(_json(run_dir / ENVIRONMENT_FILE)),
        "config": config,
    }


def series(rows: Iterable[dict[str, Any]]) -> dict[str, list[list[float | None]]]:
    """{metric: [steps, values]} of all that is a curve; a value that is not finite is None."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NO_SERIES and not name.startswith((_IOU, "health/")) and isinstance(value, (int, float)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return {name: thinned(*curve) for name, curve in found.items()}


def thinned(steps: list[int], values: list[float]) -> list[list[float | None]]:
    """At most MAX_POINTS points: means of as many neighbours as that takes, at their last step."""
    width = -(-len(values) // MAX_POINTS)
    parts = [slice(start, start + width) for start in range(0, len(values), width)] if width else []
    means = [statistics.fmean(values[part]) for part in parts]
    return [[float(steps[part][-1]) for part in parts], [_plain(mean) for mean in means]]


def lanes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every verdict that the run's rows can tell: from which step to which it held (to None: still does)."""
    health = Health(rows)
    spans: dict[str, list[dict[str, Any]]] = {name.removeprefix("health/"): [] for name in health.flags()}
    for event in health.events:
        if event.raised:
            spans[event.name].append({"from": event.step, "to": None, "since": event.since, "detail": event.detail})
        else:
            spans[event.name][-1]["to"] = event.step
    return [{"name": name, "spans": found} for name, found in spans.items()]


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
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def grouped(runs: list[Run]) -> list[dict[str, Any]]:
    """Runs whose configurations differ in nothing but the seed and where they ran, with mean and standard deviation."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        kept = {key: value for key, value in run["config"].items() if not key.startswith(_OF_ONE_GROUP)}
        groups.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(index)
    found = []
    for members in groups.values():
        scores = {name: _mean_and_spread([runs[i]["scores"][name] for i in members]) for name in SCORES}
        found.append({"runs": members, "name": _common_name([runs[i] for i in members]), "scores": scores})
    return found


def _common_name(runs: list[Run]) -> str:
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return runs[0]["name"] if len(runs) == 1 else f"{runs[0]['preset'] or 'run'}, {runs[0]['mode']}, seeds {seeds}"


def _mean_and_spread(values: list[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation of the values that are there."""
    there = [value for value in values if value is not None]
    spread = statistics.stdev(there) if len(there) > 1 else None
    return {"mean": statistics.fmean(there) if there else None, "spread": spread, "count": len(there)}


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """The configuration keys in which the runs differ, with each run's value (None: it has no such key)."""
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
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, (list, dict)) else value
    return found


def samples(folder: Path) -> list[dict[str, str]]:
    """The panels of validation images, as data URLs."""
    found = []
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else []:
        with Image.open(path) as file:
            picture = file.convert("RGB")
        if picture.width > PANEL_PX:
            picture = picture.resize((PANEL_PX, round(picture.height * PANEL_PX / picture.width)), Image.LANCZOS)  # type: ignore[attr-defined]
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=PANEL_QUALITY)
        found.append({"key": path.stem, "url": "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()})
    return found


def _confusion(run_dir: Path, evaluation: dict[str, Any], classes: list[str]) -> list[list[int]] | None:
    """The confusion matrix, rows = truth, of training's evaluation or else of the newest other one that has it."""
    others = sorted(run_dir.glob("evaluation-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for document in [evaluation, *(_json(path) for path in others)]:
        matrix = document.get("confusion")
        if isinstance(matrix, list) and len(matrix) == len(classes):
            return matrix
    return None


def _minutes(rows: list[dict[str, Any]]) -> float | None:
    """Time spent in training steps: seconds a step times steps, so that breaks between attempts do not count."""
    total, before = 0.0, 0
    for row in rows:
        if "step_seconds" in row:
            total, before = total + row["step_seconds"] * (row["step"] - before), row["step"]
    return total / 60 if before else None


def _plain(value: Any) -> float | None:
    """For JSON, which has no word for what is not finite."""
    return float(f"{value:.6g}") if isinstance(value, (int, float)) and math.isfinite(value) else None


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
