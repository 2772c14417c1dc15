"""The curves of a report: of single runs, and means over the runs of a group.

Drawn by matplotlib as SVG that stands in the page itself: it is sharp at any size and on paper,
needs no script, and its curves carry the classes by which the page's style sheet hides a run. A
chart library (uPlot) was looked at instead: curves that can be zoomed into, for 50 kB of somebody
else's JavaScript, about 100 lines of our own, and nothing to see where scripts are switched off.
W&B and TensorBoard are there for zooming.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from distseg.report.comparison import Run
from distseg.tracking.figures import Line, draw_panel, smoothed
from distseg.tracking.metric import Metric, Panel

# Okabe and Ito's colours without the yellow that white swallows, then some of Tol's; told apart by
# colour-blind readers
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#882255"),
    *("#999933", "#332288", "#888888"),
)
# those that a dark page swallows, and what stands for them there
ON_DARK = {"#000000": "#FFFFFF", "#882255": "#DB7AA6", "#332288": "#968CEB"}
STYLES = (("-", "solid"), ("--", "dashed"), (":", "dotted"))  # of matplotlib, of CSS
WIDTH_PX, HEIGHT_PX = 430, 230
_MAX_RAW = 4  # curves of a panel whose single values are drawn behind them
# text as text, of which nothing is read as a formula; the same bytes for the same curves
_SVG: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "distseg",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Entry:
    """One line of the page's legend: a run, or the mean of a group with several.

    runs: indices of its runs; place: its number, which names its class in the page.
    """

    place: int
    name: str
    runs: tuple[int, ...]
    is_shown: bool = True

    @property
    def is_mean(self) -> bool:
        return len(self.runs) > 1

    @property
    def color(self) -> str:
        # a mean has its first run's colour: where there are many, those runs are hidden at first
        return COLORS[self.runs[0] % len(COLORS)]

    @property
    def css_color(self) -> str:
        """Its colour in the page, of which the theme may make another."""
        return f"var(--run-{COLORS.index(self.color)})"

    @property
    def css_class(self) -> str:
        return f"entry-{self.place}"


def entries_of(collected: dict[str, Any]) -> list[Entry]:
    """Every run, then the mean of every group.

    Of more than four runs only those are shown at first that are in no mean.
    """
    groups = [group for group in collected["groups"] if len(group["runs"]) > 1]
    # more than four lines in a panel of this size cannot be followed
    by_means = bool(groups) and len(collected["runs"]) > 4
    averaged = set(chain.from_iterable(group["runs"] for group in groups))
    entries = []
    for index, run in enumerate(collected["runs"]):
        is_shown = not (by_means and index in averaged)
        entries.append(Entry(index, run["name"], (index,), is_shown))
    for group in groups:
        name = f"mean: {group['name']}"
        entries.append(Entry(len(entries), name, tuple(group["runs"]), by_means))
    return entries


def look_of(entry: Entry, place: int, num_runs: int) -> tuple[int, tuple[str, str]]:
    """The index into COLORS and the member of STYLES of a panel's metric, for an entry of a page.

    place: of the metric in its panel.
    """
    style = STYLES[place % len(STYLES)]
    # of a single run nothing but its metrics has to be told apart
    if num_runs == 1:
        return place % len(COLORS), style
    # several runs have a colour each, and metrics their dashes; where those are used up, colours
    # go on behind those of the runs
    return (entry.runs[0] + num_runs * (place // len(STYLES))) % len(COLORS), style


@dataclass(frozen=True)
class Curve:
    """A metric over the steps of an entry.

    runs: those that it is drawn from, which are the ones that reach its last step; without: the
    others, whose end would make a mean jump.
    """

    line: Line
    last_step: int
    runs: tuple[int, ...]
    without: tuple[int, ...]


def curve(entry: Entry, metric: Metric, runs: Sequence[Run], **style: Any) -> Curve | None:
    """The curve of an entry; None where none of its runs has the metric."""
    # only runs that have come as far: the mean of fewer and fewer jumps where each of them ends
    ends = {i: runs[i]["series"][metric.name][0][-1] for i in _having(entry, metric, runs)}
    if not ends:
        return None
    last_step = max(ends.values())
    members = tuple(index for index in ends if ends[index] == last_step)
    lines = [_line_of(runs[index], metric, **style) for index in members]
    line = lines[0]
    if len(lines) > 1:
        # over smoothed curves, which are what the panel shows of single runs too
        line = mean_line(lines, [runs[index]["seed"] for index in members], **style)
    without = tuple(index for index in entry.runs if index not in members)
    return Curve(line, last_step, members, without)


def _having(entry: Entry, metric: Metric, runs: Sequence[Run]) -> list[int]:
    return [index for index in entry.runs if metric.name in runs[index]["series"]]


def _line_of(run: Run, metric: Metric, **style: Any) -> Line:
    steps, values = (np.array(part, float) for part in run["series"][metric.name])
    return smoothed(steps, values, metric, **style)


def mean_line(lines: Sequence[Line], seeds: Sequence[Any], **style: Any) -> Line:
    """The mean over runs at the steps that all of them have, in which the runs of one seed count as
    one; the band spans the lowest to the highest. NaN where one of them is not finite.
    """
    # runs may log at other steps, and interpolated values were never measured
    steps = reduce(np.intersect1d, [line.steps for line in lines])
    values = np.stack([line.values[np.isin(line.steps, steps)] for line in lines])
    # the runs of one seed count as one
    weights = [1 / seeds.count(seed) for seed in seeds]
    mean = np.average(values, axis=0, weights=weights)
    band = values.min(0), values.max(0)  # NaN where one is NaN, as the mean
    return Line(steps, mean, has_dots=lines[0].has_dots, band=band, **style)


def panel_svg(panel: Panel, lines: Sequence[Line]) -> str:
    """The panel as an SVG element: each line's `name` is the class of its curve there, its `label`
    what is shown when the pointer rests on it.
    """
    # numbered for matplotlib, whose ids have to be unique; `embedded` puts the classes in their
    # place
    shown = [replace(line, name=f"curve-{place}", label="") for place, line in enumerate(lines)]
    if len(lines) > _MAX_RAW:
        shown = [replace(line, raw=None) for line in shown]
    # set for this figure alone: the process may draw others
    with mpl.rc_context(_SVG):
        size = (WIDTH_PX / 72, HEIGHT_PX / 72)  # matplotlib's SVG counts in 1/72 of an inch
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw_panel(axes, panel, shown)
        axes.margins(x=0.01)
        FigureCanvasSVG(figure)
        text = io.StringIO()
        # no date and no version: the same curves give the same bytes
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    return embedded(text.getvalue(), panel.title, lines)


def css_colors() -> str:
    """The rules that give the colours of runs their values, for pages of both themes."""
    light = " ".join(f"--run-{place}: {color};" for place, color in enumerate(COLORS))
    dark = " ".join(f"--run-{COLORS.index(one)}: {other};" for one, other in ON_DARK.items())
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def embedded(svg: str, label: str, lines: Sequence[Line]) -> str:
    """Matplotlib's SVG file as an element of a page: without names that others have too, in
    the page's colours, and with numbers no finer than a tenth of a pixel.
    """
    # the file's head has a size and a DOCTYPE of its own, which the page must not have
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # HTML knows no namespaces, and browsers take the plain name
    body = body.replace("xlink:href", "href")
    for place, line in enumerate(lines):
        title = f'<g class="{line.name}"><title>{html.escape(line.label)}</title>'
        body = body.replace(f'<g id="curve-{place}">', title)
    # ids have to be unique in a page of many figures; only those that something points to are kept
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    body = re.sub(r"\n *", "\n", body)
    # axes are black, as one of the runs may be; matplotlib writes small letters
    for place, color in enumerate(COLORS):
        body = body.replace(color.lower(), f"var(--run-{place})")
    # six digits by default, and numbers are most of what a curve is
    body = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\d\.\d)\d+", r"\1", m[0]), body)
    head = f'viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" aria-label="{html.escape(label)}"'
    return f"<svg {head}>{body}"
