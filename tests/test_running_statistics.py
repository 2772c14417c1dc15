"""Batch norm with strong views in the batch, against formulas: together or apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distseg.distributed.ranks import Ranks
from distseg.models import BatchNorm2d
from distseg.parallel import wrap
from distseg.parallel.running_statistics import RunningStatistics
from distseg.parallel.sync_batch_norm import synchronise
from distseg.train.batch import Images, tracked_by
from distseg.train.ema import MovingAverage
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from distseg.train.teacher import WeakToStrong
from shards.errors import InputError
from tests.ranks import run_ranks
from tests.test_consistency import SIDE, make_config, unlabelled
from tests.test_engine import BATCH, NUM_CLASSES, make_batch

STEPS = (1, 2)


class Normed(nn.Module):
    """A layer that is synchronised, one of torch's own that averages over all batches, one that is
    frozen, and one over rows of pooled cells, four of each image.
    """

    output_stride, num_classes = 4, NUM_CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, NUM_CLASSES, 1)
        self.joint, self.frozen, self.rows = BatchNorm2d(8), BatchNorm2d(8), nn.BatchNorm1d(8)
        self.own = nn.BatchNorm2d(NUM_CLASSES, momentum=None)
        self.frozen.frozen = True
        self.frozen.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        x = self.frozen(self.joint(self.first(image))).relu()
        pooled = self.rows(nn.functional.adaptive_avg_pool2d(x, 2).flatten(2).mT.flatten(0, 1))
        by_image = pooled.unflatten(0, (len(x), 4)).mean(1)
        return self.own(self.second(x + by_image[..., None, None]))


SEPARATE, JOINT = (["consistency.batch_norm=" + word] for word in ("separate", "joint"))
# in steps before the adversary, in which the teacher's term sees the target
TARGET = ["mode=domain_adaptation", "adaptation.batch_norm=separate", "strong.labelled=true"]
TARGET += ["loss.adv_start_step=9"]
CASES: dict[str, tuple[int, list[str]]] = {
    "one rank, by default": (1, []),
    "three ranks, accumulated": (3, [*SEPARATE, "gradient_accumulation_steps=2"]),
    "three ranks, fsdp": (3, [*SEPARATE, "parallel.strategy=fsdp"]),
    "both kinds of images": (3, JOINT),
    "the target's, one rank": (1, TARGET),
    "the target's, three ranks, accumulated": (3, [*TARGET, "gradient_accumulation_steps=2"]),
    "both domains'": (3, [*TARGET, *SEPARATE, "adaptation.batch_norm=joint"]),
}


def buffers_after_steps(
    ranks: Ranks, overrides: Sequence[str], precision: str = "fp64"
) -> tuple[dict[str, Any], list[Any]]:
    """Our steps, without updates: the buffers, and this rank's strong views of each step."""
    config = make_config(precision, overrides)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    torch.manual_seed(3)
    network = Normed()
    assert synchronise(network) == 2  # the frozen one as well
    pair = Pair.of(config, wrap(network, config.segmentor_optimizer, config, ranks))
    ema = MovingAverage(pair.segmentor, 0.9, as_network=True)
    teacher = WeakToStrong.of(config, pair.segmentor, ema, ranks)
    size, count, views = BATCH // ranks.world_size, config.gradient_accumulation_steps, []
    share = slice(ranks.rank * size, (ranks.rank + 1) * size)
    for step in STEPS:
        labelled = Images(*(part[share] for part in make_batch(step, dtype, SIDE)))
        weak = Images(*(part[share] for part in unlabelled(step, dtype)))
        strong = teacher(weak, labelled, step, count)
        labelled = tracked_by(config, labelled)
        training_step(pair, phase(step, config), labelled, strong, count)
        views.append(strong.pixels.numpy())
    return {name: buffer.numpy() for name, buffer in network.named_buffers()}, views


def one_value(ranks: Ranks) -> list[Any]:
    """A synchronised layer after pooling, with one image of each kind a rank: its output."""
    layer = BatchNorm2d(2)
    network = nn.Sequential(layer)
    synchronise(network)
    x = torch.tensor([[1.0, 5.0], [3.0, -2.0]])[..., None, None] * (ranks.rank + 1)
    with RunningStatistics(network).averaged(2, 1):
        return [network(x).flatten(1).tolist(), layer.running_mean.tolist()]


def of_rank(ranks: Ranks, num_ranks: int) -> dict[str, Any]:
    """All cases of so many ranks, in one group."""
    cases = {name: overrides for name, (n, overrides) in CASES.items() if n == num_ranks}
    found = {name: buffers_after_steps(ranks, overrides) for name, overrides in cases.items()}
    return found | ({"one value": one_value(ranks)} if num_ranks == 3 else {})


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    return {num_ranks: run_ranks(num_ranks, of_rank, num_ranks) for num_ranks in (1, 3)}


Kinds = list[
    list[Tensor]
]  # of each rank the parts that are normalised apart, the tracked one first


@torch.no_grad()
def reference(overrides: list[str], views: list[list[Any]]) -> dict[str, Tensor]:
    """In one process, plainly: views[rank][step] are the strong views of a rank."""
    config, num_ranks = make_config("fp64", overrides), len(views)
    torch.manual_seed(3)
    net = Normed().double()
    kept: dict[str, Tensor] = {}
    for name in ("joint", "rows", "own"):
        kept[f"{name}.running_mean"] = torch.zeros(1, dtype=torch.float64)
        kept[f"{name}.running_var"] = torch.ones(1, dtype=torch.float64)
    num_parts, num_batches = config.gradient_accumulation_steps, 0

    def normed(name: str, x: Kinds) -> Kinds:
        """Normalised; takes the first parts into the running statistics."""
        share = 1 / num_batches if name == "own" else 0.1
        # of the synchronised layer, of all ranks' images together
        groups = [range(num_ranks)] if name == "joint" else [[rank] for rank in range(num_ranks)]
        new = [moments([x[rank][0] for rank in group], correction=1) for group in groups]
        for index, kind in enumerate(("mean", "var")):
            average = torch.stack([each[index] for each in new]).mean(0)
            buffer = f"{name}.running_{kind}"
            kept[buffer] = (1 - share) * kept[buffer] + share * average
        found: Kinds = [[] for _ in x]
        for group in groups:
            for part in range(len(x[0])):
                mean, var = moments([x[rank][part] for rank in group], correction=0)
                for rank in group:
                    by_channel = x[rank][part].transpose(1, -1) - mean
                    found[rank].append((by_channel / (var + 1e-5).sqrt()).transpose(1, -1))
        return found

    for place, step in enumerate(STEPS):
        pixels = make_batch(step, torch.float64, SIDE)[0].chunk(num_ranks)
        for part in range(num_parts):
            num_batches += 1
            x = []
            for labelled, of_rank in zip(pixels, views, strict=True):
                strong = torch.from_numpy(of_rank[place]).chunk(num_parts)[part]
                kinds = [labelled.chunk(num_parts)[part], strong]
                is_joint = config.consistency.batch_norm == "joint"
                if config.mode == "domain_adaptation":
                    is_joint = config.adaptation.batch_norm == "joint"
                    kinds.reverse()
                x.append([torch.cat(kinds)] if is_joint else kinds)
            x = normed("joint", each(net.first, x))
            # the frozen layer's statistics are 0 and 1
            x = each(lambda it: (it / (1 + 1e-5) ** 0.5).relu(), x)
            rows = normed("rows", each(lambda it: pooled(it).flatten(2).mT.flatten(0, 1), x))
            for of_rank, more in zip(x, rows, strict=True):
                for kind, it in enumerate(more):
                    of_rank[kind] = (
                        of_rank[kind] + it.unflatten(0, (-1, 4)).mean(1)[..., None, None]
                    )
            normed("own", each(net.second, x))
    return kept


def each(function: Callable[[Tensor], Tensor], x: Kinds) -> Kinds:
    return [[function(part) for part in parts] for parts in x]


def pooled(x: Tensor) -> Tensor:
    """2 x 2 means of equal cells, (n, C, 2, 2)."""
    return x.unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((3, 5))


def moments(parts: list[Tensor], correction: int) -> tuple[Tensor, Tensor]:
    """The mean and variance of each channel, over all values of all parts."""
    values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
    return values.mean(1), values.var(1, correction=correction)


@pytest.mark.parametrize("name", CASES)
def test_running_statistics_are_of_the_images_that_are_asked_for(
    name: str, found: dict[int, list[dict[str, Any]]]
) -> None:
    """And so is the normalisation: what comes behind the first layer says so."""
    num_ranks, overrides = CASES[name]
    results = [of_rank[name] for of_rank in found[num_ranks]]
    expected = reference(overrides, [views for _, views in results])
    for buffers, _ in results:
        for buffer, wanted in expected.items():
            np.testing.assert_allclose(buffers[buffer], wanted, rtol=1e-12, atol=1e-12)
        assert np.array_equal(buffers["frozen.running_mean"], np.zeros(8))
        batches = len(STEPS) * (2 if "accumulated" in name else 1)
        assert buffers["joint.num_batches_tracked"] == buffers["own.num_batches_tracked"] == batches


def test_one_value_on_each_of_several_ranks_is_enough_for_a_synchronised_layer(
    found: dict[int, list[dict[str, Any]]],
) -> None:
    # 1, 2, 3 times a value: (k - 2) / sqrt(2 / 3) whatever the value, with its sign
    for rank, result in enumerate(found[3]):
        output, running_mean = result["one value"]
        k = (rank - 1) / (2 / 3) ** 0.5
        np.testing.assert_allclose(output, [[k, k], [k, -k]], atol=1e-4)
        assert running_mean == pytest.approx([0.2, 1.0])  # a tenth of the labelled images' mean


def test_strong_views_are_tracked_where_they_may_be_of_the_domain_that_is_predicted() -> None:
    segmentor: Any = SimpleNamespace(network=Normed())
    other = "data.unlabelled_shards=other"
    for words, is_tracked in (([], False), ([other], True), (JOINT, True), (SEPARATE, False)):
        config = make_config("fp64", ["consistency.teacher=segmentor", *words])
        alone = Ranks(0, 1, 0, torch.device("cpu"))
        assert WeakToStrong.of(config, segmentor, None, alone).is_tracked == is_tracked
    config = make_config("fp64", ["consistency.teacher=segmentor", other, *SEPARATE])
    assert not WeakToStrong.of(config, segmentor, None, alone).is_tracked


def test_one_value_has_no_variance_and_half_an_image_no_statistics() -> None:
    layer = nn.BatchNorm2d(3)
    for shape in ((4, 3, 1, 1), (6, 3, 2, 2)):
        statistics = RunningStatistics(nn.Sequential(layer))
        with (
            pytest.raises(InputError, match="batch_norm=joint"),
            statistics.averaged(4, 1),
        ):
            layer(torch.rand(shape))
    # and later forwards find it as it was
    assert torch.equal(layer(torch.ones(4, 3, 1, 1)), torch.zeros(4, 3, 1, 1))
