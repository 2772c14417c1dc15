"""Batch norm's running statistics: of which images they are, and kept equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distseg.distributed.compat import BATCH_NORM
from distseg.distributed.ranks import all_reduce_sum
from distseg.parallel.sync_batch_norm import SynchronisedBatchNorm2d, track
from shards.errors import InputError


class RunningStatistics:
    """A network's running means and variances, where its copies see different images."""

    def __init__(self, network: nn.Module):
        self._layers = [layer for layer in network.modules() if isinstance(layer, BATCH_NORM)]
        for layer in self._layers:
            # for good, though few forwards need it: torch.compile sees no hook that comes later
            layer.register_forward_pre_hook(_track_first)

    @contextmanager
    def averaged(self, num_images: int, num_tracked: int | None = None) -> Iterator[None]:
        """Around one forward of num_images: what it moved becomes the mean over the ranks, so every
        rank holds the same network.

        Running statistics are linear in the batches' statistics: their mean is what one process
        with all the data would keep, but for the variance between the ranks' means. Not finite on
        any rank: all keep those of before. num_tracked: they are of so many of the first images,
        and the normalisation of all; None: they are of all.
        """
        layers = [layer for layer in self._layers if layer.training and layer.track_running_stats]
        buffers: list[Tensor] = []
        for layer in layers:
            buffers += (layer.running_mean, layer.running_var)  # type: ignore[arg-type]
        # one flat copy; nothing to do where all layers are frozen
        before = torch.cat(buffers) if buffers else None
        with _tracking(layers, num_images, num_tracked):
            yield
        if before is not None:
            _average(buffers, before)


@contextmanager
def _tracking(
    layers: Sequence[nn.Module], num_images: int, num_tracked: int | None
) -> Iterator[None]:
    """Within it, these layers track that many of the first images; None: all, as they do anyway."""
    if num_tracked is None:
        yield
        return
    for layer in layers:
        # torch's own switch: the layer normalises by its input and leaves its buffers to the hook
        layer.track_running_stats = False  # type: ignore[assignment]
        layer.tracked_share = (num_tracked, num_images)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True  # type: ignore[assignment]
            layer.tracked_share = None  # type: ignore[assignment]


@torch.no_grad()
def _track_first(layer: nn.Module, inputs: tuple[Tensor]) -> None:
    """Before a layer's forward: take the first rows of its input into its running statistics."""
    share = getattr(layer, "tracked_share", None)
    if share is None or not layer.training:
        return
    (num_tracked, num_images), x = share, inputs[0]
    is_over_ranks = isinstance(layer, SynchronisedBatchNorm2d | nn.SyncBatchNorm)
    num_ranks = torch.distributed.get_world_size() if is_over_ranks else 1
    # a network may hold several rows of an image, one after the other
    num_rows, rest = divmod(len(x) * num_tracked, num_images)
    first = x[:num_rows]
    first = first if x.dtype == torch.float64 else first.float()  # sums of bf16 would lose digits
    count = first.numel() // first.shape[1] * num_ranks
    if rest or count < 2:
        got = f"batch normalisation of an input of {tuple(x.shape)} for {num_images} images, "
        needed = "images one after the other, and at least two values of each channel"
        action = "take more labelled images at a time, or write consistency.running_statistics=all"
        raise InputError(f"{got}{num_tracked} of them labelled", needed, action)
    variance, mean = torch.var_mean(first, [0, *range(2, x.ndim)], correction=0)
    if num_ranks > 1:
        of_rank, mean = mean, all_reduce_sum(mean.clone()) / num_ranks
        # and the variance between the ranks, so that it is that of all their images together
        variance = all_reduce_sum(variance + (of_rank - mean).square()) / num_ranks
    track(layer, mean, variance, count)


def _average(buffers: list[Tensor], before: Tensor) -> None:
    # one message for all layers: each is small, and latency would count
    mean = all_reduce_sum(torch.cat(buffers)).div_(torch.distributed.get_world_size())
    # on the device, and by what all ranks hold: no wait, and no rank decides otherwise
    kept = torch.where(mean.isfinite().all(), mean, before)
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, values in zip(buffers, kept.split(sizes), strict=True):
        # .data: autograd kept the buffer for the backward, which in training reads the batch's
        # statistics instead
        buffer.data.copy_(values)
