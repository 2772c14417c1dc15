"""DeepLabV2, V3 and V3+ (Chen et al. 2016, 2017, 2018) on ResNets, V3 and V3+ on EfficientNet-Lite0
too.

All of them: forward takes an image (N, 3, H, W) float in [0, 1], RGB, H and W >= 32, and gives
logits (N, C, ceil(H/s), ceil(W/s)), s the `output_stride`, on a grid that starts at the image's
corner. An image smaller than that and a bad option raise InputError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.aspp import (
    ASPP,
    LIGHT_CHANNELS,
    SummedClassifiers,
    conv_bn_relu,
    dense,
    init_classifier,
    separable,
)
from distseg.models.checks import require_number, require_size
from distseg.models.efficientnet import TAPS, EfficientNetLite0
from distseg.models.grids import to_multiple, upsample_nodes, with_margin
from distseg.models.resnet import EXPANSION, WIDTH, ResNet
from distseg.models.weights import LoadReport
from shards.errors import InputError

V2_RATES = (6, 12, 18, 24)  # "ASPP-L", Chen et al. 2016, section 4.1.2
RATES = (6, 12, 18)  # at encoder stride 16, doubled at 8: Chen et al. 2017, section 3.3
CHANNELS = 256  # of ASPP and decoder, Chen et al. 2017 and 2018
DECODER_SKIP = 48  # channels left of the encoder's map at 1/4: Chen et al. 2018, section 4.1
SKIP_QUARTER, SKIP_EIGHTH = 32, 48  # of the light decoder


class DeepLabV2ResNet101(nn.Module):
    """Atrous classifiers with rates 6, 12, 18 and 24 side by side on stride 8, summed.

    The segmentor of Hung et al. 2018; they train it with batch norm frozen
    (segmentor.batch_norm=frozen). layout, channel_order, width: see ResNet. Weights of AdvSemiSeg
    or of its COCO start need layout=caffe. aspp_branches: 4, or 2 for weights released by
    AdvSemiSeg, whose code left its loop after rates 6 and 12.
    """

    output_stride = 8
    min_size_px = 32
    init_report: LoadReport | None = None  # what was taken from a file of weights

    def __init__(
        self,
        num_classes: int,
        *,
        layout: str = "torchvision",
        channel_order: str = "rgb",
        aspp_branches: int = 4,
        width: int = WIDTH,
    ):
        super().__init__()
        if aspp_branches not in (2, 4):
            raise InputError(
                f"segmentor.options.aspp_branches={aspp_branches}", "4 or 2", "correct it"
            )
        self.num_classes = num_classes
        self.encoder = ResNet(101, 8, layout=layout, channel_order=channel_order, width=width)
        channels = 8 * EXPANSION * width
        self.aspp = SummedClassifiers(channels, num_classes, V2_RATES[:aspp_branches])

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        x, grid = _on_nodes(image, self.output_stride)
        x = self.encoder(x)[-1]  # (N, 2048, h + 1, w + 1)
        return _off_nodes(self.aspp(x), grid)


class _DeepLabV3ResNet(nn.Module):
    """Atrous spatial pyramid pooling on the last map of a ResNet; nothing finer is used.

    encoder_stride: 16, or 8 with doubled rates; the logits have it too. dropout: probability before
    the classifier. width: see ResNet.
    """

    depth: int
    min_size_px = 32
    init_report: LoadReport | None = None

    def __init__(
        self,
        num_classes: int,
        *,
        encoder_stride: int = 16,
        dropout: float = 0.1,
        width: int = WIDTH,
    ):
        super().__init__()
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        self.num_classes, self.output_stride = num_classes, encoder_stride
        self.encoder = ResNet(self.depth, encoder_stride, width=width)
        self.aspp = _paper_aspp(8 * EXPANSION * width, encoder_stride, dropout)
        self.classifier = init_classifier(nn.Conv2d(CHANNELS, num_classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        x, grid = _on_nodes(image, self.output_stride)
        return _off_nodes(self.classifier(self.aspp(self.encoder(x)[-1])), grid)


class DeepLabV3ResNet50(_DeepLabV3ResNet):
    """DeepLabV3 on ResNet-50."""

    depth = 50


class DeepLabV3ResNet101(_DeepLabV3ResNet):
    """DeepLabV3 on ResNet-101."""

    depth = 101


class _DeepLabV3PlusResNet(nn.Module):
    """Atrous spatial pyramid pooling, refined with layer1's map at 1/4 by two 3x3 convolutions.

    encoder_stride: of the pooling, 16, or 8 with doubled rates; the logits have stride 4. dropout:
    probability before the decoder. width: see ResNet.
    """

    depth: int
    output_stride = 4
    min_size_px = 32
    init_report: LoadReport | None = None

    def __init__(
        self,
        num_classes: int,
        *,
        encoder_stride: int = 16,
        dropout: float = 0.1,
        width: int = WIDTH,
    ):
        super().__init__()
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        self.num_classes = num_classes
        self.encoder = ResNet(self.depth, encoder_stride, width=width)
        self.upsampling = encoder_stride // self.output_stride
        self.aspp = _paper_aspp(8 * EXPANSION * width, encoder_stride, dropout)
        self.skip = conv_bn_relu(EXPANSION * width, DECODER_SKIP)
        self.refine = nn.Sequential(
            dense(CHANNELS + DECODER_SKIP, CHANNELS), dense(CHANNELS, CHANNELS)
        )
        self.classifier = init_classifier(nn.Conv2d(CHANNELS, num_classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        x, grid = _on_nodes(image, self.output_stride)
        quarter, x = self.encoder(x)  # (N, 256, h + 1, w + 1), (N, 2048, H/s, W/s)
        skip = self.skip(quarter)  # (N, 48, h + 1, w + 1)
        x = upsample_nodes(self.aspp(x), self.upsampling, (skip.shape[-2], skip.shape[-1]))
        return _off_nodes(self.classifier(self.refine(_beside(x, skip))), grid)


class DeepLabV3PlusResNet50(_DeepLabV3PlusResNet):
    """DeepLabV3+ on ResNet-50."""

    depth = 50


class DeepLabV3PlusResNet101(_DeepLabV3PlusResNet):
    """DeepLabV3+ on ResNet-101."""

    depth = 101


class DeepLabV3Lite0(nn.Module):
    """A light DeepLabV3: DeepLabV3Plus below without its decoder, logits at stride 16.

    dropout: as there.
    """

    output_stride = 16
    min_size_px = 32
    init_report: LoadReport | None = None

    def __init__(self, num_classes: int, *, dropout: float = 0.1):
        super().__init__()
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        self.num_classes = num_classes
        self.encoder = EfficientNetLite0()
        self.aspp = ASPP(list(TAPS.values())[-1], dropout)
        self.classifier = init_classifier(nn.Conv2d(LIGHT_CHANNELS, num_classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        image = to_multiple(image, self.output_stride)
        height, width = (side // self.output_stride for side in image.shape[-2:])
        # SAME padding puts cell i of a whole grid on pixel 16i + 15: with 7 more before, on 16i + 8
        # of the image
        x = self.encoder(with_margin(image, 7, 9))[-1]  # (N, 320, h + 1, w + 1)
        return self.classifier(self.aspp(x))[..., :height, :width]


class DeepLabV3Plus(nn.Module):
    """A light DeepLabV3+ on EfficientNet-Lite0: stride 16, refined by the encoder's maps at 1/8 and
    1/4.

    dropout: probability before the decoder. Its decoder has two steps, the paper's one.
    """

    output_stride = 4
    min_size_px = 32
    init_report: LoadReport | None = None

    def __init__(self, num_classes: int, *, dropout: float = 0.1):
        super().__init__()
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        self.num_classes = num_classes
        self.encoder = EfficientNetLite0()
        quarter, eighth, sixteenth = TAPS.values()
        self.aspp = ASPP(sixteenth, dropout)
        self.skip_eighth = conv_bn_relu(eighth, SKIP_EIGHTH)
        self.refine_eighth = separable(LIGHT_CHANNELS + SKIP_EIGHTH, LIGHT_CHANNELS)
        self.skip_quarter = conv_bn_relu(quarter, SKIP_QUARTER)
        self.refine_quarter = separable(LIGHT_CHANNELS + SKIP_QUARTER, LIGHT_CHANNELS)
        self.classifier = init_classifier(nn.Conv2d(LIGHT_CHANNELS, num_classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        require_size(image, self.min_size_px)
        quarter, eighth, sixteenth = self.encoder(image)
        x = self.aspp(sixteenth)  # (N, 128, H/16, W/16)
        x = self.refine_eighth(_join(x, self.skip_eighth(eighth)))  # (N, 128, H/8, W/8)
        x = self.refine_quarter(_join(x, self.skip_quarter(quarter)))  # (N, 128, H/4, W/4)
        return self.classifier(x)


def _paper_aspp(in_channels: int, encoder_stride: int, dropout: float) -> ASPP:
    rates = [rate * 16 // encoder_stride for rate in RATES]
    return ASPP(in_channels, dropout, CHANNELS, rates, dense)


def _on_nodes(image: Tensor, stride: int) -> tuple[Tensor, tuple[int, int]]:
    """The image so that cell i + 1 of a ResNet's stride-s map is the i-th cell of the image, and
    the cells (h, w).

    ResNet puts cell i on pixel s * i, where upsampling wants (i + 0.5) * s - 0.5. With s/2 pixels
    more before the image, cell i + 1 lies on pixel s * i + s/2: half a pixel off, since no odd
    kernel is centred between two.
    """
    image = to_multiple(image, stride)
    grid = (image.shape[-2] // stride, image.shape[-1] // stride)
    return with_margin(image, stride // 2), grid


def _off_nodes(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """The cells that lie on the image: the first one, and a last one of ceil mode, do not."""
    return logits[..., 1 : 1 + grid[0], 1 : 1 + grid[1]]


def _join(coarse: Tensor, skip: Tensor) -> Tensor:
    """`coarse` upsampled to the grid of `skip`, and `skip`, side by side."""
    return _beside(
        F.interpolate(coarse, skip.shape[-2:], mode="bilinear", align_corners=False), skip
    )


def _beside(up: Tensor, skip: Tensor) -> Tensor:
    """An upsampled map and a skip, side by side."""
    if up.requires_grad:
        # it arrives as a slice of a wider tensor, for which the backward of upsampling is 8 times
        # slower
        up.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return torch.cat([up, skip], 1)
