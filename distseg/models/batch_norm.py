"""Batch normalisation whose statistics can be frozen for good, and folded into the convolution
before it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import InputError

MODES = ("per_rank", "frozen")


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with `frozen`: it uses the stored statistics, and no .train() undoes that."""

    frozen = False

    def train(self, mode: bool = True) -> BatchNorm2d:
        return super().train(mode and not self.frozen)


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(x)) for a convolution without bias: a single convolution, unless the batch's
    statistics are used.

    Then the scale goes into the weights and the rest into a bias, so that neither time nor the
    memory of a saved activation is spent on the normalisation. Gradients reach all parameters as
    they do otherwise.
    """
    if norm.training:
        return norm(conv(x))
    assert norm.running_mean is not None and norm.running_var is not None
    # fmt: off
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (channels,)
    weight = conv.weight * scale.view(-1, 1, 1, 1)               # (channels, in, k, k)
    bias = norm.bias - norm.running_mean * scale                 # (channels,)
    # fmt: on
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def set_batch_norm(module: nn.Module, mode: str) -> None:
    """Choose where the statistics of every batch normalisation in `module` come from.

    mode: "per_rank", the batch of the rank at hand; "frozen", the stored statistics, with scale and
    shift not trained either. Raises InputError for another mode.
    """
    if mode not in MODES:
        raise InputError(
            f"batch_norm={mode}", f"one of: {', '.join(MODES)}", "correct segmentor.batch_norm"
        )
    for layer in module.modules():
        if isinstance(layer, BatchNorm2d):
            layer.frozen = mode == "frozen"
            layer.requires_grad_(not layer.frozen)
            layer.train(module.training)
