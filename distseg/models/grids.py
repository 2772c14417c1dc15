"""Where the cells of a map lie on the image.

Losses and inference upsample logits bilinearly (align_corners=False) to the image's size, which is
right when the first cell starts at the image's corner and each cell covers the same number of
pixels. The functions here make it so.

Where a size needs nothing done, they return early; not while a network is exported for sizes yet
unknown, where a choice by size would bind the exported network to it. What is then done to such a
size changes no value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_exporting


def num_cells(side: int, stride: int) -> int:
    """How many cells of `stride` pixels cover `side` pixels, rounded up."""
    # not -(-side // stride): ONNX rounds the quotient of a negative number towards zero
    return (side + stride - 1) // stride


def to_multiple(image: Tensor, stride: int) -> Tensor:
    """The image (N, 3, H, W) stretched to the next multiple of `stride` on each side.

    A last cell that hangs over the image would shift all logits when they are upsampled to the
    image's size.
    """
    height, width = (num_cells(side, stride) * stride for side in image.shape[-2:])
    if not is_exporting() and (height, width) == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, (height, width), mode="bilinear", align_corners=False)


def with_margin(image: Tensor, before: int, after: int = 0) -> Tensor:
    """The image with its border repeated, `before` px above and to the left, `after` px below and
    to the right.
    """
    return F.pad(image, (before, after, before, after), mode="replicate")


def upsample_nodes(coarse: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling that puts cell i on cell `factor` * i; beyond the last one its value is
    repeated.

    coarse: (N, C, h, w) -> (N, C, *size), size between factor * (h - 1) + 1 and factor * h, and w
    alike. This is how the maps of a network lie to each other whose odd kernels are padded
    symmetrically, as ResNet's are.
    """
    height, width = (factor * (side - 1) + 1 for side in coarse.shape[-2:])
    fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    if not is_exporting() and (height, width) == size:
        return fine
    return F.pad(fine, (0, size[1] - width, 0, size[0] - height), mode="replicate")


def cropped(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The first rows and columns: (N, C, h, w) -> (N, C, *size), size at most (h, w)."""
    if not is_exporting():
        return x[..., : size[0], : size[1]]
    # a slice of a size yet unknown ends at the smaller of two, which cannot be known to be `size`
    rows, columns = (torch.arange(side, device=x.device) for side in size)
    return x.index_select(-2, rows).index_select(-1, columns)
