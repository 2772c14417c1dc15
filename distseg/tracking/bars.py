"""Figures with a bar, or two, for each class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distseg.tracking.figures import BLUE, DPI, ORANGE, plain, save
from distseg.tracking.fonts import drawable


def iou_bars(per_class: dict[str, float], out: Path) -> None:
    """Draw the IoU of each class, in [0, 1], as a horizontal bar, and their mean.

    NaN is an absent class.
    """
    names = [plain(name) for name in drawable(list(per_class), out.suffix)]
    values = np.array(list(per_class.values()), float)
    figure = Figure(figsize=(7, 0.3 * len(names) + 1.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    # an absent class gets a row without a bar: leaving it out would look like a data set without it
    # by their rows, as two names may be written alike
    axes.barh(range(len(names)), np.nan_to_num(values), color=BLUE, height=0.7)
    axes.set_yticks(range(len(names)), names)
    for row, value in enumerate(values):
        text = "absent" if math.isnan(value) else f"{value:.1%}"
        place = (0 if math.isnan(value) else value) + 0.01
        axes.text(
            place, row, text, va="center", fontsize=9, bbox={"fc": "white", "ec": "none", "pad": 1}
        )
    if not np.isnan(values).all():
        mean = float(np.nanmean(values))
        axes.axvline(mean, color=ORANGE, linestyle="--", label=f"mean IoU {mean:.1%}", zorder=0)
        figure.legend(loc="outside upper right", frameon=False)
    axes.set(xlim=(0, 1.12), xticks=np.linspace(0, 1, 6), xlabel="intersection over union")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    # the first class on top, as in every table
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 1)  # right of it is room for the numbers only
    save(figure, out)


def kept_bars(per_class: Mapping[str, tuple[float, float]], out: Path) -> None:
    """Draw how much of each class became pseudo-labels, and how much of that is right, in [0, 1].

    NaN is a class that is absent, or of which nothing was kept.
    """
    kinds = "labelled, of its pixels", "right, of those"
    _paired_bars(per_class, kinds, "share of pixels that the shards label too", out)


def share_bars(per_class: Mapping[str, tuple[float, float]], out: Path) -> None:
    """Draw the share of each class among the predictions for the target and for the source, in
    [0, 1]: what adaptation pushes out has a bar for the source alone.
    """
    kinds = "target", "source"
    largest = max((max(pair) for pair in per_class.values()), default=1.0)
    # up to the next tenth: of twenty classes none has half of the pixels
    end = math.ceil(10 * max(largest, 0.1)) / 10
    _paired_bars(per_class, kinds, "share of the predictions", out, end=end)


def _paired_bars(
    per_class: Mapping[str, tuple[float, float]],
    words: tuple[str, str],
    unit: str,
    out: Path,
    *,
    end: float = 1.0,
) -> None:
    """Two bars of each class, on an axis from 0 to `end`; words: what each kind is."""
    names = [plain(name) for name in drawable(list(per_class), out.suffix)]
    values = np.array(list(per_class.values()), float).reshape(-1, 2)
    figure = Figure(figsize=(7, 0.45 * len(names) + 1.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    for column, (color, label) in enumerate(zip((BLUE, ORANGE), words, strict=True)):
        rows, lengths = places + (column - 0.5) * 0.38, values[:, column]
        axes.barh(rows, np.nan_to_num(lengths), height=0.36, color=color, label=label)
        for row, value in zip(rows, lengths, strict=True):
            # told apart from 0 %, which is a measurement
            text = "none" if math.isnan(value) else f"{value:.{int(end < 1)}%}"
            place = (0 if math.isnan(value) else value) + 0.01 * end
            axes.text(place, row, text, va="center", fontsize=8)
    # outside: of 150 classes some bar would be behind it
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.set(xlim=(0, 1.12 * end), xticks=np.linspace(0, end, 6), yticks=places)
    axes.set(yticklabels=names, xlabel=unit)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    # the first class on top, as in every table
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, end)
    save(figure, out)
