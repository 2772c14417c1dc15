"""torch.compile takes every network as one graph, in training as in evaluation: no operation of
theirs reads a value of the device, and none is left to Python.
"""

from __future__ import annotations

import math
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
    efficientnet,
    resnet,
    vgg,
)
from distseg.parallel.running_statistics import RunningStatistics
from tests.test_export import FEWER_BLOCKS
from tests.test_systems import narrow_options
from tests.tiny import NARROW_VGG

# of each family one that has all of its operations; tracing takes Python as long as the network is
# deep
QUICK = ["deeplabv2_resnet101", "deeplabv3plus_efficientnet_lite0", "fcn8s_vgg16"]
QUICK += ["dilated8_vgg16", "multiscale"]
IN_FULL = [pytest.param(name, marks=pytest.mark.slow) for name in SEGMENTORS]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Nothing is remembered from other networks, nor by later tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_few_blocks_of_each_family_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "NUM_BLOCKS", {101: FEWER_BLOCKS[50]})
    monkeypatch.setattr(vgg, "LAYOUT", NARROW_VGG)
    stages = tuple(stage._replace(num_blocks=1) for stage in efficientnet.STAGES)
    monkeypatch.setattr(efficientnet, "STAGES", stages)
    monkeypatch.setattr(efficientnet, "TAPS", {1: 24, 2: 40, 6: 320})
    for name in QUICK:
        check_segmentor(name)


@pytest.mark.parametrize("name", IN_FULL)
def test_every_segmentor_is_one_graph(name: str) -> None:
    check_segmentor(name)


def check_segmentor(name: str) -> None:
    """Logits and gradients of the graph are the network's, with hooks of a run on it."""
    torch.manual_seed(0)
    segmentor = build_segmentor(name, 3, init="random", **narrow_options(name))
    for layer in segmentor.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0  # else two forwards differ
    RunningStatistics(segmentor)
    image = torch.rand(2, 3, 64, 80)
    check_one_graph(segmentor, (image,), {})


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_every_discriminator_is_one_graph(name: str, features: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {} if name == "fully_convolutional" else {"width": 0.125}
    # the option that has the most to trace
    network = build_discriminator(name, 3, spectral_norm=features, **options)
    image = torch.rand(2, 3, 64, 64)
    maps = [torch.rand(2, 3, 64, 64).softmax(1) for _ in range(2)]
    check_one_graph(network, (image, *maps), {"features": True} if features else {})


def check_one_graph(network: nn.Module, inputs: tuple[Tensor, ...], options: dict) -> None:
    for mode in (True, False):
        network.train(mode)
        # each from the same running statistics and singular vectors
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        results = []
        for call in (network, torch.compile(network, backend="eager", fullgraph=True)):
            network.load_state_dict(state)
            outputs = flat(call(*inputs, **options))
            loss = sum(output.float().square().mean() for output in outputs)
            trained = [it for it in network.parameters() if it.requires_grad]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            results.append([*outputs, *(it for it in gradients if it is not None)])
        for own, of_graph in zip(*results, strict=True):
            assert math.isfinite(float(own.sum()))
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
