"""UPerNet's head (Xiao et al. 2018) as mmsegmentation has it: pyramid pooling of the last level,
then a feature pyramid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.aspp import init_classifier
from distseg.models.batch_norm import BatchNorm2d
from distseg.models.checks import require_number
from distseg.models.heads.layers import ConvNormReLU
from distseg.models.levels import Head, Level
from distseg.models.renaming import Renaming, renamed
from shards.errors import InputError

BINS = (1, 2, 3, 6)  # cells on a side, Zhao et al. 2017, section 3.2

# mmsegmentation's files begin with decode_head, transformers' have names of their own too
_RENAMED: tuple[Renaming, ...] = (
    (r"\bdecode_head\.", "head."),
    (r"\bhead\.(.+)\.batch_norm\.", r"head.\1.bn."),
    (r"\bhead\.classifier\.", "head.conv_seg."),
)


class UPerNet(Head):
    """Means over grids of 1, 2, 3 and 6 cells beside the last level; then every level adds the
    coarser one, and all are joined at the finest stride, which the logits have.

    channels: of all layers, and dropout: probability of a channel before the classifier; 512 and
    0.1 in mmsegmentation's and ConvNeXt's configurations. Names of parameters are mmsegmentation's.
    Raises InputError when a single image is trained on without `synchronised` or `frozen` batch
    norm: the mean over one cell has one value there.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        num_classes: int,
        *,
        channels: int = 512,
        dropout: float = 0.1,
    ):
        super().__init__(levels, num_classes)
        require_number("segmentor.options.channels", channels, 1, 4096)
        require_number("segmentor.options.dropout", dropout, 0, 0.9)
        self.output_stride = self.levels[0].stride
        # the last level has its own way down, through the pooling
        *finer, last = (level.channels for level in self.levels)
        # pooling has no parameters, but a place in mmsegmentation's numbering
        self.psp_modules = nn.ModuleList(
            nn.Sequential(Bins(bins), ConvNormReLU(last, channels)) for bins in BINS
        )
        self.bottleneck = ConvNormReLU(last + len(BINS) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(width, channels) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNormReLU(len(self.levels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = init_classifier(nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        # fmt: off
        self._check_batch(maps[-1])
        x = self._pooled(maps[-1])                                # (N, channels, H/32, W/32)
        joined = [x]
        finer = zip(maps[:-1], self.lateral_convs, self.fpn_convs, strict=True)
        for level, lateral, convolution in reversed(list(finer)):
            level = lateral(level)                                # (N, channels, H/s, W/s)
            x = level + _resized(x, level)
            joined.insert(0, convolution(x))                      # finest first
        x = torch.cat([_resized(y, joined[0]) for y in joined], 1)
        x = self.dropout(self.fpn_bottleneck(x))                  # (N, channels, H/4, W/4)
        return self.conv_seg(x)                                   # (N, C, H/4, W/4)
        # fmt: on

    def translated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return renamed(state, _RENAMED)

    def _pooled(self, x: Tensor) -> Tensor:
        pooled = [_resized(branch(x), x) for branch in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], 1))

    def _check_batch(self, x: Tensor) -> None:
        norm = cast(ConvNormReLU, cast(nn.Sequential, self.psp_modules[0])[1]).bn
        # torch's own error would name a shape that nobody has written
        if norm.training and type(norm) is BatchNorm2d and len(x) == 1:
            got = "one image for a rank, in training with segmentor.batch_norm=per_rank"
            needed = "two or more: UPerNet normalises each image's mean by the others'"
            raise InputError(got, needed, "or write segmentor.batch_norm=synchronised")


class Bins(nn.Module):
    """Means over `bins` x `bins` cells that cover the map, as nn.AdaptiveAvgPool2d: (N, C, h, w) ->
    (N, C, bins, bins).

    As two products with matrices, which other programs know for sizes yet unknown, and whose
    gradients are the same in every run.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        # the whole map is one cell: no matrix is needed
        if self.bins == 1:
            return x.mean((2, 3), keepdim=True)
        rows, columns = (self._weights(x.shape[axis], x) for axis in (2, 3))
        return rows @ x @ columns.T

    def _weights(self, side: int, like: Tensor) -> Tensor:
        """(bins, side): what each cell of a row takes of each of the map's `side` cells."""
        cells = torch.arange(self.bins, device=like.device)[:, None]
        places = torch.arange(side, device=like.device)
        # cells overlap where the side is no multiple of their number
        first, end = cells * side // self.bins, ((cells + 1) * side + self.bins - 1) // self.bins
        inside = ((places >= first) & (places < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear upsampling to another map's grid."""
    return F.interpolate(x, (like.shape[-2], like.shape[-1]), mode="bilinear")
