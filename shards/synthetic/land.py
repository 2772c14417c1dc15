"""What lies: sky, mountains, far lines, fields, water and roads, painted from the back to the
front.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from shards.synthetic.canvas import (
    BUILDING,
    GRASS,
    MOUNTAIN,
    ROAD,
    TREE,
    WATER,
    Brush,
    Canvas,
    tone,
)
from shards.synthetic.layout import RGB, Layout, Point, chance, pick_index, uniform
from shards.synthetic.noise import fractal, ridge

MEADOWS = (
    Brush((52, 92, 34), (118, 150, 66), "ground"),
    Brush((70, 104, 52), (140, 160, 92), "ground"),
    Brush((112, 104, 52), (186, 170, 104), "ground"),  # dry
    Brush((40, 66, 30), (92, 112, 56), "ground"),
    Brush((96, 84, 58), (128, 132, 74), "ground"),  # worn down to the earth
)
ROCKS = (
    Brush((74, 68, 64), (148, 140, 132), "coarse"),
    Brush((92, 70, 50), (164, 132, 98), "coarse"),
    Brush((44, 66, 40), (104, 114, 70), "coarse"),  # wooded
    Brush((58, 70, 92), (124, 134, 148), "coarse"),
)
ASPHALT = Brush((88, 88, 90), (132, 131, 130), "ground")
PALE_ROAD = Brush((140, 136, 128), (184, 180, 170), "ground")
DIRT = Brush((118, 92, 64), (170, 142, 106), "ground")
WET_ROAD = Brush((66, 70, 76), (120, 126, 134), "ground")
PAVEMENT = Brush((136, 132, 126), (176, 172, 164), "ground")
PAINT = Brush((214, 212, 204), (236, 234, 228), "ground")
BANK = Brush((92, 78, 54), (142, 124, 90), "ground")
WATERS: tuple[RGB, ...] = ((44, 74, 98), (52, 84, 70), (104, 92, 66), (70, 82, 92))
SNOW = Brush((214, 218, 226), (246, 248, 250), "coarse")
HORIZON_M = 500.0  # a road seen no further: less than a pixel remains


def paint_sky(canvas: Canvas, rng: np.random.Generator) -> None:
    """Gradient and clouds over the whole picture; what is below the horizon is painted over."""
    light, size = canvas.light, canvas.camera.size
    up = np.linspace(1, 0, canvas.camera.horizon_px, dtype=np.float32)[:, None, None]
    rows = np.array(light.low_sky, np.float32) * (1 - up) + np.array(light.zenith, np.float32) * up
    canvas.image[: canvas.camera.horizon_px] = rows
    cell = uniform(rng, 20, 50), uniform(rng, 50, 110)
    cover = fractal(rng, size, cell, 5) - np.float32(0.85 - light.cloud_cover)
    alpha = (cover * np.float32(uniform(rng, 2, 4))).clip(0, 0.9)[..., None]
    belly = 1 - 0.35 * cover.clip(0, 0.7)[..., None]  # thick clouds are darker below
    whole = (slice(None), slice(None))
    canvas.blend(whole, alpha, np.array(light.cloud, np.float32) * belly.astype(np.float32))


def paint_far(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> None:
    """Mountains, then what stands on the horizon.

    A line of trees, or a town. All above the horizon.
    """
    if layout.has_mountains:
        peak = uniform(rng, 0.4, 0.9)
        # a lower range, if any, is nearer, so it comes second
        for part in (1.0, uniform(rng, 0.45, 0.75))[: 1 + chance(rng, 0.6)]:
            _paint_ridge(
                canvas,
                rng,
                peak * part,
                depth_m=layout.light.haze_m * uniform(rng, 0.25, 0.9) * part,
            )
    if chance(rng, 0.35):
        _paint_town(canvas, rng)
    if chance(rng, 0.6):
        _paint_far_trees(canvas, rng)


def paint_ground(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> None:
    """Grass from the horizon down, fields on it, then water with its banks, then roads."""
    height, horizon = canvas.camera.size[0], canvas.camera.horizon_px
    meadow = MEADOWS[pick_index(rng, len(MEADOWS))]
    near, far = (tone(canvas.light, color, 0) for color in (meadow.first, meadow.second))
    rows = np.arange(1, height - horizon + 1, dtype=np.float32)[:, None, None]
    # the camera's own formula, a row at a time: rows begin at 1, since the horizon is infinitely
    # far
    depth = np.float32(canvas.camera.focal_px * canvas.camera.height_m) / rows
    haze = depth / (depth + np.float32(canvas.light.haze_m))
    color = near + (far - near) * canvas.noise["ground"][horizon:, :, None]
    canvas.image[horizon:] = color + (np.array(canvas.light.low_sky, np.float32) - color) * haze
    canvas.label[horizon:] = GRASS
    if layout.place != "street":
        for _ in range(pick_index(rng, 4)):
            _paint_field(canvas, rng)
    if layout.place == "lake":
        shore = _lake(canvas, rng)
        wide = uniform(rng, 1.02, 1.10)
        _paint_water(canvas, rng, shore, [(x, horizon + (y - horizon) * wide) for x, y in shore])
    if layout.place == "river":
        half_m = uniform(rng, 2.5, 6)
        line = _bends(rng, 250, uniform(rng, 10, 40), uniform(rng, -5, 5))
        bank = _strip(canvas, line, half_m + uniform(rng, 0.3, 1.5))
        _paint_water(canvas, rng, _strip(canvas, line, half_m), bank)
    if layout.has_road:
        _paint_roads(canvas, layout, rng)


def _paint_ridge(canvas: Canvas, rng: np.random.Generator, peak: float, depth_m: float) -> None:
    """A mountain range whose summit takes `peak` of the height between horizon and upper edge."""
    width, base = canvas.camera.size[1], canvas.camera.horizon_px
    line = ridge(rng, 6, uniform(rng, 0.42, 0.62))
    low, high = min(line), max(line)
    # a little wider than the picture, so that no range ends in view
    step = width * 1.04 / (len(line) - 1)
    up = [(0.12 + 0.88 * (value - low) / (high - low)) * peak * base for value in line]
    top = [(-0.02 * width + i * step, base - rise) for i, rise in enumerate(up)]
    brush = ROCKS[pick_index(rng, len(ROCKS))]
    canvas.fill([[(top[0][0], base), *top, (top[-1][0], base)]], MOUNTAIN, brush, depth_m)
    side = canvas.light.sun
    faces = []
    for i in range(2, len(top) - 2):  # slopes that turn away from the sun, down to an uneven foot
        if (top[i + 1][1] - top[i][1]) * side < 0 and up[i] > 0.25 * peak * base:
            (x0, y0), (x1, y1) = top[i], top[i + 1]
            slide = -side * step * uniform(rng, 0.3, 1.8)
            foot0, foot1 = (
                y0 + up[i] * uniform(rng, 0.3, 0.8),
                y1 + up[i + 1] * uniform(rng, 0.3, 0.8),
            )
            faces.append([(x0, y0), (x1, y1), (x1 + slide, foot1), (x0 + slide, foot0)])
    if faces:
        shade = 1 - 0.25 - 0.25 * canvas.light.contrast
        # None: the whole range is labelled by now, and shade is no class
        canvas.fill(_under(faces, top), None, brush, depth_m, shade)
    if chance(rng, 0.35):
        snow_line = uniform(rng, 0.55, 0.8) * peak * base
        foot = [
            (x, min(base - snow_line + uniform(rng, -0.12, 0.12) * peak * base, base))
            for x, _ in top
        ]
        lower = [(x, max(y, bottom)) for (x, y), (_, bottom) in zip(top, foot, strict=True)]
        canvas.fill([[*top, *reversed(lower)]], None, SNOW, depth_m)


def _under(faces: list[list[Point]], top: list[Point]) -> list[list[Point]]:
    """Faces pushed down to the skyline where they would reach into the sky."""
    step, first = top[1][0] - top[0][0], top[0][0]

    def below(point: Point) -> Point:
        # the last segment's end belongs to it, or there would be no point behind
        at = min(max((point[0] - first) / step, 0), len(top) - 1.001)
        (_, left), (_, right) = top[int(at)], top[int(at) + 1]
        return point[0], max(point[1], left + (right - left) * (at - int(at)))

    covered = []
    for face in faces:
        covered.append([below(point) for point in face])
    return covered


def _paint_far_trees(canvas: Canvas, rng: np.random.Generator) -> None:
    """The edge of a wood along a stretch of the horizon."""
    height, width = canvas.camera.size
    base, rise = canvas.camera.horizon_px, height * uniform(rng, 0.03, 0.10)
    left, right = sorted((uniform(rng, -0.6, 1.0), uniform(rng, 0.2, 1.6)))
    columns = range(int(left * width), int(right * width), 4)
    # ragged: a straight edge would be told from a wall by nothing but colour
    tops = [(float(x), base - rise * uniform(rng, 0.7, 1.3)) for x in columns]
    if tops:
        outline = [(tops[0][0], base), *tops, (tops[-1][0], base)]
        brush = Brush((24, 44, 26), (74, 96, 54), "fine")
        canvas.fill([outline], TREE, brush, depth_m=uniform(rng, 60, 220))


def _paint_town(canvas: Canvas, rng: np.random.Generator) -> None:
    """Far houses or towers side by side on a stretch of the horizon."""
    height, width = canvas.camera.size
    base, depth_m = canvas.camera.horizon_px, uniform(rng, 100, 400)
    x, stop = width * uniform(rng, -0.2, 0.6), width * uniform(rng, 0.5, 1.1)
    tall = height * uniform(rng, 0.04, 0.16)
    while x < stop:
        broad = uniform(rng, 4, 14)
        top = base - max(3, tall * uniform(rng, 0.3, 1.2))
        gray = uniform(rng, 90, 190)
        color = gray * uniform(rng, 1.0, 1.25), gray, gray * uniform(rng, 0.75, 1.05)
        brush = Brush(color, (color[0] * 0.8, color[1] * 0.8, color[2] * 0.8), "fine")
        canvas.fill(
            [[(x, base), (x, top), (x + broad, top), (x + broad, base)]], BUILDING, brush, depth_m
        )
        x += broad + (uniform(rng, 0, 10) if chance(rng, 0.3) else 0)


def _paint_field(canvas: Canvas, rng: np.random.Generator) -> None:
    """A patch of other grass or crops between two depths, with edges that run to the vanishing
    point.
    """
    near_m = uniform(rng, 1.2, 10) * canvas.camera.nearest_m
    far_m = near_m * uniform(rng, 1.3, 4)
    left_m = uniform(rng, -1.4, 0.8) * near_m
    right_m = left_m + uniform(rng, 0.4, 1.6) * near_m
    corners = ((left_m, near_m), (left_m, far_m), (right_m, far_m), (right_m, near_m))
    ground = [canvas.camera.point(x_m, 0, depth_m) for x_m, depth_m in corners]
    canvas.fill([ground], GRASS, MEADOWS[pick_index(rng, len(MEADOWS))], near_m)


def _lake(canvas: Canvas, rng: np.random.Generator) -> list[Point]:
    """Outline of a lake: a far shore just below the horizon, a near one with coves."""
    height, width = canvas.camera.size
    below = height - canvas.camera.horizon_px
    top = canvas.camera.horizon_px + below * uniform(rng, 0.03, 0.14)
    bottom = canvas.camera.horizon_px + below * uniform(rng, 0.45, 0.95)
    left, right = width * uniform(rng, -0.5, 0.15), width * uniform(rng, 0.85, 1.5)
    far, near = ridge(rng, 5, 0.5), ridge(rng, 5, 0.5)
    middle = top + (bottom - top) * 0.25
    upper, lower = [], []
    for i in range(33):
        t = i / 32
        # a half circle: both shores meet at the ends
        taper = math.sqrt(4 * t * (1 - t))
        x = left + (right - left) * t
        upper.append((x, middle + (top - middle) * taper * (1 + 0.1 * far[i])))
        lower.append((x, middle + (bottom - middle) * taper * (1 + 0.15 * near[i])))
    return [*upper, *reversed(lower)]


def _paint_water(
    canvas: Canvas, rng: np.random.Generator, outline: list[Point], bank: list[Point]
) -> None:
    """Water that mirrors what stands behind it, broken by ripples, inside a bank of bare earth."""
    horizon = canvas.camera.horizon_px
    canvas.fill([bank], GRASS, BANK, 20)
    found = canvas.mask([outline])
    if found is None:
        return
    where, alpha = found
    ripple = canvas.noise["ripple"][where]
    rows = np.arange(where[0].start, where[0].stop)[:, None]
    # a row below the horizon shows the row as far above it, moved by ripples, and never water
    # itself
    shaken = (
        2 * horizon - 1 - rows + ((ripple - 0.5) * uniform(rng, 2, 14)).astype(np.int64)
    ).clip(0, horizon - 1)
    mirrored = canvas.image[shaken, np.arange(where[1].start, where[1].stop)[None]]
    body = tone(canvas.light, WATERS[pick_index(rng, len(WATERS))], 0)
    clear = np.float32(uniform(rng, 0.45, 0.85))
    color = body + (mirrored - body) * clear
    color *= 1 + (ripple[..., None] - 0.5) * np.float32(uniform(rng, 0.15, 0.5))
    canvas.blend(where, alpha, color)
    canvas.label[where][alpha[..., 0] > 0.5] = WATER


def _bends(
    rng: np.random.Generator, far_m: float, swing_m: float, x_m: float
) -> list[tuple[float, float]]:
    """(depth, x) of a centre line that starts at the camera and swings more with distance."""
    line = ridge(rng, 5, 0.4)
    steps = [i / 32 for i in range(33)]
    # cubed: most points are near, where a bend is many pixels wide
    depths = [2.0 + (far_m - 2.0) * t * t * t for t in steps]
    return [
        (d, x_m + swing_m * t * (line[i] - line[0]))
        for i, (d, t) in enumerate(zip(depths, steps, strict=True))
    ]


def _strip(
    canvas: Canvas, line: list[tuple[float, float]], half_m: float, offset_m: float = 0.0
) -> list[Point]:
    """Outline of a band of constant width on the ground along a centre line, moved sideways by
    offset_m.
    """
    left = [canvas.camera.point(x_m + offset_m - half_m, 0, depth_m) for depth_m, x_m in line]
    right = [canvas.camera.point(x_m + offset_m + half_m, 0, depth_m) for depth_m, x_m in line]
    return [*left, *reversed(right)]


def _paint_roads(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> None:
    """A road across the view, as beside water, or one to the horizon, in a street between
    pavements.
    """
    street = layout.place == "street"
    surface = (ASPHALT, PALE_ROAD, WET_ROAD, DIRT)[pick_index(rng, 3 if street else 4)]
    if layout.has_water or (not street and chance(rng, 0.3)):
        _paint_crossing(canvas, rng, surface)
        return
    half_m = uniform(rng, 3.2, 6.0) if street else uniform(rng, 1.6, 4.0)
    swing_m = 0.0 if street else uniform(rng, 0, 60)
    line = _bends(rng, HORIZON_M, swing_m, uniform(rng, -0.5, 0.5) * half_m)
    if street:
        canvas.fill([_strip(canvas, line, half_m + uniform(rng, 1.5, 4))], ROAD, PAVEMENT, 10)
    canvas.fill([_strip(canvas, line, half_m)], ROAD, surface, 10)
    if surface is DIRT:  # two wheel tracks
        canvas.fill(
            [_strip(canvas, line, 0.3, -0.8), _strip(canvas, line, 0.3, 0.8)], None, BANK, 10, 0.85
        )
    elif chance(rng, 0.75):
        dashes = [canvas.camera.nearest_m * 0.7 + 6.0 * i for i in range(14)]
        marks = [
            _strip(canvas, [(d, _at(line, d)), (d + 2.5, _at(line, d + 2.5))], 0.09) for d in dashes
        ]
        sides = (-1, 1) if chance(rng, 0.5) else ()
        edges = [_strip(canvas, line, 0.07, side * (half_m - 0.3)) for side in sides]
        canvas.fill([*marks, *edges], None, PAINT, 20)


def _paint_crossing(canvas: Canvas, rng: np.random.Generator, surface: Brush) -> None:
    """A road from the left edge to the right one, slightly slanted.

    Over water it is a bridge or a dam.
    """
    near_m = canvas.camera.nearest_m * uniform(rng, 1.05, 1.9)
    far_m = near_m * uniform(rng, 1.4, 2.2)
    slant = uniform(rng, 0.9, 1.1)
    wide_m = 4 * far_m
    corners = (
        (-wide_m, near_m),
        (-wide_m, far_m),
        (wide_m, far_m * slant),
        (wide_m, near_m * slant),
    )
    canvas.fill(
        [[canvas.camera.point(x_m, 0, deep) for x_m, deep in corners]], ROAD, surface, near_m
    )


def _at(line: list[tuple[float, float]], depth_m: float) -> float:
    """x of a centre line at a depth."""
    """x of a centre line at a depth, straight between its points."""
    for (near_m, x0), (far_m, x1) in pairwise(line):
        if depth_m <= far_m:
            return x0 + (x1 - x0) * (depth_m - near_m) / (far_m - near_m)
    return line[-1][1]
