"""Spectral normalisation (Miyato et al. 2018): each weight is divided by its largest singular
value, so that no layer can stretch its input.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from shards.errors import InputError

LAYERS = (nn.Conv2d, nn.Linear)


class SpectralNorm(nn.Module):
    """torch's, in full precision: one power iteration a call in training mode, none in evaluation.

    Its singular vectors are buffers, a function of the weights since the start: all ranks that hold
    the same weights hold the same vectors.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, weight: Tensor) -> Tensor:
        # autocast would round the vectors' products, and not all of its types go together
        with torch.autocast(weight.device.type, enabled=False):
            return self.norm(weight)


def normalise(network: nn.Module, asked: bool) -> None:
    """Give every convolution and linear layer a spectral norm, where that is asked for.

    Raises InputError for an option that is neither true nor false.
    """
    if not isinstance(asked, bool):
        got = f"discriminator.options.spectral_norm={asked}"
        raise InputError(got, "true or false", "true: weights are divided by their largest factor")
    if not asked:
        return
    # a list first: each norm is a module that is added to those looked at
    for layer in [layer for layer in network.modules() if isinstance(layer, LAYERS)]:
        parametrizations.spectral_norm(layer)
        chain: Any = layer.parametrizations.weight  # type: ignore[union-attr]
        chain[0] = SpectralNorm(chain[0])


def norms_of(network: nn.Module) -> list[nn.Module]:
    """The spectral norms in a network."""
    return [layer for layer in network.modules() if isinstance(layer, SpectralNorm)]


def normalised_once(network: nn.Module) -> AbstractContextManager[None]:
    """Around a forward, in which every weight is normalised once, however often it is used."""
    # torch normalises at every use of a weight, so each label map would be another iteration
    return parametrize.cached() if norms_of(network) else nullcontext()
