"""DeepSpeed: optimizer states, gradients and parameters of a network split over the ranks, by ZeRO
stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distseg.config.schema import Config, OptimizerConfig
from distseg.distributed.compat import (
    begin_zero_backward,
    begin_zero_micro_batch,
    keep_gathered,
    remove_forward_hooks,
)
from distseg.distributed.ranks import Ranks
from distseg.parallel.deepspeed_config import generate, initialize, stays_whole
from distseg.parallel.deepspeed_state import ZeroOptimizerState, full_tensors, gathered
from distseg.parallel.full_copy import FullCopies, copy_with
from distseg.parallel.optimizers import initial_state
from distseg.parallel.torch_learner import BackwardStart, TorchLearner


class DeepSpeedLearner(TorchLearner):
    """A network in a DeepSpeed engine of its own, with its optimizer; see distseg.parallel.Learner.

    The forward is that of the bare network, which the engine's hooks (ZeRO-3's gathers) are on, and
    not the engine's: that one prepares a reduction for the first gradient to reach its output,
    which in an adversarial step is the proxy's, and it would switch our autocast off. Stage 0
    leaves all but the gradients' exchange to TorchLearner: by itself it would take in gradients
    that are not finite.
    """

    def __init__(
        self, network: nn.Module, optimizer: OptimizerConfig, config: Config, ranks: Ranks
    ):
        self.stage = config.parallel.zero_stage
        network = network.to(ranks.device)
        super().__init__(network, network, optimizer, config, ranks)
        if self.stage > 0:
            # ZeRO updates flat pieces of parameters: the state is theirs, below
            self.optimizer.state.clear()
        # before the engine splits the parameters, of which no structure could be copied then
        self._full_copies = FullCopies(network) if self.stage == 3 else None
        self.engine = initialize(
            network, self.optimizer, generate(network, optimizer, config, ranks.world_size), ranks
        )
        if self.stage == 3 and stays_whole(network):
            # one forward and two backward passes, as between domains: the second needs them too
            keep_gathered(self.engine)
        # not before: DeepSpeed's first broadcast cannot take it; and ZeRO flattens anyway
        if self.stage == 0 and config.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # in the format that parameters have now
            for parameter, state in self.optimizer.state.items():
                state.update(initial_state(parameter, optimizer))
        # stage 3 gathers in them; else they are timers, which a copy of the network would keep
        if self.stage < 3:
            remove_forward_hooks(self.engine)
        self._zero_state: ZeroOptimizerState | None = None
        if self.stage > 0:
            self._zero_state = ZeroOptimizerState(
                self.engine, self.optimizer, optimizer, self.stage
            )

    def __call__(self, *inputs: Tensor, num_tracked: int | None = None, **options: Any) -> Any:
        """Forward under autocast, then running statistics averaged over the ranks."""
        if self.stage > 0:
            # the engine's own forward, which would say so, is never called
            begin_zero_micro_batch(self.engine)
        return super().__call__(*inputs, num_tracked=num_tracked, **options)

    def full_network(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """See Learner.full_network. At stage 3 a copy, as of this call."""
        if self._full_copies is None:
            return self.network if tensors is None else copy_with(self.network, tensors)
        values = full_tensors(self.network) if tensors is None else tensors
        return self._full_copies.make(self.network, values)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """See Learner.no_sync. From stage 2 on gradients are exchanged all the same.

        No rank has room for all.
        """
        # DeepSpeed's word for it: this is not the last micro-batch before a step
        before = self.engine.is_gradient_accumulation_boundary()
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(before)

    @staticmethod
    def backward(work: Sequence[tuple[DeepSpeedLearner, Sequence[BackwardStart]]]) -> None:
        """See distseg.parallel.backward.

        One backward of each engine, from the one scalar that it takes.
        """
        for learner, starts in reversed(work):
            # (t * g).sum() has the gradient g at t: so a start that is no scalar becomes one
            scalars = [
                tensor if gradient is None else (tensor * gradient).sum()
                for tensor, gradient in starts
            ]
            learner._backward(torch.stack(scalars).sum())

    def _backward(self, total: Tensor) -> None:
        if self.stage > 0:
            begin_zero_backward(self.engine)
            if self._loss_scale is not None:
                # a wait for the device, with fp16 alone: DeepSpeed wants a number
                scale = float(self._loss_scale.scale)
                self.engine.optimizer.override_loss_scale(scale)
                # the engine multiplies by it again; exactly, as it is a power of two
                total = total / scale
        self.engine.backward(total)

    def _update(self) -> tuple[Tensor, Tensor]:
        if self.stage == 0:
            return super()._update()
        self.engine.step()  # which unscales, clips, and skips on all ranks together
        device = self.counters["skips"].device
        norm = torch.as_tensor(
            self.engine.get_global_grad_norm(), dtype=torch.float32, device=device
        )
        return norm, torch.tensor(float(self.engine.optimizer.overflow), device=device)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """See Learner.state_dict.

        Full tensors on every rank, named as under DDP, whatever the stage.
        """
        # the network again, as under stage 3 its own state_dict has empty tensors
        return super().state_dict() | {"network": full_tensors(self.network)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """See Learner.load_state_dict. Called on every rank, with the same tensors."""
        with gathered(list(self.network.parameters()), changed=True):
            super().load_state_dict(state)
        if self._zero_state is not None:
            # ZeRO updates flat fp32 copies, which would overwrite what was loaded at the next step
            self.engine.optimizer.refresh_fp32_params()
            self._zero_state.set(self._named, state["optimizer"])

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return (
            super()._optimizer_tensors()
            if self._zero_state is None
            else self._zero_state.get(self._named)
        )
