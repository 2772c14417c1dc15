"""Batch norm's running statistics, kept equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distseg.distributed.compat import BATCH_NORM
from distseg.distributed.ranks import all_reduce_sum


class RunningStatistics:
    """A network's running means and variances, where its copies see different images."""

    def __init__(self, network: nn.Module):
        self._layers = [layer for layer in network.modules() if isinstance(layer, BATCH_NORM)]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Around one forward: what it moved becomes the mean over the ranks, so every rank holds
        the same network.

        Running statistics are linear in the batches' statistics: their mean is what one process
        with all the data would keep, but for the variance between the ranks' means. Not finite on
        any rank: all keep those of before.
        """
        buffers: list[Tensor] = []
        for layer in self._layers:
            for buffer in (layer.running_mean, layer.running_var):
                if layer.training and buffer is not None:
                    buffers.append(buffer)
        before = torch.cat(buffers) if buffers else None
        yield
        if before is not None:
            _average(buffers, before)


def _average(buffers: list[Tensor], before: Tensor) -> None:
    mean = all_reduce_sum(torch.cat(buffers)).div_(torch.distributed.get_world_size())
    kept = torch.where(mean.isfinite().all(), mean, before)
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, values in zip(buffers, kept.split(sizes), strict=True):
        # .data: autograd kept the buffer for the backward, which in training reads the batch's
        # statistics instead
        buffer.data.copy_(values)
