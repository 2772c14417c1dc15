"""A discriminator of your own: label maps in, logits out, above 0 for ground truth.

    distseg train preset=toy discriminator=examples/own_discriminator.py:Patches
    distseg models discriminator=examples/own_discriminator.py:Patches

The constructor gets `num_classes` and what discriminator.options holds. Its forward is one of
forward(label_map)              label maps (k, C, h, w), which sum to 1 over C
forward(image, label_map)       with their images (k, 3, H, W) in [0, 1]
forward(image, *label_maps)     all of a step, so that what is made of the image is made once
and gives logits (k, 1, h', w'), one a patch, or (k, 1), one an image; the last form a tuple.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Patches(nn.Module):
    """A logit for each patch of image and label map side by side (Isola et al. 2017, pix2pix)."""

    def __init__(self, num_classes: int, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3 + num_classes, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def forward(self, image: Tensor, label_map: Tensor) -> Tensor:
        colors = F.interpolate(image, label_map.shape[-2:], mode="bilinear", antialias=True)
        return self.layers(torch.cat([2 * colors - 1, label_map], 1))  # (k, 1, h/4, w/4)
