"""What stands and is fixed: buildings in perspective, and trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.synthetic.canvas import BUILDING, TREE, Brush, Canvas
from shards.synthetic.layout import RGB, Point, chance, pick_index, uniform

WALLS: tuple[RGB, ...] = (
    (128, 126, 122),
    (166, 160, 150),
    (128, 72, 54),
    (150, 108, 78),
    (206, 198, 182),
    (188, 166, 120),
    (98, 108, 118),
    (92, 82, 74),
    (222, 220, 214),
)
ROOFS: tuple[RGB, ...] = ((132, 66, 48), (92, 84, 80), (70, 74, 80), (112, 86, 62))
PANES: tuple[RGB, ...] = ((38, 44, 52), (74, 88, 102), (120, 146, 170), (196, 176, 116))
LEAVES: tuple[tuple[RGB, RGB], ...] = (
    ((20, 42, 18), (86, 122, 52)),
    ((28, 56, 30), (98, 130, 72)),
    ((34, 40, 20), (112, 112, 50)),
    ((86, 52, 20), (188, 128, 54)),  # autumn
    ((18, 34, 26), (58, 82, 56)),
    ((58, 62, 34), (140, 146, 84)),
)
# one circle, to four decimals: the library's sine may differ in the last bit from machine to machine
CIRCLE: tuple[Point, ...] = tuple(
    (round(float(np.cos(i * np.pi / 10)), 4), round(float(np.sin(i * np.pi / 10)), 4)) for i in range(20)
)


@dataclass(frozen=True)
class Block:
    """A box on the ground, in metres: left, right, near and far edge, eaves, and the ridge above them (0: flat)."""

    left: float
    right: float
    near: float
    far: float
    height: float
    gable: float = 0.0


def paint_block(canvas: Canvas, block: Block, rng: np.random.Generator) -> None:
    """A building: the front, the side that faces the camera, a gabled roof, windows and a door, its shadow."""
    wall = WALLS[pick_index(rng, len(WALLS))]
    factor = uniform(rng, 0.85, 1.1)
    brush = Brush(
        _scaled(wall, factor),
        _scaled(wall, factor * uniform(rng, 0.75, 0.95)),
        ("fine", "coarse")[chance(rng, 0.5)],
    )
    pane = PANES[pick_index(rng, len(PANES))]
    roof_color = ROOFS[pick_index(rng, len(ROOFS))]
    roof = Brush(roof_color, _scaled(roof_color, 0.75))
    camera, sun, contrast = canvas.camera, canvas.light.sun, canvas.light.contrast
    _cast_shadow(canvas, block)
    side_x = block.left if block.left > 0 else block.right
    has_side = block.left > 0 or block.right < 0
    # a side wall on the left of the view looks to the right, and is lit when the sun is there
    side_shade = 1 + (0.08 if (side_x < 0) == (sun > 0) else -0.35) * contrast
    front_shade = 1 - 0.15 * contrast
    rise = block.height + block.gable
    if has_side:
        corners = ((block.near, 0.0), (block.near, block.height), (block.far, block.height), (block.far, 0.0))
        canvas.fill(
            [[camera.point(side_x, up, deep) for deep, up in corners]],
            BUILDING,
            brush,
            block.near,
            side_shade,
        )
    if block.gable:
        middle = (block.left + block.right) / 2
        slope = [camera.point(side_x, block.height, deep) for deep in (block.near, block.far)]
        top = [camera.point(middle, rise, deep) for deep in (block.far, block.near)]
        canvas.fill([[*slope, *top]], BUILDING, roof, block.near, side_shade)
    front = [(block.left, 0.0), (block.left, block.height), (block.right, block.height), (block.right, 0.0)]
    if block.gable:
        front.insert(2, ((block.left + block.right) / 2, rise))
    canvas.fill(
        [[camera.point(x, up, block.near) for x, up in front]], BUILDING, brush, block.near, front_shade
    )
    storey = uniform(rng, 2.8, 3.8)
    span = uniform(rng, 2.2, 4.0)
    glass = Brush(pane, _scaled(pane, 0.7), "coarse")
    grid = _windows(block.right - block.left, block.height, storey, span)
    _paint_panes(canvas, grid, lambda u, up: camera.point(block.left + u, up, block.near), glass, block.near)
    if has_side:
        grid = _windows(block.far - block.near, block.height, storey, span)
        _paint_panes(canvas, grid, lambda u, up: camera.point(side_x, up, block.near + u), glass, block.near)


def paint_tree(canvas: Canvas, x_m: float, depth_m: float, rng: np.random.Generator) -> None:
    """A tree on its trunk: a round crown of several lobes, a conifer, or a bush. All of it is labelled tree."""
    kind = ("round", "round", "round", "conifer", "bush")[pick_index(rng, 5)]
    tall = uniform(rng, 1.0, 2.4) if kind == "bush" else uniform(rng, 4.5, 13)
    broad = tall * {"round": uniform(rng, 0.28, 0.45), "conifer": uniform(rng, 0.16, 0.24), "bush": 0.7}[kind]
    bare = {"round": uniform(rng, 0.22, 0.42), "conifer": 0.1, "bush": 0.0}[kind] * tall
    dark, bright = (
        LEAVES[pick_index(rng, len(LEAVES) - (kind == "conifer"))] if kind != "conifer" else LEAVES[4]
    )

    def at(x: float, up: float) -> Point:
        return canvas.camera.point(x_m + x, up, depth_m)

    shadow_ellipse(canvas, x_m, depth_m, broad * 1.1)
    bark = Brush((58, 44, 34), (104, 86, 70), "fine")
    lean, thick = uniform(rng, -0.04, 0.04) * tall, 0.035 * tall
    trunk = [
        at(-thick, 0),
        at(lean - thick * 0.6, bare + tall * 0.2),
        at(lean + thick * 0.6, bare + tall * 0.2),
        at(thick, 0),
    ]
    canvas.fill([trunk], TREE, bark, depth_m)
    if kind == "conifer":
        lobes = [
            _tier(at, broad, bare + (tall - bare) * t, (tall - bare) * 0.42, 1 - t * 0.9, rng)
            for t in (0, 0.2, 0.4, 0.6)
        ]
    else:
        middle, half = (tall + bare) / 2, (tall - bare) / 2
        centers = [
            (uniform(rng, -0.5, 0.5) * broad, middle + uniform(rng, -0.45, 0.45) * half) for _ in range(5)
        ]
        lobes = [_lobe(at, (lean, middle), (broad * 0.8, half * 0.85), rng)]
        lobes += [_lobe(at, (lean + x, up), (broad * 0.55, half * 0.5), rng) for x, up in centers]
    canvas.fill(lobes, TREE, Brush(dark, bright, "fine"), depth_m, 0.8)
    lit = Brush(_scaled(dark, 1.3), _scaled(bright, 1.0 + 0.3 * canvas.light.contrast), "fine")
    canvas.fill([_sunny(lobe, canvas.light.sun) for lobe in lobes], TREE, lit, depth_m)


def _sunny(lobe: list[Point], sun: int) -> list[Point]:
    """The lit part of a lobe: the same shape, smaller, moved up and towards the sun."""
    columns, rows = zip(*lobe, strict=True)
    x, y = sum(columns) / len(lobe), sum(rows) / len(lobe)
    slide_x, slide_y = sun * (max(columns) - min(columns)) * 0.16, -(max(rows) - min(rows)) * 0.14
    return [(x + (u - x) * 0.68 + slide_x, y + (v - y) * 0.68 + slide_y) for u, v in lobe]


def _lobe(
    at: Callable[[float, float], Point], center: Point, radii: Point, rng: np.random.Generator
) -> list[Point]:
    """A circle with a leafy edge around (x, up), in metres."""
    rough = [1 + 0.16 * (2 * rng.random() - 1) for _ in CIRCLE]
    return [
        at(center[0] + radii[0] * c * r, max(center[1] + radii[1] * s * r, 0.0))
        for (c, s), r in zip(CIRCLE, rough, strict=True)
    ]


def _tier(
    at: Callable[[float, float], Point],
    broad: float,
    base: float,
    tall: float,
    part: float,
    rng: np.random.Generator,
) -> list[Point]:
    """One skirt of a conifer's branches."""
    hem = [
        at(broad * part * (i / 4 - 1), base + tall * 0.08 * (i % 2) * (1 + rng.random())) for i in range(9)
    ]
    return [*hem, at(0.0, base + tall)]


def _windows(
    length: float, height: float, storey: float, span: float
) -> list[tuple[float, float, float, float]]:
    """(left, right, lower, upper) of the windows on a wall, in metres; few where the wall is small or far."""
    columns, storeys = min(int(length / span), 12), min(int(height / storey), 10)
    cell = length / columns if columns else 0.0
    return [
        (cell * (i + 0.25), cell * (i + 0.75), storey * (k + 0.3), storey * (k + 0.8))
        for k in range(storeys)
        for i in range(columns)
    ]


def _paint_panes(
    canvas: Canvas,
    windows: list[tuple[float, float, float, float]],
    at: Callable[[float, float], Point],
    brush: Brush,
    depth_m: float,
) -> None:
    panes = [[at(u0, v0), at(u0, v1), at(u1, v1), at(u1, v0)] for u0, u1, v0, v1 in windows]
    if panes:
        canvas.fill(panes, None, brush, depth_m, 0.9)


def _cast_shadow(canvas: Canvas, block: Block) -> None:
    """The shadow on the ground beside a block, away from the sun."""
    reach = -canvas.light.sun * min(block.height * 0.5, 5.0)
    edge = block.right if reach > 0 else block.left
    corners = ((edge, block.near), (edge, block.far), (edge + reach, block.far), (edge + reach, block.near))
    canvas.darken([canvas.camera.point(x_m, 0, depth_m) for x_m, depth_m in corners], 0.45)


def shadow_ellipse(canvas: Canvas, x_m: float, depth_m: float, half_m: float) -> None:
    """The shadow of something round, `half_m` wide to each side, on the ground under it."""
    shift = -canvas.light.sun * half_m * 0.4
    deep = min(half_m * 0.6, depth_m * 0.3)
    canvas.darken(
        [canvas.camera.point(x_m + shift + half_m * c, 0, depth_m + deep * s) for c, s in CIRCLE], 0.5
    )


def _scaled(color: RGB, factor: float) -> RGB:
    return color[0] * factor, color[1] * factor, color[2] * factor
