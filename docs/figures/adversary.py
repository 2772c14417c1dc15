"""A scene, its label, the prediction, and what the discriminator believes of both."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from distseg.losses.tensors import upsample
from docs.figures.label_maps import coloured
from docs.figures.style import SCENE, SHADES, Canvas

LEFT, GAP, WIDTH, TOP = 4, 8, 158, 26  # px
MIN_SHARE = 0.003  # of the pixels of label and prediction


def draw() -> Figure:
    scene = dict(np.load(SCENE))
    height = WIDTH * scene["image"].shape[0] / scene["image"].shape[1]
    canvas = Canvas(2 * LEFT + 5 * WIDTH + 4 * GAP, TOP + height + 34)
    pictures = (
        ("image", scene["image"]),
        ("label", coloured(scene, "label")),
        ("prediction", coloured(scene, "prediction")),
        ("prediction, judged", confidence(scene, "on_fake")),
        ("label, judged", confidence(scene, "on_real")),
    )
    for column, (name, picture) in enumerate(pictures):
        x = LEFT + column * (WIDTH + GAP)
        axes = canvas.picture((x, TOP, WIDTH, height))
        axes.imshow(picture, cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
        canvas.text(x + WIDTH / 2, 13, name, size=13, weight="bold")
    shown = [scene["label"], scene["prediction"]]
    legend(canvas, scene, shown, TOP + height + 20)
    canvas.scale((LEFT + 3 * (WIDTH + GAP) + 94, TOP + height + 14, 160, 12), "fake", "real")
    return canvas.figure


def confidence(scene: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The discriminator's probability of real at every pixel, (H, W), as its loss sees it."""
    logits = torch.from_numpy(scene[name].astype(np.float32))[None, None]
    return upsample(logits, scene["label"].shape).sigmoid()[0, 0].numpy()


def legend(canvas: Canvas, scene: dict[str, np.ndarray], maps: list[np.ndarray], y: float) -> None:
    """The classes of some maps in one line."""
    x: float = LEFT
    shown = np.concatenate([indices.ravel() for indices in maps])
    for index, name in enumerate(scene["names"]):
        # a speck of a class needs no entry
        if (shown == index).mean() < MIN_SHARE:
            continue
        color = "#" + bytes(scene["palette"][index]).hex()
        canvas.swatch(x, y, color, str(name))
        x += 34 + 6.8 * len(name)
