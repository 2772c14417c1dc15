"""DeepLabV3+ (Chen et al. 2018) on EfficientNet-Lite0, with a decoder in two steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.batch_norm import BatchNorm2d
from distseg.models.checks import require_number, require_size
from distseg.models.depthwise import DepthwiseConv2d
from distseg.models.efficientnet import TAPS, EfficientNetLite0
from distseg.models.weights import LoadReport

RATES = (3, 6, 9)  # of the atrous branches: half the paper's, for crops about half as large
CHANNELS = 128
SKIP_QUARTER, SKIP_EIGHTH = 32, 48


class DeepLabV3Plus(nn.Module):
    """Atrous spatial pyramid pooling at stride 16, refined by the encoder's maps at 1/8 and 1/4.

    forward: image (N, 3, H, W) float in [0, 1], RGB, H and W >= 32 -> logits (N, C, ceil(H/4), ceil(W/4)).
    dropout: probability before the decoder. Raises InputError for a smaller image.
    """

    output_stride = 4
    min_size_px = 32
    init_report: LoadReport | None = None  # what the encoder took from a file of weights

    def __init__(self, num_classes: int, *, dropout: float = 0.1):
        super().__init__()
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        self.num_classes = num_classes
        self.encoder = EfficientNetLite0()
        quarter, eighth, sixteenth = TAPS.values()
        self.aspp = ASPP(sixteenth, dropout)
        self.skip_eighth = conv_bn_relu(eighth, SKIP_EIGHTH)
        self.refine_eighth = separable(CHANNELS + SKIP_EIGHTH, CHANNELS)
        self.skip_quarter = conv_bn_relu(quarter, SKIP_QUARTER)
        self.refine_quarter = separable(CHANNELS + SKIP_QUARTER, CHANNELS)
        self.classifier = nn.Conv2d(CHANNELS, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        quarter, eighth, sixteenth = self.encoder(image)
        x = self.aspp(sixteenth)  # (N, 128, H/16, W/16)
        x = self.refine_eighth(_join(x, self.skip_eighth(eighth)))  # (N, 128, H/8, W/8)
        x = self.refine_quarter(_join(x, self.skip_quarter(quarter)))  # (N, 128, H/4, W/4)
        return self.classifier(x)


class ASPP(nn.Module):
    """A 1x1 branch, three separable atrous ones and the image's mean, side by side and mixed."""

    def __init__(self, in_channels: int, dropout: float):
        super().__init__()
        self.point = conv_bn_relu(in_channels, CHANNELS)
        self.atrous = nn.ModuleList(separable(in_channels, CHANNELS, rate) for rate in RATES)
        # no batch norm on this branch: it has one value per image, too few for statistics of a small batch
        self.mean = nn.Sequential(nn.Conv2d(in_channels, CHANNELS, 1), nn.ReLU(inplace=True))
        self.mix = conv_bn_relu(CHANNELS * (2 + len(RATES)), CHANNELS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.dropout(self.mix(torch.cat([self.point(x), *(branch(x) for branch in self.atrous), mean], 1)))


def conv_bn_relu(in_channels: int, channels: int) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), BatchNorm2d(channels), nn.ReLU(inplace=True))


def separable(in_channels: int, channels: int, dilation: int = 1) -> nn.Sequential:
    """A depthwise 3x3 followed by a 1x1; one normalisation, after both."""
    return nn.Sequential(DepthwiseConv2d(in_channels, 3, 1, dilation), *conv_bn_relu(in_channels, channels))


def _join(coarse: Tensor, skip: Tensor) -> Tensor:
    """`coarse` upsampled to the grid of `skip`, and `skip`, side by side."""
    up = F.interpolate(coarse, skip.shape[-2:], mode="bilinear", align_corners=False)
    if up.requires_grad:
        # it arrives as a slice of a wider tensor, for which the backward of upsampling is 8 times slower
        up.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return torch.cat([up, skip], 1)
