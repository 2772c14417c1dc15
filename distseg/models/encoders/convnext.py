"""ConvNeXt-T, S and B (Liu et al. 2022) as dense encoders.

Names and shapes of parameters are torchvision's; the norms of the maps that go to a head are the
authors' norm0 to norm3, which classification files lack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distseg.models.blocks import Block, rising
from distseg.models.channel_order import channels_first, channels_last
from distseg.models.checks import require_number
from distseg.models.depthwise import DepthwiseConv2d
from distseg.models.levels import Encoder, Level
from distseg.models.renaming import Renaming, renamed
from distseg.models.vgg import MEAN, STD
from distseg.models.weights import downloaded_file
from shards.errors import InputError

STRIDES = (4, 8, 16, 32)
EPSILON = 1e-6  # of all norms
FIRST_SCALE = 1e-6  # of every channel of a residual branch, Liu et al. 2022, table 5
# a head's words for an encoder's layers (see distseg.models.levels), for one in stages
WORDS = {"last": (3,), "last_four": (0, 1, 2, 3), "spread": (0, 1, 2, 3)}


class Size(NamedTuple):
    """Channels and number of blocks of the four stages; the authors' rate of stochastic depth for
    segmentation; torchvision's file of weights.
    """

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    drop_path: float
    file: str


# Liu et al. 2022, section 3; drop_path of the authors' upernet_convnext_*_160k_ade20k_ss.py
SIZES = {
    "convnext_tiny": Size((96, 192, 384, 768), (3, 3, 9, 3), 0.4, "convnext_tiny-983f1562.pth"),
    "convnext_small": Size((96, 192, 384, 768), (3, 3, 27, 3), 0.3, "convnext_small-0c510722.pth"),
    "convnext_base": Size((128, 256, 512, 1024), (3, 3, 27, 3), 0.4, "convnext_base-6075fbad.pth"),
}


def _stage(at: re.Match[str]) -> str:
    """A stage's number as the place of its blocks in torchvision's `features`."""
    return f"features.{2 * int(at[1]) + 1}."


def _reduced(at: re.Match[str]) -> str:
    """A stage's number as the place of what comes before its blocks."""
    return f"features.{2 * int(at[1])}."


# what others call the layers: the authors, timm, transformers and mmpretrain
_RENAMED: tuple[Renaming, ...] = (
    (r"\bconvnext\.", ""),
    (r"\bdownsample_layers\.(\d)\.", _reduced),
    (r"\bstem\.(?=[01]\.)", "features.0."),
    (r"\bembeddings\.patch_embeddings\.", "features.0.0."),
    (r"\bembeddings\.layernorm\.", "features.0.1."),
    (r"\b(?:encoder\.)?stages\.(\d)\.(?:downsample|downsampling_layer)\.", _reduced),
    (r"\b(?:encoder\.)?stages\.(\d)\.(?:blocks\.|layers\.)?(?=\d)", _stage),
    (r"\b(?:dwconv|conv_dw|depthwise_conv)\.", "block.0."),
    (r"(?<=\d\.)(?:norm|layernorm)\.", "block.2."),
    (r"\b(?:pwconv1|mlp\.fc1|pointwise_conv1)\.", "block.3."),
    (r"\b(?:pwconv2|mlp\.fc2|pointwise_conv2)\.", "block.5."),
    (r"\b(?:gamma|layer_scale_parameter)$", "layer_scale"),
    (r"\bhidden_states_norms\.stage(\d)\.", lambda at: f"norm{int(at[1]) - 1}."),
)


class ConvNeXt(Encoder):
    """Four stages of depthwise 7x7 convolutions and MLPs of a pixel's channels.

    Cell i of a stride-s map covers exactly the pixels s * i to s * (i + 1) - 1; of other sizes than
    multiples of 32 the last pixels are left out. layers: the stages to give, counted from 0, or a
    head's word for them ("last"; "last_four" and "spread" are all). drop_path: probability that the
    last block's branch is left out for a sample, rising linearly from 0 at the first block; None:
    the authors' (0.4, and 0.3 for S). Raises InputError for a bad option.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, size: Size, layers: str | Sequence[int] = "spread", drop_path: float | None = None
    ):
        super().__init__()
        drop_path = size.drop_path if drop_path is None else drop_path
        require_number("segmentor.options.drop_path", drop_path, 0, 0.9)
        self.stages = _stages(layers)
        self.depths = size.depths[: max(self.stages) + 1]
        self.levels = tuple(Level(size.channels[stage], STRIDES[stage]) for stage in self.stages)
        rates, in_channels = rising(drop_path, sum(size.depths)), 3
        features: list[nn.Module] = []
        # what comes after the last stage asked for would get no gradient
        for stage, depth in enumerate(self.depths):
            channels = size.channels[stage]
            before = sum(size.depths[:stage])
            blocks = [ConvNeXtBlock(channels, rates[before + index]) for index in range(depth)]
            features += [_reduction(in_channels, channels), nn.Sequential(*blocks)]
            in_channels = channels
        self.features = nn.Sequential(*features)
        # beside the path from stage to stage, which goes on without them
        for stage in self.stages:
            self.add_module(f"norm{stage}", ChannelNorm(size.channels[stage], eps=EPSILON))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        # as the authors and torchvision begin
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> list[Tensor]:
        # fmt: off
        x = (image - self.mean) / self.std                     # (N, 3, H, W)
        maps = []
        for stage in range(len(self.depths)):
            x = self.features[2 * stage](x)                    # (N, channels, H/s, W/s)
            x = self.features[2 * stage + 1](x)                # (N, channels, H/s, W/s)
            if stage in self.stages:
                maps.append(getattr(self, f"norm{stage}")(x))  # (N, channels, H/s, W/s)
        return maps
        # fmt: on

    def translated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = renamed(state, _RENAMED)
        # of rank 1 elsewhere, where channels come last
        scales = {key: found[key].reshape(-1, 1, 1) for key in found if key.endswith("layer_scale")}
        return found | scales

    def layers_above(self, name: str) -> int:
        part, _, rest = name.partition(".")
        if part.startswith("norm"):
            return sum(self.depths[int(part[-1]) + 1 :])
        # two features each stage: what halves the grid, which stands beside the first block, and
        # the blocks
        feature, index = (int(number) for number in rest.split(".")[:2])
        from_here = sum(self.depths[feature // 2 :])
        return from_here - index if feature % 2 else from_here + (feature == 0)


class ConvNeXtBlock(Block):
    """A depthwise 7x7, a norm, and an MLP four times as wide inside; scaled by channel and added:
    (N, channels, h, w).
    """

    def __init__(self, channels: int, drop_path: float):
        super().__init__(drop_path)
        # with places for what has no parameters: the keys are numbered as torchvision's
        self.block = nn.Sequential(
            DepthwiseConv2d(channels, 7, bias=True),
            Last(),
            nn.LayerNorm(channels, eps=EPSILON),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            First(),
        )
        # next to nothing: at first a block changes its input hardly at all
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), FIRST_SCALE))

    def compute(self, x: Tensor) -> Tensor:
        return x + self.kept(self.layer_scale * self.block(x))


class Last(nn.Module):
    """Channels last, as layers of a pixel's channels want them."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(x)


class First(nn.Module):
    """Channels first again."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(x)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation of each pixel's channels: (N, channels, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(super().forward(channels_last(x)))


def weights_file(size: Size) -> Path:
    """torchvision's file, where torchvision itself puts it. Raises InputError when it is absent."""
    return downloaded_file("ConvNeXt", [size.file])


def _reduction(in_channels: int, channels: int) -> nn.Sequential:
    """To a quarter of the image's grid, or to half of the stage's before; (N, channels, h, w)."""
    # of the image there is nothing to normalise yet
    if in_channels == 3:
        norm = ChannelNorm(channels, eps=EPSILON)
        return nn.Sequential(nn.Conv2d(in_channels, channels, 4, 4), norm)
    norm = ChannelNorm(in_channels, eps=EPSILON)
    return nn.Sequential(norm, nn.Conv2d(in_channels, channels, 2, 2))


def _stages(layers: str | Sequence[int]) -> tuple[int, ...]:
    """Numbers of the stages whose maps go to the head. Raises InputError where there are none."""
    if isinstance(layers, str) and layers in WORDS:
        return WORDS[layers]
    numbers = [] if isinstance(layers, str) else list(layers)
    if not numbers or numbers != sorted(set(numbers)) or not set(numbers) <= set(range(4)):
        got = f"segmentor.options.layers={layers}"
        needed = "last, last_four, spread, or rising numbers of stages from 0 to 3: [1,2,3]"
        raise InputError(got, needed, "correct segmentor.options.layers")
    return tuple(numbers)
