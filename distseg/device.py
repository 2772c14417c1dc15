"""What the device of this process can do: the precision to compute in, and memory that is used again."""

from __future__ import annotations

import ctypes
import platform

import torch

AUTOCAST_DTYPES = {"bf16": torch.bfloat16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" becomes bf16 where the device multiplies in it (not merely emulates it), else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype of torch.autocast for a resolved precision; None for full precision."""
    return AUTOCAST_DTYPES.get(precision)


def _cpu_has_bf16() -> bool:
    """Whether oneDNN has bf16 dot products here; emulated ones are slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so absent from some releases
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)
