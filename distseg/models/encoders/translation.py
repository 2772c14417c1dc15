"""Vision transformers' state dicts of other libraries, under the names of DINOv2's own files.

transformers' (Dinov2, Dinov2WithRegisters, DINOv3ViT: as released, and as its version 5 names the
same layers) and timm's (vit_*_patch14_dinov2 and _reg4_dinov2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from distseg.models.encoders.resampling import resampled, resampling

# in order; what a name is then called, wherever it stands in a key
_RENAMED = (
    (r"^(?:dinov2|dinov2_with_registers)\.", ""),
    (r"(?:(?:encoder|model)\.)?layer\.(?=\d)", "blocks."),
    (r"embeddings\.patch_embeddings(?:\.projection)?", "patch_embed.proj"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.(?=cls_token|mask_token|register_tokens)", ""),
    (r"\breg_token\b", "register_tokens"),
    (r"layernorm\.", "norm."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
    (r"attention\.(?:attention\.query|q_proj)", "attn.q"),
    (r"attention\.(?:attention\.key|k_proj)", "attn.k"),
    (r"attention\.(?:attention\.value|v_proj)", "attn.v"),
    (r"mlp\.weights_in", "mlp.w12"),
    (r"mlp\.weights_out", "mlp.w3"),
    (r"mlp\.gate_proj", "mlp.w1"),
)
# the same layer has another name where the MLP is gated
_PLAIN = ((r"mlp\.up_proj", "mlp.fc1"), (r"mlp\.down_proj", "mlp.fc2"))
_GATED = ((r"mlp\.up_proj", "mlp.w2"), (r"mlp\.down_proj", "mlp.w3"))
_FUSED = ((r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))


def translated(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names that `own` has, in its shapes; an encoder's own as it is.

    Prefixes of wrappers stay. Position embeddings for another grid of patches than the encoder's
    are resampled to it.
    """
    # by what the network has, as a file does not say of which network it is
    is_gated = "blocks.0.mlp.w3.weight" in own
    is_fused = "blocks.0.mlp.w12.weight" in own
    renamed = (*_RENAMED, *(_GATED if is_gated else _PLAIN), *(_FUSED if is_fused else ()))
    found = {_renamed(key, renamed): tensor for key, tensor in state.items()}
    if "storage_tokens" in own:
        found = {
            _renamed(key, ((r"\bregister_tokens\b", "storage_tokens"),)): found[key]
            for key in found
        }
    _join(found, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    if is_fused:
        _join(found, ("mlp.w1", "mlp.w2"), "mlp.w12")
    for key, tensor in found.items():
        last = key.rpartition(".")[2]
        if last == "mask_token":
            found[key] = tensor.reshape(1, -1)  # some have a dimension more
        if last == "pos_embed" and "pos_embed" in own:
            found[key] = _positions(tensor, own["pos_embed"].shape[1])
    return found


def _renamed(key: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in pairs:
        key = re.sub(pattern, name, key)
    return key


def _join(state: dict[str, Tensor], parts: tuple[str, ...], whole: str) -> None:
    """Put layers that another library keeps apart into the one that they are here."""
    for key in [key for key in state if f".{parts[0]}." in key]:
        keys = [key.replace(parts[0], part) for part in parts]
        first = state[key]
        # keys without a bias are as keys with zeros
        tensors = [state.pop(each, torch.zeros_like(first)) for each in keys]
        state[key.replace(parts[0], whole)] = torch.cat(tensors)


def _positions(stored: Tensor, length: int) -> Tensor:
    """Position embeddings (1, tokens, dim) as (1, length, dim): of the class token, then of a
    square grid.
    """
    grid = math.isqrt(stored.shape[1])
    if grid**2 == stored.shape[1]:
        # timm's with registers: the class token's has been added to it
        stored = torch.cat([torch.zeros_like(stored[:, :1]), stored], 1)
    grid, side = math.isqrt(stored.shape[1] - 1), math.isqrt(length - 1)
    if grid == side or grid**2 + 1 != stored.shape[1]:
        return stored  # what is no square fails by its shape
    matrix = resampling(grid, side, antialias=True)
    cells = resampled(stored[0, 1:].double().unflatten(0, (grid, grid)), matrix, matrix)
    return torch.cat([stored[:, :1], cells[None].to(stored.dtype)], 1)
