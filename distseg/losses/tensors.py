"""Precision, resolution and order: what losses and views do to logits and labels first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.sample import IGNORE_INDEX


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    # a sum over pixels in bf16 (8 significant bits) stops growing at a few hundred ones
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def sent(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Values of the host on a device, as another type where one is named; the host does not wait
    for the device.
    """
    # here, or torch would convert them on the way, into memory that is not pinned
    values = values.to(dtype or values.dtype)
    # from memory that the system may move, a copy can wait until all before it is done
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, half-pixel centres: (N, C, h, w) -> (N, C, *size)."""
    if logits.shape[-2:] == tuple(size):
        return logits
    # half-pixel centres, as labels have them: with aligned corners edges would move apart
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def of_neighbours(values: Tensor) -> Tensor:
    """What belongs to each image's neighbour, of an even number of them: 1, 0, 3, 2, ..."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def label_at(label: Tensor, size: tuple[int, int] | torch.Size) -> tuple[Tensor, Tensor]:
    """The label at another resolution, by the nearest pixel.

    label: (N, H, W) uint8, 255 = void. Returns the class indices (N, h, w) int64, 0 at void, and
    the valid mask (N, h, w) bool.
    """
    # plain "nearest" leans to the top left; class indices up to 255 are exact as floats
    small = F.interpolate(label[:, None].float(), size=tuple(size), mode="nearest-exact")
    index = small[:, 0].long()  # (N, h, w)
    valid = index != IGNORE_INDEX
    return index.where(valid, 0), valid
