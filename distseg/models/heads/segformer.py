"""SegFormer's head (Xie et al. 2021, section 3.2): a linear layer on each level, and one on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.aspp import init_classifier
from distseg.models.checks import require_number
from distseg.models.heads.layers import ConvNormReLU
from distseg.models.levels import Head, Level
from distseg.models.renaming import Renaming, renamed

# the authors' files begin with decode_head, transformers' have names of their own too
_RENAMED: tuple[Renaming, ...] = (
    (r"\bdecode_head\.", "head."),
    (r"\bhead\.linear_(?:c|projections)\.(\d)\.", lambda at: f"head.linear_c{int(at[1]) + 1}."),
    (r"\bhead\.linear_fuse\.weight$", "head.linear_fuse.conv.weight"),
    (r"\bhead\.batch_norm\.", "head.linear_fuse.bn."),
    (r"\bhead\.classifier\.", "head.linear_pred."),
)


class SegFormer(Head):
    """Every level projected to `channels`, upsampled to the finest, joined and mixed.

    Logits have the finest level's stride. Names of parameters are those of the authors' files.
    channels: 256 with MiT-B0 and B1, 768 with the others, in the authors' configurations. dropout:
    probability of a channel before the classifier (there 0.1).

    The published network upsamples before it mixes. Nothing but linear maps lie there, each of
    which a bilinear upsampling may change places with, so here a level's two layers are made one,
    which runs on its own grid, and what is upsampled is added up: the same numbers, with one map of
    `channels` at the finest stride in memory in place of one for each level.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        num_classes: int,
        *,
        channels: int = 768,
        dropout: float = 0.1,
    ):
        super().__init__(levels, num_classes)
        require_number("segmentor.options.channels", channels, 1, 4096)
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        self.output_stride = self.levels[0].stride
        for number, level in enumerate(self.levels, start=1):
            self.add_module(f"linear_c{number}", Projection(level.channels, channels))
        self.linear_fuse = ConvNormReLU(channels * len(self.levels), channels)
        self.dropout = nn.Dropout2d(dropout)
        # whole channels are dropped, since neighbouring pixels tell the same
        self.linear_pred = init_classifier(nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        # fmt: off
        size = (maps[0].shape[-2], maps[0].shape[-1])
        # (channels, channels) for each level, the coarsest first, as the authors join them
        mixing = _matrix(self.linear_fuse.conv.weight).chunk(len(maps), 1)
        total: Tensor | None = None
        for number, (x, mix) in enumerate(zip(maps, reversed(mixing), strict=True), start=1):
            linear = cast(Projection, getattr(self, f"linear_c{number}")).proj
            weight = (mix @ linear.weight)[:, :, None, None]            # (channels, in, 1, 1)
            x = F.conv2d(x, weight, mix @ linear.bias)                  # (N, channels, H/s, W/s)
            x = x if total is None else F.interpolate(x, size, mode="bilinear")
            total = x if total is None else total + x                   # (N, channels, H/4, W/4)
        assert total is not None
        x = self.dropout(self.linear_fuse.normalised(total))            # (N, channels, H/4, W/4)
        return self.linear_pred(x)                                      # (N, C, H/4, W/4)
        # fmt: on

    def translated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return renamed(state, _RENAMED)


class Projection(nn.Module):
    """A linear layer under the name that the authors' files have for it."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, channels)


def _matrix(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight (out, in, 1, 1) as (out, in)."""
    # by the way that gives a gradient in the weight's own order in memory, which DDP asks for
    is_first = weight.stride(-1) == 1
    return weight.flatten(1) if is_first else weight.permute(0, 2, 3, 1).flatten(1)
