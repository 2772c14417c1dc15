"""The training view: random scale, crop, rotation, mirror, colour and blur of a sample, with one warp per array."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from shards.errors import InputError
from shards.sample import IGNORE_INDEX

FILL_RGB = (
    124,
    116,
    104,
)  # ImageNet's mean colour, so that the fill is near 0 once a network has normalised it
GRAY = (0.299, 0.587, 0.114)  # luma of RGB, ITU-R BT.601
MAX_TRIES = 10  # draws of a crop until one holds a labelled pixel
DRAWS_PER_TRY = 7  # scale, two positions, mirror, brightness, contrast, saturation
MORE_DRAWS = 3  # angle, whether to blur, how much; behind the others, so that these are what they always were
BLUR_MIN_PX = 0.1  # the smallest standard deviation of a blur, as in SimCLR (Chen et al. 2020, appendix A)
# Pixels. Where a source position falls exactly between two label pixels the warp would round as the library
# pleases; this much to the right and below, it is always the second. Real positions differ from such a tie by
# 1/(2 * side).
TIE_BREAK = 1e-4


@dataclass(frozen=True)
class _Geometry:
    """Where the crop lies on the scaled image: its corner in whole pixels of that, then turned about its middle."""

    size: tuple[int, int]  # height, width of the image
    scaled: tuple[int, int]  # the same after scaling
    offset: tuple[int, int]  # row, column of the crop's corner in the scaled image; negative: the image lies inside
    crop_px: int
    radians: float  # 0: not turned

    def covered(self) -> tuple[slice, slice]:
        """Rows and columns of the crop that are written: those that the image covers; all of a turned crop."""
        if self.radians:
            return slice(None), slice(None)
        rows, columns = (
            slice(max(0, -start), min(self.crop_px, size - start))
            for size, start in zip(self.scaled, self.offset, strict=True)
        )
        return rows, columns

    def matrix(self) -> np.ndarray:
        """(2, 3): the image's (x, y) for each (x, y) of the written part of the crop.

        Without a turn every sum is of whole and half pixels, so exact: the same to the last bit as plain scaling.
        """
        middle = self.crop_px / 2
        # pixel centres lie at half-integers on both sides
        first_y, first_x = (0.5 + (part.start or 0) - middle for part in self.covered())
        cos, sin = math.cos(self.radians), math.sin(self.radians)
        step_y, step_x = (side / scaled for side, scaled in zip(self.size, self.scaled, strict=True))
        x = self.offset[1] + middle + cos * first_x - sin * first_y
        y = self.offset[0] + middle + sin * first_x + cos * first_y
        rows = [step_x * cos, -step_x * sin, x * step_x - 0.5], [step_y * sin, step_y * cos, y * step_y - 0.5]
        return np.array(rows)


@dataclass(frozen=True)
class TrainView:
    """A random square view of a sample, the same for the image and its label.

    crop_px: side of the view, pixels. The scale is log-uniform in [scale_min, scale_max]; the scaled size is
    rounded to whole pixels and the crop starts at a whole pixel of it, so the view equals resizing (half-
    pixel centres) and then cropping. The crop lies inside the scaled image where that is larger, and the
    image inside the crop where it is smaller. mirror: left and right are swapped with probability 1/2.
    color_jitter: brightness, contrast and saturation are each multiplied by a factor uniform in 1 -+
    color_jitter; 0 is off. The crop is turned about its middle by an angle uniform in -+ rotate_degrees; 0 is off.
    With blur_probability the image is blurred by a Gaussian whose standard deviation is uniform in [0.1, blur_max_px]
    pixels of the view.

    The warp interpolates between the four nearest pixels and does not average over more, so below half size
    it leaves source pixels out.
    """

    crop_px: int
    scale_min: float = 1.0
    scale_max: float = 1.0
    mirror: bool = True
    color_jitter: float = 0.0
    rotate_degrees: float = 0.0
    blur_probability: float = 0.0
    blur_max_px: float = 2.0

    def __post_init__(self) -> None:
        if self.crop_px < 1:
            raise InputError(f"crop_px={self.crop_px}", "at least 1 pixel", "correct crop_px")
        if not 0 < self.scale_min <= self.scale_max < math.inf:
            got = f"scale_min={self.scale_min}, scale_max={self.scale_max}"
            raise InputError(got, "0 < scale_min <= scale_max", "correct the scales")
        bounds = {"color_jitter": (0, 1), "rotate_degrees": (0, 180), "blur_probability": (0, 1)}
        for name, (low, high) in (bounds | {"blur_max_px": (BLUR_MIN_PX, 100)}).items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}={getattr(self, name)}", f"a number from {low} to {high}", f"correct {name}")

    def __call__(
        self,
        image: np.ndarray,
        label: np.ndarray,
        rng: np.random.Generator,
        out_image: np.ndarray,
        out_label: np.ndarray,
    ) -> None:
        """Write one view into the two outputs, which may be slices of a batch.

        image (H, W, 3) uint8 RGB and label (H, W) uint8 are read; out_image (crop_px, crop_px, 3) uint8 and
        out_label (crop_px, crop_px) uint8 are overwritten. Outside the image the label is 255 and the image
        FILL_RGB. A view without a labelled pixel is drawn again, up to MAX_TRIES times. The generator is
        advanced by the same amount whatever the options and the sample.
        """
        draws = rng.random((MAX_TRIES, DRAWS_PER_TRY))
        draws = np.hstack([draws, rng.random((MAX_TRIES, MORE_DRAWS))])
        for draw in draws:
            geometry = self._geometry(label.shape, draw)
            part = geometry.covered()
            out_label.fill(IGNORE_INDEX)
            _warp(label, geometry, cv2.INTER_NEAREST, out_label[part])
            if out_label.min() != IGNORE_INDEX:
                break
        inside = out_image[part]
        if inside.shape != out_image.shape:
            # whole rows at a time: pixel by pixel the assignment takes longer than the warp
            out_image[:] = np.full((self.crop_px, 3), FILL_RGB, np.uint8)
        _warp(image, geometry, cv2.INTER_LINEAR, inside)
        self._recolor(inside, draw)
        if geometry.radians:
            cv2.copyTo(np.full_like(out_image, FILL_RGB), _outside(geometry), dst=out_image)
        if self.mirror and draw[3] < 0.5:
            # In place, after the warp: a mirrored warp would round some pixels the other way.
            cv2.flip(out_image, 1, dst=out_image)
            cv2.flip(out_label, 1, dst=out_label)

    def _geometry(self, size: tuple[int, ...], draw: np.ndarray) -> _Geometry:
        scale = self.scale_min * (self.scale_max / self.scale_min) ** draw[0]
        height, width = (max(1, round(side * scale)) for side in size)
        offset = (self._start(height, draw[1]), self._start(width, draw[2]))
        radians = math.radians(self.rotate_degrees) * (2 * draw[7] - 1)
        return _Geometry((size[0], size[1]), (height, width), offset, self.crop_px, radians)

    def _recolor(self, image: np.ndarray, draw: np.ndarray) -> None:
        """Colour and blur, in place, where the image is: neither mixes with the fill."""
        if self.color_jitter:
            factors = 1 + self.color_jitter * (2 * draw[4:7] - 1)
            cv2.transform(image, _color_matrix(*factors), dst=image)
        if draw[8] < self.blur_probability:
            sigma = BLUR_MIN_PX + (self.blur_max_px - BLUR_MIN_PX) * draw[9]
            cv2.GaussianBlur(image, (0, 0), sigma, dst=image)

    def _start(self, scaled_px: int, uniform: float) -> int:
        """A whole start from 0 to scaled_px - crop_px, or the other way round where that is negative."""
        room = scaled_px - self.crop_px
        return min(room, 0) + int(uniform * (abs(room) + 1))


def _warp(source: np.ndarray, geometry: _Geometry, interpolation: int, out: np.ndarray) -> None:
    """Write what the crop sees of source into out, which is the part of the crop that geometry covers.

    Beyond the image a turned crop sees 255 in a label, and in an image its border drawn out.
    """
    matrix, border = geometry.matrix(), cv2.BORDER_REPLICATE
    if interpolation == cv2.INTER_NEAREST:
        matrix[:, 2] += TIE_BREAK
        border = cv2.BORDER_CONSTANT if geometry.radians else border
    cv2.warpAffine(
        source,
        matrix,
        (out.shape[1], out.shape[0]),
        dst=out,
        flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=border,  # not turned: for the outermost half pixel; what lies further out is never asked for
        borderValue=IGNORE_INDEX,
    )


def _outside(geometry: _Geometry) -> np.ndarray:
    """(crop_px, crop_px) uint8: 255 where a turned crop sees beyond the image, else 0."""
    outside = np.empty((geometry.crop_px, geometry.crop_px), np.uint8)
    _warp(np.zeros(geometry.size, np.uint8), geometry, cv2.INTER_NEAREST, outside)
    return outside


def _color_matrix(brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """The (3, 4) affine map of RGB 0-255 that applies the three factors in turn; 1, 1, 1 is the identity.

    Brightness scales all, contrast the distance from FILL_RGB's gray, saturation the distance from a pixel's
    own gray. One map costs half of a look-up table, and saturation comes free.
    """
    gray = np.tile(GRAY, (3, 1))
    pivot = float(np.dot(GRAY, FILL_RGB))
    linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * gray)
    return np.column_stack([linear, np.full(3, (1 - contrast) * pivot)])
