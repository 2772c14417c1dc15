"""What every network checks: its options and its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shards.errors import InputError


def require_size(x: Tensor, min_size_px: int, what: str = "image") -> None:
    """Raise InputError when `x` (N, C, H, W) is smaller than `min_size_px` on a side."""
    height, width = x.shape[-2:]
    # before the layers, whose own error would name a kernel and a tensor of some inner size
    if height < min_size_px or width < min_size_px:
        got = f"{what} of {height}x{width} px"
        raise InputError(
            got, f"at least {min_size_px} px on each side", "leave it out, enlarge it or pad it"
        )


def require_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise InputError when an option is not one of `choices`."""
    if value not in choices:
        raise InputError(f"{key}={value}", f"one of: {', '.join(choices)}", f"correct {key}")


def require_number(key: str, value: Any, low: float, high: float) -> None:
    """Raise InputError when an option is not a number from `low` to `high`."""
    # a bool is an int to Python, and `dropout=true` would pass for 1
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{key}={value}", f"a number from {low} to {high}", f"correct {key}")


def require_flag(key: str, value: Any) -> None:
    """Raise InputError when an option is neither true nor false."""
    if not isinstance(value, bool):
        raise InputError(f"{key}={value}", "true or false", f"correct {key}")
