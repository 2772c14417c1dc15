"""What all learners share: torch's optimizers, each on the tensors that this rank holds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distseg.config.schema import Config, OptimizerConfig
from distseg.distributed.device import autocast_dtype
from distseg.distributed.ranks import Ranks
from distseg.models.spectral_norm import norms_of
from distseg.parallel.optimizers import LossScale, build_optimizer, clip, guarded_step
from distseg.parallel.running_statistics import RunningStatistics
from distseg.parallel.stopwatch import Stopwatch

# Where a backward begins: a tensor, and the gradient that has reached it (None: 1, for a scalar)
BackwardStart = tuple[Tensor, Tensor | None]


class TorchLearner:
    """A network already spread over the ranks, with its optimizer; see distseg.parallel.Learner.

    forward: the network with whatever exchanges its gradients. own_shards: the tensor that this
    rank holds of a parameter, which the optimizer works on; None: the parameters themselves.
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Callable[..., Any],
        optimizer: OptimizerConfig,
        config: Config,
        ranks: Ranks,
        *,
        own_shards: dict[Tensor, Tensor] | None = None,
    ):
        self.network, self._forward = network, forward
        # listed now, as under FSDP a forward puts full ones in their place
        self._named = dict(network.named_parameters())
        parameters = list(self._named.values())
        self._own_shards = own_shards or dict(zip(parameters, parameters, strict=True))
        # after the network was moved, since the state is made like the parameters
        self.optimizer = build_optimizer(network, optimizer, self._own_shards)
        self.clip_norm = optimizer.clip_norm
        self.trained = [
            self._own_shards[parameter] for parameter in parameters if parameter.requires_grad
        ]
        # on the device, so that counting waits for nothing
        self.counters = {
            name: torch.zeros((), device=ranks.device) for name in ("skips", "skips_in_a_row")
        }
        self._loss_scale = LossScale(ranks.device) if config.precision == "fp16" else None
        self._device_type = ranks.device.type
        self._autocast_dtype = autocast_dtype(config.precision)
        self._statistics = RunningStatistics(network)
        self.stopwatch = Stopwatch(ranks.device)
        if config.compile:
            network.compile()  # in place: the names in a checkpoint stay

    def __call__(self, *inputs: Tensor, num_tracked: int | None = None, **options: Any) -> Any:
        """Forward under autocast, then running statistics averaged over the ranks."""
        # timed without the averaging, in which a rank waits for the others
        with (
            self._statistics.averaged(len(inputs[0]), num_tracked),
            autocast(self._device_type, self._autocast_dtype),
            self.stopwatch.running("forward"),
        ):
            return self._forward(*inputs, **options)

    def forward_frozen(self, *inputs: Tensor, **options: bool) -> Any:
        """See Learner.forward_frozen."""
        # past DDP: its forward would prepare a reduction for a backward that is not its own; and
        # what spectral norms remember stays, as of the last forward that was for an update
        still, timed = evaluating(*norms_of(self.network)), self.stopwatch.running("forward")
        with still, timed, autocast(self._device_type, self._autocast_dtype):
            return self.network(*inputs, **options)

    def twin(self) -> nn.Module:
        """See Learner.twin: a copy, where every rank holds the whole network."""
        return copy.deepcopy(self.network).requires_grad_(False).eval()

    @torch.no_grad()
    def infer(self, network: nn.Module, *inputs: Tensor) -> Any:
        """See Learner.infer."""
        timed = self.stopwatch.running("forward")
        with evaluating(network), timed, autocast(self._device_type, self._autocast_dtype):
            output = network(*inputs)
        return output["out"] if isinstance(output, dict) else output

    def scaled(self, loss: Tensor) -> Tensor:
        """See Learner.scaled."""
        return loss if self._loss_scale is None else loss * self._loss_scale.scale.to(loss.dtype)

    def step(self, lr_factor: float) -> dict[str, Tensor]:
        """See Learner.step. Returns scalars on the device: grad_norm, skips, skips_in_a_row."""
        for group in self.optimizer.param_groups:
            # from the rate as configured: a checkpoint need not hold the present one
            group["lr"] = group["base_lr"] * lr_factor
        with self.stopwatch.running("optimizer"):
            norm, skipped = self._update()
        self.counters["skips"] += skipped
        # times 0 at an update: the row ends without a branch, which would wait for the device
        self.counters["skips_in_a_row"].add_(1).mul_(skipped)
        if self._loss_scale is None:
            return {"grad_norm": norm, **self.counters}
        # after the step: the scale that the gradients were made with has been divided out
        self._loss_scale.update(skipped)
        return {"grad_norm": norm, "loss_scale": self._loss_scale.scale, **self.counters}

    def _update(self) -> tuple[Tensor, Tensor]:
        """Clip, update, clear the gradients.

        Their norm, and 1.0 when the update was skipped, else 0.0.
        """
        self._take_gradients()
        if self._loss_scale is not None:
            self._loss_scale.unscale(self.trained)  # before the norm, which is the user's unit
        norm = clip(self.trained, self.clip_norm, self._norm_over_ranks)
        skipped = guarded_step(self.optimizer, norm)
        self.optimizer.zero_grad()
        return norm, skipped

    def _take_gradients(self) -> None:
        """Give the gradients of this step to the tensors in `trained`.

        Where parameters are not sharded, they have them.
        """

    def _norm_over_ranks(self, norm: Tensor) -> Tensor:
        """The norm of the full gradient from that of this rank's shards."""
        return norm

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """See Learner.state_dict. Optimizer tensors are named `<kind>/<parameter>`."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer_tensors(),
            "counters": self._counts(),
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """See Learner.load_state_dict. Copies into the same tensors: their memory format stays."""
        self.network.load_state_dict(state["network"])
        own_parts = {"optimizer": self._optimizer_tensors(), "counters": self._counts()}
        for part, own in own_parts.items():
            different = own.keys() ^ state[part].keys()
            if different:
                raise KeyError(f"{part} state: {sorted(different)[:4]} on one side only")
            for name, tensor in own.items():
                tensor.copy_(state[part][name])

    def _counts(self) -> dict[str, Tensor]:
        return self.counters | ({} if self._loss_scale is None else self._loss_scale.state())

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self._named.items():
            state = self.optimizer.state.get(self._own_shards[parameter], {})
            for kind, tensor in state.items():
                tensors[f"{kind}/{name}"] = self._sharded_as(parameter, tensor)
        return tensors

    def _sharded_as(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """An optimizer's tensor, as a shard where its parameter is one."""
        return tensor


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Networks in evaluation mode, and afterwards each layer in the mode that it was in."""
    # layers by themselves: some are in evaluation mode while their network trains
    layers = itertools.chain.from_iterable(network.modules() for network in networks)
    training = [layer for layer in layers if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def autocast(device_type: str, dtype: torch.dtype | None) -> Any:
    """torch.autocast, or nothing for dtype None (full precision)."""
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def dtype_of(config: Config) -> torch.dtype:
    """The type of the parameters."""
    return torch.float64 if config.precision == "fp64" else torch.float32
