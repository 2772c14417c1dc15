"""Generated outdoor scenes with the classes of Stanford Background: an image and its label, from numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from shards.errors import InputError
from shards.sample import IGNORE_INDEX
from shards.synthetic.canvas import GRASS, ROAD, Canvas, add_void
from shards.synthetic.land import paint_far, paint_ground, paint_sky
from shards.synthetic.layout import Camera, Layout, chance, pick_index, plan_layout, scene_rng, uniform
from shards.synthetic.noise import fractal
from shards.synthetic.standing import Block, paint_block, paint_tree
from shards.synthetic.things import USUAL, paint_thing

MIN_SIDE_PX = 32
VOID_SHARE = (0.006, 0.018)
Item = tuple[float, Callable[[], None]]  # depth in metres, what paints it

__all__ = ["render_scene", "scene_layout"]


def scene_layout(seed: int, index: int, size: tuple[int, int]) -> Layout:
    """Place, camera and light of the scene that `render_scene` paints for the same arguments."""
    return plan_layout(_checked_rng(seed, index, size), size)


def render_scene(seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Paint scene `index` of the set `seed`: image (H, W, 3) uint8 RGB and label (H, W) uint8, 0 to 7 or 255 for void.

    size: (height, width), each at least 32 pixels. A pure function of its arguments.
    Raises InputError for negative numbers and for smaller sizes.
    """
    rng = _checked_rng(seed, index, size)
    layout = plan_layout(rng, size)
    canvas = Canvas(layout, rng)
    paint_sky(canvas, rng)
    paint_far(canvas, layout, rng)
    paint_ground(canvas, layout, rng)
    ground = (
        canvas.label.copy()
    )  # what stands is placed by what lies there, not by what has been painted since
    items = [*_buildings(canvas, layout, ground, rng), *_trees(canvas, layout, ground, rng)]
    items += _things(canvas, layout, ground, rng)
    for _, paint in sorted(items, key=lambda item: -item[0]):
        paint()
    add_void(canvas.label, uniform(rng, *VOID_SHARE), rng)
    return _exposed(canvas, rng), canvas.label


def _checked_rng(seed: int, index: int, size: tuple[int, int]) -> np.random.Generator:
    if seed < 0 or index < 0:
        raise InputError(f"seed {seed}, index {index}", "whole numbers from 0", "choose others")
    if min(size) < MIN_SIDE_PX:
        raise InputError(
            f"a scene of {size[0]} x {size[1]} pixels",
            f"{MIN_SIDE_PX} or more a side",
            "ask for a larger one",
        )
    return scene_rng(seed, index)


def _buildings(canvas: Canvas, layout: Layout, ground: np.ndarray, rng: np.random.Generator) -> list[Item]:
    blocks: list[Block] = []
    if layout.place == "street":
        for side in (-1, 1):
            if chance(rng, 0.9):
                blocks += _row_of_houses(layout.camera, side, rng)
    else:
        for _ in range(pick_index(rng, 4)):
            half_m, high_m = uniform(rng, 3, 8), uniform(rng, 2.6, 7)
            spot = _spot(layout.camera, ground, (GRASS,), rng, (2.2, 14), half_m)
            if spot:
                x_m, near_m = spot
                gable = uniform(rng, 1.2, 3.5) if chance(rng, 0.75) else 0.0
                blocks.append(
                    Block(x_m - half_m, x_m + half_m, near_m, near_m + uniform(rng, 5, 12), high_m, gable)
                )
    return [(block.near, partial(paint_block, canvas, block, rng)) for block in blocks]


def _row_of_houses(camera: Camera, side: int, rng: np.random.Generator) -> list[Block]:
    """Blocks along one side of the street, some gaps between them, from the camera to far away."""
    depth_m = camera.nearest_m * uniform(rng, 0.6, 2.5)
    edge_m = uniform(rng, 7.5, 13)
    high_m = uniform(rng, 4, 18)
    blocks = []
    while depth_m < 130 and len(blocks) < 8:
        long_m, wide_m = uniform(rng, 7, 20), uniform(rng, 7, 14)
        back = uniform(rng, 0, 1.5)
        inner, outer = side * (edge_m + back), side * (edge_m + back + wide_m)
        gable = uniform(rng, 1, 3) if high_m < 8 and chance(rng, 0.7) else 0.0
        height_m = high_m * uniform(rng, 0.65, 1.35)
        blocks.append(Block(min(inner, outer), max(inner, outer), depth_m, depth_m + long_m, height_m, gable))
        depth_m += long_m + (uniform(rng, 2, 14) if chance(rng, 0.45) else 0.0)
    return blocks


def _trees(canvas: Canvas, layout: Layout, ground: np.ndarray, rng: np.random.Generator) -> list[Item]:
    count = pick_index(rng, 5) if layout.place == "street" else pick_index(rng, 11)
    spots = [_spot(layout.camera, ground, (GRASS,), rng, (1.4, 16), 0.3) for _ in range(count)]
    return [(z, partial(paint_tree, canvas, x, z, rng)) for x, z in filter(None, spots)]


def _things(canvas: Canvas, layout: Layout, ground: np.ndarray, rng: np.random.Generator) -> list[Item]:
    items: list[Item] = []
    usual = USUAL[layout.place]
    for number in range(1 + pick_index(rng, 7)):
        thing = usual[pick_index(rng, len(usual))]
        reach = (1.02, 2.0) if number == 0 else (1.05, 9)  # the first one is near: something to see
        spot = _spot(layout.camera, ground, thing.ground, rng, reach, thing.half_m)
        if spot:
            items.append((spot[1], partial(paint_thing, canvas, thing, *spot, rng)))
    return items


def _spot(
    camera: Camera,
    ground: np.ndarray,
    classes: tuple[int, ...],
    rng: np.random.Generator,
    reach: tuple[float, float],
    half_m: float,
) -> tuple[float, float] | None:
    """(x, depth) in metres of a place in view whose ground is one of `classes`, `half_m` to each side too; or None.

    reach: least and greatest depth, in depths of the lowest row. Rows are drawn alike, so that near and far both occur.
    """
    height, width = camera.size
    low, high = (camera.horizon_px + (height - camera.horizon_px) / deep for deep in (reach[1], reach[0]))
    for _ in range(16):
        row, column = uniform(rng, low, high), uniform(rng, 0, width)
        depth_m = camera.depth(row)
        half_px = camera.focal_px * half_m / depth_m
        sides = (min(max(int(side), 0), width - 1) for side in (column - half_px, column, column + half_px))
        if all(ground[min(int(row), height - 1), side] in classes for side in sides):
            return (column - camera.vanishing_px) * depth_m / camera.focal_px, depth_m
    return None


def _exposed(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The picture as a camera gives it: uneven light, sensor noise, rounded to bytes."""
    patches = fractal(rng, canvas.camera.size, (90, 90), 1)[..., None]
    grain = rng.integers(-128, 128, canvas.image.shape, np.int8).astype(np.float32)
    strength = np.float32(uniform(rng, 0.015, 0.075))
    image = canvas.image * (np.float32(0.88) + np.float32(0.24) * patches)
    image += grain * strength
    return np.rint(image).clip(0, 255).astype(np.uint8)
