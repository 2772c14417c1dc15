"""The report's page: HTML, style and SVG in one file, without a script.

What a run wrote is escaped and stands in the page as text, never as HTML. A checkbox for every run
and every mean hides its curves and its column of class IoU, by the style sheet alone.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from html import escape
from importlib import resources
from typing import Any

from distseg.report.comparison import drawn_panels
from distseg.report.curves import (
    COLORS,
    STYLES,
    Curve,
    Entry,
    css_colors,
    curve,
    entries_of,
    look_of,
    panel_svg,
)
from distseg.report.markup import Section, swatch
from distseg.report.sections import SECTIONS
from distseg.tracking.figures import reference
from distseg.tracking.metric import Metric, Panel

# The policy forbids scripts and every address: should something escape escaping, it can neither run
# nor call home.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{heading}</h1>
<p class="note">distseg report of {made}</p>
<nav>{links}</nav>
{sections}
</body>
</html>
"""


def render(collected: dict[str, Any]) -> str:
    """The whole page."""
    runs, entries = collected["runs"], entries_of(collected)
    sections = [make(collected, entries) for make in SECTIONS]
    # after the table of runs and their health, which say whether a curve is worth a look
    sections.insert(2, curves_section(collected, entries))
    # a section without content would be a heading that leads nowhere
    shown = [section for section in sections if section is not None]
    links = [f'<a href="#{section.id}">{escape(section.title)}</a>' for section in shown]
    texts = [section.to_html() for section in shown]
    # below the table of runs, whose marks it explains, and above all that its boxes hide
    texts.insert(1, legend(entries))
    heading = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"
    return _PAGE.format(
        title="distseg: " + escape(", ".join(run["name"] for run in runs)),
        style=style(entries),
        heading=escape(heading),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        links="\n".join(links),
        sections="\n".join(texts),
    )


def style(entries: list[Entry]) -> str:
    """The style sheet, with the rules that hide what is not checked."""
    text = resources.files("distseg.report").joinpath("page.css").read_text(encoding="utf-8")
    # :has() in CSS, so that no script is needed
    rules = [
        f"body:has(#show-{entry.place}:not(:checked)) .{entry.css_class} {{ display: none; }}"
        for entry in entries
    ]
    return "\n".join([text, css_colors(), *rules])


def legend(entries: list[Entry]) -> str:
    """The names of all curves, each with a box to check; for one run there is nothing to choose."""
    if len(entries) == 1:
        return ""
    labels = []
    for entry in entries:
        checked = " checked" if entry.is_shown else ""
        box = f'<input type="checkbox" id="show-{entry.place}"{checked}>'
        labels.append(f"<label>{box}{swatch(entry)}{escape(entry.name)}</label>")
    return f'<div class="bar">{"".join(labels)}</div>'


def curves_section(collected: dict[str, Any], entries: list[Entry]) -> Section:
    """A figure for every panel that has something to say."""
    runs = collected["runs"]
    names: list[str] = []
    for run in runs:
        # nowhere finite, or 0 throughout as skipped updates should be: nothing to draw
        names += [name for name, (_, values) in run["series"].items() if any(values)]
    found = drawn_panels(names, runs)
    figures = [panel_figure(panel, metrics, entries, runs) for panel, metrics in found]
    note = (
        "Over training steps. Thin: single logged steps; thick: their running mean; of a mean over "
        "runs, the shaded band spans the lowest to the highest."
    )
    content = f'<div class="charts">{"".join(figures)}</div>' if figures else "<p>No rows yet.</p>"
    return Section("curves", "Curves", note, content)


def panel_figure(
    panel: Panel, metrics: list[Metric], entries: list[Entry], runs: list[dict[str, Any]]
) -> str:
    """A panel with its title and legend."""
    drawn: list[Curve] = []
    for entry in entries:
        for place, metric in enumerate(metrics):
            color, (line_style, _) = look_of(entry, place, len(runs))
            label = f"{entry.name}, {metric.label}" if len(metrics) > 1 else entry.name
            look = {"label": label, "color": COLORS[color], "style": line_style}
            # its class is the entry's, by which the style sheet hides it
            found = curve(entry, metric, runs, name=entry.css_class, **look)
            if found is not None:
                last = metric.text(float(found.line.values[-1]))
                line = replace(found.line, label=f"{label}: {last} at step {found.last_step}")
                drawn.append(replace(found, line=line))
    svg = panel_svg(panel, [one.line for one in drawn])
    title = f"{escape(panel.title)} <small>{escape(panel.unit)}</small>"
    names = [*_names(panel, metrics, entries, len(runs)), *_notes(panel, drawn, runs)]
    marks = "".join(f"<span>{name}</span>" for name in names)
    caption = f"<figcaption>{title}</figcaption>"
    return f'<figure>{caption}{svg}<div class="legend">{marks}</div></figure>'


def _names(panel: Panel, metrics: list[Metric], entries: list[Entry], num_runs: int) -> list[str]:
    """The legend of a panel's metrics; none of a single one that the title names."""
    names = []
    is_told = len(metrics) == 1 and metrics[0].label.casefold() in panel.title.casefold()
    for place, metric in enumerate([] if is_told else metrics):
        # while there are dashes enough, they say which metric it is of every run
        if num_runs > 1 and len(metrics) <= len(STYLES):
            lines = f'<i class="swatch" style="border-top-style: {STYLES[place][1]}"></i>'
        else:
            lines = "".join(_line(entry, place, num_runs) for entry in entries)
        names.append(lines + escape(metric.label))
    return names


def _line(entry: Entry, place: int, num_runs: int) -> str:
    color, (_, dashes) = look_of(entry, place, num_runs)
    look = f"border-top-style: {dashes}; border-top-color: var(--run-{color})"
    # its class, so that it is hidden with the entry's curves
    return f'<i class="swatch {entry.css_class}" style="{look}"></i>'


def _notes(panel: Panel, drawn: list[Curve], runs: list[dict[str, Any]]) -> list[str]:
    marks = []
    level = reference(panel)
    if level is not None:
        marks.append(f"····· {escape(level[1])}")
    without: dict[int, int] = {}
    for one in drawn:
        # a mean that silently leaves a run out would be taken for one over all
        without |= dict.fromkeys(one.without, one.last_step)
    if without:
        names = ", ".join(runs[index]["name"] for index in without)
        step = max(without.values())
        marks.append(escape(f"no value at step {step}, so in no mean: {names}"))
    return marks
