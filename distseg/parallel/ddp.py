"""DistributedDataParallel: every rank holds the whole network, gradients are averaged as backward goes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distseg.config import Config, OptimizerConfig
from distseg.device import autocast_dtype
from distseg.distributed import Ranks, all_reduce_sum
from distseg.optimizers import LossScale, build_optimizer, clip, guarded_step

# torch 2.13 renamed the argument
_BROADCAST = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_BROADCAST: dict[str, Any] = {"forward_sync_buffers" if _BROADCAST else "broadcast_buffers": False}


class DDPLearner:
    """A network under DDP with its optimizer; see distseg.parallel.Learner."""

    def __init__(self, network: nn.Module, optimizer: OptimizerConfig, config: Config, ranks: Ranks):
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.network = network.to(ranks.device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.network, optimizer)
        self.clip_norm = optimizer.clip_norm
        self.counters = {name: torch.zeros((), device=ranks.device) for name in ("skips", "skips_in_a_row")}
        self._loss_scale = LossScale(ranks.device) if config.precision == "fp16" else None
        self._device_type = ranks.device.type
        self._autocast_dtype = autocast_dtype(config.precision)
        self.trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self._batch_norms = [m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        # Running statistics are averaged below, once a forward; DDP's own broadcast would keep only rank 0's.
        self._ddp = DistributedDataParallel(
            self.network,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            **_NO_BUFFER_BROADCAST,
            gradient_as_bucket_view=True,
        )
        if config.compile:
            self.network.compile()  # in place: the names in a checkpoint stay

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward through DDP under autocast, then running statistics averaged over the ranks."""
        statistics = self._statistics()
        before = torch.cat(statistics) if statistics else None
        with autocast(self._device_type, self._autocast_dtype):
            outputs = self._ddp(*inputs)
        if before is not None:
            self._average_statistics(statistics, before)
        return outputs

    def frozen(self, *inputs: Tensor) -> Any:
        """See Learner.frozen."""
        with autocast(self._device_type, self._autocast_dtype):
            return self.network(*inputs)

    def _statistics(self) -> list[Tensor]:
        """The running statistics that a forward moves."""
        moving = [module for module in self._batch_norms if module.training]
        return [b for module in moving for b in (module.running_mean, module.running_var) if b is not None]

    def _average_statistics(self, statistics: list[Tensor], before: Tensor) -> None:
        """Batch norm's running statistics become the mean over the ranks, so every rank holds the same network.

        They are linear in the batches' statistics: their mean is what one process with all the data would keep,
        but for the variance between the ranks' means. Not finite on any rank: all keep those `before` the forward.
        """
        mean = all_reduce_sum(torch.cat(statistics)).div_(torch.distributed.get_world_size())
        kept = torch.where(mean.isfinite().all(), mean, before)
        for buffer, values in zip(statistics, kept.split([b.numel() for b in statistics]), strict=True):
            # .data: autograd kept the buffer for the backward, which in training reads the batch's statistics instead
            buffer.data.copy_(values)

    def scaled(self, loss: Tensor) -> Tensor:
        """See Learner.scaled."""
        return loss if self._loss_scale is None else loss * self._loss_scale.scale.to(loss.dtype)

    def no_sync(self) -> AbstractContextManager[None]:
        """See Learner.no_sync."""
        return self._ddp.no_sync()

    @staticmethod
    def backward(work: Sequence[tuple[DDPLearner, Sequence[tuple[Tensor, Tensor | None]]]]) -> None:
        """See distseg.parallel.backward: ONE backward into the parameters of all learners.

        Autograd runs the graph made last first: the discriminator's gradients are ready, and their all-reduce under
        way, before the segmentor's backward begins; each DDP waits for its own only at the very end. Naming the
        parameters leaves out every gradient that nobody asked for, such as the one to the fake label maps.
        """
        parameters = [parameter for learner, _ in work for parameter in learner.trained]
        roots, gradients = zip(*(root for _, roots in work for root in roots), strict=True)
        torch.autograd.backward(roots, gradients, inputs=parameters)

    def step(self, lr_factor: float) -> dict[str, Tensor]:
        """See Learner.step. Returns scalars on the device: grad_norm, skips, skips_in_a_row."""
        if self._loss_scale is not None:
            self._loss_scale.unscale(self.trained)
        norm = clip(self.trained, self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        skipped = guarded_step(self.optimizer, norm)
        self.counters["skips"] += skipped
        self.counters["skips_in_a_row"].add_(1).mul_(skipped)
        self.optimizer.zero_grad()
        if self._loss_scale is None:
            return {"grad_norm": norm, **self.counters}
        self._loss_scale.update(skipped)
        return {"grad_norm": norm, "loss_scale": self._loss_scale.scale, **self.counters}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """See Learner.state_dict. Optimizer tensors are named `<kind>/<parameter>`."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer_tensors(),
            "counters": self._counts(),
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """See Learner.load_state_dict. Copies into the existing tensors: their memory format stays."""
        self.network.load_state_dict(state["network"])
        for part in ("optimizer", "counters"):
            own = self._optimizer_tensors() if part == "optimizer" else self._counts()
            if own.keys() != state[part].keys():
                raise KeyError(f"{part} state: {sorted(own.keys() ^ state[part].keys())[:4]} on one side only")
            for name, tensor in own.items():
                tensor.copy_(state[part][name])

    def _counts(self) -> dict[str, Tensor]:
        return self.counters | ({} if self._loss_scale is None else self._loss_scale.state())

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        states = self.optimizer.state.items()
        return {f"{kind}/{names[p]}": tensor for p, state in states for kind, tensor in state.items()}


def autocast(device_type: str, dtype: torch.dtype | None) -> Any:
    """torch.autocast, or nothing for dtype None (full precision)."""
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)
