"""From an image of any size to class probabilities at full resolution, for evaluation and
prediction: test-time augmentation (TTA) over scales and the horizontal flip, and a sliding window
over images that are too large to be taken at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.config.schema import EvaluateConfig
from distseg.distributed.device import autocast_dtype
from shards.errors import InputError

_MIN_PX = 32  # the smallest side that every segmentor takes
# windows start on multiples of the largest output stride, so that their logits share one grid
_GRID_PX = 32


@dataclass(frozen=True)
class TestTimeAugmentation:
    """How an image is looked at: softmax probabilities averaged over scales and, if asked, the
    horizontal flip.

    window_px: an image with a longer side is cut into windows that overlap by overlap_px (see
    `sliding_window`); 0: never.
    """

    __test__ = False  # no test, although pytest takes its name for one

    scales: tuple[float, ...]
    horizontal_flip: bool
    precision: str  # resolved: bf16, fp32 or fp64
    device: torch.device
    window_px: int = 0
    overlap_px: int = 128

    @classmethod
    def of(
        cls, options: EvaluateConfig, precision: str, device: torch.device
    ) -> TestTimeAugmentation:
        """That of a configuration."""
        return cls(
            tuple(options.scales),
            options.horizontal_flip,
            precision,
            device,
            options.window_px,
            options.overlap_px,
        )

    def __call__(self, network: nn.Module, image: np.ndarray) -> Tensor:
        """Class probabilities (C, H, W) float32 on the device, of an image (H, W, 3) uint8 RGB."""

        def at_once(part: np.ndarray) -> Tensor:
            return probabilities(
                network,
                part,
                self.scales,
                self.horizontal_flip,
                device=self.device,
                autocast_dtype=autocast_dtype(self.precision),
            )

        # an image that fits is taken whole: windows would only hide context from it
        if not 0 < self.window_px < max(image.shape[:2]):
            return at_once(image)
        # on the CPU until now: the map of a large image may not fit beside the network
        return sliding_window(at_once, image, self.window_px, self.overlap_px).to(self.device)

    def suffix(self) -> str:
        """For file names: nothing for the plain image, for example "-scales-0.75-1-flip" else."""
        parts = []
        # in file names, so that evaluations of one checkpoint lie beside one another
        if self.scales != (1.0,):
            parts += ["scales", *(f"{scale:g}" for scale in self.scales)]
        if self.horizontal_flip:
            parts.append("flip")
        if self.window_px:
            parts += ["window", str(self.window_px), str(self.overlap_px)]
        return "".join(f"-{part}" for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """What a score depends on."""
        found: dict[str, Any] = {"scales": list(self.scales)}
        found["horizontal_flip"] = self.horizontal_flip
        if self.window_px:
            found |= {"window_px": self.window_px, "overlap_px": self.overlap_px}
        return found | {"precision": self.precision}


@torch.no_grad()
def probabilities(
    model: nn.Module,
    image: np.ndarray,
    scales: tuple[float, ...] = (1.0,),
    horizontal_flip: bool = False,
    *,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """Class probabilities of every pixel, averaged over scaled and flipped copies of the image.

    model: a segmentor in evaluation mode on `device`. image: (H, W, 3) uint8 RGB, any size. scales:
    factors on both sides, one copy each, and with `horizontal_flip` its mirror image too.
    autocast_dtype: None for the model's own type. Returns (C, H, W) float32 on `device`, sums to 1
    over C. A copy gives the softmax of its logits upsampled bilinearly (align_corners=False) to
    (H, W): the usual average (Chen et al. 2017, section 4.3).
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        got = f"an image of shape {image.shape} and type {image.dtype}"
        raise InputError(got, "(H, W, 3) uint8", "convert it to 8-bit RGB")
    if not scales or min(scales) <= 0:
        raise InputError(
            f"scales={scales}", "at least one factor above 0", "scales=(1.0,) is the plain image"
        )
    device = torch.device(device)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    # HWC bytes seen as NCHW are channels_last already, and are copied to the device as bytes.
    # (1, 3, H, W)
    pixels = torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None].to(dtype) / 255
    height, width = image.shape[:2]
    total = torch.zeros((), device=device)
    with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        for scale in scales:
            scaled = _resized(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
            total = total + _softmax_at(model, scaled, height, width)
            if horizontal_flip:
                # flipped back before it is added: probabilities belong to pixels, not to places in
                # the copy
                total = total + _softmax_at(model, scaled.flip(3), height, width).flip(3)
    return (total / (len(scales) * (1 + horizontal_flip)))[0]


def sliding_window(
    predict: Callable[[np.ndarray], Tensor],
    image: np.ndarray,
    window_px: int = 1024,
    overlap_px: int = 256,
) -> Tensor:
    """Class probabilities of a large image, from overlapping windows blended into one another.

    predict: (h, w, 3) uint8 -> (C, h, w) float32. window_px, overlap_px: multiples of 32, the
    overlap at most half of the window. Within a quarter of the overlap from a window's inner edge a
    prediction lacks context and counts nothing; over the next half it fades in. So a model that
    looks
    no further than overlap_px / 4 gives what it gives for the whole image. Returns (C, H, W)
    float32 on the CPU.
    """
    total = torch.zeros(())
    for rows, columns, block in window_blocks(predict, image, window_px, overlap_px):
        if total.ndim == 0:
            total = torch.zeros(block.shape[0], *image.shape[:2])
        total[:, rows, columns] = block
    return total


def window_blocks(
    predict: Callable[[np.ndarray], Tensor],
    image: np.ndarray,
    window_px: int,
    overlap_px: int,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The result of `sliding_window` in pieces, as they are finished: (rows, columns, (C, h, w)).

    Holds one window and the overlap with the windows above it, which is a strip of the image's
    width: an image needs no memory for all of its probabilities. Each pixel is in one piece.
    """
    _check_windows(window_px, overlap_px)
    height, width = image.shape[:2]
    above: Tensor | None = None  # (C, overlap_px, W), summed over the windows so far
    for top, bottom, row_weight in _spans(height, window_px, overlap_px):
        # the rows from here on go into the next windows, too
        next_top = bottom if bottom == height else bottom - overlap_px
        below: list[Tensor] = []
        beside: Tensor | None = None  # (C, h, overlap_px)
        for left, right, column_weight in _spans(width, window_px, overlap_px):
            next_left = right if right == width else right - overlap_px
            # (C, h, w), off the device at once: only one window's map is there at a time. Weights
            # of all windows at a pixel sum to 1, so nothing is to be divided by at the end
            part = predict(image[top:bottom, left:right]).cpu()
            part = part * row_weight[:, None] * column_weight
            if above is not None:
                # where the window beside it reaches, it has added them already
                new = 0 if beside is None else overlap_px
                part[:, :overlap_px, new:] += above[:, :, left + new : right]
            if beside is not None:
                part[:, :, :overlap_px] += beside
            done_rows, done_columns = next_top - top, next_left - left
            # a copy: a view would keep all of the window
            beside = None if right == width else part[:, :, done_columns:].clone()
            below.append(part[:, done_rows:, :done_columns].clone())
            yield slice(top, next_top), slice(left, next_left), part[:, :done_rows, :done_columns]
        above = torch.cat(below, dim=2)


def _check_windows(window_px: int, overlap_px: int) -> None:
    if window_px % _GRID_PX or overlap_px % _GRID_PX or not 0 < 2 * overlap_px <= window_px:
        got = f"windows of {window_px} pixels with an overlap of {overlap_px}"
        raise InputError(
            got, "multiples of 32, the overlap at most half the window", "try 1024 and 256"
        )


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    # the plain image keeps its bits: resampling to the same size may round
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.interpolate(
        pixels, (height, width), mode="bilinear", align_corners=False, antialias=True
    )


def _softmax_at(model: nn.Module, image: Tensor, height: int, width: int) -> Tensor:
    """(1, 3, h, w) -> (1, C, height, width) float32; an image under 32 pixels is padded by its
    edge.
    """
    rows, columns = image.shape[2:]
    missing = (max(0, _MIN_PX - rows), max(0, _MIN_PX - columns))
    if any(missing):
        # at the right and below, where cropping afterwards takes it off again
        image = F.pad(image, (0, missing[1], 0, missing[0]), mode="replicate")
    # a softmax in half precision would not sum to 1, and its ties would decide classes
    logits = model(image).float()
    if any(missing):
        logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
        logits = logits[:, :, :rows, :columns]
    if logits.shape[2:] != (height, width):
        logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    return logits.softmax(dim=1)


def _spans(length: int, window_px: int, overlap_px: int) -> list[tuple[int, int, Tensor]]:
    """Cut 0..length into windows.

    (start, end, weights of its pixels); the weights of a pixel sum to 1.
    """
    fade_px, blind_px = overlap_px // 2, overlap_px // 4
    # (overlap_px,): blind, a ramp through its pixels' centres, full
    fade_in = torch.cat(
        [torch.zeros(blind_px), (torch.arange(fade_px) + 0.5) / fade_px, torch.ones(blind_px)]
    )
    spans = []
    start = 0
    while True:
        end = min(start + window_px, length)
        # the image's own border needs no fading: nothing beyond it is known to any window
        weights = torch.ones(end - start)
        if start > 0:
            weights[:overlap_px] = fade_in
        if end < length:
            weights[-overlap_px:] = 1 - fade_in
        spans.append((start, end, weights))
        if end == length:
            return spans
        start += window_px - overlap_px
