"""The training view: a random scale, crop, mirror and colour of one sample, with one warp per array."""

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
# Pixels. Where a source position falls exactly between two label pixels the warp would round as the library
# pleases; this much to the right and below, it is always the second. Real positions differ from such a tie by
# 1/(2 * side).
TIE_BREAK = 1e-4


@dataclass(frozen=True)
class _Geometry:
    """Where the crop lies on the scaled image, in whole pixels of the scaled image."""

    scaled: tuple[int, int]  # height, width of the image after scaling
    offset: tuple[int, int]  # row, column of the crop's corner in the scaled image; negative: the image lies inside

    def inside(self, crop_px: int) -> tuple[slice, slice]:
        """Rows and columns of the crop that the image covers."""
        rows, columns = (
            slice(max(0, -start), min(crop_px, size - start))
            for size, start in zip(self.scaled, self.offset, strict=True)
        )
        return rows, columns


@dataclass(frozen=True)
class TrainView:
    """A random square view of a sample, the same for the image and its label.

    crop_px: side of the view, pixels. The scale is log-uniform in [scale_min, scale_max]; the scaled size is
    rounded to whole pixels and the crop starts at a whole pixel of it, so the view equals resizing (half-
    pixel centres) and then cropping. The crop lies inside the scaled image where that is larger, and the
    image inside the crop where it is smaller. mirror: left and right are swapped with probability 1/2.
    color_jitter: brightness, contrast and saturation are each multiplied by a factor uniform in 1 -+
    color_jitter; 0 is off.

    The warp interpolates between the four nearest pixels and does not average over more, so below half size
    it leaves source pixels out.
    """

    crop_px: int
    scale_min: float = 1.0
    scale_max: float = 1.0
    mirror: bool = True
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_px < 1:
            raise InputError(f"crop_px={self.crop_px}", "at least 1 pixel", "correct crop_px")
        if not 0 < self.scale_min <= self.scale_max < math.inf:
            got = f"scale_min={self.scale_min}, scale_max={self.scale_max}"
            raise InputError(got, "0 < scale_min <= scale_max", "correct the scales")
        if not 0 <= self.color_jitter <= 1:
            raise InputError(f"color_jitter={self.color_jitter}", "a strength from 0 to 1", "correct color_jitter")

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
        for draw in draws:
            geometry = self._geometry(label.shape, draw)
            rows, columns = geometry.inside(self.crop_px)
            out_label.fill(IGNORE_INDEX)
            _warp(label, geometry, cv2.INTER_NEAREST, out_label[rows, columns])
            if out_label.min() != IGNORE_INDEX:
                break
        inside = out_image[rows, columns]
        if inside.shape != out_image.shape:
            # whole rows at a time: pixel by pixel the assignment takes longer than the warp
            out_image[:] = np.full((self.crop_px, 3), FILL_RGB, np.uint8)
        _warp(image, geometry, cv2.INTER_LINEAR, inside)
        if self.color_jitter:
            factors = 1 + self.color_jitter * (2 * draw[4:] - 1)
            cv2.transform(inside, _color_matrix(*factors), dst=inside)
        if self.mirror and draw[3] < 0.5:
            # In place, after the warp: a mirrored warp would round some pixels the other way.
            cv2.flip(out_image, 1, dst=out_image)
            cv2.flip(out_label, 1, dst=out_label)

    def _geometry(self, size: tuple[int, ...], draw: np.ndarray) -> _Geometry:
        scale = self.scale_min * (self.scale_max / self.scale_min) ** draw[0]
        height, width = (max(1, round(side * scale)) for side in size)
        return _Geometry((height, width), (self._start(height, draw[1]), self._start(width, draw[2])))

    def _start(self, scaled_px: int, uniform: float) -> int:
        """A whole start from 0 to scaled_px - crop_px, or the other way round where that is negative."""
        room = scaled_px - self.crop_px
        return min(room, 0) + int(uniform * (abs(room) + 1))


def _warp(source: np.ndarray, geometry: _Geometry, interpolation: int, out: np.ndarray) -> None:
    """Scale source and write the part that the crop sees into out, which is that part of the crop."""
    tie_break = TIE_BREAK if interpolation == cv2.INTER_NEAREST else 0.0
    matrix = np.zeros((2, 3))
    for row, axis in ((0, 1), (1, 0)):  # the matrix maps (x, y), arrays are indexed (y, x)
        step = source.shape[axis] / geometry.scaled[axis]
        first = max(geometry.offset[axis], 0)
        # pixel centres lie at half-integers on both sides
        matrix[row, row], matrix[row, 2] = step, (first + 0.5) * step - 0.5 + tie_break
    cv2.warpAffine(
        source,
        matrix,
        (out.shape[1], out.shape[0]),
        dst=out,
        flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,  # the outermost half pixel; what lies further out is never asked for
    )


def _color_matrix(brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """The (3, 4) affine map of RGB 0-255 that applies the three factors in turn; 1, 1, 1 is the identity.

    Brightness scales all, contrast the distance from FILL_RGB's gray, saturation the distance from a pixel's
    own gray. One map costs half of a look-up table, and saturation comes free.
    """
    gray = np.tile(GRAY, (3, 1))
    pivot = float(np.dot(GRAY, FILL_RGB))
    linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * gray)
    return np.column_stack([linear, np.full(3, (1 - contrast) * pivot)])
