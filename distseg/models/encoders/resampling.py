"""Bicubic resampling as a matrix product, which exporters know for any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SUPPORT = 2  # of the cubic kernel, in cells to either side
_SHARP, _SMOOTH = -0.75, -0.5  # Keys' parameter, as torch has it without and with antialiasing


def resampling(cells: int, new: int, offset: float = 0.0, antialias: bool = False) -> Tensor:
    """A matrix (new, cells) float64, by which a row of `cells` numbers becomes one of `new`.

    That of F.interpolate(mode="bicubic", align_corners=False) with a scale of (new + offset) /
    cells.
    """
    # tensors all the way: a branch on a size yet unknown would bind an export to it
    step = cells / (torch.ones(new, dtype=torch.float64).sum() + offset)  # between new cells
    centres = ((torch.arange(new, dtype=torch.float64) + 0.5) * step - 0.5)[:, None]
    if antialias:
        # a kernel as wide as a new cell where these are the larger ones, cut at the border
        weights = _cubic(
            (torch.arange(cells) - centres) / step.maximum(torch.ones_like(step)), _SMOOTH
        )
        return weights / weights.sum(1, keepdim=True)
    # beyond the border lie copies of the cell there: their weights are its
    places = range(-_SUPPORT - 1, cells + _SUPPORT + 1)
    inside = torch.tensor([min(max(place, 0), cells - 1) for place in places])
    return _cubic(torch.tensor(places) - centres, _SHARP) @ F.one_hot(inside, cells).double()


def resampled(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(i, j, dim) by the matrices (h, i) and (w, j) -> (h * w, dim)."""
    # without a transposition, whose strides exporters could not tell apart
    tall = (rows @ cells.flatten(1)).unflatten(1, cells.shape[1:])  # (h, j, dim)
    return (columns @ tall).flatten(0, 1)


def _cubic(distances: Tensor, a: float) -> Tensor:
    """Keys' kernel (1981): 1 at 0, 0 at all other whole distances."""
    x = distances.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < _SUPPORT, far, 0.0))
