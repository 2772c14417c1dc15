"""The one check that every network makes of its input."""

from __future__ import annotations

from torch import Tensor

from shards.errors import InputError


def require_size(x: Tensor, min_size_px: int, what: str = "image") -> None:
    """Raise InputError when `x` (N, C, H, W) is smaller than `min_size_px` on a side."""
    height, width = x.shape[-2:]
    if min(height, width) < min_size_px:
        got = f"{what} of {height}x{width} px"
        raise InputError(got, f"at least {min_size_px} px on each side", "leave it out, enlarge it or pad it")
