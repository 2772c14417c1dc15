"""Where the cells of a map lie on the image.

Losses and inference upsample logits bilinearly (align_corners=False) to the image's size, which is right when the
first cell starts at the image's corner and each cell covers the same number of pixels. The functions here make it so.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def to_multiple(image: Tensor, stride: int) -> Tensor:
    """The image (N, 3, H, W) stretched to the next multiple of `stride` on each side.

    A last cell that hangs over the image would shift all logits when they are upsampled to the image's size.
    """
    height, width = (-(-side // stride) * stride for side in image.shape[-2:])
    if (height, width) == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, (height, width), mode="bilinear", align_corners=False)


def with_margin(image: Tensor, before: int, after: int = 0) -> Tensor:
    """The image with so many more pixels above and to the left, below and to the right: its border, repeated."""
    return F.pad(image, (before, after, before, after), mode="replicate")


def upsample_nodes(coarse: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling that puts cell i on cell `factor` * i; beyond the last one its value is repeated.

    coarse: (N, C, h, w) -> (N, C, *size), size between factor * (h - 1) + 1 and factor * h, and w alike. This is how
    the maps of a network lie to each other whose odd kernels are padded symmetrically, as ResNet's are.
    """
    height, width = (factor * (side - 1) + 1 for side in coarse.shape[-2:])
    fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    if (height, width) == size:
        return fine
    return F.pad(fine, (0, size[1] - width, 0, size[0] - height), mode="replicate")
