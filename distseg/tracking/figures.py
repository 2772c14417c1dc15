"""Pictures of a run: its curves, its scores per class, and what it makes of an image.

Figures are drawn on their own canvas (no pyplot), so nothing here depends on a display or on
another thread. Colours of curves are Okabe and Ito's, told apart by colour-blind readers; line
styles differ as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogFormatter, PercentFormatter

from distseg.config.forms import DEFAULT
from distseg.tracking.catalogue import HELD_OUT, VALIDATION, panels_of
from distseg.tracking.fonts import drawable_classes, lettered
from distseg.tracking.metric import Metric, Panel
from distseg.tracking.verdicts import NAMED
from shards.files import published
from shards.sample import IGNORE_INDEX, ClassSet

# text as text, which can be searched and set in another font; the same bytes for the same picture
_VECTOR: Any = {"svg.fonttype": "none", "svg.hashsalt": "distseg", "pdf.fonttype": 42}
_NO_DATE = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#555555"
DPI = 120
# right, wrong, void
_ERROR_COLORS = np.array([[222, 222, 222], [213, 17, 17], [0, 0, 0]], np.uint8)
_SMOOTHING = 0.03  # the smoothed line's window, as a share of the run
# of a run's own metrics in one panel, in turn
_OF_A_METRIC = ((BLUE, "-"), (ORANGE, "--"), (PURPLE, ":"), (GREEN, "-."), (GRAY, "-"))
_CELL_INCHES = 2.6  # the longer side of one picture in a panel
_TITLE_INCHES, _GAP_INCHES, _BAR_INCHES, _ENTRY_INCHES = 0.28, 0.08, 0.85, (0.19, 1.2)
_NUM_COLUMNS = 4
_STRIPES = 60  # across a picture, two to a period


@dataclass(frozen=True)
class Line:
    """One curve of a panel.

    steps, values: (n,) float, NaN where a value is not finite. label: "" for none in the legend.
    raw: single values behind a running mean. low, high: edges of a band. name: of the curve's group
    in an SVG, where a style sheet can hide it.
    """

    steps: np.ndarray
    values: np.ndarray
    label: str
    color: str
    style: str = "-"
    has_dots: bool = False
    raw: np.ndarray | None = None
    band: tuple[np.ndarray, np.ndarray] | None = None
    name: str | None = None


def curves(
    metrics: Sequence[dict[str, Any]], out: Path, adv_form: str = DEFAULT, of_domains: bool = False
) -> None:
    """Draw the losses and validation scores of a run over its steps; `out`: as of `save`.

    metrics: rows of metrics.jsonl; adv_form: of the run's losses; of_domains: as of
    `panels_of`. One panel each for the discriminator's loss on real and on predicted label maps (if
    the run has a discriminator), the segmentor's losses, and the validation scores (if there are
    any); of noisy losses the single values are thin and a running mean is thick.
    """
    names = dict.fromkeys(itertools.chain.from_iterable(metrics))
    # the losses of the published figures; the report has the others
    panels = [found for found in panels_of(names, [adv_form], of_domains) if found[0].in_picture]
    # a run that was stopped before its first logged step has a picture too
    panels = panels or [(Panel("no metrics yet", ""), [])]
    figure = Figure(figsize=(9, 2.6 * len(panels) + 0.4), dpi=DPI, layout="constrained")
    # one x axis for all: an event is looked for downwards
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (panel, drawn) in zip(all_axes, panels, strict=True):
        lines = []
        for place, metric in enumerate(drawn):
            steps, values = _series(metrics, metric.name)
            label = metric.label
            if panel.is_share:  # often one evaluation, whose number says more than a dot
                label = f"{label}, last {metric.text(values[-1])}"
            color, style = _OF_A_METRIC[place % len(_OF_A_METRIC)]
            lines.append(smoothed(steps, values, metric, label=label, color=color, style=style))
        draw_panel(axes, panel, lines)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.set_ylabel(panel.unit)
        # one curve too: "other terms" does not say which
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="best", fontsize=9)
    all_axes[-1].set_xlabel("training step")
    save(figure, out)


def smoothed(steps: np.ndarray, values: np.ndarray, metric: Metric, **style: Any) -> Line:
    """A curve as its running mean before its single values; scores of evaluations stay as they
    are.
    """
    if metric.name.startswith((VALIDATION, HELD_OUT)):
        return Line(steps, values, has_dots=True, **style)
    # a share and not a number of rows: a run of 500 steps and one of 50,000 look alike
    window = max(1, round(_SMOOTHING * len(values)))
    if window == 1:
        return Line(steps, values, **style)
    return Line(steps, running_mean(values, window), raw=values, **style)


def draw_panel(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    """Draw curves into axes, with the panel's scale and its reference level."""
    for line in lines:
        _draw_line(axes, line)
    level = reference(panel)
    if level is not None:
        axes.axhline(level[0], color="black", linewidth=0.9, linestyle=":", label=level[1])
    _set_scale(axes, panel, lines)
    if panel.unit == "bytes":
        axes.yaxis.set_major_formatter(EngFormatter())
    # there is no step between two; one tick is enough where there is one step
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    # 10k, as five digits would touch each other
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_line(axes: Axes, line: Line) -> None:
    if line.band is not None:
        # the group's id is what the report's style sheet takes hold of
        band = axes.fill_between(line.steps, *line.band, color=line.color, alpha=0.15, lw=0)
        band.set_gid(line.name)
    if line.raw is not None:
        # thin and behind, as single batches scatter more than runs differ
        axes.plot(line.steps, line.raw, color=line.color, lw=0.6, alpha=0.3, gid=line.name)
    # a point without neighbours has no line to be seen by: a run's first row, one between gaps
    dots = np.isfinite(line.values) if line.has_dots else alone(line.values)
    style: dict[str, Any] = {
        "color": line.color,
        "linestyle": line.style,
        "label": line.label or "_",
    }
    if dots.any():
        style |= {"marker": "o", "markersize": 3, "markevery": np.flatnonzero(dots).tolist()}
    axes.plot(line.steps, line.values, lw=1.8, gid=line.name, **style)


def _set_scale(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    if panel.is_log:
        axes.set_yscale("log")
        # powers as plain numbers: 0.001, not a formula
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    elif panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, 1)
    else:
        # from 0, so that a loss which has halved looks so
        bottom = axes.get_ylim()[0] if _has_negative(lines) else 0
        # room above by the whole height: a curve that hardly moves would lie on the frame
        axes.update_datalim([(0, bottom)], updatex=False)
        axes.autoscale_view()
        axes.set_ylim(bottom=bottom)


def alone(values: np.ndarray) -> np.ndarray:
    """Which of the values (n,) are finite with no finite one beside them, (n,) bool."""
    finite = np.isfinite(values)
    framed = np.concatenate([[False], finite, [False]])
    return finite & ~framed[:-2] & ~framed[2:]


def reference(panel: Panel) -> tuple[float, str] | None:
    """The level that a panel's curves are compared with, and what it is."""
    if panel.check:
        return NAMED[panel.check].raise_at, f"{NAMED[panel.check].title} below"
    return panel.reference


def _has_negative(lines: Sequence[Line]) -> bool:
    return any(bool((line.values < 0).any()) for line in lines)


def plain(text: str) -> str:
    """A name for a figure, in which matplotlib finds no formula: names may have $ signs."""
    return text.replace("$", r"\$")


def beside_panel(
    image: np.ndarray,
    label: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    classes: ClassSet,
    out: Path,
) -> None:
    """Draw the picture, its label, and what two runs make of it; `out`: as of `save`.

    image, label: as of `sample_panel`. predictions: by the run's name, (H, W) uint8.
    """
    classes = drawable_classes(classes, out.suffix)
    pictures = [("picture", image), ("label", colourise(label, classes))]
    # void is in neither share, as in every score
    counted = label != IGNORE_INDEX
    shown = set(occurring(label, classes))
    for name, prediction in predictions.items():
        right = (prediction == label)[counted]
        share = f": {right.mean():.1%} right" if right.size else ""
        pictures.append((f"{name}{share}", colourise(prediction, classes)))
        shown |= {*occurring(prediction, classes)}
    legend = legend_entries(classes, not counted.all(), sorted(shown))
    grid = _Grid(image.shape[:2], 1, len(legend), has_scale=False)
    for column, (title, picture) in enumerate(pictures):
        # none: as in sample_panel
        grid.axes(0, column, title).imshow(picture, interpolation="none")
    grid.add_legend(legend)
    save(grid.figure, out)


def sample_panel(
    image: np.ndarray,
    label: np.ndarray | None,
    probabilities: np.ndarray,
    classes: ClassSet,
    out: Path,
) -> None:
    """Draw what a segmentor makes of an image; `out`: as of `save`.

    image: (H, W, 3) uint8 RGB. label: (H, W) uint8 with 255 = void, or None. probabilities: (C, H,
    W) float32 in [0, 1]. Above: the picture, its label, the prediction and where they differ;
    below: one probability picture for each class that occurs in label or prediction, all on one
    scale from 0 to 1.
    """
    classes = drawable_classes(classes, out.suffix)
    prediction = probabilities.argmax(0).astype(np.uint8)
    # of 150 classes a picture shows a dozen
    shown = occurring(prediction, classes)
    top = [("picture", image), ("prediction", colourise(prediction, classes))]
    if label is not None:
        top.insert(1, ("label", colourise(label, classes)))
        top.append((_error_title(prediction, label), error_map(prediction, label)))
        shown = sorted({*shown, *occurring(label, classes)})
    has_void = label is not None and bool((label == IGNORE_INDEX).any())
    legend = legend_entries(classes, has_void, shown)
    grid = _Grid(image.shape[:2], 1 + math.ceil(len(shown) / _NUM_COLUMNS), len(legend))
    for column, (title, picture) in enumerate(top):
        # none: interpolated colours would be those of other classes; and drawings keep every pixel
        grid.axes(0, column, title).imshow(picture, interpolation="none")
    for place, index in enumerate(shown):
        row, column = divmod(place, _NUM_COLUMNS)
        axes = grid.axes(1 + row, column, classes.names[index])
        # 0 to 1 on all: a scale of its own would show a class of 1 % as certain
        look: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 1}
        scale = axes.imshow(probabilities[index], interpolation="none", **look)
    grid.add_scale(scale)
    grid.add_legend(legend)
    save(grid.figure, out)


@dataclass(frozen=True)
class Taught:
    """An image with a teacher's label.

    image: (H, W, 3) uint8 RGB; label: (H, W) uint8, 255 = outside; confident: (H, W) bool.
    """

    image: np.ndarray
    label: np.ndarray
    confident: np.ndarray

    def title(self, what: str) -> str:
        """With the share of its pixels inside that are confident."""
        inside = self.label != IGNORE_INDEX
        # of pixels inside, as the term's own divisor is; a crop may be half fill
        share = float(self.confident[inside].mean()) if inside.any() else 0.0
        return f"{what}: {share:.0%} confident"

    def picture(self, classes: ClassSet) -> np.ndarray:
        """The label in the colours of its classes, (H, W, 3) uint8; pale and striped where it is
        not confident.
        """
        colours = colourise(self.label, classes)
        rows, columns = np.indices(self.label.shape)
        width = max(2, max(self.label.shape) // _STRIPES)
        is_stripe = (rows + columns) // width % 2 == 0
        # stripes, as a pale colour alone may be that of another class
        pale = np.where(is_stripe[..., None], 255, 127 + colours // 2).astype(np.uint8)
        is_pale = ~self.confident & (self.label != IGNORE_INDEX)
        return np.where(is_pale[..., None], pale, colours)


def taught_panel(
    weak: Taught, strong: Taught, classes: ClassSet, threshold: float, out: Path
) -> None:
    """Draw an unlabelled image as a teacher labels it and as the segmentor is trained on it; `out`:
    as of `save`. threshold: from which probability on a pixel is confident.
    """
    classes = drawable_classes(classes, out.suffix)
    shown = sorted({*occurring(weak.label, classes), *occurring(strong.label, classes)})
    has_void = bool((weak.label == IGNORE_INDEX).any() or (strong.label == IGNORE_INDEX).any())
    legend = legend_entries(classes, has_void, shown)
    # the number itself, as "not confident" means another thing in every run
    unsure = f"probability < {threshold:g}"
    legend.append(Patch(facecolor="white", edgecolor="gray", hatch="////", lw=0.4, label=unsure))
    grid = _Grid(weak.image.shape[:2], 1, len(legend), has_scale=False)
    pictures = (
        ("weak view", weak.image),
        (weak.title("pseudo-label"), weak.picture(classes)),
        ("strong view", strong.image),
        (strong.title("its pseudo-label"), strong.picture(classes)),
    )
    for column, (title, picture) in enumerate(pictures):
        # none, as in sample_panel: interpolated stripes would have colours of their own
        grid.axes(0, column, title).imshow(picture, interpolation="none")
    grid.add_legend(legend)
    save(grid.figure, out)


class _Grid:
    """A figure of equal pictures in the image's shape, placed by hand: faster than a layout
    engine.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        num_rows: int,
        num_legend_entries: int,
        *,
        has_scale: bool = True,
    ):
        # the image's shape, so that pictures are neither squeezed nor framed by white
        self._cell = np.array(image_size) / max(image_size) * _CELL_INCHES  # height, width
        self._width = _NUM_COLUMNS * (self._cell[1] + _GAP_INCHES)
        self._width += _BAR_INCHES if has_scale else _GAP_INCHES
        self.legend_columns = max(1, int(self._width / _ENTRY_INCHES[1]))
        num_legend_rows = math.ceil(num_legend_entries / self.legend_columns)
        self._height = (
            num_rows * (self._cell[0] + _TITLE_INCHES) + (num_legend_rows + 1) * _ENTRY_INCHES[0]
        )
        self.figure = Figure(figsize=(self._width, self._height), dpi=DPI)

    def axes(self, row: int, column: int, title: str) -> Axes:
        """The place of one picture, without ticks, under its title."""
        height, width = self._cell
        left = _GAP_INCHES + column * (width + _GAP_INCHES)
        axes = self._at(left, (row + 1) * (height + _TITLE_INCHES), width, height)
        axes.set_axis_off()
        axes.set_title(plain(title), fontsize=9, pad=3)
        return axes

    def add_legend(self, entries: Sequence[Patch]) -> None:
        """Below the pictures."""
        columns = self.legend_columns
        look: dict[str, Any] = {"fontsize": 8, "frameon": False}
        self.figure.legend(handles=entries, loc="lower center", ncols=columns, **look)

    def add_scale(self, shown: AxesImage) -> None:
        """What the colours of a probability mean, in a narrow place right of the second row."""
        left = self._width - _BAR_INCHES + 2 * _GAP_INCHES
        place = self._at(left, 2 * (self._cell[0] + _TITLE_INCHES), 0.18, self._cell[0])
        bar = self.figure.colorbar(shown, cax=place, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.set_label("probability", fontsize=8)
        bar.ax.tick_params(labelsize=8)

    def _at(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """left, and bottom counted downwards from the top edge: inches."""
        across, up = self._width, self._height
        # matplotlib counts in shares of the figure, from the bottom
        return self.figure.add_axes((left / across, 1 - bottom / up, width / across, height / up))


def colourise(label: np.ndarray, classes: ClassSet) -> np.ndarray:
    """Class indices (H, W) uint8 in the colours of their classes, (H, W, 3) uint8 RGB.

    Void is black, or white where a class is black.
    """
    # (256, 3): one row for every value of a byte, so that no index is out of range
    colors = np.full((256, 3), _void_color(classes), np.uint8)
    colors[: classes.num_classes] = classes.palette
    return colors[label]


def occurring(label: np.ndarray, classes: ClassSet) -> list[int]:
    """The class indices that occur in (H, W) uint8, void left out."""
    # OpenCV's: NumPy would turn every byte into eight
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()
    return np.flatnonzero(counts[: classes.num_classes]).tolist()


def _void_color(classes: ClassSet) -> tuple[int, int, int]:
    # PASCAL VOC's background is black, from which void must be told
    return (255, 255, 255) if (0, 0, 0) in classes.palette else (0, 0, 0)


def overlay(
    image: np.ndarray, label: np.ndarray, classes: ClassSet, alpha: float = 0.5
) -> np.ndarray:
    """The picture (H, W, 3) uint8 under class colours of opacity alpha in [0, 1].

    Void stays uncovered.
    """
    mixed = np.rint(image * (1 - alpha) + colourise(label, classes) * np.float32(alpha)).astype(
        np.uint8
    )
    return np.where((label == IGNORE_INDEX)[..., None], image, mixed)


def error_map(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB: red where prediction and label differ, gray where not, black for
    void.
    """
    # the comparison's False and True are 0 and 1, right and wrong
    return _ERROR_COLORS[np.where(label == IGNORE_INDEX, 2, prediction != label)]


def _series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in metrics if name in row]
    table = np.array(pairs, float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite ones among the values at most window // 2 places away.

    NaN where there is none.
    """
    # One NaN would make a hole of a whole window, just where a reader looks for what happened.
    finite = np.isfinite(values)
    # cumulative sums: the cost does not grow with the window
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    first, end = (
        np.maximum(places - window // 2, 0),
        np.minimum(places + window // 2 + 1, len(values)),
    )
    found = counts[end] - counts[first]
    return np.divide(
        sums[end] - sums[first], found, out=np.full(len(values), np.nan), where=found > 0
    )


def _error_title(prediction: np.ndarray, label: np.ndarray) -> str:
    counted = label != IGNORE_INDEX
    if not counted.any():
        return "errors (label is all void)"
    return f"errors: {(prediction != label)[counted].mean():.1%} of pixels"


def legend_entries(
    classes: ClassSet, with_void: bool, shown: Sequence[int] | None = None
) -> list[Patch]:
    """A patch of each class's colour with its name, for a figure's legend; void's last.

    shown: indices of the classes that are named, None for all.
    """
    pairs = [*zip(classes.names, classes.palette, strict=True)]
    entries = pairs if shown is None else [pairs[index] for index in shown]
    return [
        Patch(
            facecolor="#" + bytes(color).hex(), edgecolor="black", linewidth=0.4, label=plain(name)
        )
        for name, color in entries + [("void", _void_color(classes))] * with_void
    ]


def save(figure: Figure, out: Path) -> None:
    """Write a figure, whole or not at all, as what the name of `out` ends in: png, svg or pdf.

    Text stays text in SVG and PDF, and pictures keep their pixels.
    """
    form = out.suffix[1:].lower()
    with mpl.rc_context(_VECTOR), lettered(figure, out.suffix), published(out) as partial:
        # no pyplot, which keeps every figure in a registry of the process until it is closed
        figure.savefig(partial, format=form, metadata=_NO_DATE.get(form))
