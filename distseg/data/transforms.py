"""The training view: random scale, crop, rotation, horizontal flip, colour and blur of a sample,
each array resampled once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from distseg.data.own_view import OwnView
from shards.errors import InputError
from shards.sample import IGNORE_INDEX

FILL_RGB = (
    124,
    116,
    104,
)  # ImageNet's mean colour, so that the fill is near 0 once a network has normalised it
GRAY = (0.299, 0.587, 0.114)  # luma of RGB, ITU-R BT.601
MAX_TRIES = 10  # draws of a crop until one holds a labelled pixel
DRAWS_PER_TRY = 7  # scale, two positions, flip, brightness, contrast, saturation
# angle, whether to blur, how much; behind the others, so that these are what they always were
MORE_DRAWS = 3
# the smallest standard deviation of a blur, as in SimCLR (Chen et al. 2020, appendix A)
BLUR_MIN_PX = 0.1


@dataclass(frozen=True)
class _Span:
    """One axis of a view, in pixels.

    `seen` of the image, from `first`, fill `filled` of the view, from `place`.
    """

    first: int
    seen: int
    place: int
    filled: int

    @property
    def source(self) -> slice:
        return slice(self.first, self.first + self.seen)

    @property
    def target(self) -> slice:
        return slice(self.place, self.place + self.filled)


@dataclass(frozen=True)
class _Geometry:
    """What a crop sees of an image.

    The rows, the columns, and by how much it is then turned about its middle.
    """

    rows: _Span
    columns: _Span
    crop_px: int
    radians: float  # 0: not turned

    @property
    def target(self) -> tuple[slice, slice]:
        """The part of the crop that the image covers; where it is turned, that may be all."""
        return (
            (slice(None), slice(None)) if self.radians else (self.rows.target, self.columns.target)
        )

    def matrix(self) -> np.ndarray:
        """(2, 3): the image's (x, y) for each (x, y) of a turned crop.

        Pixel centres lie at half-integers in both.
        """
        cos, sin = math.cos(self.radians), math.sin(self.radians)
        middle = self.crop_px / 2
        corner = 0.5 - middle
        rows = []
        for span, (to_x, to_y) in ((self.columns, (cos, -sin)), (self.rows, (sin, cos))):
            # pixels of the image for one of the crop, along this axis
            step = span.seen / span.filled
            start = middle + (to_x + to_y) * corner - span.place
            rows.append([step * to_x, step * to_y, span.first + step * start - 0.5])
        return np.array(rows)


@dataclass(frozen=True)
class TrainView:
    """A random square view of a sample, the same for the image and its label.

    crop_px: side of the view, pixels. The scale is log-uniform in [scale_min, scale_max], but for
    rounding: a whole number of the image's pixels is cut out and resized (half-pixel centres) to a
    whole number of the view's. The crop lies inside the scaled image where that is larger, and the
    image inside the crop where it is smaller. horizontal_flip: left and right are swapped with
    probability 1/2. color_jitter: brightness, contrast and saturation are each multiplied by a
    factor uniform in 1 -+ color_jitter; 0 is off. The crop is turned about its middle by an angle
    uniform in -+ rotate_degrees; 0 is off. With blur_probability the image is blurred by a Gaussian
    whose standard deviation is uniform in [0.1, blur_max_px] pixels of the view. own: code of the
    user's that gets the crop last.

    Resizing interpolates between the four nearest pixels and does not average over more, so below
    half size it leaves pixels of the image out. (It takes a third of the time of an affine warp,
    which only turned views need.)
    """

    crop_px: int
    scale_min: float = 1.0
    scale_max: float = 1.0
    horizontal_flip: bool = True
    color_jitter: float = 0.0
    rotate_degrees: float = 0.0
    blur_probability: float = 0.0
    blur_max_px: float = 2.0
    own: OwnView | None = None

    def __post_init__(self) -> None:
        if self.crop_px < 1:
            raise InputError(f"crop_px={self.crop_px}", "at least 1 pixel", "correct crop_px")
        if not 0 < self.scale_min <= self.scale_max < math.inf:
            got = f"scale_min={self.scale_min}, scale_max={self.scale_max}"
            raise InputError(got, "0 < scale_min <= scale_max", "correct the scales")
        bounds = {"color_jitter": (0, 1), "rotate_degrees": (0, 180), "blur_probability": (0, 1)}
        for name, (low, high) in (bounds | {"blur_max_px": (BLUR_MIN_PX, 100)}).items():
            if not low <= getattr(self, name) <= high:
                raise InputError(
                    f"{name}={getattr(self, name)}",
                    f"a number from {low} to {high}",
                    f"correct {name}",
                )

    def __call__(
        self,
        image: np.ndarray,
        label: np.ndarray,
        rng: np.random.Generator,
        out_image: np.ndarray,
        out_label: np.ndarray,
    ) -> None:
        """Write one view into the two outputs, which may be slices of a batch.

        image (H, W, 3) uint8 RGB and label (H, W) uint8 are read; out_image (crop_px, crop_px, 3)
        uint8 and out_label (crop_px, crop_px) uint8 are overwritten. Outside the image the label is
        255 and the image FILL_RGB. A view without a labelled pixel is drawn again, up to MAX_TRIES
        times. The generator is advanced by the same amount whatever the options and the sample,
        before code of the user's own gets it.
        """
        geometry, draw = self._draw_crop(label, rng, out_label)
        inside = out_image[geometry.target]
        if inside.shape != out_image.shape:
            # whole rows at a time: pixel by pixel the assignment takes longer than all the rest
            out_image[:] = np.full((self.crop_px, 3), FILL_RGB, np.uint8)
        _write(image, geometry, True, inside)
        # before the fill is laid over a turned crop: it has one colour in all pictures
        self._recolor(inside, draw)
        if geometry.radians:
            cv2.copyTo(
                np.full_like(out_image, FILL_RGB), _outside(label.shape, geometry), dst=out_image
            )
        if self.horizontal_flip and draw[3] < 0.5:
            # in place, and last: a flipped source would round some pixels the other way
            cv2.flip(out_image, 1, dst=out_image)
            cv2.flip(out_label, 1, dst=out_label)
        if self.own is not None:
            self.own(out_image, out_label, rng)

    def _draw_crop(
        self, label: np.ndarray, rng: np.random.Generator, out_label: np.ndarray
    ) -> tuple[_Geometry, np.ndarray]:
        """Draw crops until one shows a labelled pixel, and write its label; also its draws."""
        # all at once, needed or not: how far the generator is then must not depend on the sample
        draws = rng.random((MAX_TRIES, DRAWS_PER_TRY))
        draws = np.hstack([draws, rng.random((MAX_TRIES, MORE_DRAWS))])
        for draw in draws:
            geometry = self._geometry(label.shape, draw)
            # the label alone decides, so the image is warped once however many tries it takes
            out_label.fill(IGNORE_INDEX)
            _write(label, geometry, False, out_label[geometry.target])
            if out_label.min() != IGNORE_INDEX:
                break
        return geometry, draw

    def _geometry(self, size: tuple[int, ...], draw: np.ndarray) -> _Geometry:
        # log-uniform: half size is as likely as twice the size
        scale = self.scale_min * (self.scale_max / self.scale_min) ** draw[0]
        rows, columns = (
            self._span(side, scale, place) for side, place in zip(size, draw[1:3], strict=True)
        )
        return _Geometry(
            rows, columns, self.crop_px, math.radians(self.rotate_degrees) * (2 * draw[7] - 1)
        )

    def _span(self, side_px: int, scale: float, uniform: float) -> _Span:
        if side_px * scale >= self.crop_px:
            # whole pixels, so that a plain resize serves; the scale is off by less than half of one
            seen = min(side_px, max(1, round(self.crop_px / scale)))
            # + 1: both ends are as likely as every place between
            return _Span(int(uniform * (side_px - seen + 1)), seen, 0, self.crop_px)
        filled = max(1, round(side_px * scale))
        room = self.crop_px - filled
        return _Span(0, side_px, room - int(uniform * (room + 1)), filled)

    def _recolor(self, image: np.ndarray, draw: np.ndarray) -> None:
        """Colour and blur, in place, where the image is: neither mixes with the fill."""
        if self.color_jitter:
            factors = 1 + self.color_jitter * (2 * draw[4:7] - 1)
            cv2.transform(image, color_matrix(*factors), dst=image)
        if draw[8] < self.blur_probability:
            sigma = BLUR_MIN_PX + (self.blur_max_px - BLUR_MIN_PX) * draw[9]
            # (0, 0): OpenCV chooses the kernel's side by sigma
            cv2.GaussianBlur(image, (0, 0), sigma, dst=image)


def _write(source: np.ndarray, geometry: _Geometry, smooth: bool, out: np.ndarray) -> None:
    """Write what the crop sees of an image (smooth) or a label into out, the part of the crop that
    is its target.

    Beyond the image a turned crop sees 255 in a label, and in an image its border drawn out.
    """
    if not geometry.radians:
        # EXACT: pixel centres at half-integers, as the image's; the older one shifts labels
        interpolation = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST_EXACT
        part = source[geometry.rows.source, geometry.columns.source]
        cv2.resize(part, (out.shape[1], out.shape[0]), dst=out, interpolation=interpolation)
        return
    interpolation, border = cv2.INTER_NEAREST, cv2.BORDER_CONSTANT
    if smooth:
        # drawn out: at its edge the image must not mix with a constant; beyond it, fill comes later
        interpolation, border = cv2.INTER_LINEAR, cv2.BORDER_REPLICATE
    size = (geometry.crop_px, geometry.crop_px)
    # the matrix leads from the crop to the image already, which is what OpenCV needs
    flags = interpolation | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(source, geometry.matrix(), size, out, flags, border, IGNORE_INDEX)


def _outside(size: tuple[int, ...], geometry: _Geometry) -> np.ndarray:
    """(crop_px, crop_px) uint8: 255 where a turned crop sees beyond such an image, else 0."""
    outside = np.empty((geometry.crop_px, geometry.crop_px), np.uint8)
    _write(np.zeros(size, np.uint8), geometry, False, outside)
    return outside


def color_matrix(brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """The (3, 4) affine map of RGB 0-255 that applies the three factors in turn; 1, 1, 1 is the
    identity.

    Brightness scales all, contrast the distance from FILL_RGB's gray, saturation the distance from
    a pixel's own gray. One map costs half of a look-up table, and saturation comes free.
    """
    gray = np.tile(GRAY, (3, 1))
    pivot = float(np.dot(GRAY, FILL_RGB))
    linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * gray)
    return np.column_stack([linear, np.full(3, (1 - contrast) * pivot)])
