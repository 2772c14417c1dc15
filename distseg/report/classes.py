"""The sections of the page about classes: their IoU, and what they are confused with."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

from distseg.report.comparison import Run
from distseg.report.curves import Entry
from distseg.report.markup import (
    Cell,
    Collected,
    Section,
    details,
    number,
    table,
)
from shards.words import counted

MAX_EVALUATIONS = 12  # of a run's table of class IoU over its evaluations
MAX_CELLS = 30  # classes of a confusion matrix that is a table; of more it is a picture
_CELL_PX = 6  # of that picture
_NUM_CONFUSIONS = 10
_BLUE = ((247, 251, 255), (8, 48, 107))  # of 0 and 1, evenly dark for all readers


def iou_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """Every class's IoU at the last evaluation, for runs and means, and at evaluations before."""
    runs = collected["runs"]
    # of all runs, in the order of the first that has them: data sets may differ
    classes = list(dict.fromkeys(chain.from_iterable(run["classes"] for run in runs)))
    if not classes:
        return None
    # (entry, [(seed, IoU by class)], step)
    columns = [(entry, *_last_iou(entry, runs)) for entry in entries]
    columns = [column for column in columns if column[1]]
    head = ["class", *(f"{entry.name}, step {step}" for entry, _, step in columns)]
    rows = []
    for name in classes:
        cells = [_iou_cell(entry, of_runs, name) for entry, of_runs, _ in columns]
        rows.append([Cell(name), *cells])
    content = table(head, rows, "bars", ["", *(entry.css_class for entry, _, _ in columns)])
    for run, entry in zip(runs, entries, strict=False):
        if len(run["iou"]) > 1:
            title = f"{entry.name}: over {len(run['iou'])} evaluations"
            content += details(title, _history(run), entry)
    note = (
        "At each run's last evaluation, per cent. A mean is over the runs that have the newest "
        "one, with the lowest and the highest of them in brackets."
    )
    return Section("iou", "IoU of each class", note, content)


def _last_iou(entry: Entry, runs: list[Run]) -> tuple[list[tuple[Any, dict[str, float]]], int]:
    """(seed, IoU by class) of the runs with the newest evaluation, and its step."""
    having = [runs[index] for index in entry.runs if runs[index]["iou"]]
    # a mean of evaluations at different steps would be one of no network
    newest = max((run["iou"][-1]["step"] for run in having), default=0)
    found = []
    for run in having:
        if run["iou"][-1]["step"] == newest:
            values = zip(run["classes"], run["iou"][-1]["values"], strict=True)
            # without absent classes, which have no IoU to take a mean of
            found.append((run["seed"], {name: iou for name, iou in values if iou is not None}))
    return found, newest


def _iou_cell(entry: Entry, of_runs: list[tuple[Any, dict[str, float]]], name: str) -> Cell:
    pairs = [(seed, values[name]) for seed, values in of_runs if name in values]
    kind = f"number {entry.css_class}"
    if not pairs:
        return Cell("absent", kind)
    seeds, values = zip(*pairs, strict=True)
    # the same seed again is the same sample, up to what GPUs round
    weights = [1 / seeds.count(seed) for seed in seeds]  # the runs of one seed count as one
    mean = float(np.average(values, weights=weights))
    text = f"{100 * mean:.1f}"
    if len(values) > 1:
        text += f" ({100 * min(values):.1f} to {100 * max(values):.1f})"
    # a quarter opaque, so that the number on it stays readable
    faint = f"color-mix(in srgb, {entry.css_color} 25%, transparent)"
    bar = f"background: linear-gradient(to right, {faint} {mean:.1%}, transparent {mean:.1%})"
    return Cell(text, kind, style=bar, title=f"{entry.name}, {name}: {text} %")


def _history(run: Run) -> str:
    count = len(run["iou"])
    # first and last always, and others evenly between; unique, as rounding may repeat one
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_EVALUATIONS)).astype(int))
    evaluations = [run["iou"][place] for place in chosen.tolist()]
    head = ["class", *(f"step {evaluation['step']}" for evaluation in evaluations)]
    rows = []
    for place, name in enumerate(run["classes"]):
        values = [evaluation["values"][place] for evaluation in evaluations]
        rows.append([Cell(name), *(_heat(value) for value in values)])
    return table(head, rows, "heat")


def _heat(share: float | None, title: str = "") -> Cell:
    """A cell of per cent in the colour of its size."""
    if share is None:
        return number("–", title=title)
    red, green, blue = _blue(np.array(share)).tolist()
    # white on the darker cells, where black could not be read; the page's own ink may be either
    ink = "#fff" if share > 0.3 else "#1b1b1b"
    style = f"background: #{red:02x}{green:02x}{blue:02x}; color: {ink}"
    return number(f"{100 * share:.1f}", style=style, title=title)


def _blue(share: np.ndarray) -> np.ndarray:
    """Shares in [0, 1] as colours (..., 3) uint8: small ones differ more, as most are small."""
    low, high = (np.array(color, float) for color in _BLUE)
    return np.rint(low + (high - low) * np.sqrt(share)[..., None]).astype(np.uint8)


def shares_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """How often each class is predicted for the target and for the source, of runs with both."""
    having = []
    for run, entry in zip(collected["runs"], entries, strict=False):
        if run["shares"]:
            having.append((run, entry))
    if not having:
        return None
    # both of a run beside one another: it is their difference that tells something
    head, columns = ["class"], []
    for run, entry in having:
        head += [f"{entry.name}, target", f"{entry.name}, source"]
        columns.append(dict(zip(run["classes"], run["shares"], strict=True)))
    rows = []
    for name in dict.fromkeys(chain.from_iterable(columns)):
        cells = [_heat(share) for found in columns for share in found.get(name, [None, None])]
        rows.append([Cell(name), *cells])
    note = (
        "Per cent of the predictions for pixels with a label (void is excluded), at the last "
        "evaluation. In a run that adapts, a class that the source has and the target hardly does "
        "was pushed out, unless the target lacks it."
    )
    return Section("shares", "Classes among the predictions", note, table(head, rows, "heat"))


def confusion_section(collected: Collected, entries: list[Entry]) -> Section:
    """Every run's confusion matrix, and its largest entries off the diagonal."""
    parts: list[str] = []
    for run, entry in zip(collected["runs"], entries, strict=False):
        about = run["confusion"]
        if about is None:
            continue
        source = f"{entry.name}: from {about['file']}"
        source += f", split {about['split']}" if about["split"] else ""
        source += "" if about["step"] is None else f", checkpoint of step {about['step']}"
        # the first is open, the others one click away: a matrix of 21 classes fills a screen
        content = confusion_matrix(run["classes"], np.array(about["matrix"], float))
        parts.append(details(source, content, entry, is_open=not parts))
    note = (
        "Per cent of the pixels of each true class (row) that were taken for each class (column); "
        "void excluded."
    )
    missing = (
        "<p>None of these runs has one of its own classes in its evaluation.json; "
        "<code>distseg evaluate RUN</code> makes one.</p>"
    )
    return Section("confusion", "Confusion matrix", note, "".join(parts) or missing)


def confusion_matrix(classes: Sequence[str], counts: np.ndarray) -> str:
    """A matrix of pixels (C, C), rows = truth, as HTML."""
    totals = counts.sum(1, keepdims=True)
    # rows of classes that never occur stay 0 instead of 0 / 0
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    confused = _confusions(classes, counts, shares)
    # 150 classes would be 22,500 cells
    if len(classes) > MAX_CELLS:
        return _picture(_blue(shares)) + confused
    rows = []
    for name, row_shares, row_counts in zip(classes, shares, counts, strict=True):
        row = [Cell(name)]
        for other, share, count in zip(classes, row_shares, row_counts, strict=True):
            row.append(_heat(float(share), _taken(name, other, share, count)))
        rows.append(row)
    return table(["truth ↓ predicted →", *classes], rows, "heat") + confused


def _taken(name: str, other: str, share: float, count: float) -> str:
    return f"{name} taken for {other}: {100 * share:.1f} % ({counted(round(count), 'pixel')})"


def _confusions(classes: Sequence[str], counts: np.ndarray, shares: np.ndarray) -> str:
    """The errors with most pixels, in words."""
    # by pixels and not by share: rare classes are confused by large shares of next to nothing
    wrong = np.where(np.eye(len(classes), dtype=bool), 0, counts)
    # stable, so that the same matrix gives the same list
    worst = np.argsort(wrong, axis=None, kind="stable")[::-1][:_NUM_CONFUSIONS]
    lines = []
    for truth, guess in zip(*np.unravel_index(worst, counts.shape), strict=True):
        if wrong[truth, guess]:
            found = shares[truth, guess], counts[truth, guess]
            lines.append(escape(_taken(classes[truth], classes[guess], *found)))
    if not lines:
        return ""
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<p>Most frequent errors, by pixels:</p><ol>{items}</ol>"


def _picture(colors: np.ndarray) -> str:
    # enlarged here: browsers that are asked to enlarge blur the cells
    large = colors.repeat(_CELL_PX, 0).repeat(_CELL_PX, 1)
    data = io.BytesIO()
    Image.fromarray(large).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    text = "confusion matrix, truth downwards, prediction to the right, in the classes' order"
    return f'<div class="scroll"><img src="{url}" alt="{text}"></div>'
