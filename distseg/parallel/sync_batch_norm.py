"""Batch normalisation over the images of all ranks, on CPUs and GPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distseg.distributed.compat import SYNC_BATCH_NORM_FUNCTION
from distseg.distributed.ranks import all_reduce_sum
from distseg.models.batch_norm import BatchNorm2d


class SynchronisedBatchNorm2d(BatchNorm2d):
    """A BatchNorm2d whose statistics in training are those of all ranks' images, with the gradients
    that follow.

    Every rank must hold as many values, as equal shares of a batch do. On a GPU this is what
    nn.SyncBatchNorm runs; torch has nothing for the CPU, so there it is written out: mean and
    variance in two all-reduces, and two more in the backward.

    Not nn.SyncBatchNorm itself on the GPU: the layer is chosen when the network is built, before
    the device is known, and nn.SyncBatchNorm raises ValueError on a CPU, as does DDP around a
    network that contains one (torch 2.13.0).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or dist.get_world_size() == 1:
            return super().forward(x)
        # the rest of nn.BatchNorm2d.forward is not run
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        if x.is_cuda:
            return SYNC_BATCH_NORM_FUNCTION.apply(
                x,
                self.weight,
                self.bias,
                self.running_mean if self.track_running_stats else None,
                self.running_var if self.track_running_stats else None,
                self.eps,
                self.momentum,
                dist.group.WORLD,
                dist.get_world_size(),
            )
        return self._normalised_on_cpu(x)

    def _normalised_on_cpu(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()  # sums of bf16 would lose digits
        mean = _over_ranks(wide.mean((0, 2, 3)))
        centred = wide - mean[:, None, None]
        # from centred values: E[x^2] - E[x]^2 cancels where the mean is large
        variance = _over_ranks(centred.square().mean((0, 2, 3)))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), count)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        # as torch has it: unbiased in the running variance, biased where it normalises
        unbiased = variance * (count / max(1, count - 1))
        for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            kept.lerp_(new.to(kept.dtype), self.momentum)  # type: ignore[union-attr, arg-type]


def synchronise(network: nn.Module) -> int:
    """Make every batch normalisation of a network one over all ranks; returns their number."""
    # exactly this class: a layer that is synchronised already is not counted twice
    layers = [layer for layer in network.modules() if type(layer) is BatchNorm2d]
    for layer in layers:
        layer.__class__ = SynchronisedBatchNorm2d  # the same parameters, buffers and names
    return len(layers)


class _Sum(torch.autograd.Function):
    """The sum over the ranks.

    The gradient is the sum of all ranks' gradients, which all depend on it.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        # a copy: the all-reduce works in place, and autograd still has this tensor
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


def _over_ranks(local_mean: Tensor) -> Tensor:
    return _Sum.apply(local_mean) / dist.get_world_size()
