"""Layers that several heads are made of."""

from __future__ import annotations

from torch import Tensor, nn

from distseg.models.batch_norm import BatchNorm2d


class ConvNormReLU(nn.Module):
    """A convolution without bias, batch norm, ReLU: (N, in, h, w) -> (N, channels, h, w).

    Names of parameters are those of mmsegmentation's ConvModule: conv and bn.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, bias=False)
        self.bn = BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.normalised(self.conv(x))

    def normalised(self, x: Tensor) -> Tensor:
        """What follows the convolution, for those who compute it in another way."""
        return self.bn(x).relu()
