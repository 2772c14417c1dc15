"""Curves of a real run of `preset=toy`: data/run.json, made by run_data.py."""

from __future__ import annotations

import json
import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from docs.figures.style import BLUE_LINE, GREEN_LINE, INK, ORANGE_LINE, RUN, blank

Pairs = list[list[float]]


def draw() -> Figure:
    metrics = json.loads(RUN.read_text())["metrics"]
    figure = blank(640, 500)
    upper, middle, lower = figure.subplots(3, 1, sharex=True)
    # by hand: a layout engine asks the fonts, whose answer depends on their version
    figure.subplots_adjust(left=0.08, right=0.8, top=0.95, bottom=0.08, hspace=0.32)
    _axes(upper, "the segmentor's losses, nats")
    ends = {
        "cross entropy": _curve(upper, metrics["loss/cross_entropy"], BLUE_LINE),
        "adversarial": _curve(upper, metrics["loss/adversarial"], ORANGE_LINE, "--"),
    }
    _names(upper, ends)
    _axes(middle, "the discriminator's loss, nats")
    ends = {
        "on real": _curve(middle, metrics["loss/discriminator_real"], GREEN_LINE),
        "on fake": _curve(middle, metrics["loss/discriminator_fake"], ORANGE_LINE, "--"),
        "ln 2: cannot tell": (math.log(2), INK),
    }
    middle.axhline(math.log(2), color=INK, lw=1.2, ls=":")
    _names(middle, ends)
    _axes(lower, "validation, mean IoU (EMA weights)")
    _names(lower, {"mean IoU": _curve(lower, metrics["val/mean_iou"], BLUE_LINE)})
    last = metrics["val/mean_iou"][-1]
    lower.text(last[0], last[1] + 0.05, f"{last[1]:.1%}", color=INK, ha="right", size=9)
    lower.yaxis.set_major_formatter(PercentFormatter(1.0))
    lower.set(ylim=(0, 1), xlim=(0, last[0]), xlabel="training step")
    lower.xaxis.label.set_color(INK)
    return figure


def _axes(axes: Axes, title: str) -> None:
    axes.patch.set_alpha(0)
    axes.set_title(title, loc="left", size=9.5, color=INK, weight="bold")
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(color=INK, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def _curve(axes: Axes, pairs: Pairs, color: str, style: str = "-") -> tuple[float, str]:
    """One curve of (step, value) pairs; where its end is and its colour, for `_names`."""
    steps, values = zip(*pairs, strict=True)
    # scores are few and exact, losses are of single batches
    is_loss = len(steps) > 20
    marker = "" if is_loss else "o"
    axes.plot(steps, values, style, color=color, lw=1.6, marker=marker, ms=4, clip_on=False)
    # from 0, so that a loss which has halved looks so
    axes.set_ylim(0, max(axes.get_ylim()[1], max(values) * 1.05))
    tail = values[-5:] if is_loss else values[-1:]
    return sum(tail) / len(tail), color


def _names(axes: Axes, ends: dict[str, tuple[float, str]]) -> None:
    """The curves' names at their ends, which no reader has to look up in a legend."""
    pitch = 0.13 * axes.get_ylim()[1]
    lowest = 0.0
    for name, (end, color) in sorted(ends.items(), key=lambda item: item[1]):
        y = max(end, lowest)
        lowest = y + pitch
        where = axes.get_yaxis_transform()
        axes.text(1.02, y, name, color=color, size=9, va="center", transform=where)
