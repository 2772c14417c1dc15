"""The palette `safe`, as four kinds of eyes see it; and how it was chosen.

It begins with the seven colours of Okabe and Ito (2008, "Color universal design") that are not
black. Each further one is, of a grid of sRGB with L* from 25 to 95, the one that lies farthest from
the nearest of those before it, from black (void) and from white (paper): farthest by CIEDE2000, as
seen by the usual eye, with deuteranopia and with protanopia, whichever is least (Machado, Oliveira
and Fernandes 2009, severity 1). `chosen(255)` takes seconds, so distseg/tracking/palettes.py holds
its result.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from distseg.tracking.palettes import SAFE, safe_colors
from docs.figures.style import Canvas

OKABE_ITO = SAFE[:7]
SHOWN = 24  # colours in the figure
_LEVELS = np.linspace(0, 255, 18)  # of each channel in the grid of candidates
# linear RGB to the linear RGB that looks the same to the usual eye
SEEN_WITH = {
    "usual": np.eye(3),
    "deuteranopia": np.array(
        [
            (0.367322, 0.860646, -0.227968),
            (0.280085, 0.672501, 0.047413),
            (-0.011820, 0.042940, 0.968881),
        ]
    ),
    "protanopia": np.array(
        [
            (0.152286, 1.052583, -0.204868),
            (0.114503, 0.786281, 0.099216),
            (-0.003882, -0.048116, 1.051998),
        ]
    ),
}
_TO_XYZ = np.array(
    [
        (0.4124564, 0.3575761, 0.1804375),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339, 0.1191920, 0.9503041),
    ]
)


def chosen(number: int) -> list[tuple[int, int, int]]:
    """The first `number` colours of the palette, computed."""
    grid = np.array(np.meshgrid(_LEVELS, _LEVELS, _LEVELS)).reshape(3, -1).T.round()
    lightness = views(grid)[0, :, 0]
    # what is nearly black or white differs on paper, and hardly over a photograph
    grid = grid[(lightness > 25) & (lightness < 95)]
    seen = views(grid)
    nearest = np.full(len(grid), np.inf)
    colors: list[tuple[int, int, int]] = []
    for place in range(-2, number):
        # black and white come first and are not kept
        color = ((0, 0, 0), (255, 255, 255), *OKABE_ITO)[place + 2] if place < 7 else None
        if color is None:
            red, green, blue = grid[nearest.argmax()].astype(int).tolist()
            color = (red, green, blue)
        distance = ciede2000(seen, views(np.array(color))[:, None])
        nearest = np.minimum(nearest, distance.min(0))
        colors += [color] * (place >= 0)
    return colors


def views(colors: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) from 0 to 255 as CIELAB (3, ..., 3), a row for each eye of SEEN_WITH."""
    linear = _linear(colors)
    return np.stack([_lab(np.clip(linear @ matrix.T, 0, 1)) for matrix in SEEN_WITH.values()])


def _linear(colors: np.ndarray) -> np.ndarray:
    share = np.asarray(colors, float) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """Linear sRGB (..., 3) in [0, 1] as CIELAB, white D65."""
    of_white = linear @ _TO_XYZ.T / _TO_XYZ.sum(1)
    f = np.where(of_white > (6 / 29) ** 3, np.cbrt(of_white), of_white * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def ciede2000(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The colour difference of CIELAB values (..., 3), as Sharma, Wu and Dalal (2005) write it."""
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)
    # near gray a* is stretched
    mean7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1 + 0.5 * (1 - np.sqrt(mean7 / (mean7 + 25.0**7)))
    c1, h1 = _polar(stretch * a1, b1)
    c2, h2 = _polar(stretch * a2, b2)
    is_gray = c1 * c2 == 0
    turn = np.where(is_gray, 0, (h2 - h1 + 180) % 360 - 180)  # the shorter way round
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    lightness, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    # one of the two is 0 where there is no hue
    hue = np.where(is_gray, h1 + h2, (h1 + turn / 2) % 360)
    t = 1 - 0.17 * _cos(hue - 30) + 0.24 * _cos(2 * hue)
    t += 0.32 * _cos(3 * hue + 6) - 0.20 * _cos(4 * hue - 63)
    off = (lightness - 50) ** 2
    dl = dl / (1 + 0.015 * off / np.sqrt(20 + off))
    dc = dc / (1 + 0.045 * chroma)
    dh = dh / (1 + 0.015 * chroma * t)
    angle = 60 * np.exp(-(((hue - 275) / 25) ** 2))  # of the rotation among blues
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * np.sin(np.radians(angle))
    return np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh)


def _polar(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chroma, and hue in degrees from 0 to 360."""
    return np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360


def _cos(degrees: np.ndarray) -> np.ndarray:
    return np.cos(np.radians(degrees))


def seen_as(colors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) from 0 to 255 as the usual eye would have to see it to see the same."""
    linear = np.clip(_linear(colors) @ matrix.T, 0, 1)
    share = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * share).astype(np.uint8)


def draw() -> Figure:
    left, cell, row = 118, 21, 30  # px
    canvas = Canvas(left + cell * SHOWN + 8, 30 + row * len(SEEN_WITH))
    colors = np.array(safe_colors(SHOWN))
    for number in (1, 7, 12, SHOWN):
        canvas.text(left + cell * (number - 0.5), 12, str(number), size=11)
    for place, (name, matrix) in enumerate(SEEN_WITH.items()):
        y = 26 + row * place
        canvas.text(8, y + row / 2 - 2, name, align="left", weight="bold")
        for column, color in enumerate(seen_as(colors, matrix)):
            where = (left + cell * column, y)
            patch = Rectangle(where, cell - 1, row - 4, color="#" + bytes(color).hex(), lw=0)
            canvas.axes.add_patch(patch)
    return canvas.figure


if __name__ == "__main__":
    # the lines of SAFE in distseg/tracking/palettes.py
    words = [bytes(color).hex() for color in chosen(255)]
    for start in range(0, len(words), 12):
        print(*words[start : start + 12])
