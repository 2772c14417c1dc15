"""What a scene is: its place, camera, light and weather, drawn before anything is painted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RGB = tuple[float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Camera:
    """A level pinhole camera: everything on the ground obeys one perspective.

    horizon_px: row of the horizon; vanishing_px: column where lines along the view meet; height_m:
    its own.
    """

    size: tuple[int, int]
    horizon_px: int
    vanishing_px: float
    focal_px: float
    height_m: float

    def row(self, depth_m: float, up_m: float = 0.0) -> float:
        """Row of a point `up_m` above the ground, `depth_m` away."""
        return self.horizon_px + self.focal_px * (self.height_m - up_m) / depth_m

    def column(self, x_m: float, depth_m: float) -> float:
        """Column of a point `x_m` to the right of the line of sight."""
        return self.vanishing_px + self.focal_px * x_m / depth_m

    def point(self, x_m: float, up_m: float, depth_m: float) -> Point:
        """(column, row) of a point in space."""
        return self.column(x_m, depth_m), self.row(depth_m, up_m)

    def depth(self, row: float) -> float:
        """Metres to the ground seen in a row below the horizon."""
        return self.focal_px * self.height_m / (row - self.horizon_px)

    @property
    def nearest_m(self) -> float:
        """Depth of the ground in the lowest row."""
        return self.depth(self.size[0])


@dataclass(frozen=True)
class Light:
    """Sky colours, the tint of what is lit, the haze. sun: -1 from the left, 1 from the right."""

    zenith: RGB
    low_sky: RGB
    tint: RGB
    haze_m: float  # at this depth half of a colour is the low sky's
    contrast: float  # lit against shaded faces and cast shadows: 0 overcast, 1 full sun
    cloud: RGB
    cloud_cover: float
    sun: int


@dataclass(frozen=True)
class Layout:
    """Place, camera and light of a scene. place: street, country, lake or river."""

    place: str
    camera: Camera
    light: Light
    has_mountains: bool
    has_road: bool

    @property
    def has_water(self) -> bool:
        """Whether there is a lake or a river."""
        return self.place in ("lake", "river")


@dataclass(frozen=True)
class PlaceKind:
    """up_to: a draw in [0, 1) below this, and not below the one before, means this place.

    Then chances.
    """

    up_to: float
    mountains: float
    road: float


# looked up by one draw, in this order: a place more would shift those behind it, and with them
# every scene
PLACES = {
    "street": PlaceKind(0.28, mountains=0.40, road=1.0),
    "country": PlaceKind(0.52, mountains=0.75, road=0.9),
    "lake": PlaceKind(0.78, mountains=0.75, road=0.4),
    "river": PlaceKind(1.0, mountains=0.7, road=0.6),
}
# the same places as often as the shares of classes among Stanford Background's training labels
# have them: three of four pictures are of streets, and mountains are rare
TOWN_PLACES = {
    "street": PlaceKind(0.72, mountains=0.10, road=1.0),
    "country": PlaceKind(0.84, mountains=0.25, road=0.9),
    "lake": PlaceKind(0.92, mountains=0.25, road=0.4),
    "river": PlaceKind(1.0, mountains=0.25, road=0.6),
}

# zenith, low sky, tint, haze_m, contrast, cloud: clear, overcast, evening, dusk, haze, rain, dust
# so unlike each other that no class has a colour of its own
WEATHERS: tuple[tuple[RGB, RGB, RGB, float, float, RGB], ...] = (
    ((82, 140, 208), (188, 212, 232), (1.0, 0.99, 0.95), 700, 1.0, (240, 242, 245)),
    ((152, 158, 166), (198, 201, 204), (0.82, 0.84, 0.86), 350, 0.2, (128, 132, 138)),
    ((96, 108, 150), (236, 172, 118), (1.02, 0.80, 0.64), 450, 0.9, (226, 150, 122)),
    ((58, 72, 108), (158, 142, 152), (0.62, 0.64, 0.74), 400, 0.25, (98, 92, 116)),
    ((172, 186, 200), (224, 220, 210), (0.95, 0.92, 0.86), 130, 0.4, (232, 230, 226)),
    ((92, 98, 106), (154, 158, 160), (0.68, 0.71, 0.74), 300, 0.15, (72, 77, 84)),
    ((176, 160, 134), (214, 200, 174), (0.96, 0.88, 0.76), 220, 0.5, (200, 186, 160)),
)


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One double in [low, high)."""
    # from random() alone, here and below: the fewest steps between the generator's bits and a draw
    return low + (high - low) * rng.random()


def chance(rng: np.random.Generator, probability: float) -> bool:
    """True with the probability given."""
    return bool(rng.random() < probability)


def pick_index(rng: np.random.Generator, count: int) -> int:
    """One of 0 to count - 1, all alike."""
    return int(rng.random() * count)


def scene_rng(seed: int, index: int) -> np.random.Generator:
    """The generator that a scene is drawn from: no two pairs (seed, index) share numbers."""
    # a counter with the pair as its key: scene 7 needs no scenes before it, so that any worker can
    # paint any
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))


def plan_layout(
    rng: np.random.Generator, size: tuple[int, int], places: Mapping[str, PlaceKind] = PLACES
) -> Layout:
    """Draw place, camera and light; uses the first numbers of the scene's generator."""
    height, width = size
    draw = rng.random()
    # the last reaches to 1.0, and a draw stays below it
    place = next(name for name, kind in places.items() if draw < kind.up_to)
    camera = Camera(
        size=size,
        horizon_px=int(height * uniform(rng, 0.34, 0.60)),
        vanishing_px=width * uniform(rng, 0.25, 0.75),
        # from the area: portrait and landscape see things equally large
        focal_px=math.sqrt(height * width) * uniform(rng, 0.85, 1.25),
        height_m=uniform(rng, 1.7, 3.4) if place == "street" else uniform(rng, 1.8, 5.5),
    )
    kind = places[place]
    return Layout(place, camera, _light(rng), chance(rng, kind.mountains), chance(rng, kind.road))


def _light(rng: np.random.Generator) -> Light:
    zenith, low_sky, tint, haze_m, contrast, cloud = WEATHERS[pick_index(rng, len(WEATHERS))]
    exposure = uniform(rng, 0.85, 1.15)
    warmth = uniform(rng, -0.06, 0.06)

    def exposed(color: RGB) -> RGB:
        return (
            color[0] * exposure * (1 + warmth),
            color[1] * exposure,
            color[2] * exposure * (1 - warmth),
        )

    return Light(
        zenith=exposed(zenith),
        low_sky=exposed(low_sky),
        tint=exposed(tint),
        haze_m=haze_m * uniform(rng, 0.7, 1.4),
        contrast=contrast,
        cloud=exposed(cloud),
        cloud_cover=uniform(rng, 0.0, 0.75),
        sun=1 if chance(rng, 0.5) else -1,
    )
