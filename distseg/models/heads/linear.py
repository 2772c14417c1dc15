"""Linear classifiers: DINOv2's evaluation heads for segmentation (Oquab et al. 2023, section 7.4;
BNHead of dinov2/eval/segmentation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.aspp import init_classifier
from distseg.models.batch_norm import BatchNorm2d
from distseg.models.levels import Head, Level


class MultiLevel(Head):
    """Batch normalisation and a 1x1 convolution on all levels side by side, at the finest stride.

    On a vision transformer these are its last four layers; coarser levels are upsampled.
    """

    layers = "last_four"

    def __init__(self, levels: Sequence[Level], num_classes: int):
        super().__init__(levels, num_classes)
        self.output_stride = self.levels[0].stride
        channels = sum(level.channels for level in self.levels)
        self.norm = BatchNorm2d(channels)
        self.classifier = init_classifier(nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        # fmt: off
        # the finest, so that no level loses places
        size = maps[0].shape[-2:]                                     # (h, w)
        every = [
            x if level.stride == self.output_stride else F.interpolate(x, size, mode="bilinear")
            for x, level in zip(maps, self.levels, strict=True)
        ]                                                             # (N, channels, h, w) each
        return self.classifier(self.norm(torch.cat(every, 1)))        # (N, C, h, w)
        # fmt: on


class Linear(MultiLevel):
    """The same on the last level alone, at its stride."""

    layers = "last"

    def __init__(self, levels: Sequence[Level], num_classes: int):
        super().__init__(levels[-1:], num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return super().forward(maps[-1:])
