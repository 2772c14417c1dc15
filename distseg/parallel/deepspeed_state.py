"""Full tensors out of, and into, what DeepSpeed has split over the ranks.

As checkpoints of any strategy hold them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distseg.config.schema import OptimizerConfig
from distseg.distributed.compat import flat_zero_parameters, link_zero_optimizer_state
from distseg.parallel.optimizers import initial_state


class ZeroOptimizerState:
    """An optimizer's state from ZeRO's stage 1 on, as full tensors; every call is one of all ranks.

    Stages 1 and 2 keep, for each group of parameters, one flat piece a rank; stage 3 flat pieces of
    its own subgroups. The state is made at once, so that a checkpoint has the same names at every
    step.
    """

    def __init__(
        self, engine: Any, optimizer: torch.optim.Optimizer, config: OptimizerConfig, stage: int
    ):
        self._optimizer, self._stage = optimizer, stage
        if stage == 3:
            pieces = flat_zero_parameters(engine)
        else:
            pieces = list(itertools.chain(*(group["params"] for group in optimizer.param_groups)))
        for piece in pieces:
            optimizer.state[piece].update(initial_state(piece, config))
        if stage < 3:
            link_zero_optimizer_state(engine)
        self._kinds = tuple(next(iter(optimizer.state.values())))

    def get(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the full tensors, on every rank, named `<kind>/<parameter>`."""
        tensors = {}
        for name, parameter in parameters.items():
            for kind in self._kinds if parameter.requires_grad else ():
                tensors[f"{kind}/{name}"] = self._get(parameter, kind)
        return tensors

    def set(self, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's share of what `get` gave."""
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            self._set(parameters[name], kind, tensor)

    def _get(self, parameter: Tensor, kind: str) -> Tensor:
        if kind == "step":  # one for each flat piece; all parameters are updated together
            return next(iter(self._optimizer.state.values()))[kind].clone()
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, kind)

    def _set(self, parameter: Tensor, kind: str, value: Tensor) -> None:
        if kind == "step":
            for state in self._optimizer.state.values():
                state[kind].copy_(value)
        elif self._stage < 3:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value, kind)
        else:
            from deepspeed.utils import safe_get_local_optimizer_state

            own = safe_get_local_optimizer_state(parameter, kind)
            # DeepSpeed pads the last rank's
            padded = value.new_zeros(own.numel() * torch.distributed.get_world_size())
            padded[: value.numel()] = value.flatten()
            own.copy_(padded.view(-1, own.numel())[torch.distributed.get_rank()])


def full_tensors(network: nn.Module) -> dict[str, Tensor]:
    """A network's state_dict with full parameters, on every rank; called on all of them."""
    tensors = network.state_dict()
    for name, parameter in network.named_parameters():
        if is_split(parameter):
            with gathered([parameter]):
                tensors[name] = parameter.detach().clone()
    return tensors


def gathered(parameters: list[nn.Parameter], changed: bool = False) -> Any:
    """A context in which split parameters are full.

    `changed`: what the main rank makes of them is split after it.
    """
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0 if changed else None)


def is_split(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has taken a parameter over."""
    return hasattr(parameter, "ds_id")
