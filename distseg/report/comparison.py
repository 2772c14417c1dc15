"""Several runs beside one another: their names, their groups with means, and how they differ."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distseg.config.compare import setting
from distseg.config.forms import DEFAULT
from distseg.config.schema import ADAPTATION
from distseg.evaluate.summary import of_seeds, sample_deviation
from distseg.tracking.catalogue import DISCRIMINATOR_FAKE, SCORES, panels_of
from distseg.tracking.metric import Metric, Panel
from shards.errors import InputError

MAX_POINTS = 600  # of a curve: more than a panel has pixels; longer ones become means of neighbours

Run = dict[str, Any]
Curve = tuple[list[int], list[float | None]]  # steps, values; None for what is not finite


def drawn_panels(names: Iterable[str], runs: Sequence[Run]) -> list[tuple[Panel, list[Metric]]]:
    """As `panels_of`, by what the runs' discriminators learn."""
    judged = [run["config"] for run in runs if DISCRIMINATOR_FAKE in run["series"]]
    forms = [config.get("loss.adv_form", DEFAULT) for config in judged] or [DEFAULT]
    # of both kinds of runs the words of the usual one hold
    of_domains = bool(judged) and all(config.get("mode") in ADAPTATION for config in judged)
    return panels_of(names, forms, of_domains)


def check_distinct(paths: Sequence[Path]) -> None:
    """Raise InputError for a run that is named twice."""
    seen: set[Path] = set()
    for path in paths:
        # resolved, as one run may be reached by two names; its mean with itself would look like two
        # seeds
        if path.resolve() in seen:
            raise InputError(f"{path} twice", "each run once", "name it once")
        seen.add(path.resolve())


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Each path's last part, with as many parts before it as all need to differ.

    The paths are distinct.
    """
    # `.` and `..` say nothing to whoever gets the page
    parts = [path.resolve().parts for path in paths]
    count = 1
    while True:
        names = ["/".join(of_path[-count:]) for of_path in parts]
        if len(set(names)) == len(names):
            return names
        count += 1


def thin(runs: Sequence[Run]) -> None:
    """Replace every metric that has more than MAX_POINTS in some run by means, on one grid of steps
    for all runs.
    """
    for name in set().union(*(run["series"] for run in runs)):
        having = [run["series"] for run in runs if name in run["series"]]
        if max(len(curves[name][0]) for curves in having) > MAX_POINTS:
            # one width for all runs, or means over runs would have no steps in common
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
        # the last part may be short, and then ends where the run does
        parts.setdefault(min(-(-step // width) * width, steps[-1]), []).append(value)
    return list(parts), [_mean(part) for part in parts.values()]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    # None among them makes the whole part None: a NaN that was thinned away would look like a good
    # run
    return plain(statistics.fmean(known)) if len(known) == len(values) else None


def plain(value: Any) -> float | None:
    """A number of six digits; None for what is not finite, or no number."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        # more digits would only make the page larger
        return float(f"{value:.6g}")
    return None


def _round(value: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is no smaller."""
    power = 10 ** max(0, math.floor(math.log10(value)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def grouped(runs: list[Run]) -> list[dict[str, Any]]:
    """Runs whose configurations differ in nothing but the seed and where they ran, with the mean of
    finished ones.

    note: over how many runs the mean is taken, and why over no more.
    """
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        # as text, since dictionaries cannot be keys; sorted, since files of versions order keys
        # differently
        kept = json.dumps(setting(run["config"]), sort_keys=True, default=str)
        groups.setdefault(kept, []).append(index)
    found = []
    for members in groups.values():
        own = [runs[i] for i in members]
        # a run that goes on has scores of an earlier step, which would pull the mean down
        finished = [run for run in own if run["is_finished"]]
        group = {"runs": members, "name": _common_name(own), "note": _note(own, finished)}
        scores = {score.name: _mean_and_deviation(finished, score.name) for score in SCORES}
        found.append(group | {"scores": scores})
    return found


def _common_name(runs: list[Run]) -> str:
    if len(runs) == 1:
        return runs[0]["name"]
    seeds = ", ".join(dict.fromkeys(str(run["seed"]) for run in runs))
    return f"{runs[0]['preset'] or 'run'}, {runs[0]['mode']}, seeds {seeds}"


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


def _mean_and_deviation(runs: list[Run], name: str) -> dict[str, Any]:
    """Mean and sample standard deviation of a score over distinct seeds.

    None where a run lacks the score.
    """
    values = [run["scores"][name] for run in runs]
    # a mean over those that have a score would not be the mean that its row promises
    if not values or None in values:
        return {"mean": None, "deviation": None, "count": 0}
    each = of_seeds([run["seed"] for run in runs], values)
    # JSON and the page have None for "unknown", where the function has NaN
    deviation = sample_deviation(each) if len(each) > 1 else None
    return {"mean": statistics.fmean(each), "deviation": deviation, "count": len(each)}


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """The configuration keys in which the runs differ, with each run's value (None: it has no such
    key).
    """
    found = []
    # run_dir differs in every two runs, and says nothing
    for key in sorted(set().union(*(run["config"] for run in runs)) - {"run_dir"}):
        values = [run["config"].get(key) for run in runs]
        # what the others have there is named by itself
        if {} in values:
            continue
        if any(value != values[0] for value in values):
            found.append({"key": key, "values": values})
    return found
