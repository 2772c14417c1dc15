"""What all figures share: colours, text, boxes and arrows on a canvas counted in CSS pixels.

They stand on white pages and on black ones, so the background is transparent, boxes bring their
own, and what is written beside them is of a gray in the middle (contrast 4.4 on white and on
#0d1117). The hues are told apart by colour-blind readers, and none says anything that a word does
not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Outline

FOLDER = Path(__file__).parent
RUN, SCENE = FOLDER / "data" / "run.json", FOLDER / "data" / "scene.npz"  # of run_data.py
UNLABELLED = FOLDER / "data" / "unlabelled.npz"  # of unlabelled_data.py

# after Okabe and Ito, darkened until white text on them has a contrast of 5
BLUE, ORANGE, GREEN, PURPLE, SLATE = "#1f6fa8", "#b4530a", "#0b7a5c", "#8c3f88", "#5b6168"
# lines need no white text on them, and are lighter so that they show on black
BLUE_LINE, ORANGE_LINE, GREEN_LINE, PURPLE_LINE = "#2f86c5", "#d2691e", "#11a17a", "#b062ac"
INK = "#797979"  # of all that stands on the page itself
SHADES = "cividis"  # of numbers from 0 to 1; made for colour-blind eyes
PAPER = "#ffffff"  # of text in boxes

_PX = 1 / 96  # inches
_POINTS = 0.75  # in a pixel
# where a letter's middle is above its base line, in parts of the size
_MIDDLE = 0.35
# laid out with the fonts that come with matplotlib, the widest in use; shown in the reader's own
_SHOWN = {
    "'DejaVu Sans Mono'": "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace",
    "'DejaVu Sans'": "system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif",
}
# text as text, nothing read as a formula, and the same bytes every time
SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 12 * _POINTS,
    "svg.fonttype": "none",
    "svg.hashsalt": "distseg",
    "text.parse_math": False,
}


class Canvas:
    """A drawing of width x height px; x counts to the right, y downwards."""

    def __init__(self, width: float, height: float):
        self.figure = blank(width, height)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, width), ylim=(height, 0))

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        """One line, its middle at y. size: px; align, color, weight, mono, angle."""
        size = options.get("size", 12)
        angle = options.get("angle", 0)
        self.axes.text(
            x,
            # by hand: matplotlib would ask the font, whose answer depends on its version
            y if angle else y + _MIDDLE * size,
            text,
            size=size * _POINTS,
            color=options.get("color", INK),
            ha=options.get("align", "center"),
            va="baseline",
            weight=options.get("weight", "normal"),
            family="DejaVu Sans Mono" if options.get("mono") else "DejaVu Sans",
            rotation=angle,
            rotation_mode="anchor",
        )

    def box(
        self, place: tuple[float, float, float, float], *lines: str, color: str, **options: Any
    ) -> None:
        """A filled box at place (x, y, width, height).

        Its first line is its name, the others say more. mono: the name is one of the code's.
        """
        x, y, width, height = place
        self._rounded(place, facecolor=color, edgecolor="none")
        pitch = 15.5
        top = y + height / 2 - pitch * (len(lines) - 1) / 2
        for row, line in enumerate(lines):
            look: dict[str, Any] = {"color": PAPER, "size": 11.5}
            if row == 0:
                look |= {"size": 13, "weight": "bold", "mono": options.get("mono", False)}
            self.text(x + width / 2, top + row * pitch, line, **look)

    def frame(self, place: tuple[float, float, float, float], title: str = "") -> None:
        """A dotted outline around several boxes, its title in the upper left corner."""
        self._rounded(place, facecolor="none", edgecolor=INK, linestyle=(0, (1.5, 2.5)))
        self.text(place[0] + 12, place[1] + 15, title, align="left", weight="bold")

    def arrow(self, *points: tuple[float, float], **options: Any) -> None:
        """A line through the points with a head at its end. color, width, dashed, head."""
        look = {
            "color": options.get("color", INK),
            "linewidth": options.get("width", 1.6) * _POINTS,
        }
        if options.get("dashed"):
            look["linestyle"] = (0, (4, 2.2))
        path = Outline(points)
        style = "-|>,head_length=5,head_width=2.6" if options.get("head", True) else "-"
        # butt: a dash's own ends would close the gaps
        self.axes.add_patch(
            FancyArrowPatch(
                path=path,
                arrowstyle=style,
                mutation_scale=1,
                capstyle="butt",
                joinstyle="miter",
                **look,
            )
        )

    def picture(self, place: tuple[float, float, float, float]) -> Axes:
        """Bare axes at place (x, y, width, height), for a picture."""
        x, y, width, height = place
        across, down = self.axes.get_xlim()[1], self.axes.get_ylim()[0]
        axes = self.figure.add_axes(
            (x / across, 1 - (y + height) / down, width / across, height / down)
        )
        axes.set_axis_off()
        return axes

    def swatch(self, x: float, y: float, color: str, name: str) -> None:
        """An entry of a legend; x: its left edge."""
        self.box((x, y - 6, 12, 12), "", color=color)
        self.text(x + 18, y, name, align="left")

    def scale(self, place: tuple[float, float, float, float], low: str, high: str) -> None:
        """The colours of SHADES with the names of both ends."""
        x, y, width, height = place
        shades = np.linspace(0, 1, 256)[None]
        self.picture(place).imshow(shades, cmap=SHADES, aspect="auto", interpolation="bilinear")
        self.text(x - 6, y + height / 2, low, align="right")
        self.text(x + width + 6, y + height / 2, high, align="left")

    def _rounded(self, place: tuple[float, float, float, float], **look: Any) -> None:
        x, y, width, height = place
        style = "round,pad=0,rounding_size=5"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, **look))


def blank(width: float, height: float) -> Figure:
    """A transparent figure of so many px."""
    figure = Figure(figsize=(width * _PX, height * _PX))
    figure.patch.set_alpha(0)
    return figure


def columns(left: float, right: float, number: int, gap: float) -> Sequence[tuple[float, float]]:
    """(x, width) of so many equal columns between two edges."""
    width = (right - left - gap * (number - 1)) / number
    return [(left + place * (width + gap), width) for place in range(number)]


def png(figure: Figure) -> bytes:
    """The drawing as pixels, two a px for sharp screens."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 / _PX)
    return file.getvalue()


def svg(figure: Figure) -> bytes:
    """The drawing as text, the same for the same figure and version of matplotlib."""
    FigureCanvasSVG(figure)
    file = io.StringIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    for laid_out, shown in _SHOWN.items():
        text = text.replace(laid_out, shown)
    return text.encode()
