"""Vision transformers (Dosovitskiy et al. 2021) as DINOv2 has them (Oquab et al. 2023): ViT-S, B, L
and g with patches of 14 px, with registers too (Darcet et al. 2024).

Names and shapes of parameters are those of the released files, dinov2_vits14_pretrain.pth and so
on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting

from distseg.models.blocks import Block, rising
from distseg.models.checks import require_number
from distseg.models.encoders.resampling import resampled, resampling
from distseg.models.encoders.translation import translated
from distseg.models.levels import Encoder, Level
from distseg.models.weights import downloaded_file
from shards.errors import InputError

# of ImageNet, as DINOv2 and v3 were trained with
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# cosines and sines (tokens, head_dim) of the angles that turn queries and keys
Rotation = tuple[Tensor, Tensor]


class MLP(nn.Module):
    """Two layers with a GELU between them, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020), with two thirds of the MLP's width and so as many parameters."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = (8 * dim // 3 + 7) // 8 * 8  # a multiple of 8, as it was released
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        # one product for both, in the order of the released weights
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


@dataclass(frozen=True)
class Size:
    """What tells one vision transformer from another.

    layers: the four that a head gets which wants them spread, counted from 0. registers: tokens
    beside the class token. mlp, qkv: make the layers of a block from its dim. epsilon: of the layer
    norms. grid: rows and columns of the stored position embeddings, as of 518 px; offset,
    antialias: how these become h rows, by the scale (h + offset) / grid.
    """

    dim: int
    depth: int
    num_heads: int
    layers: tuple[int, ...]
    patch_px: int = 14
    registers: int = 0
    mlp: Callable[[int], nn.Module] = MLP
    qkv: Callable[[int, int], nn.Module] = nn.Linear
    epsilon: float = 1e-6
    grid: int = 518 // 14
    offset: float = 0.1
    antialias: bool = False

    def norm(self) -> nn.LayerNorm:
        """A layer norm of its tokens."""
        return nn.LayerNorm(self.dim, eps=self.epsilon)


# spread as DINOv2's depth heads and UniMatch V2 have it, which is not in equal steps for ViT-L
_SIZES = {
    "vits14": Size(384, 12, 6, (2, 5, 8, 11)),
    "vitb14": Size(768, 12, 12, (2, 5, 8, 11)),
    "vitl14": Size(1024, 24, 16, (4, 11, 17, 23)),
    "vitg14": Size(1536, 40, 24, (9, 19, 29, 39), mlp=GatedMLP),
}
# those with registers were released with another resampling, see dinov2/hub/backbones.py
SIZES = _SIZES | {
    f"{name}_reg": replace(size, registers=4, offset=0.0, antialias=True)
    for name, size in _SIZES.items()
}


class Transformer(Encoder):
    """Patches of an image as tokens, beside a class token and registers, through blocks of
    attention; subclasses say where each token is: `_add_positions`, `_first_tokens`, `_rotation`.

    Every level is the output of one layer, normalised by the last norm as DINOv2's
    get_intermediate_layers gives it, at the patch's stride. layers: which, counted from 0, or
    "last", "last_four", "spread" (Size.layers); layers after the last of these are not built.
    drop_path: probability that the last block's branches are left out for a sample, rising linearly
    from 0 at the first (see Block). Raises InputError for a bad option.
    """

    mean: Tensor
    deviation: Tensor
    mask_token: Tensor

    def __init__(self, size: Size, layers: str | Sequence[int], drop_path: float):
        super().__init__()
        require_number("segmentor.options.drop_path", drop_path, 0, 0.9)
        self.size, self.layers = size, _layers(size, layers)
        self.levels = tuple(Level(size.dim, size.patch_px) for _ in self.layers)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        # of pretraining alone; a parameter without a gradient would leave other ranks waiting, and
        # so would those of layers that nothing is taken from
        self.register_buffer("mask_token", torch.zeros(1, size.dim))
        self._add_positions()
        self.patch_embed = PatchEmbedding(size)
        rates = rising(drop_path, size.depth)[: max(self.layers) + 1]
        self.blocks = nn.ModuleList(TransformerBlock(size, rate) for rate in rates)
        self.norm = size.norm()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _add_positions(self) -> None:
        """Add what says where tokens are, and the registers; initialise them."""
        raise NotImplementedError

    def _first_tokens(self) -> Tensor:
        """The class token and the registers, (1, 1 + registers, dim)."""
        raise NotImplementedError

    def _placed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tokens (N, h * w, dim) of the patches with their positions."""
        return patches

    def _rotation(self, grid: tuple[int, int]) -> Rotation | None:
        """What turns queries and keys by their positions; None: nothing does."""
        return None

    def forward(self, image: Tensor) -> list[Tensor]:
        # fmt: off
        x = self.patch_embed((image - self.mean) / self.deviation)   # (N, dim, h, w)
        grid = (x.shape[-2], x.shape[-1])
        x = self._placed(_plain(x.flatten(2).transpose(1, 2)), grid)  # (N, h * w, dim)
        first = self._first_tokens().to(x.dtype)
        x = torch.cat([first.expand(x.shape[0], -1, -1), x], 1)          # (N, T, dim)
        # once for all blocks
        rotation = self._rotation(grid)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x, rotation)                                   # (N, T, dim)
            if index in self.layers:
                patches = self.norm(x[:, first.shape[1] :])          # (N, h * w, dim)
                maps.append(_plain(patches.transpose(1, 2)).unflatten(2, grid))
        return maps
        # fmt: on

    def translated(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return translated(state, self.state_dict())

    def layers_above(self, name: str) -> int:
        part, _, rest = name.partition(".")
        # as in BEiT and in DINOv2's param_groups.py, where the last norm goes with the head
        if part == "norm":
            return 0
        return len(self.blocks) - (int(rest.split(".")[0]) if part == "blocks" else -1)


class DINOv2(Transformer):
    """A vision transformer with learned position embeddings, resampled to the image's grid.

    As dinov2/models/vision_transformer.py has it: bicubic; of the released networks those without
    registers by the scale (h + 0.1) / 37, without antialiasing, those with registers by h / 37 with
    antialiasing (see Size.offset). Options as Transformer has them.
    """

    def __init__(
        self, *, size: Size, layers: str | Sequence[int] = "spread", drop_path: float = 0.0
    ):
        super().__init__(size, layers, drop_path)

    def _add_positions(self) -> None:
        size = self.size
        self.pos_embed = nn.Parameter(torch.zeros(1, size.grid**2 + 1, size.dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, size.registers, size.dim)) if size.registers else None
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)

    def _first_tokens(self) -> Tensor:
        first = self.cls_token + self.pos_embed[:, :1]
        # registers have no position
        return (
            first if self.register_tokens is None else torch.cat([first, self.register_tokens], 1)
        )

    def _placed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        size, stored = self.size, self.pos_embed[:, 1:]
        if is_exporting() or grid != (size.grid, size.grid):
            rows, columns = (
                resampling(size.grid, side, size.offset, size.antialias).to(stored) for side in grid
            )
            # under autocast the products would round what they are to place
            with torch.autocast(stored.device.type, enabled=False):
                stored = resampled(stored[0].unflatten(0, (size.grid, -1)), rows, columns)[None]
        return patches + stored.to(patches.dtype)


def weights_file(name: str) -> Path:
    """DINOv2's released file of a size. Raises InputError where it is not."""
    file = f"dinov2_{name.replace('_reg', '_reg4')}_pretrain.pth"
    source = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{name.removesuffix('_reg')}/"
    return downloaded_file(f"DINOv2 {name}", (file,), source)


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
        self.norm1 = size.norm()
        self.attn = Attention(size)
        self.ls1 = LayerScale(size.dim)
        # in the order of the released files, which the report of what was loaded goes through
        self.norm2 = size.norm()
        self.mlp = size.mlp(size.dim)
        self.ls2 = LayerScale(size.dim)

    def compute(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        x = x + self.kept(self.ls1(self.attn(self.norm1(x), rotation)))
        return x + self.kept(self.ls2(self.mlp(self.norm2(x))))


class Attention(nn.Module):
    """Every token looks at every token, in several heads: (N, T, dim) -> (N, T, dim)."""

    def __init__(self, size: Size):
        super().__init__()
        self.num_heads = size.num_heads
        self.qkv = size.qkv(size.dim, 3 * size.dim)
        self.proj = nn.Linear(size.dim, size.dim)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        # One product for all three; (N, T, 3 * dim) -> (N, heads, T, head_dim) each. Parts of the
        # last axis, whose gradients are joined by one copy.
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=2)
        )
        if rotation is not None:
            query, key = _rotated(query, rotation), _rotated(key, rotation)
        seen = F.scaled_dot_product_attention(query, key, value)
        return self.proj(seen.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al. 2021), 1 at first."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _plain(x: Tensor) -> Tensor:
    """x itself; while it is exported a copy, of whose strides exporters need not know the order."""
    return x.contiguous() if is_exporting() else x


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Each pair (i, i + head_dim / 2) of channels turned by its angle at each token."""
    cosine, sine = rotation
    one, other = x.chunk(2, -1)
    return (x * cosine + torch.cat([-other, one], -1) * sine).to(x.dtype)


def _layers(size: Size, layers: str | Sequence[int]) -> tuple[int, ...]:
    """Numbers of the layers that are given. Raises InputError where there are none such."""
    last = size.depth - 1
    words = {"last": (last,), "last_four": tuple(range(last - 3, last + 1)), "spread": size.layers}
    if isinstance(layers, str) and layers in words:
        return words[layers]
    numbers = layers if isinstance(layers, list | tuple) else ()
    # those in order that there are: the same list where every one was good
    if not numbers or [each for each in range(last + 1) if each in numbers] != list(numbers):
        needed = f"last, last_four, spread, or rising numbers from 0 to {last}: [2,5,8,11]"
        got = f"segmentor.options.layers={layers}"
        raise InputError(got, needed, "correct segmentor.options.layers")
    return tuple(numbers)
