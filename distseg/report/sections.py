"""The sections of the page that are tables and pictures."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from itertools import chain
from typing import Any

from distseg.report.classes import confusion_section, iou_section, shares_section
from distseg.report.comparison import Run
from distseg.report.curves import Entry
from distseg.report.markup import (
    Cell,
    Collected,
    Section,
    named,
    number,
    or_dash,
    swatch,
    table,
)
from distseg.runs.goodput import PARTS
from distseg.tracking.catalogue import SCORES
from distseg.tracking.metric import Metric
from distseg.tracking.verdicts import NAMED
from shards.words import counted

# of curves.py, which are told apart by colour-blind readers too; green: the steps that counted
_PART_COLORS = dict(zip(PARTS, (2, 5, 6, 0, 3, 9, 1, 10, 4), strict=True))


def runs_section(collected: Collected, entries: list[Entry]) -> Section:
    """One row for every run, and for every group the means over seeds."""
    runs, groups = collected["runs"], [g for g in collected["groups"] if len(g["runs"]) > 1]
    scores = []
    for score in SCORES:
        # a column of dashes would only push the others out of the window
        if {run["scores"][score.name] for run in runs} != {None}:
            scores.append(score)
    head = ["run", "mode", "seed", "steps", *(s.title for s in scores), "minutes", "health"]
    best = {}
    for score in scores:
        best[score.name] = score.best([run["scores"][score.name] for run in runs])
    rows = []
    for run, entry in zip(runs, entries, strict=False):
        steps = f"{run['step']} of {run['steps']}" if run["steps"] else str(run["step"])
        about = [named(entry), Cell(or_dash(run["mode"])), number(or_dash(run["seed"]))]
        cells = [_score(run["scores"][s.name], s, best[s.name], len(runs)) for s in scores]
        minutes = "–" if run["minutes"] is None else f"{run['minutes']:.1f}"
        rows.append([*about, number(steps), *cells, number(minutes), Cell(summary(run), "text")])
    # entries are the runs and then the groups, in this order; see `entries_of`
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
    # of one run every score would be the best
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
    # not "nothing found", which a run of an earlier version cannot claim
    if not run["health"]:
        return "no signals"
    # of the spans of a verdict only the last one can be open
    at_end = [c for c in run["health"] if c["spans"] and c["spans"][-1]["to"] is None]
    before = [c for c in run["health"] if c["spans"] and c not in at_end]
    for when, checks in (("at the end", at_end), ("for a while", before)):
        if checks:
            return f"{when}: " + "; ".join(NAMED[check["name"]].title for check in checks)
    # the most important first: what holds at the end, then what held for a while
    early = sum(check["judged_from"] is None for check in run["health"])
    rest = f"; too early to tell for {early} of {len(run['health'])} checks" if early else ""
    return "nothing found" + rest


def health_section(collected: Collected, entries: list[Entry]) -> Section:
    """A bar over the steps for each check and run, and in words what was found."""
    runs = collected["runs"]
    # at least 1, by which all places are divided
    last = max([1, *(run["step"] for run in runs)])
    rows, found, early = [], [], []
    # in the order of the catalogue of checks, so that two pages can be laid side by side
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
    # what could not be judged is dotted and not green
    judged_from = run["step"] if seen["judged_from"] is None else seen["judged_from"]
    early = f"{entry.name}: {title}? Too early to tell"
    parts = [_bar("early", 0, judged_from / last, early)]
    parts.append(_bar("good", judged_from / last, run["step"] / last, ""))
    for span in seen["spans"]:
        end = run["step"] if span["to"] is None else span["to"]
        label = f"{entry.name}: {title}, since step {span['since']}"
        # from the first row that it goes by, as that is when it began, not when it was told
        parts.append(_bar("bad", span["since"] / last, end / last, label, entry.css_color))
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


def gallery_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """The same validation image of all runs side by side, one after the other."""
    note = (
        "Above: picture, label, prediction, errors (red). Below: the probability of each class "
        "that occurs."
    )
    content = _gallery(collected, entries, "samples", "picture, label, prediction and errors")
    return Section("gallery", "Predictions", note, content) if content else None


def taught_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """Some unlabelled images of each run that has a teacher, as they are trained on."""
    note = (
        "Unlabelled images: the weak view, the teacher's label of it, the strong view that the "
        "segmentor is trained on, and its label. Striped pixels are not confident."
    )
    content = _gallery(collected, entries, "taught", "weak and strong view with pseudo-labels")
    return Section("pseudo-labels", "Pseudo-labels", note, content) if content else None


def _gallery(collected: Collected, entries: list[Entry], which: str, what: str) -> str:
    """Pictures of all runs, those of one key side by side; "" where there are none."""
    pictures: dict[str, list[str]] = {}
    for run, entry in zip(collected["runs"], entries, strict=False):
        for sample in run[which]:
            text = f"{sample['key']}: {what} of {run['name']}"
            # lazy: a page of many runs has more pictures than a browser should decode at once
            image = f'<img src="{sample["url"]}" alt="{escape(text)}" loading="lazy">'
            label = f"{swatch(entry)} {escape(run['name'])}"
            figure = f"<figure>{label}{image}</figure>"
            pictures.setdefault(sample["key"], []).append(figure)
    # one after the other, as pictures of one key are compared
    parts = []
    for key, figures in pictures.items():
        parts.append(f'<h3>{escape(key)}</h3><div class="gallery">{"".join(figures)}</div>')
    return "".join(parts)


def goodput_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """A bar of each run's time, in shares, and the same as a table."""
    booked = []
    for run, entry in zip(collected["runs"], entries, strict=False):
        if run["goodput"] is not None:
            booked.append((run["goodput"], entry))
    if not booked:
        return None
    # a part that took no time in any run would be a column of zeros
    parts = [part for part in PARTS if any(found["shares"][part] >= 0.0005 for found, _ in booked)]
    bars, rows = [], []
    for found, entry in booked:
        stacked = _stacked(found["shares"])
        bars.append(f'<div class="check"><div>{named(entry).html}</div>{stacked}</div>')
        about = [number(str(found["attempts"])), number(f"{found['wall_seconds'] / 60:.1f}")]
        rows.append([named(entry), *about, *(_share(found, part) for part in parts)])
    marks = [f"<span>{_part_mark(part)}{escape(PARTS[part])}</span>" for part in parts]
    legend = f'<div class="legend">{"".join(marks)}</div>'
    head = ["run", "attempts", "minutes", *(PARTS[part] for part in parts)]
    note = (
        "Where the time between a run's first start and its end went; the goodput is the share of "
        "the steps that counted."
    )
    content = "".join([*bars, legend, table(head, rows)])
    return Section("goodput", "Goodput", note, content)


# HTML and not a chart: it prints, needs no script and follows the page's colours
def _stacked(shares: dict[str, float]) -> str:
    """One line of pieces, each as wide as its share."""
    pieces = []
    for part, share in shares.items():
        title = escape(f"{PARTS[part]}: {share:.1%}")
        width = f"width: {max(0.0, share):.2%}; background: {_part_color(part)}"
        pieces.append(f'<i style="{width}" title="{title}"></i>')
    return f'<div class="stacked">{"".join(pieces)}</div>'


def _part_mark(part: str) -> str:
    return f'<i class="swatch" style="border-top-color: {_part_color(part)}"></i>'


def _part_color(part: str) -> str:
    return f"var(--run-{_PART_COLORS[part]})"


def _share(found: dict[str, Any], part: str) -> Cell:
    share = found["shares"][part]
    return number(f"{share:.1%}", title=f"{share * found['wall_seconds']:.0f} s")


def attempts_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """One line for each start of a run."""
    found = []
    for run, entry in zip(collected["runs"], entries, strict=False):
        found += [(entry, n, attempt) for n, attempt in enumerate(run["attempts"], start=1)]
    if not found:
        return None
    keys = list(found[0][2])
    # only starts by the supervisor have labels
    if not any(attempt["label"] for _, _, attempt in found):
        keys.remove("label")
    rows = []
    for entry, n, attempt in found:
        rows.append([named(entry), number(str(n)), *(Cell(or_dash(attempt[key])) for key in keys)])
    note = "One line for each start of a run."
    return Section(
        "attempts", "Attempts and requeues", note, table(["run", "attempt", *keys], rows)
    )


def differences_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """The keys of the configuration in which runs differ."""
    if len(collected["runs"]) == 1:
        return None
    head = ["key", *(run["name"] for run in collected["runs"])]
    rows = []
    for row in collected["differences"]:
        rows.append([Cell(row["key"]), *(Cell(or_dash(value), "text") for value in row["values"])])
    note = "" if rows else "Nothing but the run's directory."
    title = "What differs between the configurations"
    return Section("differences", title, note, table(head, rows) if rows else "")


def configuration_section(collected: Collected, entries: list[Entry]) -> Section:
    """Every key of every run."""
    content, count = _of_every_run(collected["runs"], "config", "key")
    details = f"<details><summary>all of {counted(count, 'key')}</summary>{content}</details>"
    return Section("configuration", "Configuration", "", details)


def environment_section(collected: Collected, entries: list[Entry]) -> Section | None:
    """What every run's last attempt ran in."""
    content, count = _of_every_run(collected["runs"], "environment", "fact")
    note = "Of each run's last attempt."
    return Section("environment", "Environment", note, content) if count else None


def _of_every_run(runs: list[Run], what: str, title: str) -> tuple[str, int]:
    """A table of a run's dictionaries beside one another, and how many keys it has."""
    # the union, as versions differ in their keys: a dash where a run has none
    keys = list(dict.fromkeys(chain.from_iterable(run[what] for run in runs)))
    rows = []
    for key in keys:
        rows.append([Cell(key), *(Cell(or_dash(run[what].get(key)), "text") for run in runs)])
    return table([title, *(run["name"] for run in runs)], rows), len(keys)


# the order of the page; each gives None where it has nothing to show
SECTIONS: tuple[Callable[[Collected, list[Entry]], Section | None], ...] = (
    *(runs_section, health_section, iou_section, shares_section),
    *(confusion_section, gallery_section),
    taught_section,
    *(
        goodput_section,
        attempts_section,
        differences_section,
        configuration_section,
        environment_section,
    ),
)
