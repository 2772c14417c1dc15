"""Maps with their channels last, as linear layers and layer norms want them, and first again.

Both are one order in memory for what is in channels_last there: nothing is copied. While a network
is exported for sizes yet unknown everything is copied into the order that its shape says, since of
any other the exporter asks questions that bind the file to some sizes.
"""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_exporting


def channels_last(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h, w, C)."""
    x = x.permute(0, 2, 3, 1)
    return x.contiguous() if is_exporting() else x


def channels_first(x: Tensor) -> Tensor:
    """(N, h, w, C) -> (N, C, h, w)."""
    x = x.permute(0, 3, 1, 2)
    return x.contiguous() if is_exporting() else x
