"""Batch norm's running statistics: of which images they are, and kept equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distseg.distributed.compat import BATCH_NORM
from distseg.distributed.ranks import all_reduce_sum
from distseg.parallel.sync_batch_norm import SynchronisedBatchNorm2d
from shards.errors import InputError

_OVER_RANKS = (SynchronisedBatchNorm2d, nn.SyncBatchNorm)


class RunningStatistics:
    """A network's running means and variances, where its copies see different images."""

    def __init__(self, network: nn.Module):
        self._layers = [layer for layer in network.modules() if isinstance(layer, BATCH_NORM)]
        for layer in self._layers:
            # for good, though few forwards need them: torch.compile sees no hook that comes later
            layer.register_forward_pre_hook(_first_part)
            layer.register_forward_hook(_with_the_rest)

    @contextmanager
    def averaged(self, num_images: int, num_tracked: int | None = None) -> Iterator[None]:
        """Around one forward of num_images: what it moved becomes the mean over the ranks, so every
        rank holds the same network.

        Running statistics are linear in the batches' statistics: their mean is what one process
        with all the data would keep, but for the variance between the ranks' means. Not finite on
        any rank: all keep those of before. num_tracked: so many of the first images, or below 0 of
        the last, are normalised by themselves and tracked, the others by themselves and not; None:
        all together.
        """
        # layers by themselves: frozen ones are in evaluation mode while their network trains
        layers = [layer for layer in self._layers if layer.training]
        buffers: list[Tensor] = []
        for layer in layers:
            for buffer in (layer.running_mean, layer.running_var):
                if buffer is not None:
                    buffers.append(buffer)
        # one flat copy; nothing to do where all layers are frozen
        before = torch.cat(buffers) if buffers else None
        with _apart(layers, num_images, num_tracked):
            yield
        if before is not None:
            _average(buffers, before)


@contextmanager
def _apart(layers: Sequence[nn.Module], num_images: int, num_tracked: int | None) -> Iterator[None]:
    """Within it these layers take so many images apart, see `averaged`; None: all together."""
    if num_tracked is None:
        yield
        return
    for layer in layers:
        layer.tracked_share = (num_tracked, num_images)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.tracked_share = None  # type: ignore[assignment]


# Not the running statistics alone, with one normalisation for all: a layer would then keep
# statistics of features that the layers before it never give when they use theirs. In a deep
# network that is another network: after 25 such steps a teacher was sure of nothing any more.
def _first_part(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """Before a layer's forward: leave it the rows that it tracks, and put the others aside."""
    share = getattr(layer, "tracked_share", None)
    if share is None or not layer.training:
        return None
    (num_tracked, num_images), x = share, inputs[0]
    # a network may hold several rows of an image, one after the other
    num_rows, odd = divmod(len(x) * abs(num_tracked), num_images)
    cut = num_rows if num_tracked > 0 else len(x) - num_rows
    # not by two slices, each of which has a gradient as large as x
    first, rest = x.split([cut, len(x) - cut])
    # a layer over all ranks' images has as many more of them
    num_shares = dist.get_world_size() if isinstance(layer, _OVER_RANKS) else 1
    if odd or min(first.numel(), rest.numel()) * num_shares < 2 * x.shape[1]:
        got = f"batch normalisation of an input of {tuple(x.shape)} for {num_images} images, "
        needed = (
            "images one after the other, and at least two values of each channel in either kind"
        )
        action = "take more images at a time, or write consistency.batch_norm=joint, or "
        action += "adaptation.batch_norm=joint"
        got += f"{abs(num_tracked)} of them of the one kind"
        raise InputError(got, needed, action)
    tracked, others = (first, rest) if num_tracked > 0 else (rest, first)
    # on the layer itself, which a copy of the network has its own of
    layer.rest = others
    return (tracked,)


def _with_the_rest(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
    """After it: the same for the others, which are not tracked."""
    rest = getattr(layer, "rest", None)
    if rest is None:
        return None
    layer.rest, is_tracking = None, layer.track_running_stats  # type: ignore[assignment]
    # torch's own switch; past the hooks, which have seen this input
    layer.track_running_stats = False  # type: ignore[assignment]
    others = layer.forward(rest)
    layer.track_running_stats = is_tracking
    num_tracked, _ = layer.tracked_share  # type: ignore[misc]
    return torch.cat([output, others] if num_tracked > 0 else [others, output])


def _average(buffers: list[Tensor], before: Tensor) -> None:
    # one message for all layers: each is small, and latency would count
    mean = all_reduce_sum(torch.cat(buffers)).div_(dist.get_world_size())
    # on the device, and by what all ranks hold: no wait, and no rank decides otherwise
    kept = torch.where(mean.isfinite().all(), mean, before)
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, values in zip(buffers, kept.split(sizes), strict=True):
        # .data: autograd kept the buffer for the backward, which in training reads the batch's
        # statistics instead
        buffer.data.copy_(values)
