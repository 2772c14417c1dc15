"""Foreground things: flat parts in metres, placed on the ground that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.synthetic.canvas import FOREGROUND, GRASS, ROAD, WATER, Brush, Canvas
from shards.synthetic.layout import RGB, Point, chance, pick_index, uniform
from shards.synthetic.standing import CIRCLE, shadow_ellipse

# colour's name, polygon: x to the right, y up from the ground, metres
Part = tuple[str, tuple[Point, ...]]

# several for each part: a thing with one colour of its own would be learned without its shape
COLORS: dict[str, tuple[RGB, ...]] = {
    "paint": (
        (176, 32, 30),
        (40, 62, 120),
        (222, 222, 220),
        (58, 60, 64),
        (150, 152, 156),
        (36, 84, 60),
        (204, 168, 52),
    ),
    "cloth": (
        (150, 40, 44),
        (46, 60, 104),
        (212, 206, 196),
        (60, 58, 58),
        (92, 112, 72),
        (196, 146, 60),
        (120, 84, 120),
    ),
    "trousers": ((48, 54, 74), (70, 62, 54), (36, 36, 38), (130, 118, 98)),
    "hide": ((92, 58, 38), (46, 40, 38), (212, 204, 192), (150, 112, 76), (118, 112, 106)),
    "patch": ((226, 220, 208), (60, 48, 42), (136, 100, 72)),
    "wool": ((214, 206, 190), (178, 168, 150), (90, 80, 72)),
    "skin": ((214, 168, 138), (150, 104, 76), (92, 64, 48)),
    "sail": ((232, 228, 218), (200, 80, 60), (210, 190, 140)),
    "wood": ((112, 80, 52), (150, 128, 100), (84, 76, 70)),
    "metal": ((92, 94, 96), (140, 142, 142), (58, 62, 60)),
    "glass": ((44, 54, 64), (96, 116, 130)),
    "tire": ((26, 26, 28),),
    "lamp": ((208, 60, 50), (236, 226, 190)),
}


def _box(color: str, left: float, right: float, low: float, high: float) -> Part:
    return color, ((left, low), (left, high), (right, high), (right, low))


def _disc(color: str, x: float, up: float, radius: float) -> Part:
    return color, tuple((x + radius * c, up + radius * s) for c, s in CIRCLE)


@dataclass(frozen=True)
class Thing:
    """Parts from the back to the front, and the classes of ground that it stands on."""

    parts: tuple[Part, ...]
    ground: tuple[int, ...]
    half_m: float  # half of its width, for shadow and placement


# wheels behind the body in the list are painted over it
CAR_SIDE = Thing(
    (
        (
            "paint",
            (
                (-2.1, 0.3),
                (-2.1, 0.78),
                (-1.3, 0.92),
                (-0.7, 1.42),
                (0.85, 1.42),
                (1.5, 0.95),
                (2.1, 0.85),
                (2.1, 0.3),
            ),
        ),
        ("glass", ((-1.05, 0.95), (-0.6, 1.33), (0.05, 1.33), (0.05, 0.95))),
        ("glass", ((0.15, 0.95), (0.15, 1.33), (0.78, 1.33), (1.2, 0.95))),
        _disc("tire", -1.3, 0.33, 0.34),
        _disc("tire", 1.3, 0.33, 0.34),
        _disc("metal", -1.3, 0.33, 0.16),
        _disc("metal", 1.3, 0.33, 0.16),
    ),
    (ROAD,),
    2.1,
)
CAR_END = Thing(
    (
        _box("tire", -0.85, -0.6, 0.0, 0.5),
        _box("tire", 0.6, 0.85, 0.0, 0.5),
        (
            "paint",
            ((-0.9, 0.25), (-0.92, 0.85), (-0.68, 1.45), (0.68, 1.45), (0.92, 0.85), (0.9, 0.25)),
        ),
        ("glass", ((-0.74, 0.92), (-0.58, 1.36), (0.58, 1.36), (0.74, 0.92))),
        _box("lamp", -0.84, -0.58, 0.66, 0.82),
        _box("lamp", 0.58, 0.84, 0.66, 0.82),
        _box("tire", -0.9, 0.9, 0.25, 0.4),
    ),
    (ROAD,),
    0.9,
)
BUS = Thing(
    (
        _box("paint", -1.25, 1.25, 0.4, 3.1),
        _box("glass", -1.1, 1.1, 1.5, 2.6),
        _box("lamp", -1.1, -0.8, 0.7, 0.95),
        _box("lamp", 0.8, 1.1, 0.7, 0.95),
        _box("tire", -1.1, -0.7, 0.0, 0.45),
        _box("tire", 0.7, 1.1, 0.0, 0.45),
    ),
    (ROAD,),
    1.25,
)
PERSON = Thing(
    (
        ("trousers", ((-0.2, 0.0), (-0.17, 0.9), (-0.01, 0.9), (-0.04, 0.0))),
        ("trousers", ((0.22, 0.0), (0.02, 0.9), (0.17, 0.9), (0.36, 0.04))),
        (
            "cloth",
            ((-0.2, 0.85), (-0.25, 1.42), (-0.1, 1.5), (0.1, 1.5), (0.25, 1.42), (0.2, 0.85)),
        ),
        ("cloth", ((-0.25, 1.42), (-0.36, 0.85), (-0.27, 0.82), (-0.17, 1.3))),
        ("cloth", ((0.25, 1.42), (0.38, 0.9), (0.29, 0.86), (0.17, 1.3))),
        _disc("skin", 0.0, 1.62, 0.13),
    ),
    (ROAD, GRASS),
    0.3,
)
COW = Thing(
    (
        _box("hide", -0.7, -0.55, 0.0, 0.75),
        _box("hide", -0.45, -0.33, 0.05, 0.75),
        _box("hide", 0.4, 0.53, 0.0, 0.75),
        _box("hide", 0.6, 0.73, 0.05, 0.75),
        (
            "hide",
            (
                (-0.85, 0.7),
                (-0.9, 1.3),
                (-0.2, 1.38),
                (0.6, 1.4),
                (0.9, 1.25),
                (0.85, 0.65),
                (0, 0.58),
            ),
        ),
        ("hide", ((0.7, 1.35), (1.05, 1.5), (1.42, 1.25), (1.4, 1.05), (1.1, 1.1), (0.8, 0.95))),
        ("patch", ((-0.5, 0.75), (-0.55, 1.15), (-0.1, 1.25), (0.1, 0.9))),
    ),
    (GRASS,),
    1.1,
)
SHEEP = Thing(
    (
        _box("tire", -0.35, -0.28, 0.0, 0.4),
        _box("tire", 0.25, 0.32, 0.0, 0.4),
        ("wool", tuple((0.55 * c, 0.58 + 0.3 * s) for c, s in CIRCLE)),
        _disc("tire", 0.58, 0.72, 0.15),
    ),
    (GRASS,),
    0.6,
)
SAILBOAT = Thing(
    (
        _box("wood", -0.06, 0.06, 0.5, 6.4),
        ("sail", ((0.15, 1.1), (0.15, 6.2), (2.1, 1.2))),
        ("sail", ((-0.15, 1.1), (-0.15, 5.2), (-1.7, 1.0))),
        ("paint", ((-2.3, 0.8), (-1.8, 0.0), (1.8, 0.0), (2.5, 0.85))),
    ),
    (WATER,),
    2.4,
)
ROWBOAT = Thing(
    (
        ("wood", ((-1.7, 0.6), (-1.3, 0.0), (1.2, 0.0), (1.8, 0.65))),
        ("cloth", ((-0.25, 0.5), (-0.25, 1.15), (0.2, 1.15), (0.25, 0.5))),
        _disc("skin", -0.02, 1.3, 0.14),
    ),
    (WATER,),
    1.7,
)
MOTORBOAT = Thing(
    (
        ("paint", ((-3.2, 1.0), (-3.0, 0.0), (2.2, 0.0), (3.6, 1.2))),
        ("sail", ((-2.2, 1.0), (-1.9, 2.1), (0.6, 2.1), (1.3, 1.05))),
        ("glass", ((-1.7, 1.25), (-1.6, 1.8), (0.4, 1.8), (0.8, 1.25))),
    ),
    (WATER,),
    3.3,
)
LAMP_POST = Thing(
    (
        _box("metal", -0.1, 0.1, 0.0, 5.6),
        _box("metal", -0.06, 1.3, 5.5, 5.68),
        _box("lamp", 0.8, 1.4, 5.38, 5.55),
    ),
    (ROAD, GRASS),
    0.2,
)
SIGN = Thing(
    (
        _box("metal", -0.06, 0.06, 0.0, 2.6),
        _box("paint", -0.55, 0.55, 1.7, 2.7),
        _box("sail", -0.4, 0.4, 2.0, 2.4),
    ),
    (GRASS,),
    0.5,
)
BENCH = Thing(
    (
        _box("metal", -0.8, -0.7, 0.0, 0.9),
        _box("metal", 0.7, 0.8, 0.0, 0.9),
        _box("wood", -0.95, 0.95, 0.55, 0.95),
        _box("wood", -0.95, 0.95, 0.38, 0.48),
    ),
    (GRASS,),
    0.9,
)
FENCE = Thing(
    (
        *(_box("wood", x - 0.1, x + 0.1, 0.0, 1.25) for x in (-4.0, -2.0, 0.0, 2.0, 4.0)),
        _box("wood", -4.1, 4.1, 0.85, 1.05),
        _box("wood", -4.1, 4.1, 0.4, 0.6),
    ),
    (GRASS,),
    4.0,
)

# what may be seen where; listed twice: twice as often
USUAL: dict[str, tuple[Thing, ...]] = {
    "street": (CAR_SIDE, CAR_END, CAR_END, CAR_END, BUS, PERSON, PERSON, LAMP_POST, SIGN),
    "country": (CAR_SIDE, CAR_END, COW, COW, SHEEP, PERSON, FENCE, SIGN, LAMP_POST),
    "lake": (SAILBOAT, SAILBOAT, ROWBOAT, MOTORBOAT, PERSON, BENCH, CAR_END, FENCE),
    "river": (ROWBOAT, MOTORBOAT, COW, SHEEP, PERSON, FENCE, CAR_END, BENCH),
}


def paint_thing(
    canvas: Canvas, thing: Thing, x_m: float, depth_m: float, rng: np.random.Generator
) -> None:
    """Paint one thing with its feet at (x_m, depth_m) on the ground.

    All of it is labelled foreground.
    """
    size = uniform(rng, 0.9, 1.1)
    # mirrored at random, as crops are in training: no side is the usual one
    side = 1 if chance(rng, 0.5) else -1
    # a colour for each name, once: both legs of a person wear the same trousers, and the draws do
    # not depend on the parts
    picked = {name: choices[pick_index(rng, len(choices))] for name, choices in COLORS.items()}
    fade = uniform(rng, 0.6, 0.85)
    shadow_ellipse(canvas, x_m, depth_m, thing.half_m * 1.1)
    for name, polygon in thing.parts:
        color = picked[name]
        brush = Brush(color, (color[0] * fade, color[1] * fade, color[2] * fade), "coarse")
        points = [
            canvas.camera.point(x_m + side * size * x, size * up, depth_m) for x, up in polygon
        ]
        canvas.fill([points], FOREGROUND, brush, depth_m, 0.95)
