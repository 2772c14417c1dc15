"""Mix transformers MiT-B0 to B5, the encoders of SegFormer (Xie et al. 2021).

Names and shapes of parameters are those of the authors' files, mit_b0.pth and so on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.models.blocks import Block, rising
from distseg.models.channel_order import channels_first, channels_last
from distseg.models.checks import require_number
from distseg.models.depthwise import DepthwiseConv2d
from distseg.models.levels import Encoder, Level
from distseg.models.renaming import Renaming, renamed
from distseg.models.vgg import MEAN, STD
from distseg.models.weights import downloaded_file

STRIDES = (4, 8, 16, 32)
NUM_HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)  # keys and values have a grid this much coarser
MLP_RATIO = 4
BLOCK_EPSILON = 1e-6  # of the norms in and behind blocks; the others have torch's default


class Size(NamedTuple):
    """Channels and number of blocks of the four stages."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


# the authors' mix_transformer.py; the paper's table 6 has other MLP ratios for B0 than its files
SIZES = {
    "mitb0": Size((32, 64, 160, 256), (2, 2, 2, 2)),
    "mitb1": Size((64, 128, 320, 512), (2, 2, 2, 2)),
    "mitb2": Size((64, 128, 320, 512), (3, 4, 6, 3)),
    "mitb3": Size((64, 128, 320, 512), (3, 4, 18, 3)),
    "mitb4": Size((64, 128, 320, 512), (3, 8, 27, 3)),
    "mitb5": Size((64, 128, 320, 512), (3, 6, 40, 3)),
}
# files of mmsegmentation's configs/segformer
_MMSEGMENTATION = {
    "mitb0": "mit_b0_20220624-7e0fe6dd.pth",
    "mitb1": "mit_b1_20220624-02e5a6a1.pth",
    "mitb2": "mit_b2_20220624-66e8bf70.pth",
    "mitb3": "mit_b3_20220624-13b1141c.pth",
    "mitb4": "mit_b4_20220624-d588d980.pth",
    "mitb5": "mit_b5_20220624-658746d9.pth",
}
# of SegFormer's head: embed_dim in the authors' configurations
HEAD_CHANNELS = {name: 256 if name in ("mitb0", "mitb1") else 768 for name in SIZES}

# what others call the layers: transformers (its released files, and its version 5 in memory), and
# mmsegmentation, whose stages are lists of patches, blocks and a norm
_RENAMED: tuple[Renaming, ...] = (
    (r"\bsegformer\.(?:encoder\.)?", ""),
    (r"\bpatch_embeddings\.(\d)\.", lambda at: f"patch_embed{int(at[1]) + 1}."),
    (r"\bstages\.(\d)\.patch_embeddings\.", lambda at: f"patch_embed{int(at[1]) + 1}."),
    (r"\blayers\.(\d)\.0\.(?=proj|norm)", lambda at: f"patch_embed{int(at[1]) + 1}."),
    (r"\bblock\.(\d)\.", lambda at: f"block{int(at[1]) + 1}."),
    (r"\bstages\.(\d)\.blocks\.", lambda at: f"block{int(at[1]) + 1}."),
    (r"\blayers\.(\d)\.1\.(?=\d)", lambda at: f"block{int(at[1]) + 1}."),
    (r"\blayer_norm\.(\d)\.", lambda at: f"norm{int(at[1]) + 1}."),
    (r"\bstages\.(\d)\.layer_norm\.", lambda at: f"norm{int(at[1]) + 1}."),
    (r"\blayers\.(\d)\.2\.(?=weight|bias)", lambda at: f"norm{int(at[1]) + 1}."),
    (r"(?<=patch_embed\d\.)layer_norm\.", "norm."),
    (r"(?<=patch_embed\d\.)projection\.", "proj."),
    (r"\battention\.(?:self\.query|q_proj)\.", "attn.q."),
    (r"\battention\.(?:self\.key|k_proj)\.", "attn.key."),
    (r"\battention\.(?:self\.value|v_proj)\.", "attn.value."),
    (r"\battention\.(?:self\.sr|sequence_reduction\.sequence_reduction)\.", "attn.sr."),
    (r"\battention\.(?:self|sequence_reduction)\.layer_norm\.", "attn.norm."),
    (r"\battention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"\battn\.attn\.in_proj_", "attn.qkv."),
    (r"\battn\.attn\.out_proj\.", "attn.proj."),
    (r"\b(?:layer_norm_1|layernorm_before)\.", "norm1."),
    (r"\b(?:layer_norm_2|layernorm_after)\.", "norm2."),
    (r"\bmlp\.dense(?=[12]\.)", "mlp.fc"),
    (r"\bffn\.layers\.0\.", "mlp.fc1."),
    (r"\bffn\.layers\.1\.", "mlp.dwconv.dwconv."),
    (r"\bffn\.layers\.4\.", "mlp.fc2."),
)


class MixTransformer(Encoder):
    """Four stages of attention over a grid whose keys and values are coarser; no positions are
    told, a depthwise convolution in each MLP finds them at the borders.

    Any input size; maps have ceil(H / stride) rows. Cell i of a stride-s map lies on pixel s * i,
    as the authors' weights have learnt it. drop_path: probability that the last
    block's branches are left out for a sample, rising linearly from 0 at the first block. Raises
    InputError for a bad option.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, size: Size, drop_path: float = 0.1):
        super().__init__()
        require_number("segmentor.options.drop_path", drop_path, 0, 0.9)
        self.depths = size.depths
        self.levels = tuple(map(Level, size.channels, STRIDES))
        rates, before, in_channels = rising(drop_path, sum(size.depths)), 0, 3
        for stage, (channels, depth) in enumerate(zip(*size, strict=True)):
            blocks = [MixBlock(channels, stage, rates[before + i]) for i in range(depth)]
            # numbered from 1 and beside each other, as the authors' keys have it
            patches = Patches(in_channels, channels, is_first=stage == 0)
            self.add_module(f"patch_embed{stage + 1}", patches)
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(channels, eps=BLOCK_EPSILON))
            before, in_channels = before + depth, channels
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        # as the authors begin, for training from nothing
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Conv2d):
                fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
                nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> list[Tensor]:
        # fmt: off
        # sizes of maps follow from the convolutions alone, so that any image will do
        x = (image - self.mean) / self.std                   # (N, 3, H, W)
        maps = []
        for stage in range(1, len(self.levels) + 1):
            # channels last, as linear layers and norms want them: no copy from or to a convolution
            x = getattr(self, f"patch_embed{stage}")(x)      # (N, h, w, channels)
            for block in getattr(self, f"block{stage}"):
                x = block(x)                                 # (N, h, w, channels)
            x = getattr(self, f"norm{stage}")(x)             # (N, h, w, channels)
            x = channels_first(x)                            # (N, channels, h, w)
            maps.append(x)
        return maps
        # fmt: on

    def translated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        given = renamed(state, _RENAMED)
        # keys and values are one layer here, as the authors have it
        for key, tensor in given.items():
            value = given.get(key.replace(".attn.key.", ".attn.value."))
            if ".attn.qkv." in key:
                # mmsegmentation's attention is torch's own, with all three in one
                third = len(tensor) // 3
                found[key.replace(".qkv.", ".q.")] = tensor[:third]
                found[key.replace(".qkv.", ".kv.")] = tensor[third:]
            elif ".attn.key." in key and value is not None:
                found[key.replace(".key.", ".kv.")] = torch.cat([tensor, value])
            elif ".attn.value." not in key:
                # its linear layers are 1x1 convolutions
                is_1x1 = ".mlp.fc" in key and tensor.ndim == 4
                found[key] = tensor.flatten(1) if is_1x1 else tensor
        return found

    def layers_above(self, name: str) -> int:
        part, _, rest = name.partition(".")
        stage = int(part[-1]) - 1
        # blocks from this stage on: a stage's patches stand beside its first block
        from_here = sum(self.depths[stage:])
        if part.startswith("norm"):
            return from_here - self.depths[stage]
        if part.startswith("block"):
            return from_here - int(rest.split(".")[0])
        return from_here + (stage == 0)


class Patches(nn.Module):
    """Overlapping patches to tokens: (N, in, H, W) -> (N, ceil(H / 4), ceil(W / 4), channels) in
    the first stage, half of H and W in the others.
    """

    def __init__(self, in_channels: int, channels: int, is_first: bool):
        super().__init__()
        kernel, stride = (7, 4) if is_first else (3, 2)
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(channels_last(self.proj(x)))


class MixBlock(Block):
    """Attention and an MLP, each on normalised tokens and added: (N, h, w, channels)."""

    def __init__(self, channels: int, stage: int, drop_path: float):
        super().__init__(drop_path)
        self.norm1 = nn.LayerNorm(channels, eps=BLOCK_EPSILON)
        self.attn = Attention(channels, NUM_HEADS[stage], REDUCTIONS[stage])
        self.norm2 = nn.LayerNorm(channels, eps=BLOCK_EPSILON)
        self.mlp = MLP(channels)

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.kept(self.attn(self.norm1(x)))
        return x + self.kept(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Every token looks at a grid coarser by `reduction`: (N, h, w, channels), the same."""

    def __init__(self, channels: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads = num_heads
        # keys and values together, queries apart: they come from grids of two sizes
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.sr: nn.Conv2d | None = None
        # at 1/4 every token looking at every other would be most of the network's work
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        # fmt: off
        seen = x
        if self.sr is not None:
            seen = channels_last(self.sr(channels_first(x)))
            seen = self.norm(seen)                            # (N, h / r, w / r, channels)
        query = self._heads(self.q(x), 1)                     # (1, N, heads, h * w, dim)
        key_value = self._heads(self.kv(seen), 2)             # (2, N, heads, h * w / r^2, dim)
        y = F.scaled_dot_product_attention(query[0], key_value[0], key_value[1])
        y = y.transpose(1, 2).reshape(x.shape)                # (N, h, w, channels)
        return self.proj(y)
        # fmt: on

    def _heads(self, x: Tensor, count: int) -> Tensor:
        """(N, h, w, count * heads * dim) -> (count, N, heads, h * w, dim)."""
        return x.flatten(1, 2).unflatten(2, (count, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


class MLP(nn.Module):
    """Four times as wide inside, with a depthwise 3x3 and a GELU there: (N, h, w, channels)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = MLP_RATIO * channels
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        # one more level of names than layers, as the authors' keys have it
        self.dwconv = nn.ModuleDict({"dwconv": DepthwiseConv2d(hidden, 3, bias=True)})

    def forward(self, x: Tensor) -> Tensor:
        x = channels_first(self.fc1(x))  # (N, 4 * channels, h, w)
        x = channels_last(self.dwconv["dwconv"](x))
        return self.fc2(F.gelu(x))


def weights_file(name: str) -> Path:
    """The authors' ImageNet weights, or these as mmsegmentation has them. Raises InputError where
    neither file is.
    """
    size = name.removeprefix("mit")
    files = (f"mit_{size}.pth", _MMSEGMENTATION[name])
    source = "https://github.com/NVlabs/SegFormer, or https://download.openmmlab.com/mmsegmentation"
    return downloaded_file(f"MiT-{size.upper()}", files, f"{source}/v0.5/pretrain/segformer/")
