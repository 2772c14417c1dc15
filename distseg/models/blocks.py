"""The repeated layers of deep encoders: stochastic depth, and activations computed twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from shards.errors import InputError

# dear to compute again, and small beside what lies between them
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class Block(nn.Module):
    """A layer of an encoder that has many alike; subclasses write `compute`.

    drop_path: probability that a residual branch is left out for a sample (stochastic depth, Huang
    et al. 2016). Its forward is `compute`, whose activations are kept for the backward, or computed
    again there with the same random numbers; see checkpoint_activations. There must be no batch
    normalisation inside: its statistics would move twice.
    """

    recomputed = "none"

    def __init__(self, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path

    def compute(self, *inputs: Any) -> Tensor:
        """What the block does."""
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Tensor:
        """See compute."""
        if self.recomputed == "none" or not torch.is_grad_enabled():
            return self.compute(*inputs)
        contexts = noop_context_fn if self.recomputed == "blocks" else _saving_products
        return checkpoint(self.compute, *inputs, use_reentrant=False, context_fn=contexts)

    def kept(self, branch: Tensor) -> Tensor:
        """A residual branch (N, ...), zero for the samples that leave it out, and larger by as much
        for the others.
        """
        if not (self.training and self.drop_path):
            return branch
        # of torch's generator, which the trainer seeds by the step: a resumed run draws the same
        shape = [len(branch)] + [1] * (branch.ndim - 1)
        kept = torch.rand(shape, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


def rising(drop_path: float, depth: int) -> list[float]:
    """The rates of so many blocks in a row: from 0 at the first to `drop_path` at the last."""
    return [drop_path * index / max(1, depth - 1) for index in range(depth)]


def checkpoint_activations(network: nn.Module, recomputed: str) -> None:
    """Choose what the blocks of a network compute again in the backward, to save memory.

    recomputed: "none"; "blocks", all that is inside of one (Chen et al. 2016); "selective", all but
    the results of matrix products and of attention. Values and gradients stay as they are. Raises
    InputError for a network without blocks, unless it is "none".
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    if recomputed != "none" and not blocks:
        got = f"segmentor.activation_checkpointing={recomputed} for a network without such blocks"
        needed = "a segmentor on a transformer or a ConvNeXt, such as dpt_vitb14"
        raise InputError(got, needed, "write segmentor.activation_checkpointing=none")
    for block in blocks:
        block.recomputed = recomputed


def _saving_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    is_product = operation in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE
