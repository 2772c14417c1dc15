"""torch.compile takes every network as one graph, in training as in evaluation: no operation of
theirs reads a value of the device, and none is left to Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distseg.models import (
    DISCRIMINATORS,
    SEGMENTORS,
    build_discriminator,
    build_segmentor,
    resnet,
)
from distseg.parallel.running_statistics import RunningStatistics
from tests.test_export import FEWER_BLOCKS
from tests.test_systems import narrow_options

# tracing takes Python long: of each kind this one at each change, with few blocks
QUICK = "deeplabv2_resnet101"
JUDGES = [
    name if name == "fully_convolutional" else pytest.param(name, marks=pytest.mark.slow)
    for name in DISCRIMINATORS
]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Nothing is remembered from other networks, nor by later tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_few_blocks_of_a_deep_segmentor_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "NUM_BLOCKS", {101: FEWER_BLOCKS[50]})
    check_segmentor(QUICK, (True,))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTORS)
def test_every_segmentor_is_one_graph(name: str) -> None:
    check_segmentor(name, (True, False))


def check_segmentor(name: str, modes: tuple[bool, ...]) -> None:
    """Logits and gradients of the graph are the network's, with hooks of a run on it."""
    torch.manual_seed(0)
    segmentor = build_segmentor(name, 3, init="random", **narrow_options(name))
    RunningStatistics(segmentor)
    image = torch.rand(2, 3, 64, 80)
    check_one_graph(segmentor, (image,), modes)


@pytest.mark.parametrize("name", JUDGES)
def test_every_discriminator_is_one_graph(name: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {} if name == "fully_convolutional" else {"width": 0.125}
    # with what has the most to trace
    network = build_discriminator(name, 3, spectral_norm=True, **options)
    image = torch.rand(2, 3, 64, 64)
    maps = [torch.rand(2, 3, 64, 64).softmax(1) for _ in range(2)]
    check_one_graph(network, (image, *maps), (True,), features=True)


def check_one_graph(
    network: nn.Module, inputs: tuple[Tensor, ...], modes: tuple[bool, ...], **options: bool
) -> None:
    for mode in modes:
        network.train(mode)
        # each from the same running statistics and singular vectors
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        results = []
        for call in (network, torch.compile(network, backend="eager", fullgraph=True)):
            network.load_state_dict(state)
            torch.manual_seed(1)  # of dropout
            outputs = flat(call(*inputs, **options))
            loss = sum(output.float().square().mean() for output in outputs)
            trained = [it for it in network.parameters() if it.requires_grad]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            results.append([*outputs, *(it for it in gradients if it is not None)])
        for own, of_graph in zip(*results, strict=True):
            assert own.isfinite().all()
            torch.testing.assert_close(of_graph, own)


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values for tensor in flat(value)]


def test_a_network_that_reads_a_value_is_found() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Reads(), backend="eager", fullgraph=True)(torch.ones(2))
