"""Generated outdoor scenes with the classes of Stanford Background: image and label, from numbers
alone.

Measured on the toy set (400 training and 60 validation scenes, seed 0): shares of the pixels sky
0.24, tree 0.13, road 0.15, grass 0.17, water 0.07, building 0.10, mountain 0.06, foreground 0.08,
void 0.012; each class takes 1 % or more of at least 45 % of the scenes. Guessing the class from the
colour alone (a histogram of 32 levels a channel) reaches a validation mIoU of 0.31, from colour and
place (16 levels, 8 x 8 cells of the picture) 0.43, and a small U-Net trained for 700 steps of 16
crops about 0.7: what is left has to come from shape and layout.

That is why it is more than a page of code: of simpler pictures a network learns the colours, and
neither the demo nor a test of training would show whether it learns anything else. A real set in
its place would have to be downloaded, where clusters often have no network, under its own licence.

A scene depends on nothing but its arguments: integer noise, elementwise arithmetic and exact or
integer OpenCV calls (noise.py), so neither process nor number of threads changes a pixel. Another
version of NumPy (its streams) or of OpenCV (`fillPoly`, `ellipse`, `resize`) could.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shards.errors import InputError
from shards.synthetic.canvas import Canvas, add_void
from shards.synthetic.land import paint_far, paint_ground, paint_sky
from shards.synthetic.layout import (
    PLACES,
    Layout,
    PlaceKind,
    plan_layout,
    scene_rng,
    uniform,
)
from shards.synthetic.noise import fractal
from shards.synthetic.placement import Site

__all__ = ["VOID_SHARE", "render_scene", "scene_layout"]

MIN_SIDE_PX = 32
# as in hand-made sets, where void lies along borders: training and metrics have to leave it out
VOID_SHARE = (0.006, 0.018)  # least and greatest share of void pixels in a scene


def render_scene(
    seed: int,
    index: int,
    size: tuple[int, int],
    places: Mapping[str, PlaceKind] = PLACES,
) -> tuple[np.ndarray, np.ndarray]:
    """Paint scene `index` of set `seed`: image (H, W, 3) uint8 RGB, label (H, W) uint8, 0 to 7 or
    255 (void).

    size: (height, width), each at least 32 pixels. places: how often each is drawn. A pure function
    of its arguments. Raises InputError for a negative seed or index and for smaller sizes.
    """
    rng = _checked_rng(seed, index, size)
    # first, so that scene_layout can draw it alone from the same numbers
    layout = plan_layout(rng, size, places)
    canvas = Canvas(layout, rng)
    # from the back to the front, as a painter: what is near covers what is far, in the label too
    paint_sky(canvas, rng)
    paint_far(canvas, layout, rng)
    paint_ground(canvas, layout, rng)
    # a copy of the label: things look for bare ground, and must not see each other
    Site(canvas, layout, canvas.label.copy(), rng).paint()
    # after all that is painted: void lies on the borders of what is seen
    add_void(canvas.label, uniform(rng, *VOID_SHARE), rng)
    return _exposed(canvas, rng), canvas.label


def scene_layout(seed: int, index: int, size: tuple[int, int]) -> Layout:
    """Place, camera and light of the scene that `render_scene` paints for the same arguments."""
    return plan_layout(_checked_rng(seed, index, size), size)


def _checked_rng(seed: int, index: int, size: tuple[int, int]) -> np.random.Generator:
    if seed < 0 or index < 0:
        raise InputError(f"seed {seed}, index {index}", "whole numbers from 0", "choose others")
    if min(size) < MIN_SIDE_PX:
        got = f"a scene of {size[0]} x {size[1]} pixels"
        raise InputError(got, f"{MIN_SIDE_PX} or more a side", "ask for a larger one")
    return scene_rng(seed, index)


def _exposed(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The picture as a camera gives it: uneven light, sensor noise, rounded to bytes."""
    patches = fractal(rng, canvas.camera.size, (90, 90), 1)[..., None]
    grain = rng.integers(-128, 128, canvas.image.shape, np.int8).astype(np.float32)
    # uneven light and grain: else a network would find the brushes' exact colours
    image = canvas.image * (np.float32(0.88) + np.float32(0.24) * patches)
    image += grain * np.float32(uniform(rng, 0.015, 0.075))
    # clipped first: a float above 255 as uint8 is what the processor makes of it
    return np.rint(image).clip(0, 255).astype(np.uint8)
