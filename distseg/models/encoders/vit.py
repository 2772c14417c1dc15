"""Vision transformers (Dosovitskiy et al. 2021) as DINOv2 has them (Oquab et al. 2023): ViT-S, B, L
and g with patches of 14 px, with registers too (Darcet et al. 2024).

Names and shapes of parameters are those of the released files, dinov2_vits14_pretrain.pth and so
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.blocks import Block, rising
from distseg.models.checks import require_number
from distseg.models.levels import Encoder, Level
from shards.errors import InputError

# of ImageNet, as DINOv2 was trained with
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-6  # of the layer norms
PRETRAINED_PX = 518  # whose patches the released position embeddings are for


@dataclass(frozen=True)
class Size:
    """What tells one vision transformer from another.

    layers: the four that a head gets which wants them spread, counted from 0. is_gated: SwiGLU in
    place of the MLP. registers: tokens beside the class token. grid: rows and columns of the stored
    position embeddings.
    """

    dim: int
    depth: int
    num_heads: int
    layers: tuple[int, ...]
    patch_px: int = 14
    is_gated: bool = False
    registers: int = 0
    grid: int = PRETRAINED_PX // 14


# spread as DINOv2's depth heads and UniMatch V2 have it, which is not in equal steps for ViT-L
_PLAIN = {
    "vits14": Size(384, 12, 6, (2, 5, 8, 11)),
    "vitb14": Size(768, 12, 12, (2, 5, 8, 11)),
    "vitl14": Size(1024, 24, 16, (4, 11, 17, 23)),
    "vitg14": Size(1536, 40, 24, (9, 19, 29, 39), is_gated=True),
}
SIZES = _PLAIN | {f"{name}_reg": replace(size, registers=4) for name, size in _PLAIN.items()}


class VisionTransformer(Encoder):
    """A vision transformer; every level is the output of one layer, normalised, at the patch's
    stride.

    layers: which, counted from 0, or "last", "last_four", "spread". drop_path: probability that the
    last block's branches are left out for a sample (stochastic depth, Huang et al. 2016), rising
    linearly from 0 at the first block. Raises InputError for a bad option.
    """

    mean: Tensor
    deviation: Tensor
    mask_token: Tensor

    def __init__(
        self, *, size: Size, layers: str | Sequence[int] = "spread", drop_path: float = 0.0
    ):
        super().__init__()
        require_number("segmentor.options.drop_path", drop_path, 0, 0.9)
        self.size, self.layers = size, _layers(size, layers)
        self.levels = tuple(Level(size.dim, size.patch_px) for _ in self.layers)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, size.grid**2 + 1, size.dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, size.registers, size.dim)) if size.registers else None
        )
        # of pretraining alone; a parameter without a gradient would leave other ranks waiting
        self.register_buffer("mask_token", torch.zeros(1, size.dim))
        self.patch_embed = PatchEmbedding(size)
        # what comes after the last layer asked for would get no gradient either
        depth = max(self.layers) + 1
        rates = rising(drop_path, size.depth)[:depth]
        self.blocks = nn.ModuleList(TransformerBlock(size, rate) for rate in rates)
        self.norm = nn.LayerNorm(size.dim, eps=EPSILON)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """As DINOv2 begins: truncated normal, deviation 0.02; tokens next to zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)

    def forward(self, image: Tensor) -> list[Tensor]:
        # fmt: off
        x = self.patch_embed((image - self.mean) / self.deviation)  # (N, dim, h, w)
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)                            # (N, h * w, dim)
        x = x + self._positions(grid).to(x.dtype)
        x = torch.cat([self._first_tokens(len(x)).to(x.dtype), x], 1)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)                                            # (N, tokens, dim)
            if index in self.layers:
                patches = self.norm(x)[:, -grid[0] * grid[1] :]     # (N, h * w, dim)
                maps.append(patches.transpose(1, 2).unflatten(2, grid))
        return maps
        # fmt: on

    def _first_tokens(self, count: int) -> Tensor:
        """The class token, with its position, and the registers, which have none."""
        first = self.cls_token + self.pos_embed[:, :1]
        if self.register_tokens is not None:
            first = torch.cat([first, self.register_tokens], 1)
        return first.expand(count, -1, -1)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The embeddings of a grid's positions, (1, h * w, dim)."""
        side = self.size.grid
        stored = self.pos_embed[:, 1:]
        if grid == (side, side):
            return stored
        stored = stored.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(stored, grid, mode="bicubic").flatten(2).transpose(1, 2)

    def layers_above(self, name: str) -> int:
        if name.startswith("norm."):
            return 0
        if name.startswith("blocks."):
            return len(self.blocks) - int(name.split(".")[1])
        return len(self.blocks) + 1


class PatchEmbedding(nn.Module):
    """Each patch of pixels to a token: (N, 3, H, W) -> (N, dim, H / patch, W / patch)."""

    def __init__(self, size: Size):
        super().__init__()
        self.proj = nn.Conv2d(3, size.dim, size.patch_px, size.patch_px)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class TransformerBlock(Block):
    """Attention and an MLP, each on normalised tokens, scaled by channel and added: (N, T, dim)."""

    def __init__(self, size: Size, drop_path: float):
        super().__init__(drop_path)
        self.norm1 = nn.LayerNorm(size.dim, eps=EPSILON)
        self.attn = Attention(size)
        self.ls1 = LayerScale(size.dim)
        self.norm2 = nn.LayerNorm(size.dim, eps=EPSILON)
        self.mlp = GatedMLP(size.dim) if size.is_gated else MLP(size.dim)
        self.ls2 = LayerScale(size.dim)

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.kept(self.ls1(self.attn(self.norm1(x))))
        return x + self.kept(self.ls2(self.mlp(self.norm2(x))))


class Attention(nn.Module):
    """Every token looks at every token, in several heads: (N, T, dim) -> (N, T, dim)."""

    def __init__(self, size: Size):
        super().__init__()
        self.num_heads = size.num_heads
        self.qkv = nn.Linear(size.dim, 3 * size.dim)
        self.proj = nn.Linear(size.dim, size.dim)

    def forward(self, x: Tensor) -> Tensor:
        # (N, T, 3 * dim) -> query, key, value (N, heads, T, dim / heads)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv.unbind())
        return self.proj(seen.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al. 2021), 1 at first."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MLP(nn.Module):
    """Four times as wide inside, with a GELU."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020), with two thirds of the MLP's width, so with as many parameters."""

    def __init__(self, dim: int):
        super().__init__()
        # a multiple of 8, as the released weights have it
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


def _layers(size: Size, layers: str | Sequence[int]) -> tuple[int, ...]:
    """Numbers of the layers that an encoder gives. Raises InputError where there are none such."""
    last = size.depth - 1
    words = {"last": (last,), "last_four": tuple(range(last - 3, last + 1)), "spread": size.layers}
    if isinstance(layers, str) and layers in words:
        return words[layers]
    numbers = [] if isinstance(layers, str) else list(layers)
    if not numbers or numbers != sorted(set(numbers)) or not set(numbers) <= set(range(last + 1)):
        needed = f"last, last_four, spread, or rising numbers from 0 to {last}: [2,5,8,11]"
        got = f"segmentor.options.layers={layers}"
        raise InputError(got, needed, "correct segmentor.options.layers")
    return tuple(numbers)
