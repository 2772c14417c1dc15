"""The README's picture: what unlabelled images teach, and what a discriminator believes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from docs.figures.adversary import GAP, LEFT, TOP, confidence, legend
from docs.figures.label_maps import coloured
from docs.figures.style import SCENE, SHADES, UNLABELLED, Canvas

WIDTH = 200  # px
Row = Sequence[tuple[str, np.ndarray]]


def draw() -> Figure:
    taught, judged = dict(np.load(UNLABELLED)), dict(np.load(SCENE))
    rows: list[Row] = [
        [
            ("image", taught["image"]),
            ("label", coloured(taught, "label")),
            ("learned from 6 labels", coloured(taught, "without")),
            ("and 394 images without", coloured(taught, "with")),
        ],
        [
            ("image", judged["image"]),
            ("label", coloured(judged, "label")),
            ("prediction", coloured(judged, "prediction")),
            ("the discriminator's belief", confidence(judged, "on_fake")),
        ],
    ]
    height = WIDTH * taught["image"].shape[0] / taught["image"].shape[1]
    pitch = TOP + height + GAP
    canvas = Canvas(2 * LEFT + 4 * WIDTH + 3 * GAP, len(rows) * pitch + 24)
    for number, row in enumerate(rows):
        for column, (name, picture) in enumerate(row):
            x, y = LEFT + column * (WIDTH + GAP), number * pitch
            canvas.text(x + WIDTH / 2, y + 13, name, size=13, weight="bold")
            axes = canvas.picture((x, y + TOP, WIDTH, height))
            axes.imshow(picture, cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
    y = len(rows) * pitch + 10
    maps = [taught["label"], taught["without"], taught["with"]]
    legend(canvas, taught, [*maps, judged["label"], judged["prediction"]], y)
    canvas.scale((LEFT + 3 * (WIDTH + GAP) + 40, y - 6, WIDTH - 80, 12), "fake", "real")
    return canvas.figure
