"""How networks are measured, and the table that they are printed in."""

from __future__ import annotations

import torch
from rich import box
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distseg.models.connections import Filled, Forward

SIZE_PX = 321  # of the images whose work is counted: the crop of Hung et al. 2018


def num_parameters(network: nn.Module) -> int:
    """All of them, trained or frozen; shared ones once."""
    return sum(parameter.numel() for parameter in network.parameters())


def gflop(network: nn.Module, forward: Forward, channels_and_size: tuple[int, int]) -> float:
    """10^9 operations of one forward, a multiply-add counted as two; its values are not used."""
    channels, size = channels_and_size
    counter = FlopCounterMode(display=False)
    # fake tensors, which call themselves CPU tensors: under autocast the meta device is refused
    # attention by plain products: its kernel for CPUs is not counted (torch 2.13.0)
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        forward(Filled(network, torch.empty), torch.empty(1, channels, size, size))
    return counter.get_total_flops() / 1e9


def table(title: str, text_columns: tuple[str, ...]) -> Table:
    """An empty table whose first columns are text."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in text_columns:
        made.add_column(column, no_wrap=True)
    return made
