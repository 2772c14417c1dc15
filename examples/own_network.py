"""A segmentor of your own, from images to logits; nothing of distseg is needed to write one.

    distseg train preset=toy segmentor=examples/own_network.py:SmallUNet segmentor.options.width=16
    distseg models segmentor=examples/own_network.py:SmallUNet

forward: image (N, 3, H, W) float in [0, 1] -> logits (N, num_classes, h, w) at any output stride,
or a dict with them as "out" and, in training mode, an auxiliary head's as "aux". The constructor
gets `num_classes` and what segmentor.options holds. Optional attributes: `encoder`, a module whose
learning rate is segmentor_optimizer.encoder_lr_factor times the rest's; `size_multiple`, when sides
must be multiples of something that is not found by trying 1, 2, 4, ... 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallUNet(nn.Module):
    """Two halvings and back, each level joined with the one before (Ronneberger et al. 2015)."""

    def __init__(self, num_classes: int, width: int = 16):
        super().__init__()
        self.encoder = nn.ModuleList(
            [
                _convolutions(3, width),
                _convolutions(width, 2 * width),
                _convolutions(2 * width, 4 * width),
            ]
        )
        self.decoder = nn.ModuleList(
            [_convolutions(6 * width, 2 * width), _convolutions(3 * width, width)]
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.encoder[0](2 * image - 1)  # (N, w, H, W)
        middle = self.encoder[1](F.max_pool2d(fine, 2))  # (N, 2w, H/2, W/2)
        x = self.encoder[2](F.max_pool2d(middle, 2))  # (N, 4w, H/4, W/4)
        x = self.decoder[0](torch.cat([_doubled(x), middle], 1))
        x = self.decoder[1](torch.cat([_doubled(x), fine], 1))
        return self.classifier(x)  # (N, C, H, W)


def _convolutions(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
