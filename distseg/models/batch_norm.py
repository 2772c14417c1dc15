"""Batch normalisation whose statistics can be frozen for good."""

from __future__ import annotations

from torch import nn

from shards.errors import InputError

MODES = ("per_rank", "frozen")


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with `frozen`: the stored statistics are used, and a later .train() does not undo it."""

    frozen = False

    def train(self, mode: bool = True) -> BatchNorm2d:
        return super().train(mode and not self.frozen)


def set_batch_norm(module: nn.Module, mode: str) -> None:
    """Choose where the statistics of every batch normalisation in `module` come from.

    mode: "per_rank", the batch of the rank at hand; "frozen", the stored statistics, with scale and shift
    not trained either. Raises InputError for another mode.
    """
    if mode not in MODES:
        raise InputError(f"batch_norm={mode}", f"one of: {', '.join(MODES)}", "correct segmentor.batch_norm")
    for layer in module.modules():
        if isinstance(layer, BatchNorm2d):
            layer.frozen = mode == "frozen"
            layer.requires_grad_(not layer.frozen)
            layer.train(module.training)
