"""An exponential moving average of a network's parameters and buffers, for evaluation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """average = decay * average + (1 - decay) * network after every update; whole-number buffers are copied.

    `network` is the averaged copy, in evaluation mode. The decay warms up as (1 + n) / (10 + n) after n
    updates, so that the initial weights are soon forgotten (the rule of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, source: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(source).eval().requires_grad_(False)
        self._source = source
        self.num_updates = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the source's present state."""
        self.num_updates += 1
        n = int(self.num_updates)
        decay = min(self.decay, (1 + n) / (10 + n))
        own, new = _tensors(self.network), _tensors(self._source)
        floating = [(a, b) for a, b in zip(own, new, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], 1.0 - decay)
        for a, b in zip(own, new, strict=True):
            if not a.is_floating_point():
                a.copy_(b)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The averaged network's tensors and the number of updates."""
        return {"network": self.network.state_dict(), "counters": {"num_updates": self.num_updates}}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy in what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.num_updates.copy_(state["counters"]["num_updates"])


def _tensors(network: nn.Module) -> list[Tensor]:
    return list(network.state_dict(keep_vars=False).values())
