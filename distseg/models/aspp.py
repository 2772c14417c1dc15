"""Atrous spatial pyramid pooling of DeepLabV3 and V3+ (Chen et al. 2017, 2018), and the layers it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distseg.models.batch_norm import BatchNorm2d
from distseg.models.depthwise import DepthwiseConv2d

LIGHT_RATES = (3, 6, 9)  # half the paper's, for crops about half as large
LIGHT_CHANNELS = 128


def conv_bn_relu(in_channels: int, channels: int) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), BatchNorm2d(channels), nn.ReLU(inplace=True))


def dense(in_channels: int, channels: int, dilation: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, BatchNorm2d(channels), nn.ReLU(inplace=True))


def separable(in_channels: int, channels: int, dilation: int = 1) -> nn.Sequential:
    """A depthwise 3x3 followed by a 1x1; one normalisation, after both."""
    return nn.Sequential(DepthwiseConv2d(in_channels, 3, 1, dilation), *conv_bn_relu(in_channels, channels))


class ASPP(nn.Module):
    """A 1x1 branch, atrous ones and the image's mean, side by side and mixed: (N, in, h, w) -> (N, channels, h, w)."""

    def __init__(
        self,
        in_channels: int,
        dropout: float,
        channels: int = LIGHT_CHANNELS,
        rates: Sequence[int] = LIGHT_RATES,
        branch: Callable[[int, int, int], nn.Module] = separable,
    ):
        super().__init__()
        self.point = conv_bn_relu(in_channels, channels)
        self.atrous = nn.ModuleList(branch(in_channels, channels, rate) for rate in rates)
        # no batch norm on this branch: it has one value per image, too few for statistics of a small batch
        self.mean = nn.Sequential(nn.Conv2d(in_channels, channels, 1), nn.ReLU(inplace=True))
        self.mix = conv_bn_relu(channels * (2 + len(rates)), channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.dropout(self.mix(torch.cat([self.point(x), *(branch(x) for branch in self.atrous), mean], 1)))
