"""What the device of this process can do.

The precision to compute in, and memory that is used again.
"""

from __future__ import annotations

import ctypes
import platform

import torch

from distseg.distributed.compat import cpu_multiplies_bf16
from distseg.distributed.ranks import Ranks, of_all

# glibc's malloc.h and Linux's madvise
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _MADV_HUGEPAGE = -1, -2, -4, 14
_HUGE_PAGE = 2 << 20

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, ranks: Ranks) -> str:
    """The precision for a job: "auto" becomes bf16 where EVERY rank's device multiplies in it, else
    fp32.

    Emulated bf16 does not count: it is slower than fp32. Called on every rank.
    """
    if precision != "auto":
        return precision
    # agreed on by all: replicas that compute in different precisions drift apart
    return "bf16" if of_all(ranks, _has_bf16(ranks.device), all) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bf16()


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype of torch.autocast for a resolved precision; None for full precision."""
    return _AUTOCAST_DTYPES.get(precision)


def allow_tf32(allowed: bool) -> None:
    """Let a GPU round the factors of fp32 products to TF32, in convolutions and matrix products
    alike, or not.
    """
    # both are set, as torch's own defaults differ: off for matrices, on for convolutions
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def reuse_memory(heap_bytes: int = 1 << 30) -> bool:
    """Let glibc keep freed memory, in huge pages, for the next step of a training on the CPU; True
    where it did.

    By default every tensor above 32 MB is mapped anew and its pages are faulted in at each step.
    Affects this process only; the heap grows by `heap_bytes` of address space, which costs memory
    only where it is touched.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # ctypes takes every result for a C int, which would cut an address in half
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    libc.free.argtypes, libc.madvise.argtypes = (
        [ctypes.c_void_p],
        [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    )
    # no tensor mapped by itself, nothing given back, and the heap grown by a whole step's memory
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, heap_bytes))
    kept = all(libc.mallopt(name, value) == 1 for name, value in settings)
    start = libc.sbrk(0)
    # more than the heap has free, so that it grows by the padding now
    libc.free(libc.malloc(2 * _HUGE_PAGE))
    # madvise wants whole pages: from the first boundary of a huge one on
    end, aligned = libc.sbrk(0), -(-start // _HUGE_PAGE) * _HUGE_PAGE
    return kept and end > aligned and libc.madvise(aligned, end - aligned, _MADV_HUGEPAGE) == 0
