"""DINOv3's vision transformers (Siméoni et al. 2025): patches of 16 px, four registers, and
positions that turn queries and keys.

Names and shapes of parameters are those of the released files, dinov3_vits16_pretrain_*.pth and so
on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.encoders.vit import Rotation, Size, Transformer
from distseg.models.weights import downloaded_file

BASE = 100.0  # of the periods: rotations of the finest channels once in the image, then fewer


class UnbiasedKeys(nn.Linear):
    """Queries, keys and values, whose keys have no bias: `bias_mask` is 0 there."""

    bias_mask: Tensor

    def __init__(self, dim: int, channels: int):
        super().__init__(dim, channels)
        # a constant, but one that the released files hold
        mask = torch.ones(3, channels // 3)
        mask[1] = 0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class ThreeLayerGatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020) whose gate is a layer by itself; width: inside, by the dim."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        # two products, as the released weights have them apart
        self.w1, self.w2 = nn.Linear(dim, width * dim), nn.Linear(dim, width * dim)
        self.w3 = nn.Linear(width * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


sized = partial(Size, patch_px=16, registers=4, qkv=UnbiasedKeys, epsilon=1e-5)
WIDE = partial(ThreeLayerGatedMLP, width=4)
SIZES = {
    "vits16": sized(384, 12, 6, (2, 5, 8, 11)),
    "vits16plus": sized(384, 12, 6, (2, 5, 8, 11), mlp=WIDE),
    "vitb16": sized(768, 12, 12, (2, 5, 8, 11)),
    "vitl16": sized(1024, 24, 16, (4, 11, 17, 23)),
    "vith16plus": sized(1280, 32, 20, (7, 15, 23, 31), mlp=WIDE),
    "vit7b16": sized(
        *(4096, 40, 32, (9, 19, 29, 39)),
        mlp=partial(ThreeLayerGatedMLP, width=2),
        qkv=partial(nn.Linear, bias=False),
    ),
}

# of images of the web, with the hash that the file's name ends in (dinov3/hub/backbones.py)
_HASHES = {
    "vits16": "08c60483",
    "vits16plus": "4057cbaa",
    "vitb16": "73cec8be",
    "vitl16": "8aa4cbdd",
    "vith16plus": "7c1da9a5",
    "vit7b16": "a955f4ea",
}


class DINOv3(Transformer):
    """A vision transformer that sees positions through rotations of queries and keys (Su et al.
    2021), which are of any grid: half of the channels turn by the row, half by the column.

    The random rescaling of positions that DINOv3's pretraining has is left out. Options as
    Transformer has them.
    """

    def __init__(
        self, *, size: Size, layers: str | Sequence[int] = "spread", drop_path: float = 0.0
    ):
        super().__init__(size, layers, drop_path)

    def _add_positions(self) -> None:
        self.storage_tokens = nn.Parameter(torch.zeros(1, self.size.registers, self.size.dim))
        self.rope_embed = Periods(self.size.dim // self.size.num_heads)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.storage_tokens, std=0.02)

    def _first_tokens(self) -> Tensor:
        return torch.cat([self.cls_token, self.storage_tokens], 1)

    def _rotation(self, grid: tuple[int, int]) -> Rotation:
        angles = self.rope_embed(grid)  # (h * w, head_dim)
        # the first tokens have no place: turned by nothing
        angles = F.pad(angles, (0, 0, 1 + self.size.registers, 0))
        return angles.cos(), angles.sin()


def weights_file(name: str) -> Path:
    """DINOv3's released file of a size. Raises InputError where it is not."""
    file = f"dinov3_{name}_pretrain_lvd1689m-{_HASHES[name]}.pth"
    source = (
        "https://github.com/facebookresearch/dinov3, which gives links to who accepts its licence"
    )
    return downloaded_file(f"DINOv3 {name}", (file,), source)


class Periods(nn.Module):
    """Of the rotations, in halves of the image; an angle for each patch and channel."""

    periods: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        exponents = torch.arange(head_dim // 4) * 4 / head_dim
        self.register_buffer("periods", BASE**exponents)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """(h * w, head_dim): a quarter of the channels by the row, one by the column, and again."""
        rows, columns = (
            (2 * torch.arange(side, device=self.periods.device) + 1) / side - 1 for side in grid
        )
        # the centres of the patches, the image from -1 to 1
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        turns = places[:, :, None].to(self.periods.dtype) / self.periods  # (h * w, 2, head_dim / 4)
        return (2 * math.pi * turns).flatten(1).tile(2)
