"""Whole copies of a network whose parameters are split over the ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from distseg.parallel.slices import fill


class WholeCopy:
    """Made of a network before it is split; keeps its structure, and no memory."""

    def __init__(self, network: nn.Module):
        self._plan = copy.deepcopy(network).to("meta").requires_grad_(False)

    def __call__(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A plain network with these values of its state_dict, joined if sliced; called on every
        rank.

        network: the one that was split since, which has the buffers that no state_dict holds.
        """
        buffers = list(network.buffers())
        whole = copy.deepcopy(self._plan).to_empty(device=next(iter(tensors.values())).device)
        for own, buffer in zip(whole.buffers(), buffers, strict=True):
            own.copy_(buffer)
        fill(whole, tensors)
        return whole


def with_values(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network whose parameters are whole, with these values of its state_dict."""
    copied = copy.deepcopy(network)
    copied.load_state_dict(tensors)
    return copied
