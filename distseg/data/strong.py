"""Strong views of training crops, made where the network computes: colours, blur, and parts of
another image.

A strong view has the geometry of the crop that it is made of, so a pixel of the one is that pixel
of the other. All that is random follows from seed and position, and an image's partner, of which a
part is laid over it, from its place in the global batch: any number of ranks makes the same views.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.config.world_size import mixes_pairs
from distseg.data.plan import augmentation_rng
from distseg.data.transforms import BLUR_MIN_PX, FILL_RGB, GRAY, color_matrix
from distseg.losses.tensors import sent

# what each draw of an image decides; behind them one for every class
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYED, BLURRED, SIGMA = range(8)
MIXED, AREA, ASPECT, TOP, LEFT = range(8, 13)
NUM_DRAWS = 16  # some to spare, so that a new one moves none of those behind
# height over width of a rectangle, log-uniform between this and its inverse (Yang et al. 2023)
MIN_ASPECT = 0.3
FILL = torch.tensor(FILL_RGB, dtype=torch.float64)[:, None, None] / 255  # (3, 1, 1)
# RGB to luma and two axes of colour (NTSC's YIQ), about which hue is turned
_YIQ = np.array([GRAY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


def strong_draws(seed: int, positions: Iterable[int], num_classes: int) -> Tensor:
    """Numbers in [0, 1) for the strong views at these positions: (n, NUM_DRAWS + num_classes),
    float64, on the CPU.
    """
    size = NUM_DRAWS + num_classes
    rows = [augmentation_rng(seed, position).random(size) for position in positions]
    return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class StrongView:
    """How strong views are made; each field as the key of its name in `strong`."""

    color_jitter: float = 0.5
    hue_jitter: float = 0.25
    jitter_probability: float = 0.8
    gray_probability: float = 0.2
    blur_probability: float = 0.5
    blur_max_px: float = 2.0
    mix: str = "cutmix"
    mix_probability: float = 0.5
    mix_area_min: float = 0.02
    mix_area_max: float = 0.4

    @property
    def is_paired(self) -> bool:
        """Whether images are mixed with their neighbours, so that a share must hold pairs."""
        return mixes_pairs(self.mix, self.mix_probability)

    def changed(self, pixels: Tensor, inside: Tensor, draws: Tensor) -> Tensor:
        """Colour and blur: pixels (n, 3, H, W) float in [0, 1] -> the same, another tensor.

        inside: (n, H, W) bool, where the image is; the fill around it stays as it was. draws: of
        `strong_draws`.
        """
        rows = draws.numpy()
        matrices = torch.from_numpy(np.stack([self._color(row) for row in rows]))
        result = _recolored(pixels, sent(matrices, pixels.device, pixels.dtype))
        if self.blur_probability:
            weights = torch.from_numpy(np.stack([self._blur(row) for row in rows]))
            result = _blurred(result, sent(weights, pixels.device, pixels.dtype))
        return result.where(inside[:, None], pixels)

    def mask(self, of_partners: Tensor, draws: Tensor) -> Tensor:
        """Where something is laid over each image: (n, H, W) bool.

        of_partners: (n, H, W) uint8, what is known of the classes of each image's partner, 255
        outside of it.
        """
        chosen = draws[:, MIXED] < self.mix_probability
        if self.mix == "classmix":
            chosen, draws = (
                sent(part, of_partners.device) for part in (chosen, draws[:, NUM_DRAWS:])
            )
            half = _half_of_the_classes(of_partners, draws)
            return half & chosen[:, None, None]
        device, (height, width) = of_partners.device, of_partners.shape[-2:]
        drawn = [self._rectangle(row, height, width) for row in draws.numpy()]
        # of one that is not mixed, no row and no column
        spans = torch.tensor(drawn) * chosen[:, None]
        top, bottom, left, right = sent(spans, device).T[..., None]
        rows = torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        of_rows = (rows >= top) & (rows < bottom)  # (n, H)
        of_columns = (columns >= left) & (columns < right)  # (n, W)
        return of_rows[:, :, None] & of_columns[:, None, :]

    def mixed(
        self, values: Tensor, of_partners: Tensor, mask: Tensor, empty: float | Tensor = 0.0
    ) -> Tensor:
        """Values of images, (n, H, W) or (n, C, H, W), with those of their partners under the mask;
        of cutout with `empty` there.
        """
        if self.mix == "none" or not self.mix_probability:  # nothing is laid over anything
            return values
        if values.ndim == 4:
            mask = mask[:, None]
        if self.is_paired:
            return of_partners.where(mask, values)
        return sent(torch.as_tensor(empty), values.device, values.dtype).where(mask, values)

    def _color(self, draw: np.ndarray) -> np.ndarray:
        """(3, 4): the affine map of one image's RGB in [0, 1]."""
        factors = 1 + self.color_jitter * (2 * draw[[BRIGHTNESS, CONTRAST, SATURATION]] - 1)
        turn = 2 * math.pi * self.hue_jitter * (2 * draw[HUE] - 1)
        if draw[JITTER] >= self.jitter_probability:
            factors, turn = np.ones(3), 0.0
        linear, offset = np.split(color_matrix(*factors), [3], axis=1)
        linear = _hue(turn) @ linear
        if draw[GRAYED] < self.gray_probability:
            linear = np.tile(GRAY @ linear, (3, 1))
        # an offset is one gray, which neither hue nor gray changes
        return np.hstack([linear, offset / 255])

    def _blur(self, draw: np.ndarray) -> np.ndarray:
        """The weights of one image's blur along each axis; without blur those of one pixel."""
        reach = math.ceil(3 * self.blur_max_px)
        offsets = np.arange(-reach, reach + 1)
        if draw[BLURRED] >= self.blur_probability:
            return (offsets == 0).astype(np.float64)
        sigma = BLUR_MIN_PX + (self.blur_max_px - BLUR_MIN_PX) * draw[SIGMA]
        weights = np.exp(-0.5 * (offsets / sigma) ** 2)
        return weights / weights.sum()

    def _rectangle(self, draw: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of one image's rectangle, pixels."""
        share = self.mix_area_min + (self.mix_area_max - self.mix_area_min) * draw[AREA]
        aspect = MIN_ASPECT ** (1 - 2 * draw[ASPECT])
        # where one side would not fit, the other keeps the area
        rows = min(height, max(1, round(math.sqrt(share * height * width * aspect))))
        columns = min(width, max(1, round(share * height * width / rows)))
        rows = min(height, max(1, round(share * height * width / columns)))
        top = int(draw[TOP] * (height - rows + 1))
        left = int(draw[LEFT] * (width - columns + 1))
        return top, top + rows, left, left + columns


def _hue(radians: float) -> np.ndarray:
    """(3, 3): RGB with its colour turned and its luma kept."""
    cos, sin = math.cos(radians), math.sin(radians)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return np.linalg.inv(_YIQ) @ turn @ _YIQ


def _recolored(pixels: Tensor, matrices: Tensor) -> Tensor:
    """Pixels (n, 3, H, W) by the affine map (n, 3, 4) of each image, cut off at 0 and 1."""
    red, green, blue = pixels.split(1, dim=1)
    # (n, 3, 1, 1) each. Products and sums one by one, not a matrix product: that may round
    # otherwise for another number of images, and ranks hold other numbers of them
    of_red, of_green, of_blue, offset = matrices[..., None, None].unbind(2)
    return (of_red * red + of_green * green + of_blue * blue + offset).clamp(0, 1)


def _blurred(pixels: Tensor, weights: Tensor) -> Tensor:
    """Pixels (n, 3, H, W) with the weights (n, taps) of each image along rows and columns."""
    reach = weights.shape[1] // 2
    for dim, padding in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        padded = F.pad(pixels, padding, mode="replicate")
        total = torch.zeros_like(pixels)
        for tap, of_tap in enumerate(weights[..., None, None, None].unbind(1)):
            total = total + of_tap * padded.narrow(dim, tap, total.shape[dim])
        pixels = total
    return pixels


def _half_of_the_classes(label: Tensor, draws: Tensor) -> Tensor:
    """Where a label shows the half, rounded up, of its classes that has the lowest draws.

    label: (n, H, W) uint8, 255 = void, which never is. draws: (n, C) in [0, 1).
    """
    flat = label.flatten(1).long()
    shown = torch.zeros((len(flat), 256), dtype=torch.bool, device=label.device)
    shown.scatter_(1, flat, True)
    shown = shown[:, : draws.shape[1]]  # (n, C), without void
    rank = draws.masked_fill(~shown, math.inf).argsort(1).argsort(1)
    half = (shown.sum(1, keepdim=True) + 1) // 2
    # column 255 stays False: void is of no class
    chosen = F.pad(rank < half, (0, 256 - draws.shape[1]))
    return chosen.gather(1, flat).view_as(label)
