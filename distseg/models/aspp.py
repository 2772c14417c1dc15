"""Atrous spatial pyramid pooling of DeepLabV2, V3 and V3+, and the layers it is made of.

Chen et al. 2016, 2017 and 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting

from distseg.models.batch_norm import BatchNorm2d
from distseg.models.depthwise import DepthwiseConv2d

LIGHT_RATES = (3, 6, 9)  # half the paper's, for crops about half as large
LIGHT_CHANNELS = 128


def conv_bn_relu(in_channels: int, channels: int) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, bias=False),
        BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def dense(in_channels: int, channels: int, dilation: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, BatchNorm2d(channels), nn.ReLU(inplace=True))


def separable(in_channels: int, channels: int, dilation: int = 1) -> nn.Sequential:
    """A depthwise 3x3 followed by a 1x1; one normalisation, after both."""
    return nn.Sequential(
        DepthwiseConv2d(in_channels, 3, 1, dilation), *conv_bn_relu(in_channels, channels)
    )


def init_classifier(layer: nn.Conv2d) -> nn.Conv2d:
    """N(0, 0.01), as AdvSemiSeg; biases zero."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def fcn_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """A 3x3 convolution to a quarter of the channels, and the scores (torchvision's FCNHead)."""
    channels = in_channels // 4
    classifier = init_classifier(nn.Conv2d(channels, num_classes, 1))
    return nn.Sequential(dense(in_channels, channels), nn.Dropout(0.1), classifier)


class ASPP(nn.Module):
    """A 1x1 branch, atrous ones and the image's mean, side by side and mixed.

    (N, in, h, w) -> (N, channels, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        dropout: float,
        *,
        channels: int = LIGHT_CHANNELS,
        rates: Sequence[int] = LIGHT_RATES,
        branch: Callable[[int, int, int], nn.Module] = separable,
    ):
        super().__init__()
        self.point = conv_bn_relu(in_channels, channels)
        self.atrous = nn.ModuleList(branch(in_channels, channels, rate) for rate in rates)
        # no batch norm on this branch: it has one value per image, too few for statistics of a
        # small batch
        self.mean = nn.Sequential(nn.Conv2d(in_channels, channels, 1), nn.ReLU(inplace=True))
        self.mix = conv_bn_relu(channels * (2 + len(rates)), channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # the order of the branches is that in which their gradients are added up
        # fmt: off
        mean = self.mean(x.mean((2, 3), keepdim=True))     # (N, channels, 1, 1)
        mean = mean.expand(-1, -1, *x.shape[-2:])          # (N, channels, h, w)
        branches = [self.point(x)]                         # (N, channels, h, w)
        branches += [branch(x) for branch in self.atrous]  # (N, channels, h, w) each
        x = torch.cat([*branches, mean], 1)                # (N, channels * (2 + rates), h, w)
        return self.dropout(self.mix(x))                   # (N, channels, h, w)
        # fmt: on


class SummedClassifiers(nn.Module):
    """DeepLabV2's pooling: 3x3 classifiers of several rates side by side, summed. (N, in, h, w) ->
    (N, classes, h, w).

    State dict and values as nn.ModuleList([nn.Conv2d(...), ...]), whose outputs are added.
    Convolutions with so few outputs are slow, so the taps of all of them are computed as one 1x1
    convolution, and each tap's outputs then moved to the pixel that they count for, and added up in
    at least float32.
    """

    def __init__(self, in_channels: int, num_classes: int, rates: Sequence[int]):
        super().__init__()
        self.rates = tuple(rates)
        for number, rate in enumerate(rates):
            classifier = nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate)
            self.add_module(str(number), init_classifier(classifier))

    def forward(self, x: Tensor) -> Tensor:
        classifiers: list[nn.Conv2d] = list(self.children())  # type: ignore[arg-type]
        if is_exporting():  # other programs know plain convolutions
            return sum((classifier(x) for classifier in classifiers[1:]), start=classifiers[0](x))
        # an input at p counts at p - (tap - 1) * rate, where F.fold, meant for patches, adds tap *
        # rate: so they turn
        taps = [
            classifier.weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)
            for classifier in classifiers
        ]
        # (N, rates * classes * 9, h * w)
        outputs = F.conv2d(x, torch.cat(taps)[:, :, None, None]).flatten(2)
        outputs = outputs.float() if outputs.dtype.itemsize < 4 else outputs
        biases = torch.stack([cast(Tensor, classifier.bias) for classifier in classifiers])
        total = biases.sum(0)[:, None, None]  # (classes, 1, 1)
        for part, rate in zip(outputs.chunk(len(self.rates), 1), self.rates, strict=True):
            total = total + F.fold(part, x.shape[-2:], 3, dilation=rate, padding=rate)
        return total
