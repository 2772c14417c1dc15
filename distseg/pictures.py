"""Pictures of a run: its curves, its scores per class, and what it makes of an image.

Figures are drawn on their own canvas (no pyplot), so nothing here depends on a display or on another thread.
Colours of curves are Okabe and Ito's, told apart by colour-blind readers; line styles differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, PercentFormatter

from shards.files import published
from shards.sample import IGNORE_INDEX, ClassSet

BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#555555"
_DPI = 120
_VOID_COLOR = (255, 255, 255)
_ERROR_COLORS = np.array([[222, 222, 222], [213, 17, 17], [255, 255, 255]], np.uint8)  # right, wrong, void
_SMOOTHING = 0.03  # the smoothed line's window, as a share of the run
_CELL_INCHES = 2.6  # the longer side of one picture in a panel
_NUM_COLUMNS = 4

_CURVES = (  # title of the panel, unit of its y axis, (metric, name in the legend, colour, line style)
    ("Discriminator on real label maps", "loss (nats)", (("loss/discriminator_real", "real", BLUE, "-"),)),
    ("Discriminator on predictions", "loss (nats)", (("loss/discriminator_fake", "fake", ORANGE, "-"),)),
    (
        "Segmentor",
        "loss (nats)",
        (
            ("loss/segmentor", "total", GREEN, "-"),
            ("loss/cross_entropy", "cross entropy", GRAY, "--"),
            ("loss/adversarial", "adversarial", PURPLE, ":"),
        ),
    ),
    (
        "Validation",
        "share of 1",
        (("val/mean_iou", "mean IoU", BLUE, "-"), ("val/pixel_accuracy", "pixel accuracy", ORANGE, "--")),
    ),
)


def curves(metrics: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw the losses and validation scores of a run over its steps: `out` is a PNG.

    metrics: rows of metrics.jsonl. One panel each for the discriminator's loss on real and on predicted label
    maps (if the run has a discriminator), the segmentor's losses, and the validation scores (if there are any);
    of noisy losses the single values are thin and a running mean is thick.
    """
    panels = []
    for title, unit, lines in _CURVES:
        drawn = [(series, line) for line in lines if len((series := _series(metrics, line[0]))[0])]
        if drawn:
            panels.append((title, unit, drawn))
    panels = panels or [("no metrics yet", "", [])]
    figure = Figure(figsize=(9, 2.6 * len(panels) + 0.4), dpi=_DPI, layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, unit, drawn) in zip(all_axes, panels, strict=True):
        for (steps, values), (name, label, color, style) in drawn:
            _curve(
                axes, steps, values, noisy=name.startswith("loss/"), label=label, color=color, linestyle=style
            )
        _dress(axes, title, unit)
    all_axes[-1].set_xlabel("training step")
    _save(figure, out)


def iou_bars(per_class: dict[str, float], out: Path) -> None:
    """Draw the IoU of each class, in [0, 1], as horizontal bars with their mean; NaN marks an absent class."""
    names, values = list(per_class), np.array(list(per_class.values()), float)
    figure = Figure(figsize=(7, 0.3 * len(names) + 1.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.barh(names, np.nan_to_num(values), color=BLUE, height=0.7)
    for row, value in enumerate(values):
        text = "absent" if math.isnan(value) else f"{value:.1%}"
        axes.text((0 if math.isnan(value) else value) + 0.01, row, text, va="center", fontsize=9)
    if not np.isnan(values).all():
        mean = float(np.nanmean(values))
        axes.axvline(mean, color=ORANGE, linestyle="--", label=f"mean IoU {mean:.1%}", zorder=0)
        figure.legend(loc="outside upper right", frameon=False)
    axes.set(xlim=(0, 1.12), xticks=np.linspace(0, 1, 6), xlabel="intersection over union")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, out)


def sample_panel(
    image: np.ndarray, label: np.ndarray | None, probabilities: np.ndarray, classes: ClassSet, out: Path
) -> None:
    """Draw what a segmentor makes of an image: `out` is a PNG.

    image: (H, W, 3) uint8 RGB. label: (H, W) uint8 with 255 = void, or None. probabilities: (C, H, W) float32
    in [0, 1]. Above: the picture, its label, the prediction and where they differ; below: one probability
    picture per class, all on one scale from 0 to 1.
    """
    prediction = probabilities.argmax(0).astype(np.uint8)
    top = [("picture", image), ("prediction", colourise(prediction, classes))]
    if label is not None:
        top.insert(1, ("label", colourise(label, classes)))
        top.append((_error_title(prediction, label), error_map(prediction, label)))
    height, width = image.shape[:2]
    cell = np.array([width, height]) / max(width, height) * _CELL_INCHES
    num_rows = 1 + math.ceil(classes.num_classes / _NUM_COLUMNS)
    size = ((cell[0] + 0.12) * _NUM_COLUMNS + 0.8, (cell[1] + 0.3) * num_rows + 0.7)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    grid = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, picture) in zip(grid[0], top, strict=False):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=9)
    for axes, name, plane in zip(grid[1:].flat, classes.names, probabilities, strict=False):
        shown = axes.imshow(plane, cmap="viridis", vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
    figure.colorbar(shown, ax=grid[1:].ravel().tolist(), label="probability", fraction=0.03, pad=0.01)
    _legend(figure, classes, label)
    _save(figure, out)


def colourise(label: np.ndarray, classes: ClassSet) -> np.ndarray:
    """Class indices (H, W) uint8 in the colours of their classes, (H, W, 3) uint8 RGB; void is white."""
    colors = np.full((256, 3), _VOID_COLOR, np.uint8)
    colors[: classes.num_classes] = classes.palette
    return colors[label]


def overlay(image: np.ndarray, label: np.ndarray, classes: ClassSet, alpha: float = 0.5) -> np.ndarray:
    """The picture (H, W, 3) uint8 under its class colours with opacity alpha in [0, 1]; void stays uncovered."""
    mixed = np.rint(image * (1 - alpha) + colourise(label, classes) * np.float32(alpha)).astype(np.uint8)
    return np.where((label == IGNORE_INDEX)[..., None], image, mixed)


def error_map(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB: red where the prediction differs from the label, gray where not, white for void."""
    return _ERROR_COLORS[np.where(label == IGNORE_INDEX, 2, prediction != label)]


def _series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in metrics if name in row]
    table = np.array(pairs, float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, noisy: bool, **style: Any) -> None:
    window = max(1, round(_SMOOTHING * len(values)))
    if noisy and window > 1:
        axes.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.3)
        axes.plot(steps, running_mean(values, window), linewidth=1.8, **style)
    else:
        axes.plot(steps, values, linewidth=1.8, marker="" if noisy else "o", markersize=3, **style)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the last `window` ones at each place; NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _dress(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, loc="best", fontsize=9)


def _error_title(prediction: np.ndarray, label: np.ndarray) -> str:
    counted = label != IGNORE_INDEX
    if not counted.any():
        return "errors (label is all void)"
    return f"errors: {(prediction != label)[counted].mean():.1%} of pixels"


def _legend(figure: Figure, classes: ClassSet, label: np.ndarray | None) -> None:
    colors = [*classes.palette]
    names = [*classes.names]
    if label is not None and (label == IGNORE_INDEX).any():
        colors.append(_VOID_COLOR)
        names.append("void")
    patches = [
        Patch(facecolor=np.array(color) / 255, edgecolor="black", linewidth=0.4, label=name)
        for color, name in zip(colors, names, strict=True)
    ]
    num_columns = max(1, int(figure.get_figwidth() / 1.2))
    figure.legend(handles=patches, loc="outside lower center", ncols=num_columns, fontsize=8, frameon=False)


def _save(figure: Figure, out: Path) -> None:
    FigureCanvasAgg(figure)
    with published(out) as partial:
        figure.savefig(partial, format="png")
