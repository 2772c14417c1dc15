"""The picture and its label, painted together: one mask gives both, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import cv2
import numpy as np

from shards.sample import IGNORE_INDEX, STANFORD
from shards.synthetic.layout import RGB, Camera, Layout, Light, Point
from shards.synthetic.noise import fractal, on_ground

# the order of STANFORD's names: a label here is an index there
SKY, TREE, ROAD, GRASS, WATER, BUILDING, MOUNTAIN, FOREGROUND = range(STANFORD.num_classes)
SUBPIXELS = 4  # a mask is drawn this many times larger and averaged: smooth edges
# no polygon reaches further outside: a point near the camera would overflow fixed point
FAR_PX = 2000.0


@dataclass(frozen=True)
class Brush:
    """Two colours, as in white light, mixed by a field of noise: fine, coarse, ground or ripple."""

    first: RGB
    second: RGB
    noise: str = "fine"


class Canvas:
    """image: (H, W, 3) float32, 0 to 255.

    Label: (H, W) uint8; noise: (H, W) float32 in [0, 1] by name.
    """

    def __init__(self, layout: Layout, rng: np.random.Generator):
        self.camera, self.light = layout.camera, layout.light
        # floats until the end: rounded at each brush, thin haze would vanish
        self.image = np.zeros((*self.camera.size, 3), np.float32)
        self.label = np.full(self.camera.size, SKY, np.uint8)
        self.noise = _noises(self.camera, rng)

    def fill(
        self,
        polygons: Sequence[Sequence[Point]],
        label: int | None,
        brush: Brush,
        depth_m: float = 0.0,
        shade: float = 1.0,
    ) -> None:
        """Paint the union of polygons, (column, row) points; `label` None leaves the label as it
        is.

        depth_m: how much haze lies before it; shade: share of the light that reaches it, 1 is full.
        """
        found = self.mask(polygons)
        if found is None:
            return
        where, alpha = found
        first, second = (
            tone(self.light, color, depth_m, shade) for color in (brush.first, brush.second)
        )
        mix = self.noise[brush.noise][where][..., None]
        self.blend(where, alpha, first + (second - first) * mix)
        if label is not None:
            # a pixel belongs to what covers more than half of it, while its colour is mixed
            self.label[where][alpha[..., 0] > 0.5] = label

    def darken(self, polygon: Sequence[Point], strength: float) -> None:
        """A shadow: takes `strength` (0 to 1) of the light, by the scene's contrast, and changes no
        label.
        """
        found = self.mask([polygon])
        if found is not None:
            where, alpha = found
            self.image[where] *= 1 - alpha * np.float32(
                strength * (0.35 + 0.65 * self.light.contrast)
            )

    def blend(self, where: tuple[slice, slice], alpha: np.ndarray, color: np.ndarray) -> None:
        """Cover a window of the picture with a colour, (h, w, 3) or (3,), by alpha (h, w, 1)."""
        # a view: the next line writes into the picture
        region = self.image[where]
        region += alpha * (color - region)

    def mask(
        self, polygons: Sequence[Sequence[Point]]
    ) -> tuple[tuple[slice, slice], np.ndarray] | None:
        """The window that polygons touch and their alpha there, (h, w, 1) in [0, 1].

        None when outside.
        """
        points = np.array(list(chain.from_iterable(polygons))).clip(-FAR_PX, FAR_PX)
        low = np.floor(points.min(axis=0)).clip(0)
        left, top = low.astype(int).tolist()
        right, bottom = np.ceil(points.max(axis=0)).astype(int).tolist()
        width, height = (
            min(right, self.label.shape[1]) - left,
            min(bottom, self.label.shape[0]) - top,
        )
        if width <= 0 or height <= 0:
            return None
        mask = np.zeros((height * SUBPIXELS, width * SUBPIXELS), np.uint8)
        # 16ths of a subpixel, by shift=4 below: integers, which every machine fills alike
        fixed = np.rint((points - low) * (SUBPIXELS * 16)).astype(np.int32)
        start = 0
        for polygon in polygons:  # one at a time: together, overlaps would cancel
            cv2.fillPoly(mask, [fixed[start : start + len(polygon)]], 255, shift=4)
            start += len(polygon)
        # of bytes and by a whole factor: INTER_AREA then adds up integers, which every machine does
        # alike
        alpha = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA) * np.float32(
            1 / 255
        )
        return (slice(top, top + height), slice(left, left + width)), alpha[..., None]


def tone(light: Light, color: RGB, depth_m: float, shade: float = 1.0) -> np.ndarray:
    """(3,) float32: a colour under the scene's light, seen through the haze of `depth_m`."""
    haze = depth_m / (depth_m + light.haze_m)
    # one number after the other: a matrix product may add up in another order elsewhere
    lit = [part * tint * shade for part, tint in zip(color, light.tint, strict=True)]
    return np.array(
        [part * (1 - haze) + sky * haze for part, sky in zip(lit, light.low_sky, strict=True)],
        np.float32,
    )


def add_void(label: np.ndarray, share: float, rng: np.random.Generator) -> None:
    """Set `share` of the pixels to 255, in place: some specks, the rest along borders."""
    height, width = label.shape
    target = round(share * label.size)
    specks = np.zeros_like(label)
    # a fifth: enough that void is not at borders only
    while np.count_nonzero(specks) < target // 5:
        center = int(rng.integers(width)), int(rng.integers(height))
        axes = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        cv2.ellipse(specks, center, axes, 0, 0, 360, 1, -1)
    kernel = np.ones((3, 3), np.uint8)
    # (H, W) bool: where the 3 x 3 around a pixel has two classes
    border = (cv2.dilate(label, kernel) != cv2.erode(label, kernel)) & (specks == 0)
    rows, columns = np.nonzero(border)
    # smooth noise: whole stretches of a border go, not single pixels
    order = fractal(rng, label.shape, (24, 24), 2)[rows, columns]
    # stable: equal values keep their order, which the other kinds leave to the processor
    chosen = np.argsort(order, kind="stable")[: max(target - np.count_nonzero(specks), 0)]
    label[specks > 0] = IGNORE_INDEX
    label[rows[chosen], columns[chosen]] = IGNORE_INDEX


def _noises(camera: Camera, rng: np.random.Generator) -> dict[str, np.ndarray]:
    height = camera.size[0]
    below = np.arange(1, height - camera.horizon_px + 1, dtype=np.float32)[:, None]
    columns = np.arange(camera.size[1], dtype=np.float32)[None] - np.float32(camera.vanishing_px)
    distance = np.float32(len(below)) / below  # 1 in the lowest row
    texture = fractal(rng, (160, 160), (20, 20), 5)  # laid out on the ground
    # wide and low, as crests are that are seen from the side
    waves = fractal(rng, (160, 160), (6, 40), 3)
    fields = {
        "fine": fractal(rng, camera.size, (5, 5), 3),
        "coarse": fractal(rng, camera.size, (30, 34), 5),
        "ground": np.zeros(camera.size, np.float32),
        "ripple": np.zeros(camera.size, np.float32),
    }
    fields["ground"][camera.horizon_px :] = on_ground(texture, distance * 90, columns * distance)
    fields["ripple"][camera.horizon_px :] = on_ground(waves, distance * 90, columns * distance)
    return fields
