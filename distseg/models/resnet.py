"""ResNet-50 and -101 (He et al. 2016) as dense encoders; state-dict keys are torchvision's."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting

from distseg.models.batch_norm import BatchNorm2d, conv_norm
from distseg.models.checks import require_choice, require_number
from distseg.models.vgg import MEAN, STD
from distseg.models.weights import downloaded_file
from shards.errors import InputError

NUM_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # He et al. 2016, table 1
EXPANSION = 4
WIDTH = 64
LAYOUTS = ("torchvision", "caffe")
# RGB, 0 to 255: of AdvSemiSeg's training code
CAFFE_MEAN = (122.67891434, 116.66876762, 104.00698793)
# torchvision's files, the first one found is used (the two of a network differ in their training
# recipe)
IMAGENET_FILES = {
    50: ("resnet50-11ad3fa6.pth", "resnet50-0676ba61.pth"),
    101: ("resnet101-63fe2227.pth", "resnet101-cd907fc2.pth"),
}


class ResNet(nn.Module):
    """image (N, 3, H, W) float in [0, 1], RGB -> maps of layer1 (N, 256, H/4, W/4), of layer3 (N,
    1024, H/s, W/s) and of layer4 (N, 2048, H/s, W/s).

    Sizes are rounded up; cell i of a stride-s map lies on pixel s * i. output_stride s: 8 or 16;
    strides beyond it are replaced by dilation so that the map holds what the strided network would
    compute from every shifted image. layout: "torchvision" has a bottleneck's stride on the 3x3 and
    takes (RGB - mean) / std; "caffe" (DeepLabV2, Hung et al. 2018) has it on the first 1x1, pools
    in ceil mode (a map can be one cell larger) and takes 0..255 - mean. channel_order: of the
    pixels the weights were trained on, "rgb" or "bgr" (caffe only). width: channels of the stem, 64
    in every published file. Raises InputError for a bad option.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        depth: int,
        output_stride: int = 16,
        *,
        layout: str = "torchvision",
        channel_order: str = "rgb",
        width: int = WIDTH,
    ):
        super().__init__()
        _check(output_stride, layout, channel_order, width)
        self.layout, self.is_bgr = layout, channel_order == "bgr"
        self.channels = tuple(EXPANSION * width * times for times in (1, 4, 8))  # of its maps
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=layout == "caffe")
        first, second, third, fourth = NUM_BLOCKS[depth]
        at_8 = 2 if output_stride == 8 else 1  # dilation that replaces layer3's stride
        self.layer1 = _stage(width, width, first, layout=layout)
        self.layer2 = _stage(4 * width, 2 * width, second, layout=layout, stride=2)
        self.layer3 = _stage(
            8 * width, 4 * width, third, layout=layout, stride=2 // at_8, dilations=(1, at_8)
        )
        self.layer4 = _stage(
            16 * width, 8 * width, fourth, layout=layout, dilations=(at_8, 2 * at_8)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        mean, std = MEAN, STD
        if layout == "caffe":
            # no division by a deviation there: pixels of 0 to 255, less the mean
            red, green, blue = CAFFE_MEAN
            mean, std = (red / 255, green / 255, blue / 255), (1 / 255, 1 / 255, 1 / 255)
        # not in the state dict: published files have no such keys
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # fmt: off
        x = (image - self.mean) / self.std                 # (N, 3, H, W)
        if self.is_bgr:
            x = x.flip(1)                                  # (N, 3, H, W)
        x = self.relu(conv_norm(x, self.conv1, self.bn1))  # (N, 64, H/2, W/2)
        quarter = self.layer1(self._pooled(x))             # (N, 256, H/4, W/4)
        x = self.layer2(quarter)                           # (N, 512, H/8, W/8)
        third = self.layer3(x)                             # (N, 1024, H/s, W/s)
        return quarter, third, self.layer4(third)          # (N, 2048, H/s, W/s)
        # fmt: on

    def _pooled(self, x: Tensor) -> Tensor:
        if self.maxpool.ceil_mode and is_exporting():
            # ceil mode would bind the exported network to sizes that it rounds up, or to the
            # others; the zeros are no larger than what a ReLU has left, so these are its values
            return F.max_pool2d(F.pad(x, (1, 2, 1, 2)), 3, stride=2)
        return self.maxpool(x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with four times the channels, and a shortcut around them."""

    def __init__(
        self, in_channels: int, width: int, strides: tuple[int, int], dilation: int, is_first: bool
    ):
        """strides: of the first 1x1 and of the 3x3.

        is_first: of its stage, where the shortcut is a 1x1 too.
        """
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, strides[0], bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(
            width, width, 3, strides[1], padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None  # for its names; see forward
        if is_first:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, strides[0] * strides[1], bias=False)
            self.downsample = nn.Sequential(shortcut, BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        # fmt: off
        y = self.relu(conv_norm(x, self.conv1, self.bn1))  # (N, width, h, w)
        y = self.relu(conv_norm(y, self.conv2, self.bn2))  # (N, width, h / stride, w / stride)
        y = conv_norm(y, self.conv3, self.bn3)             # (N, 4 * width, ...)
        if self.downsample is not None:
            x = conv_norm(x, *self.downsample)             # (N, 4 * width, ...)
        # in place: no gradient needs the convolution's own output
        return self.relu(y.add_(x))                        # (N, 4 * width, ...)
        # fmt: on


def imagenet_weights_file(depth: int) -> Path:
    """torchvision's file for ResNet-`depth`. Raises InputError where there is none."""
    return downloaded_file(f"ResNet-{depth}", IMAGENET_FILES[depth])


def _stage(
    in_channels: int,
    width: int,
    num_blocks: int,
    *,
    layout: str,
    stride: int = 1,
    dilations: tuple[int, int] = (1, 1),
) -> nn.Sequential:
    """Blocks of one width. dilations: of the grid that the stage gets, and of the one that it would
    leave.

    Where dilation replaces a stride, the first block's 3x3 still sees the old grid if the stride
    was its own (torchvision), and the new one if the stride came before it (Caffe): so the
    conventions of torchvision's replace_stride_with_dilation and of DeepLabV2 are one rule.
    """
    if layout == "torchvision":
        strides, first = (1, stride), dilations[0]
    else:
        strides, first = (stride, 1), dilations[1]
    blocks = [Bottleneck(in_channels, width, strides, first, is_first=True)]
    for _ in range(num_blocks - 1):
        blocks.append(Bottleneck(EXPANSION * width, width, (1, 1), dilations[1], is_first=False))
    return nn.Sequential(*blocks)


def _check(output_stride: int, layout: str, channel_order: str, width: int) -> None:
    require_choice("segmentor.options.layout", layout, LAYOUTS)
    require_choice("segmentor.options.channel_order", channel_order, ("rgb", "bgr"))
    require_number("segmentor.options.width", width, 1, 1024)
    if output_stride not in (8, 16):
        raise InputError(
            f"segmentor.options.encoder_stride={output_stride}", "8 or 16", "correct it"
        )
    if channel_order == "bgr" and layout != "caffe":
        got = f"segmentor.options.channel_order=bgr with layout={layout}"
        raise InputError(
            got,
            "rgb, as torchvision's weights",
            "remove it, or write segmentor.options.layout=caffe",
        )
