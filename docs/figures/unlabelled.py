"""The README's picture: scenes, their labels, what six labelled images teach without and with the
unlabelled ones, and what the discriminator believes.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from docs.figures.adversary import GAP, LEFT, TOP, WIDTH, confidence, legend
from docs.figures.label_maps import coloured
from docs.figures.style import SHADES, UNLABELLED, Canvas

COLUMNS = ("image", "label", "6 labels", "+ 394 unlabelled", "the last, judged")


def draw() -> Figure:
    scenes = dict(np.load(UNLABELLED))
    num_scenes, *size = scenes["image"].shape[:3]
    height = WIDTH * size[0] / size[1]
    canvas = Canvas(2 * LEFT + 5 * WIDTH + 4 * GAP, TOP + num_scenes * (height + GAP) + 26)
    for number in range(num_scenes):
        one = {
            name: scenes[name][number] for name in ("image", "label", "without", "with", "on_fake")
        }
        one |= {name: scenes[name] for name in ("names", "palette")}
        maps = [coloured(one, name) for name in ("label", "without", "with")]
        for column, picture in enumerate([one["image"], *maps, confidence(one, "on_fake")]):
            place = (LEFT + column * (WIDTH + GAP), TOP + number * (height + GAP), WIDTH, height)
            axes = canvas.picture(place)
            axes.imshow(picture, cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
    for column, name in enumerate(COLUMNS):
        canvas.text(LEFT + column * (WIDTH + GAP) + WIDTH / 2, 13, name, size=13, weight="bold")
    y = TOP + num_scenes * (height + GAP) + 12
    legend(canvas, scenes, [scenes[name] for name in ("label", "without", "with")], y)
    canvas.scale((LEFT + 4 * (WIDTH + GAP) + 32, y - 6, WIDTH - 64, 12), "fake", "real")
    return canvas.figure
