"""Label maps as the discriminator sees them: real, fake, and real when it is scaled.

Of the scene in data/scene.npz, which run_data.py has taken from a real run.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distseg.losses.adversarial import real_label_map
from distseg.losses.tensors import label_at
from docs.figures.style import SCENE, SHADES, Canvas

CHANNELS = ("sky", "road", "building", "grass", "foreground")
TAU = 0.9  # loss.scaling_tau
LEFT, GAP, WIDTH = 8, 8, 118  # px, of the pictures
TOP = 178  # of the first row of maps


def draw() -> Figure:
    scene = dict(np.load(SCENE))
    height = WIDTH * scene["image"].shape[0] / scene["image"].shape[1]
    canvas = Canvas(640, TOP + 3 * (height + 34) + 30)
    _given(canvas, scene, 1.5 * height)
    real, scaled, fake, void = _label_maps(scene)
    texts = (
        "real y: one-hot ground truth; at void (outlined) what the prediction says",
        "fake s(x): the segmentor's softmax, here after 40 steps",
        f"real y with loss.real_map=scaling: at least {TAU} on the true class, the rest as in s(x)",
    )
    names = list(scene["names"])
    for row, (maps, text) in enumerate(zip((real, fake, scaled), texts, strict=True)):
        y = TOP + row * (height + 34)
        canvas.text(LEFT, y - 11, text, align="left")
        for column, name in enumerate(CHANNELS):
            x = LEFT + column * (WIDTH + GAP)
            axes = canvas.picture((x, y, WIDTH, height))
            plane = maps[names.index(name)]
            axes.imshow(_enlarged(plane), cmap=SHADES, vmin=0, vmax=1, interpolation="none")
            _outline(axes, void)
    below = TOP + 3 * (height + 34) - 22
    for column, name in enumerate(CHANNELS):
        canvas.text(LEFT + column * (WIDTH + GAP) + WIDTH / 2, below, name, weight="bold")
    canvas.scale((LEFT + 16, below + 18, 160, 12), "0", "1")
    return canvas.figure


def _given(canvas: Canvas, scene: dict[str, np.ndarray], height: float) -> None:
    """Image and label, and what the rows below are."""
    width = 1.5 * WIDTH
    canvas.picture((LEFT, 8, width, height)).imshow(scene["image"], interpolation="none")
    place = (LEFT + width + GAP, 8, width, height)
    canvas.picture(place).imshow(coloured(scene, "label"), interpolation="none")
    x = LEFT + 2 * (width + GAP) + 8
    for row, name in enumerate(CHANNELS):
        index = list(scene["names"]).index(name)
        canvas.swatch(x, 18 + 18 * row, "#" + bytes(scene["palette"][index]).hex(), name)
    canvas.swatch(x, 18 + 18 * len(CHANNELS), "#000000", "void: no class")
    canvas.text(x, 126, "image and label; below, what", align="left")
    canvas.text(x, 142, "of them D sees, five of 8 channels", align="left")


def coloured(scene: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The scene's label or prediction in the colours of the classes, void black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(scene["palette"])] = scene["palette"]
    return colors[scene[name]]


def _label_maps(scene: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Real, scaled and fake label maps (C, h, w), and where the label is void (h, w)."""
    fake = torch.from_numpy(scene["early_probabilities"].astype(np.float32))[None]
    index, valid = label_at(torch.from_numpy(scene["label"])[None], fake.shape[-2:])
    real = real_label_map(index, valid, fake)
    scaled = real_label_map(index, valid, fake, TAU)
    return real[0].numpy(), scaled[0].numpy(), fake[0].numpy(), ~valid[0].numpy()


def _enlarged(plane: np.ndarray) -> np.ndarray:
    # browsers smooth what they enlarge, and the cells are to be seen
    return plane.repeat(4, 0).repeat(4, 1)


def _outline(axes: Axes, void: np.ndarray) -> None:
    if void.any():
        axes.contour(
            _enlarged(void.astype(float)), levels=[0.5], colors=["#ff8c3a"], linewidths=0.8
        )
