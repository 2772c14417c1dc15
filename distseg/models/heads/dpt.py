"""DPT: dense prediction from a transformer's layers (Ranftl et al. 2021), in the widths of UniMatch
V2 (Yang et al. 2025; its supervised.py and model/semseg/dpt.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distseg.losses.tensors import at_least_float32
from distseg.models.aspp import init_classifier
from distseg.models.batch_norm import BatchNorm2d
from distseg.models.checks import require_choice, require_number
from distseg.models.grids import upsample_nodes
from distseg.models.levels import Head, Level
from shards.errors import InputError

FINEST = 4  # how much finer than the patches the finest map is
# by the channels of the last level: of the fusion, and of the four maps before it
WIDTHS = {
    384: (64, (48, 96, 192, 384)),
    768: (128, (96, 192, 384, 768)),
    1024: (256, (256, 512, 1024, 1024)),
    1536: (384, (1536, 1536, 1536, 1536)),
}
DEFAULT = (256, (256, 512, 1024, 1024))  # of other encoders: Ranftl et al. 2021
# of the four maps, where their strides are one
RESIZINGS: tuple[Callable[[int], nn.Module], ...] = (
    lambda width: nn.ConvTranspose2d(width, width, 4, 4),
    lambda width: nn.ConvTranspose2d(width, width, 2, 2),
    lambda width: nn.Identity(),
    lambda width: nn.Conv2d(width, width, 3, 2, 1),
)


class DPT(Head):
    """A pyramid of four maps, fused from the coarsest on; logits at twice the finest one.

    Levels of one stride become a pyramid, four, two, one and half as fine as the patches; levels of
    which each has twice the stride of the one before are one. Where the logits would lie between
    pixels (at 1.75 px of patches of 14) they are upsampled to every pixel, as in UniMatch V2, and
    output_stride is 1. All grids begin at the image's corner (align_corners=False), where the
    sources put the outer cells' centres there. channels: of the fusion; None: by WIDTHS. norm:
    "none", or "batch" after the convolutions of the fusion. Raises InputError for other levels.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        num_classes: int,
        *,
        channels: int | None = None,
        norm: str = "none",
    ):
        super().__init__(levels, num_classes)
        require_choice("segmentor.options.norm", norm, ("none", "batch"))
        usual, widths = WIDTHS.get(self.levels[-1].channels, DEFAULT)
        channels = usual if channels is None else channels
        require_number("segmentor.options.channels", channels, 1, 4096)
        flat = _is_flat(self.levels)
        # twice the logits' stride
        finest = self.levels[0].stride / (FINEST if flat else 1)
        self.output_stride = int(finest) // 2 if finest % 2 == 0 else 1
        self.reassemble = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(level.channels, width, 1),
                resizing(width) if flat else nn.Identity(),
                nn.Conv2d(width, channels, 3, padding=1, bias=False),
            )
            for level, width, resizing in zip(self.levels, widths, RESIZINGS, strict=True)
        )
        # the coarsest map is the first, to which nothing is added
        self.fuse = nn.ModuleList(
            Fusion(channels, norm, is_first=number == 3) for number in range(4)
        )
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            init_classifier(nn.Conv2d(channels, num_classes, 1)),
        )
        self.is_flat = flat

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        # fmt: off
        size = tuple(side * self.levels[0].stride for side in maps[0].shape[-2:])
        first, second, third, x = (
            layers(each) for layers, each in zip(self.reassemble, maps, strict=True)
        )                                      # (N, channels, 4h, 4w), 2h, h, h/2 of patches h x w
        x = self.fuse[3](x)
        # a convolution of stride 2 puts cell i on cell 2i, all else on the middle of its cells
        upsample = _upsampled_nodes if self.is_flat else _upsampled
        x = self.fuse[2](upsample(x, third), third)
        x = self.fuse[1](_upsampled(x, second), second)
        x = self.fuse[0](_upsampled(x, first), first)
        # before the last convolutions, which so see what they are to tell apart at twice the grid
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = self.classifier(x)                 # (N, C, 8h, 8w)
        if self.output_stride == 1:
            # at least float32: what follows takes logits of the image's size as they are
            x = F.interpolate(at_least_float32(x), size, mode="bilinear")
        return x                               # (N, C, H/s, W/s)
        # fmt: on


class Fusion(nn.Module):
    """What is so far and a map of the same size, added and convolved: (N, channels, h, w)."""

    def __init__(self, channels: int, norm: str, is_first: bool):
        super().__init__()
        # not of the first, to which no map is added: it would get no gradient
        self.of_map = None if is_first else Residual(channels, norm)
        self.of_sum = Residual(channels, norm)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if self.of_map is not None and added is not None:
            x = x + self.of_map(added)
        # before it is upsampled, which a 1x1 convolution changes nothing in but the work
        return self.mix(self.of_sum(x))


class Residual(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, added to their input."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            # not in place: the input is needed for the sum
            layers += [nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
            layers += [BatchNorm2d(channels)] if norm == "batch" else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _is_flat(levels: Sequence[Level]) -> bool:
    """Whether all levels have one stride. Raises InputError where they are no pyramid either."""
    strides = [level.stride for level in levels]
    is_flat = len(set(strides)) == 1
    is_pyramid = all(coarse == 2 * fine for fine, coarse in itertools.pairwise(strides))
    if len(strides) != 4 or not (is_flat or is_pyramid):
        got = f"an encoder with feature maps at strides {', '.join(map(str, strides))}"
        needed = "four, all of one stride or each of twice the one before"
        raise InputError(got, needed, "choose another head for it; distseg models lists all")
    return is_flat


def _upsampled(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear")


def _upsampled_nodes(x: Tensor, like: Tensor) -> Tensor:
    return upsample_nodes(x, 2, (like.shape[-2], like.shape[-1]))
