"""One linear classifier on an encoder's last map: DINOv2's evaluation head (Oquab et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distseg.models.aspp import init_classifier
from distseg.models.batch_norm import BatchNorm2d
from distseg.models.levels import Head, Level


class Linear(Head):
    """Batch normalisation and a 1x1 convolution on the last level; logits have its stride."""

    layers = "last"

    def __init__(self, levels: Sequence[Level], num_classes: int):
        super().__init__(levels, num_classes)
        channels, self.output_stride = self.levels[-1]
        self.norm = BatchNorm2d(channels)
        self.classifier = init_classifier(nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.norm(maps[-1]))  # (N, C, H/s, W/s)
