"""What an encoder and a head agree on: the feature maps that go from one to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Level(NamedTuple):
    """One feature map of an encoder: (N, channels, H / stride, W / stride)."""

    channels: int
    stride: int


def scaled(maps: Sequence[Tensor], factors: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """Feature maps (N, channels, h, w) times the factor (N, channels) of each channel of each
    image, one tensor for each map; factors None: as they are.
    """
    if factors is None:
        return maps
    pairs = zip(maps, factors, strict=True)
    return [x * factor.to(x.dtype)[:, :, None, None] for x, factor in pairs]


class Encoder(nn.Module):
    """From images to feature maps; `ENCODERS` lists those that any head can stand on.

    forward: image (N, 3, H, W) float in [0, 1], RGB, normalised by the encoder itself as its
    published weights want it, H and W multiples of the coarsest stride (see composed.py, which pads
    others) -> one map of each level, in their order: finest first, and of one stride the earliest
    layer first. Its constructor takes options by keyword, those of its size left to `ENCODERS`. One
    whose layers all have one resolution takes `layers`, which of them to give; see Head.layers.
    """

    levels: tuple[Level, ...]

    def forward(self, image: Tensor) -> list[Tensor]:
        """See the class."""
        raise NotImplementedError

    def layers_above(self, name: str) -> int:
        """How many layers lie between a parameter and the head: 0 for the last norm, 1 for what is
        in the last block, and most for what is next to the image.

        name: as in named_parameters. By this number rates fall towards the image
        (segmentor_optimizer.layer_decay).
        """
        raise NotImplementedError

    def translated(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of another library's under this encoder's names, wrappers' prefixes left as
        they are; any other as it is.
        """
        return state


class Head(nn.Module):
    """From an encoder's feature maps to logits; see `HEADS`.

    Built as Head(levels, num_classes, **options), options by keyword, none of them named as an
    encoder's. forward: the maps of the levels -> logits (N, C, H / s, W / s), s its output_stride;
    H and W as the encoder's. Raises InputError for levels that it cannot stand on.
    """

    output_stride: int
    # which layers of an encoder whose layers have one resolution: "last", "last_four" or "spread",
    # the four that end its quarters; one in stages gives all of its stages to any head
    layers = "spread"

    def __init__(self, levels: Sequence[Level], num_classes: int):
        super().__init__()
        self.levels, self.num_classes = tuple(levels), num_classes

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """See the class."""
        raise NotImplementedError

    def translated(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of another library's, its keys of such a head under this one's names, after
        "head."; all others as they are.
        """
        return state
