"""What stands and is fixed: buildings in perspective, and trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.synthetic.canvas import BUILDING, TREE, Brush, Canvas
from shards.synthetic.layout import RGB, Point, pick_index, uniform

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
    ((58, 62, 34), (140, 146, 84)),
)
NEEDLES: tuple[RGB, RGB] = ((18, 34, 26), (58, 82, 56))
# one circle, to four decimals: the library's sine may differ in the last bit from machine to
# machine
CIRCLE: tuple[Point, ...] = tuple(
    (round(float(np.cos(i * np.pi / 10)), 4), round(float(np.sin(i * np.pi / 10)), 4))
    for i in range(20)
)


@dataclass(frozen=True)
class Block:
    """A box on the ground, in metres.

    Left, right, near and far edge, eaves, ridge above them (0: flat).
    """

    left: float
    right: float
    near: float
    far: float
    height: float
    gable: float = 0.0


@dataclass(frozen=True)
class Wall:
    """A rectangle in space: `at(along, up)`, in metres, is its point in the picture."""

    at: Callable[[float, float], Point]
    length: float
    height: float


def paint_block(canvas: Canvas, block: Block, rng: np.random.Generator) -> None:
    """A building with its shadow.

    The side that faces the camera, a gabled roof, the front, windows.
    """
    wall = _scaled(WALLS[pick_index(rng, len(WALLS))], uniform(rng, 0.85, 1.1))
    worn, grain = _scaled(wall, uniform(rng, 0.75, 0.95)), ("fine", "coarse")[pick_index(rng, 2)]
    brush = Brush(wall, worn, grain)
    pane = PANES[pick_index(rng, len(PANES))]
    glass = Brush(pane, _scaled(pane, 0.7), "coarse")
    roof = ROOFS[pick_index(rng, len(ROOFS))]
    grid_m = uniform(rng, 2.2, 4.0), uniform(rng, 2.8, 3.8)
    # under the house, so before it; it darkens only, and leaves the label to the ground
    _cast_shadow(canvas, block)
    x_m = block.left if block.left > 0 else block.right
    # a side wall on the left of the view looks to the right, and is lit when the sun is there
    shade = 1 + (0.08 if (x_m < 0) == (canvas.light.sun > 0) else -0.35) * canvas.light.contrast
    point = canvas.camera.point
    middle, rise = (block.left + block.right) / 2, block.height + block.gable
    dim = 1 - 0.15 * canvas.light.contrast  # of the front, which looks at the camera
    if block.gable:
        eaves = [point(x_m, block.height, block.near), point(x_m, block.height, block.far)]
        top = [point(middle, rise, block.far), point(middle, rise, block.near)]
        canvas.fill([[*eaves, *top]], BUILDING, Brush(roof, _scaled(roof, 0.75)), block.near, shade)
    # a house straight ahead shows no side
    if block.left > 0 or block.right < 0:
        side = Wall(
            lambda u, up: point(x_m, up, block.near + u), block.far - block.near, block.height
        )
        _paint_wall(canvas, side, (brush, glass), grid_m, (block.near, shade))
    front = Wall(
        lambda u, up: point(block.left + u, up, block.near), block.right - block.left, block.height
    )
    _paint_wall(canvas, front, (brush, glass), grid_m, (block.near, dim))
    # the gable's triangle last: it stands in the plane of the front, before the roof
    if block.gable:
        corners = ((block.left, block.height), (middle, rise), (block.right, block.height))
        outline = [point(x, up, block.near) for x, up in corners]
        canvas.fill([outline], BUILDING, brush, block.near, dim)


def paint_tree(canvas: Canvas, x_m: float, depth_m: float, rng: np.random.Generator) -> None:
    """A tree on its trunk: a crown of several lobes, a conifer, or a bush; all labelled tree."""
    kind = ("round", "round", "round", "conifer", "bush")[pick_index(rng, 5)]
    tall = uniform(rng, 1.0, 2.4) if kind == "bush" else uniform(rng, 4.5, 13)
    broad = (
        tall
        * {"round": uniform(rng, 0.28, 0.45), "conifer": uniform(rng, 0.16, 0.24), "bush": 0.7}[
            kind
        ]
    )
    bare = {"round": uniform(rng, 0.22, 0.42), "conifer": 0.1, "bush": 0.0}[kind] * tall
    dark, bright = NEEDLES if kind == "conifer" else LEAVES[pick_index(rng, len(LEAVES))]

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
        skirts = [(broad * (1 - t * 0.9), bare + (tall - bare) * t) for t in (0, 0.2, 0.4, 0.6)]
        lobes = [_tier(at, half_m, base, (tall - bare) * 0.42, rng) for half_m, base in skirts]
    else:
        middle, half = (tall + bare) / 2, (tall - bare) / 2
        centers = [
            (uniform(rng, -0.5, 0.5) * broad, middle + uniform(rng, -0.45, 0.45) * half)
            for _ in range(5)
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
        # not below the ground, where a bush's lobes would reach
        at(center[0] + radii[0] * c * r, max(center[1] + radii[1] * s * r, 0.0))
        for (c, s), r in zip(CIRCLE, rough, strict=True)
    ]


def _tier(
    at: Callable[[float, float], Point],
    half_m: float,
    base: float,
    tall: float,
    rng: np.random.Generator,
) -> list[Point]:
    """One skirt of a conifer's branches."""
    hem = [
        at(half_m * (i / 4 - 1), base + tall * 0.08 * (i % 2) * (1 + rng.random()))
        for i in range(9)
    ]
    return [*hem, at(0.0, base + tall)]


def _paint_wall(
    canvas: Canvas,
    wall: Wall,
    brushes: tuple[Brush, Brush],
    grid_m: tuple[float, float],
    seen: tuple[float, float],
) -> None:
    """A wall with a window in each cell of `grid_m` (width, height). seen: depth in m, light."""
    depth_m, shade = seen
    outline = [
        wall.at(u, up)
        for u, up in ((0, 0), (0, wall.height), (wall.length, wall.height), (wall.length, 0))
    ]
    canvas.fill([outline], BUILDING, brushes[0], depth_m, shade)
    # bounded: panes of far towers would be finer than pixels
    columns, storeys = min(int(wall.length / grid_m[0]), 12), min(int(wall.height / grid_m[1]), 10)
    panes = []
    for column in range(columns):
        u0, u1 = ((column + part) * wall.length / columns for part in (0.25, 0.75))
        for storey in range(storeys):
            low, high = ((storey + part) * grid_m[1] for part in (0.3, 0.8))
            panes.append([wall.at(u0, low), wall.at(u0, high), wall.at(u1, high), wall.at(u1, low)])
    if panes:
        # None: a window is a part of its building
        canvas.fill(panes, None, brushes[1], depth_m, 0.9 * shade)


def _cast_shadow(canvas: Canvas, block: Block) -> None:
    """The shadow on the ground beside a block, away from the sun."""
    reach = -canvas.light.sun * min(block.height * 0.5, 5.0)
    edge = block.right if reach > 0 else block.left
    corners = (
        (edge, block.near),
        (edge, block.far),
        (edge + reach, block.far),
        (edge + reach, block.near),
    )
    canvas.darken([canvas.camera.point(x_m, 0, depth_m) for x_m, depth_m in corners], 0.45)


def shadow_ellipse(canvas: Canvas, x_m: float, depth_m: float, half_m: float) -> None:
    """The shadow of something round, `half_m` wide to each side, on the ground under it."""
    shift = -canvas.light.sun * half_m * 0.4
    # a share of the depth at most: an ellipse that reached behind the camera has no picture
    deep = min(half_m * 0.6, depth_m * 0.3)
    canvas.darken(
        [canvas.camera.point(x_m + shift + half_m * c, 0, depth_m + deep * s) for c, s in CIRCLE],
        0.5,
    )


def _scaled(color: RGB, factor: float) -> RGB:
    return color[0] * factor, color[1] * factor, color[2] * factor
