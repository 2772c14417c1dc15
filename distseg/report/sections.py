"""The sections of the page that are tables and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from distseg.report.comparison import Run
from distseg.report.curves import Entry
from distseg.tracking.catalogue import SCORES, Metric
from distseg.tracking.verdicts import NAMED

MAX_EVALUATIONS = 12  # of a run's table of class IoU over its evaluations
MAX_CELLS = 30  # classes of a confusion matrix that is a table; of more it is a picture
_CELL_PX = 6  # of that picture
_NUM_CONFUSIONS = 10
_BLUE = ((247, 251, 255), (8, 48, 107))  # of 0 and 1, evenly dark for all readers

Collected = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """content: HTML. id: of its heading."""

    id: str
    title: str
    note: str
    content: str

    def to_html(self) -> str:
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        heading = f'<h2 id="{self.id}">{escape(self.title)}</h2>'
        return f"<section>{heading}{note}{self.content}</section>"


@dataclass(frozen=True)
class Cell:
    """A table's cell: text, or HTML that is made here. kind: its CSS class."""

    text: str = ""
    kind: str = ""
    html: str = ""
    style: str = ""
    title: str = ""

    def to_html(self) -> str:
        pairs = {"class": self.kind, "style": self.style, "title": self.title}
        attributes = [f' {key}="{escape(value)}"' for key, value in pairs.items() if value]
        return f"<td{''.join(attributes)}>{self.html or escape(self.text)}</td>"


def number(text: str, **more: str) -> Cell:
    """A cell whose text stands at the right."""
    return Cell(text, "number", **more)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    kind: str = "",
    head_kinds: Sequence[str] = (),
) -> str:
    """A table that scrolls by itself where the window is narrow.

    head_kinds: CSS classes of the first titles.
    """
    kinds = [*head_kinds, *[""] * (len(head) - len(head_kinds))]
    titles = "".join(
        f'<th class="{css}">{escape(title)}</th>' for css, title in zip(kinds, head, strict=True)
    )
    lines = [f"<tr>{''.join(cell.to_html() for cell in row)}</tr>" for row in rows]
    body = f'<table class="{kind}"><tr>{titles}</tr>{"".join(lines)}</table>'
    return f'<div class="scroll">{body}</div>'


def swatch(entry: Entry) -> str:
    """The mark of an entry's colour."""
    return f'<i class="swatch" style="border-top-color: {entry.color}"></i>'


def named(entry: Entry, note: str = "") -> Cell:
    """An entry's mark and name."""
    small = f" <small>{escape(note)}</small>" if note else ""
    text = f"<span>{escape(entry.name)}{small}</span>"
    return Cell(html=f'<span class="run">{swatch(entry)}{text}</span>')


def or_dash(value: Any) -> str:
    return "–" if value is None else str(value)


def runs_section(collected: Collected, entries: list[Entry]) -> Section:
    """One row for every run, and for every group the means over seeds."""
    runs, groups = collected["runs"], [g for g in collected["groups"] if len(g["runs"]) > 1]
    scores = [s for s in SCORES if any(run["scores"][s.name] is not None for run in runs)]
    head = ["run", "mode", "seed", "steps", *(s.title for s in scores), "minutes", "health"]
    best = {s.name: s.best([run["scores"][s.name] for run in runs]) for s in scores}
    rows = []
    for run, entry in zip(runs, entries, strict=False):
        steps = f"{run['step']} of {run['steps']}" if run["steps"] else str(run["step"])
        about = [named(entry), Cell(or_dash(run["mode"])), number(or_dash(run["seed"]))]
        cells = [_score(run["scores"][s.name], s, best[s.name], len(runs)) for s in scores]
        minutes = "–" if run["minutes"] is None else f"{run['minutes']:.1f}"
        rows.append([*about, number(steps), *cells, number(minutes), Cell(summary(run), "text")])
    for group, entry in zip(groups, entries[len(runs) :], strict=True):
        cells = [number(_with_deviation(group["scores"][s.name])) for s in scores]
        mode = Cell(or_dash(runs[group["runs"][0]]["mode"]))
        row = [named(entry, group["note"]), mode, Cell(), Cell(), *cells, Cell(), Cell()]
        rows.append(row)
    note = "Scores in per cent; of several runs the best is bold."
    if groups:
        note += (
            " Means are over the finished runs that differ in the seed only; ±: the sample "
            "standard deviation over seeds."
        )
    return Section("runs", "Runs", note, table(head, rows))


def _score(value: float | None, metric: Metric, best: float | None, num_runs: int) -> Cell:
    is_best = num_runs > 1 and value is not None and value == best
    text = "–" if value is None else f"{100 * value:.1f}"
    return Cell(text, "number best" if is_best else "number", title=metric.title)


def _with_deviation(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return "–"
    mean = f"{100 * score['mean']:.1f}"
    return mean if score["deviation"] is None else f"{mean} ± {100 * score['deviation']:.1f}"


def summary(run: Run) -> str:
    """A run's health in a few words."""
    if not run["health"]:
        return "no signals"
    at_end = [c for c in run["health"] if any(span["to"] is None for span in c["spans"])]
    before = [c for c in run["health"] if c["spans"] and c not in at_end]
    for when, checks in (("at the end", at_end), ("for a while", before)):
        if checks:
            return f"{when}: " + "; ".join(NAMED[check["name"]].title for check in checks)
    early = sum(check["judged_from"] is None for check in run["health"])
    rest = f"; too early to tell for {early} of {len(run['health'])} checks" if early else ""
    return "nothing found" + rest


def health_section(collected: Collected, entries: list[Entry]) -> Section:
    """A bar over the steps for each check and run, and in words what was found."""
    runs = collected["runs"]
    last = max([1, *(run["step"] for run in runs)])
    rows, found, early = [], [], []
    for name, check in NAMED.items():
        tracks = []
        for run, entry in zip(runs, entries, strict=False):
            seen = next((c for c in run["health"] if c["name"] == name), None)
            if seen is None:
                continue
            tracks.append(_track(seen, run, entry, last))
            if seen["judged_from"] is None:
                early.append(check.title)
            if seen["spans"]:
                found.append(_verdict(seen, entry))
        if tracks:
            row = f"<div>{escape(check.title)}</div><div>{''.join(tracks)}</div>"
            rows.append(f'<div class="check">{row}</div>')
    note = (
        "A bar: the verdict held over these steps. A thin line: its signal was there and good. "
        "Dotted: too few rows or steps to tell. No line: the run did not write the signal."
    )
    if not rows:
        return Section("health", "Health", note, "<p>No signals yet.</p>")
    axis = f'<div class="check axis"><div>step</div><div><i>0</i><i>{last}</i></div></div>'
    return Section("health", "Health", note, "".join([*rows, axis, *(found or [_none(early)])]))


def _track(seen: dict[str, Any], run: Run, entry: Entry, last: int) -> str:
    """One run's line of a check, in shares of the width."""
    title = NAMED[seen["name"]].title
    judged_from = run["step"] if seen["judged_from"] is None else seen["judged_from"]
    early = f"{entry.name}: {title}? Too early to tell"
    parts = [_bar("early", 0, judged_from / last, early)]
    parts.append(_bar("good", judged_from / last, run["step"] / last, ""))
    for span in seen["spans"]:
        end = run["step"] if span["to"] is None else span["to"]
        label = f"{entry.name}: {title}, since step {span['since']}"
        parts.append(_bar("bad", span["since"] / last, end / last, label, entry.color))
    return f'<div class="track">{"".join(parts)}</div>'


def _bar(kind: str, start: float, end: float, title: str, color: str = "") -> str:
    place = f"left: {start:.2%}; width: {max(0, end - start):.2%}"
    color = f"; background: {color}" if color else ""
    label = f' title="{escape(title)}"' if title else ""
    return f'<i class="{kind}" style="{place}{color}"{label}></i>'


def _verdict(seen: dict[str, Any], entry: Entry) -> str:
    check = NAMED[seen["name"]]
    spans = []
    for span in seen["spans"]:
        end = "to the end" if span["to"] is None else f"to {span['to']}"
        detail = f" ({span['detail']})" if span["detail"] else ""
        spans.append(f"from step {span['since']} {end}{detail}")
    head = f"<strong>{escape(f'{entry.name}: {check.title}')}</strong>"
    text = f"{', '.join(spans)}. {check.meaning} {check.advice}"
    return f'<div class="verdict">{head} {escape(text)}</div>'


def _none(early: list[str]) -> str:
    text = "Nothing found in these runs, by the signals that they wrote."
    if early:
        text += f" Too early to tell: {'; '.join(dict.fromkeys(early))}."
    kind = "open" if early else "good"
    return f'<div class="verdict {kind}">{escape(text)}</div>'


def iou_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """Every class's IoU at the last evaluation, for runs and means, and at evaluations before."""
    runs = collected["runs"]
    classes = list(dict.fromkeys(name for run in runs for name in run["classes"]))
    if not classes:
        return None
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
            content += _details(title, _history(run), entry)
    note = (
        "At each run's last evaluation, per cent. A mean is over the runs that have the newest "
        "one, with the lowest and the highest of them in brackets."
    )
    return Section("iou", "IoU of each class", note, content)


def _last_iou(entry: Entry, runs: list[Run]) -> tuple[list[tuple[Any, dict[str, float]]], int]:
    """(seed, IoU by class) of the runs with the newest evaluation, and its step."""
    having = [runs[index] for index in entry.runs if runs[index]["iou"]]
    newest = max((run["iou"][-1]["step"] for run in having), default=0)
    found = []
    for run in having:
        if run["iou"][-1]["step"] == newest:
            values = zip(run["classes"], run["iou"][-1]["values"], strict=True)
            found.append((run["seed"], {name: iou for name, iou in values if iou is not None}))
    return found, newest


def _iou_cell(entry: Entry, of_runs: list[tuple[Any, dict[str, float]]], name: str) -> Cell:
    pairs = [(seed, values[name]) for seed, values in of_runs if name in values]
    kind = f"number {entry.css_class}"
    if not pairs:
        return Cell("absent", kind)
    seeds, values = zip(*pairs, strict=True)
    weights = [1 / seeds.count(seed) for seed in seeds]  # the runs of one seed count as one
    mean = float(np.average(values, weights=weights))
    text = f"{100 * mean:.1f}"
    if len(values) > 1:
        text += f" ({100 * min(values):.1f} to {100 * max(values):.1f})"
    faint = f"{entry.color}40"
    bar = f"background: linear-gradient(to right, {faint} {mean:.1%}, transparent {mean:.1%})"
    return Cell(text, kind, style=bar, title=f"{entry.name}, {name}: {text} %")


def _history(run: Run) -> str:
    count = len(run["iou"])
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
    ink = "; color: #fff" if share > 0.3 else ""
    style = f"background: #{red:02x}{green:02x}{blue:02x}{ink}"
    return number(f"{100 * share:.1f}", style=style, title=title)


def _blue(share: np.ndarray) -> np.ndarray:
    """Shares in [0, 1] as colours (..., 3) uint8: small ones differ more, as most are small."""
    low, high = (np.array(color, float) for color in _BLUE)
    return np.rint(low + (high - low) * np.sqrt(share)[..., None]).astype(np.uint8)


def _details(title: str, content: str, entry: Entry, is_open: bool = False) -> str:
    mark = " open" if is_open else ""
    label = f"<summary>{swatch(entry)} {escape(title)}</summary>"
    return f"<details{mark}>{label}{content}</details>"


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
        content = confusion_matrix(run["classes"], np.array(about["matrix"], float))
        parts.append(_details(source, content, entry, is_open=not parts))
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
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    confused = _confusions(classes, counts, shares)
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
    return f"{name} taken for {other}: {100 * share:.1f} % ({count:.0f} pixels)"


def _confusions(classes: Sequence[str], counts: np.ndarray, shares: np.ndarray) -> str:
    """The errors with most pixels, in words."""
    wrong = np.where(np.eye(len(classes), dtype=bool), 0, counts)
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
    large = colors.repeat(_CELL_PX, 0).repeat(_CELL_PX, 1)
    data = io.BytesIO()
    Image.fromarray(large).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    text = "confusion matrix, truth downwards, prediction to the right, in the classes' order"
    return f'<div class="scroll"><img src="{url}" alt="{text}"></div>'


def gallery_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """The same validation image of all runs side by side, one after the other."""
    pictures: dict[str, list[str]] = {}
    for run, entry in zip(collected["runs"], entries, strict=False):
        for sample in run["samples"]:
            text = f"{sample['key']}: picture, label, prediction and errors of {run['name']}"
            image = f'<img src="{sample["url"]}" alt="{escape(text)}" loading="lazy">'
            label = f"{swatch(entry)} {escape(run['name'])}"
            figure = f"<figure>{label}{image}</figure>"
            pictures.setdefault(sample["key"], []).append(figure)
    if not pictures:
        return None
    parts = []
    for key, figures in pictures.items():
        parts.append(f'<h3>{escape(key)}</h3><div class="gallery">{"".join(figures)}</div>')
    note = "Above: picture, label, prediction, errors (red). Below: the probability of each class."
    return Section("gallery", "Predictions", note, "".join(parts))


def attempts_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """One line for each start of a run."""
    found = [
        (entry, place, attempt)
        for run, entry in zip(collected["runs"], entries, strict=False)
        for place, attempt in enumerate(run["attempts"], start=1)
    ]
    if not found:
        return None
    keys = list(found[0][2])
    if not any(attempt["label"] for _, _, attempt in found):
        keys.remove("label")
    rows = [
        [named(entry), number(str(place)), *(Cell(or_dash(attempt[key])) for key in keys)]
        for entry, place, attempt in found
    ]
    note = "One line for each start of a run."
    return Section(
        "attempts", "Attempts and requeues", note, table(["run", "attempt", *keys], rows)
    )


def differences_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """The keys of the configuration in which runs differ."""
    if len(collected["runs"]) == 1:
        return None
    head = ["key", *(run["name"] for run in collected["runs"])]
    rows = [
        [Cell(row["key"]), *(Cell(or_dash(value), "text") for value in row["values"])]
        for row in collected["differences"]
    ]
    note = "" if rows else "Nothing but the run's directory."
    title = "What differs between the configurations"
    return Section("differences", title, note, table(head, rows) if rows else "")


def configuration_section(collected: Collected, entries: list[Entry]) -> Section:
    """Every key of every run."""
    content, count = _of_every_run(collected["runs"], "config", "key")
    details = f"<details><summary>all {count} keys</summary>{content}</details>"
    return Section("configuration", "Configuration", "", details)


def environment_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """What every run's last attempt ran in."""
    content, count = _of_every_run(collected["runs"], "environment", "fact")
    note = "Of each run's last attempt."
    return Section("environment", "Environment", note, content) if count else None


def _of_every_run(runs: list[Run], what: str, title: str) -> tuple[str, int]:
    """A table of a run's dictionaries beside one another, and how many keys it has."""
    keys = list(dict.fromkeys(key for run in runs for key in run[what]))
    rows = [
        [Cell(key), *(Cell(or_dash(run[what].get(key)), "text") for run in runs)] for key in keys
    ]
    return table([title, *(run["name"] for run in runs)], rows), len(keys)


SECTIONS: tuple[Callable[[Collected, list[Entry]], Section | None], ...] = (
    *(runs_section, health_section, iou_section, confusion_section, gallery_section),
    *(attempts_section, differences_section, configuration_section, environment_section),
)
