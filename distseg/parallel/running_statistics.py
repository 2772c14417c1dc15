"""Batch norm's running statistics, kept equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distseg.distributed.ranks import all_reduce_sum


class RunningStatistics:
    """The running means and variances of a network whose copies on the ranks see different images."""

    def __init__(self, network: nn.Module):
        self._layers = [
            m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Around one forward: what it moved becomes the mean over the ranks, so every rank holds
        the same network.

        Running statistics are linear in the batches' statistics: their mean is what one process
        with all the data would keep, but for the variance between the ranks' means. Not finite on
        any rank: all keep those of before.
        """
        moving = [layer for layer in self._layers if layer.training]
        buffers = [
            b for layer in moving for b in (layer.running_mean, layer.running_var) if b is not None
        ]
        before = torch.cat(buffers) if buffers else None
        yield
        if before is not None:
            _average(buffers, before)


def _average(buffers: list[Tensor], before: Tensor) -> None:
    mean = all_reduce_sum(torch.cat(buffers)).div_(torch.distributed.get_world_size())
    kept = torch.where(mean.isfinite().all(), mean, before)
    for buffer, values in zip(buffers, kept.split([b.numel() for b in buffers]), strict=True):
        # .data: autograd kept the buffer for the backward, which in training reads the batch's
        # statistics instead
        buffer.data.copy_(values)
