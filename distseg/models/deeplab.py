"""DeepLabV2, V3 and V3+ (Chen et al. 2016, 2017, 2018) on ResNets; V3 and V3+ on
EfficientNet-Lite0, 1 and 2 too.

All of them: forward takes an image (N, 3, H, W) float in [0, 1], RGB, H and W >= 32, and gives
logits (N, C, ceil(H/s), ceil(W/s)), s the `output_stride`, on a grid that starts at the image's
corner; DeepLabV2 with layout=caffe brings its own to the image's size, s = 1. An image smaller than
that and a bad option raise InputError. feature_factors: what each channel of the encoder's maps is
multiplied by, (N, c) for each c of feature_channels; None: nothing is. auxiliary: a second head on
the map before the last, whose logits forward gives in training mode: {"out": logits, "aux": logits
of the same size}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.losses.tensors import at_least_float32
from distseg.models.aspp import (
    ASPP,
    LIGHT_CHANNELS,
    SummedClassifiers,
    conv_bn_relu,
    dense,
    fcn_head,
    init_classifier,
    separable,
)
from distseg.models.checks import require_flag, require_number, require_size
from distseg.models.efficientnet import EfficientNetLite
from distseg.models.grids import to_multiple, upsample_nodes, with_margin
from distseg.models.levels import scaled
from distseg.models.resnet import EXPANSION, WIDTH, ResNet
from distseg.models.weights import LoadReport
from shards.errors import InputError

V2_RATES = (6, 12, 18, 24)  # "ASPP-L", Chen et al. 2016, section 4.1.2
RATES = (6, 12, 18)  # at encoder stride 16, doubled at 8: Chen et al. 2017, section 3.3
CHANNELS = 256  # of ASPP and decoder, Chen et al. 2017 and 2018
DECODER_SKIP = 48  # channels left of the encoder's map at 1/4: Chen et al. 2018, section 4.1
SKIP_QUARTER, SKIP_EIGHTH = 32, 48  # of the light decoder

Size = tuple[int, int]  # height, width
Factors = Sequence[Tensor] | None  # of channels


class DeepLabV2ResNet101(nn.Module):
    """Atrous classifiers with rates 6, 12, 18 and 24 side by side on stride 8, summed.

    The segmentor of Hung et al. 2018; they train it with batch norm frozen
    (segmentor.batch_norm=frozen). layout, channel_order, width: see ResNet. aspp_branches: 4, or 2
    for weights released by AdvSemiSeg, whose code left its loop after rates 6 and 12. auxiliary:
    the same classifiers on layer3 (Tsai et al. 2018).

    layout=caffe: for weights of AdvSemiSeg or of its COCO start, whose grid has a cell on every 8th
    pixel from 0 on, one more where the pooling rounds up, and is stretched over the image so that
    the outer cells' centres lie on its outer pixels (align_corners). No size but 8k + 1 px makes
    that exact, and no other way of upsampling fits the weights, so the logits come upsampled, (N,
    C, H, W) in at least float32, to losses, discriminator and evaluation alike.
    """

    output_stride = 8  # 1 with layout=caffe
    min_size_px = 32
    init_report: LoadReport | None = None  # what was taken from a file of weights

    def __init__(
        self,
        num_classes: int,
        *,
        layout: str = "torchvision",
        channel_order: str = "rgb",
        aspp_branches: int = 4,
        auxiliary: bool = False,
        width: int = WIDTH,
    ):
        super().__init__()
        require_flag("segmentor.options.auxiliary", auxiliary)
        if aspp_branches not in (2, 4):
            raise InputError(
                f"segmentor.options.aspp_branches={aspp_branches}", "4 or 2", "correct it"
            )
        self.num_classes = num_classes
        if layout == "caffe":
            self.output_stride = 1
        self.encoder = ResNet(101, 8, layout=layout, channel_order=channel_order, width=width)
        # those that are looked at: layer4's, and layer3's before it for an auxiliary head
        self.feature_channels = self.encoder.channels[-1 - auxiliary :]
        rates = V2_RATES[:aspp_branches]
        self.aspp = SummedClassifiers(self.feature_channels[-1], num_classes, rates)
        # last, so that the other layers' first weights do not depend on it
        self.has_auxiliary = auxiliary
        if auxiliary:
            self.auxiliary = SummedClassifiers(self.feature_channels[0], num_classes, rates)

    def forward(self, image: Tensor, feature_factors: Factors = None) -> Any:
        require_size(image, self.min_size_px)
        is_stretched = self.encoder.layout == "caffe"
        x, grid = image, _size_of(image)
        if not is_stretched:
            x, grid = _on_nodes(image, self.output_stride)  # (N, 3, 8h + 4, 8w + 4)
        on_image = _stretched if is_stretched else _off_nodes
        # fmt: off
        maps = self.encoder(x)[-len(self.feature_channels) :]
        maps = scaled(maps, feature_factors)                 # (N, 2048, h + 1, w + 1) the last
        logits = on_image(self.aspp(maps[-1]), grid)         # (N, C, h, w)
        if not (self.training and self.has_auxiliary):
            return logits
        auxiliary = on_image(self.auxiliary(maps[0]), grid)  # (N, C, h, w)
        # fmt: on
        return {"out": logits, "aux": auxiliary}


class _OnResNet(nn.Module):
    """A ResNet and the paper's atrous spatial pyramid pooling; `_add_head` says what follows.

    encoder_stride: 16, or 8 with doubled rates. dropout: probability behind the pooling. auxiliary:
    a small FCN on layer3 (Zhao et al. 2017; torchvision's form). width: see ResNet.
    """

    depth: int
    upsampling: int  # of layer3's and layer4's maps to the logits' resolution
    min_size_px = 32
    init_report: LoadReport | None = None

    def __init__(
        self,
        num_classes: int,
        *,
        encoder_stride: int = 16,
        dropout: float = 0.1,
        auxiliary: bool = False,
        width: int = WIDTH,
    ):
        super().__init__()
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        require_flag("segmentor.options.auxiliary", auxiliary)
        self.num_classes = num_classes
        self.encoder = ResNet(self.depth, encoder_stride, width=width)
        self.feature_channels = self.encoder.channels
        rates = [rate * 16 // encoder_stride for rate in RATES]
        self.aspp = ASPP(
            8 * EXPANSION * width, dropout, channels=CHANNELS, rates=rates, branch=dense
        )
        self._add_head(encoder_stride, width)
        # last, so that the other layers' first weights do not depend on it
        self.has_auxiliary = auxiliary
        if auxiliary:
            self.auxiliary = fcn_head(4 * EXPANSION * width, num_classes)

    def _add_head(self, encoder_stride: int, width: int) -> None:
        """Add the layers from the pooling to the logits."""
        raise NotImplementedError  # in the class of each version

    def _answer(self, logits: Tensor, third: Tensor, size: Size, grid: Size) -> Any:
        """The logits (N, C, h, w), with the auxiliary head's where they are trained.

        third: layer3's map, at encoder_stride; size: of the nodes (h + 1, w + 1) of the logits.
        """
        if not (self.training and self.has_auxiliary):
            return logits
        # fmt: off
        x = self.auxiliary(third)                          # (N, C, ...) at encoder_stride
        x = upsample_nodes(x, self.upsampling, size)       # (N, C, h + 1, w + 1)
        return {"out": logits, "aux": _off_nodes(x, grid)} # (N, C, h, w) both
        # fmt: on


class _DeepLabV3ResNet(_OnResNet):
    """Atrous spatial pyramid pooling on the last map of a ResNet; nothing finer is used.

    The logits have encoder_stride. Options as above.
    """

    def _add_head(self, encoder_stride: int, width: int) -> None:
        self.output_stride, self.upsampling = encoder_stride, 1
        self.classifier = init_classifier(nn.Conv2d(CHANNELS, self.num_classes, 1))

    def forward(self, image: Tensor, feature_factors: Factors = None) -> Any:
        require_size(image, self.min_size_px)
        # fmt: off
        x, grid = _on_nodes(image, self.output_stride)  # (N, 3, s * h + s/2, s * w + s/2)
        maps = scaled(self.encoder(x), feature_factors)
        _, third, x = maps                              # (N, 1024 and 2048, h + 1, w + 1)
        x = self.aspp(x)                                # (N, 256, h + 1, w + 1)
        x = self.classifier(x)                          # (N, C, h + 1, w + 1)
        size, x = _size_of(x), _off_nodes(x, grid)      # (N, C, h, w)
        return self._answer(x, third, size, grid)
        # fmt: on


class DeepLabV3ResNet50(_DeepLabV3ResNet):
    """DeepLabV3 on ResNet-50."""

    depth = 50


class DeepLabV3ResNet101(_DeepLabV3ResNet):
    """DeepLabV3 on ResNet-101."""

    depth = 101


class _DeepLabV3PlusResNet(_OnResNet):
    """Atrous spatial pyramid pooling, refined with layer1's map at 1/4 by two 3x3 convolutions.

    The logits have stride 4, whatever encoder_stride. Options as above.
    """

    output_stride = 4

    def _add_head(self, encoder_stride: int, width: int) -> None:
        self.upsampling = encoder_stride // self.output_stride
        self.skip = conv_bn_relu(EXPANSION * width, DECODER_SKIP)
        self.refine = nn.Sequential(
            dense(CHANNELS + DECODER_SKIP, CHANNELS), dense(CHANNELS, CHANNELS)
        )
        self.classifier = init_classifier(nn.Conv2d(CHANNELS, self.num_classes, 1))

    def forward(self, image: Tensor, feature_factors: Factors = None) -> Any:
        require_size(image, self.min_size_px)
        # fmt: off
        x, grid = _on_nodes(image, self.output_stride)          # (N, 3, 4h + 2, 4w + 2)
        maps = scaled(self.encoder(x), feature_factors)
        quarter, third, x = maps                                # (N, 256, h + 1, w + 1), ...
        skip = self.skip(quarter)                               # (N, 48, h + 1, w + 1)
        x = self.aspp(x)                                        # (N, 256, ...) at encoder_stride
        x = upsample_nodes(x, self.upsampling, _size_of(skip))  # (N, 256, h + 1, w + 1)
        x = self.refine(_beside(x, skip))                       # (N, 256, h + 1, w + 1)
        x = self.classifier(x)                                  # (N, C, h + 1, w + 1)
        x = _off_nodes(x, grid)                                 # (N, C, h, w)
        return self._answer(x, third, _size_of(skip), grid)
        # fmt: on


class DeepLabV3PlusResNet50(_DeepLabV3PlusResNet):
    """DeepLabV3+ on ResNet-50."""

    depth = 50


class DeepLabV3PlusResNet101(_DeepLabV3PlusResNet):
    """DeepLabV3+ on ResNet-101."""

    depth = 101


class _OnLite(nn.Module):
    """An EfficientNet-Lite and a light pooling at its stride 16; `_add_head` says what follows.

    dropout: probability behind the pooling. auxiliary: a small FCN on the map at 1/8.
    """

    variant: int
    min_size_px = 32
    init_report: LoadReport | None = None

    def __init__(self, num_classes: int, *, dropout: float = 0.1, auxiliary: bool = False):
        super().__init__()
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        require_flag("segmentor.options.auxiliary", auxiliary)
        self.num_classes = num_classes
        self.encoder = EfficientNetLite(self.variant)
        self.feature_channels = self.encoder.channels
        self.aspp = ASPP(self.encoder.channels[-1], dropout)
        self._add_head()
        # last, so that the other layers' first weights do not depend on it
        self.has_auxiliary = auxiliary
        if auxiliary:
            self.auxiliary = fcn_head(self.encoder.channels[-2], num_classes)

    def _add_head(self) -> None:
        """Add the layers from the pooling to the logits."""
        raise NotImplementedError  # in the class of each version

    def _answer(self, logits: Tensor, eighth: Tensor) -> Any:
        """The logits (N, C, h, w), with the auxiliary head's where they are trained.

        eighth: the encoder's map at 1/8.
        """
        if not (self.training and self.has_auxiliary):
            return logits
        return {"out": logits, "aux": self._on_cells(self.auxiliary(eighth), _size_of(logits))}

    def _on_cells(self, eighths: Tensor, size: Size) -> Tensor:
        """Logits at 1/8 on the cells (h, w) of the network's own."""
        raise NotImplementedError  # in the class of each version


class _DeepLabV3Lite(_OnLite):
    """A light DeepLabV3: _DeepLabV3PlusLite below without its decoder, logits at stride 16."""

    output_stride = 16

    def _add_head(self) -> None:
        self.classifier = init_classifier(nn.Conv2d(LIGHT_CHANNELS, self.num_classes, 1))

    def forward(self, image: Tensor, feature_factors: Factors = None) -> Any:
        require_size(image, self.min_size_px)
        image = to_multiple(image, self.output_stride)
        height, width = (side // self.output_stride for side in image.shape[-2:])
        # SAME padding puts cell i of a whole grid on pixel 16i + 15: with 7 more before, on 16i + 8
        # of the image
        # fmt: off
        x = with_margin(image, 7, 9)              # (N, 3, 16h + 16, 16w + 16)
        maps = scaled(self.encoder(x), feature_factors)
        x = self.aspp(maps[-1])                   # (N, 320 to 128, h + 1, w + 1)
        x = self.classifier(x)                    # (N, C, h + 1, w + 1)
        x = x[..., :height, :width]               # (N, C, h, w)
        return self._answer(x, maps[-2])
        # fmt: on

    def _on_cells(self, eighths: Tensor, size: Size) -> Tensor:
        # with that margin cell j of 8 px lies on pixel 8j of the image, so every second one, from
        # the one after the first, on a cell of the logits
        return eighths[..., 1::2, 1::2][..., : size[0], : size[1]]


class DeepLabV3Lite0(_DeepLabV3Lite):
    """The light DeepLabV3 on EfficientNet-Lite0."""

    variant = 0


class DeepLabV3Lite1(_DeepLabV3Lite):
    """The light DeepLabV3 on EfficientNet-Lite1."""

    variant = 1


class DeepLabV3Lite2(_DeepLabV3Lite):
    """The light DeepLabV3 on EfficientNet-Lite2."""

    variant = 2


class _DeepLabV3PlusLite(_OnLite):
    """A light DeepLabV3+: stride 16, refined by the encoder's maps at 1/8 and 1/4.

    Its decoder has two steps, the paper's one.
    """

    output_stride = 4

    def _add_head(self) -> None:
        quarter, eighth, _ = self.encoder.channels
        self.skip_eighth = conv_bn_relu(eighth, SKIP_EIGHTH)
        self.refine_eighth = separable(LIGHT_CHANNELS + SKIP_EIGHTH, LIGHT_CHANNELS)
        self.skip_quarter = conv_bn_relu(quarter, SKIP_QUARTER)
        self.refine_quarter = separable(LIGHT_CHANNELS + SKIP_QUARTER, LIGHT_CHANNELS)
        self.classifier = init_classifier(nn.Conv2d(LIGHT_CHANNELS, self.num_classes, 1))

    def forward(self, image: Tensor, feature_factors: Factors = None) -> Any:
        require_size(image, self.min_size_px)
        # fmt: off
        maps = scaled(self.encoder(image), feature_factors)
        quarter, eighth, sixteenth = maps                 # (N, 24, H/4, W/4), 1/8, 1/16
        x = self.aspp(sixteenth)                          # (N, 128, H/16, W/16)
        x = _join(x, self.skip_eighth(eighth))            # (N, 176, H/8, W/8)
        x = self.refine_eighth(x)                         # (N, 128, H/8, W/8)
        x = _join(x, self.skip_quarter(quarter))          # (N, 160, H/4, W/4)
        x = self.refine_quarter(x)                        # (N, 128, H/4, W/4)
        return self._answer(self.classifier(x), eighth)   # (N, C, H/4, W/4)
        # fmt: on

    def _on_cells(self, eighths: Tensor, size: Size) -> Tensor:
        return F.interpolate(eighths, size, mode="bilinear", align_corners=False)


class DeepLabV3PlusLite0(_DeepLabV3PlusLite):
    """The light DeepLabV3+ on EfficientNet-Lite0."""

    variant = 0


class DeepLabV3PlusLite1(_DeepLabV3PlusLite):
    """The light DeepLabV3+ on EfficientNet-Lite1."""

    variant = 1


class DeepLabV3PlusLite2(_DeepLabV3PlusLite):
    """The light DeepLabV3+ on EfficientNet-Lite2."""

    variant = 2


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


def _stretched(logits: Tensor, size: Size) -> Tensor:
    """The logits as AdvSemiSeg has them, of an image of that size without a margin."""
    # at least float32: what follows takes logits of the image's size as they are
    return F.interpolate(at_least_float32(logits), size, mode="bilinear", align_corners=True)


def _join(coarse: Tensor, skip: Tensor) -> Tensor:
    """`coarse` upsampled to the grid of `skip`, and `skip`, side by side."""
    up = F.interpolate(coarse, _size_of(skip), mode="bilinear", align_corners=False)
    return _beside(up, skip)


def _beside(up: Tensor, skip: Tensor) -> Tensor:
    """An upsampled map and a skip, side by side."""
    if up.requires_grad:
        # it arrives as a slice of a wider tensor, for which the backward of upsampling is 8 times
        # slower
        up.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return torch.cat([up, skip], 1)


def _size_of(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
