"""Evaluations as tables.

One on a screen, several in Markdown, LaTeX or JSON, with mean and sample deviation over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distseg.config import loading
from distseg.config.compare import differing
from distseg.config.names import flattened, without_empty
from distseg.config.schema import Config
from distseg.evaluate import document
from distseg.evaluate.document import SAME_AUGMENTATION, SAME_DATA
from distseg.tracking.catalogue import (
    CLASS_IOU,
    CLASSES_COUNTED,
    MEAN_IOU,
    SCORES,
    SUBSET,
    VALIDATION,
    metric,
)
from shards.errors import InputError
from shards.words import counted

_LATEX = {symbol: f"\\{symbol}" for symbol in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def overview(report: dict[str, Any]) -> list[str]:
    """What one evaluation found, line by line.

    Scores with their intervals, and how many classes mIoU counts.
    """
    # said with the mean: classes in neither labels nor predictions are left out, and splits differ
    # in them
    all_classes = counted(len(report["confusion"]), "class", "classes")
    over = f"{report[CLASSES_COUNTED]:.0f} of {all_classes}"
    intervals = report.get("intervals_95", {})
    lines = []
    for score in SCORES:
        # a file of an earlier version, or --quick
        if report.get(score.name) is None:
            continue
        line = f"{score.title:24}{report[score.name]:6.1%}"
        if score.name in intervals:
            low, high = intervals[score.name]
            line += f"  ({low:.1%} to {high:.1%})"
        if score.name == MEAN_IOU:
            line += f"  mean over {over} in labels or predictions"
        lines.append(line)
    for name in report:
        if name.startswith(f"{VALIDATION}{SUBSET}") and report[name] is not None:
            lines.append(f"{metric(name).title:24}{report[name]:6.1%}")
    if intervals:
        lines.append("in brackets: 95 % of 1000 sets of as many images drawn from these")
    elif report.get("num_images") == 1:
        lines.append("of one image, so without intervals")
    return lines


@dataclass(frozen=True)
class Evaluation:
    """One evaluation file and the configuration of its run."""

    path: Path
    config: Config
    scores: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Evaluations whose runs differ in nothing but the seed.

    name: what sets them apart from the other rows; values: per score, one number a run, in the
    order of the runs.
    """

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    values: dict[str, tuple[float, ...]]

    def of_seeds(self, name: str) -> list[float]:
        """A score of each distinct seed."""
        return of_seeds(self.seeds, self.values[name])


def run(paths: Sequence[Path], form: str) -> int:
    """`distseg summarize`: print the table, and a note where steps differ.

    form: markdown, latex or json.
    """
    printers = {"markdown": to_markdown, "latex": to_latex, "json": to_json}
    # all are read before anything is printed: half a table would be taken for the whole
    evaluations = [read(path) for path in paths]
    print(printers[form](rows(evaluations)))
    # allowed, since the best checkpoints of runs seldom are of one step
    first_at: dict[int, Path] = {}
    for evaluation in evaluations:
        first_at.setdefault(evaluation.scores["step"], evaluation.path)
    if len(first_at) > 1:
        steps = ", ".join(f"{step} ({path})" for step, path in sorted(first_at.items()))
        print(
            f"note: scores of networks after different numbers of steps: {steps}", file=sys.stderr
        )
    return 0


def read(path: Path) -> Evaluation:
    """An evaluation file, or the one that training left in a run directory.

    Raises InputError when it is none.
    """
    # training's own, of its last step; every other one has to be named, as there may be several
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        scores = document.read(file)
        is_known = {MEAN_IOU, "split", "data", "step"} <= scores.keys()
    except (OSError, ValueError):
        is_known = False
    if not is_known:
        action = "check the path"
        if path.is_dir():
            evaluated = f"run `distseg evaluate {path}`, and name the file it writes"
            action = loading.runs_inside(path) or evaluated
        needed = "a finished run, or a file of `distseg evaluate`"
        raise InputError(f"no evaluation in {file}", needed, action)
    return Evaluation(file, loading.from_file(file.parent / "config.yaml"), scores)


def rows(evaluations: Sequence[Evaluation]) -> list[Setting]:
    """One row for each configuration, in order of appearance, whatever its seeds.

    Raises InputError when two evaluations are not of the same data and test-time augmentation, and
    for the same one named twice.
    """
    # before means are taken: scores of other images or scales differ for reasons of their own
    _check_comparable(evaluations)
    groups: list[list[Evaluation]] = []
    for evaluation in evaluations:
        # compared with the first of each group: equal in all keys but the seed is transitive
        same = (group for group in groups if not _differing(group[0], evaluation))
        group = next(same, None)
        if group is None:
            groups.append([evaluation])
        else:
            group.append(evaluation)
    names = [name for name in evaluations[0].scores if _in_tables(name)]
    for evaluation in evaluations:  # a mean is defined where every run has the score
        names = [name for name in names if evaluation.scores.get(name) is not None]
    return [_setting(group, groups, names) for group in groups]


def _in_tables(name: str) -> bool:
    return name.startswith(CLASS_IOU) or name in (score.name for score in SCORES)


def _setting(group: list[Evaluation], groups: list[list[Evaluation]], names: list[str]) -> Setting:
    config = _compared(group[0])
    apart: set[str] = set()
    for other in groups:
        apart |= set(_differing(group[0], other[0]))
    apart -= {"preset"} if len(apart) > 1 else set()  # it says nothing that the other keys do not
    # only what differs: a full configuration has some hundred keys
    named = [f"{key}={config.get(key)}" for key in sorted(apart)]
    if apart == {"preset"} and group[0].config.preset is None:
        named = ["no preset"]
    # nothing apart: by the data, as a preset is often only what a run of other data began with
    name = ", ".join(named) or str(group[0].scores["data"])
    values = {}
    for score in names:
        values[score] = tuple(float(e.scores[score]) for e in group)
    runs = tuple(str(e.path.parent) for e in group)
    return Setting(name, runs, tuple(e.config.seed for e in group), values)


def _differing(one: Evaluation, other: Evaluation) -> list[str]:
    """Keys, other than the seed, that made the networks of two runs different."""
    return differing(_compared(one), _compared(other))


def _compared(evaluation: Evaluation) -> dict[str, Any]:
    return without_empty(flattened(loading.to_dict(evaluation.config)))


def _check_comparable(evaluations: Sequence[Evaluation]) -> None:
    first = evaluations[0]
    for place, other in enumerate(evaluations):
        if other.path.resolve() in (e.path.resolve() for e in evaluations[:place]):
            raise InputError(f"{other.path} twice", "each evaluation once", "name it once")
        here, there = _conditions(first), _conditions(other)
        for key in here:
            # files of earlier versions do not say what the data hold
            unknown = key == "data_sha256" and None in (here[key], there[key])
            if here[key] != there[key] and not unknown:
                got = f"{key} is {there[key]} in {other.path}, and {here[key]} in {first.path}"
                needed = "evaluations of the same data with the same test-time augmentation"
                raise InputError(got, needed, "leave one of them out")


def _conditions(evaluation: Evaluation) -> dict[str, Any]:
    """What scores that are compared have in common."""
    scores = evaluation.scores
    # the classes too: mIoU over seven is no mIoU over eight
    classes = [name.removeprefix(CLASS_IOU) for name in scores if name.startswith(CLASS_IOU)]
    found = {key: scores.get(key) for key in (*SAME_DATA, *SAME_AUGMENTATION)}
    return found | {"classes": classes}


def of_seeds(seeds: Sequence[Any], values: Sequence[float]) -> list[float]:
    """One value for each distinct seed, the mean over its runs.

    The same seed again is not another sample.
    """
    groups: dict[Any, list[float]] = {}
    for seed, value in zip(seeds, values, strict=True):
        groups.setdefault(seed, []).append(value)
    return [statistics.fmean(group) for group in groups.values()]


def sample_deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (n - 1), NaN for a single value."""
    # n - 1: seeds are a sample, and with three of them n would say a fifth too little
    return statistics.stdev(values) if len(values) > 1 else math.nan


def to_markdown(table: Sequence[Setting]) -> str:
    """A table with one line a row, in per cent: mean ± sample standard deviation over distinct
    seeds.
    """
    columns = _columns(table)
    lines = ["| " + " | ".join(["runs", "seeds", *columns.values()]) + " |"]
    lines.append("|---|" + "---:|" * (1 + len(columns)))
    for row in table:
        seeds = str(len(set(row.seeds)))
        cells = [
            row.name.replace("|", "\\|"),
            seeds,
            *(_cell(row.of_seeds(name), "±") for name in columns),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_latex(table: Sequence[Setting]) -> str:
    """Rows for a tabular, in per cent, after a comment that names the columns."""
    columns = _columns(table)
    lines = ["% " + " & ".join(["runs", "seeds", *columns.values()])]
    for row in table:
        name = "".join(_LATEX.get(letter, letter) for letter in row.name)
        cells = [f"${_cell(row.of_seeds(name), chr(92) + 'pm')}$" for name in columns]
        lines.append(" & ".join([name, str(len(set(row.seeds))), *cells]) + r" \\")
    return "\n".join(lines)


def to_json(table: Sequence[Setting]) -> str:
    """Everything, per-class IoU included, in [0, 1].

    The values are of each run; "spread", the sample standard deviation, is null over one seed.
    """
    content = []
    for row in table:
        scores = {}
        for name, values in row.values.items():
            of_seeds = row.of_seeds(name)
            deviation = sample_deviation(of_seeds)
            scores[name] = {"mean": statistics.fmean(of_seeds), "values": list(values)}
            # null, not 0: one seed says nothing of the spread
            scores[name]["spread"] = None if math.isnan(deviation) else deviation
        content.append(
            {"name": row.name, "runs": list(row.runs), "seeds": list(row.seeds), "scores": scores}
        )
    return json.dumps(content, indent=1)


def _columns(table: Sequence[Setting]) -> dict[str, str]:
    """Titles by the names of the scores that the table has."""
    return {score.name: score.title for score in SCORES if score.name in table[0].values}


def _cell(values: Sequence[float], plus_minus: str) -> str:
    deviation = sample_deviation(values)
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if math.isnan(deviation) else f"{mean} {plus_minus} {100 * deviation:.1f}"
