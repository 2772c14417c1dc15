"""The moving average against its formula."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from distseg.parallel.full_copy import copy_with
from distseg.train.ema import MovingAverage


def learner(network: nn.Module) -> Any:
    """As much of a learner as an average looks at."""
    return SimpleNamespace(
        network=network, full_network=lambda tensors: copy_with(network, tensors)
    )


def test_the_average_follows_its_formula_and_copies_whole_numbers() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    average = MovingAverage(learner(source), decay=0.3)
    expected = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    for n in range(1, 6):
        for parameter in source.parameters():
            parameter.data += torch.randn_like(parameter)
        source(torch.randn(2, 3, 5, 5, dtype=torch.float64))  # moves the running statistics
        average.update()
        decay = min(0.3, (1 + n) / (10 + n))
        for name, tensor in source.state_dict().items():
            new = (
                decay * expected[name] + (1 - decay) * tensor
                if tensor.is_floating_point()
                else tensor
            )
            expected[name] = new.clone()
        for name, tensor in average.full_network().state_dict().items():
            assert (tensor - expected[name]).abs().max() < 1e-12, name
    assert average.full_network()[1].num_batches_tracked == 5
    assert not average.full_network().training and source.training


def test_a_loaded_average_goes_on_as_the_saved_one() -> None:
    source = nn.Linear(3, 2)
    one = MovingAverage(learner(source), decay=0.9)
    one.update()
    other = MovingAverage(learner(nn.Linear(3, 2)), decay=0.9)
    other.load_state_dict(
        {
            part: {k: t.clone() for k, t in tensors.items()}
            for part, tensors in one.state_dict().items()
        }
    )
    other._pairs = [(own, new) for (own, _), (_, new) in zip(other._pairs, one._pairs, strict=True)]
    for average in (one, other):
        average.update()
    assert torch.equal(one.full_network().weight, other.full_network().weight)
    assert int(other.num_updates) == 2
