"""Plain copies of a network, with all its parameters, where the ranks hold shards of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distseg.parallel.parameter_shards import load_full


class FullCopies:
    """Makes full copies of a network; itself made of it before it is sharded.

    Keeps its structure on the meta device, and no memory: a second network would cost what sharding
    saves.
    """

    def __init__(self, network: nn.Module):
        # copied with tensors of the meta device in place of its own, or there would be two for a
        # moment: more than a large network's steps take
        tensors: dict[int, Any] = {
            id(it): torch.empty_like(it, device="meta") for it in network.buffers()
        }
        for parameter in network.parameters():
            structure = torch.empty_like(parameter, device="meta")
            tensors[id(parameter)] = nn.Parameter(structure, requires_grad=False)
        self._structure = copy.deepcopy(network, tensors)

    def make(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A plain network with these values of its state_dict, joined if sharded; called on every
        rank.

        network: the one that was sharded since, which has the buffers that no state_dict holds.
        """
        device = next(iter(tensors.values())).device
        # to_empty leaves garbage everywhere: buffers without a name in state_dict come from the
        # network, all else from the tensors
        full = copy.deepcopy(self._structure).to_empty(device=device)
        for own, buffer in zip(full.buffers(), network.buffers(), strict=True):
            own.copy_(buffer)
        load_full(full, tensors)
        return full


def copy_with(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network whose parameters are not sharded, with these values of its state_dict."""
    copied = copy.deepcopy(network)
    copied.load_state_dict(tensors)
    return copied
