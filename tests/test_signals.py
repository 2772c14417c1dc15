"""Signals of a logged step against plain formulas on the joined batch, under every parallel
strategy.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks
from distseg.parallel import wrap
from distseg.parallel.torch_learner import dtype_of
from distseg.tracking.catalogue import RATIO
from distseg.train import diagnostics
from distseg.train.batch import Images
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from tests.ranks import PATIENCE, run_ranks
from tests.test_engine import SUPERVISED
from tests.test_engine_terms import BATCH, CASES, SIZE, make_config, make_images, make_networks

STEP = 2  # by which the semi-supervised term is on
SEMI = CASES["semi, a score per cell"]
AT_IMAGE = [*SEMI, "loss.map_resolution=image"]
GAP = ["discriminator.options.head=gap"]
HINGE, LEAST_SQUARES = ([*GAP, f"loss.adv_form={name}"] for name in ("hinge", "least_squares"))
WEIGHTED = [*GAP, "loss.ce_weight=0.25"]
STRATEGIES: dict[str, list[str]] = {"ddp": [], "fsdp": ["parallel.strategy=fsdp"]}
if importlib.util.find_spec("deepspeed") is not None:
    STRATEGIES |= {
        f"stage {n}": ["parallel.strategy=deepspeed", f"parallel.zero_stage={n}"] for n in (0, 3)
    }


def measure(ranks: Ranks, case: list[str], strategy: str, num_parts: int = 1) -> dict[str, float]:
    """The logged values of one step on this rank's part of the batch."""
    precision = "fp32" if strategy.startswith("stage") else "fp64"
    config = make_config([*case, *STRATEGIES[strategy], f"precision={precision}"])
    networks, optimizers = (
        make_networks(config),
        (config.segmentor_optimizer, config.discriminator_optimizer),
    )
    pair = Pair.of(
        config,
        *(wrap(*both, config, ranks) for both in zip(networks, optimizers, strict=True)),
    )
    share = slice(
        ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size
    )
    parts = [make_images(STEP, labelled) for labelled in (True, False)]
    labelled, unlabelled = (
        Images(part.pixels[share].to(dtype_of(config)), part.label[share]) for part in parts
    )
    now = replace(phase(STEP, config), watched=True)
    rest = unlabelled if config.mode == "semi_supervised" else None
    for learner in pair.learners:
        learner.stopwatch.begin(True)
    metrics = training_step(pair, now, labelled, rest, num_parts)
    grad_norm = {
        f"grad_norm/{name}": learner.step(0.0)["grad_norm"] for name, learner in named(pair)
    }
    seconds = diagnostics.sections(pair.learners)
    # timed under every strategy; where one exchanges within its backward, no wait is left
    assert (
        min(seconds[name] for name in ("forward", "backward", "optimizer"))
        > 0
        <= min(seconds.values())
    )
    return diagnostics.means(metrics | grad_norm, ranks)


def named(pair: Pair) -> list[tuple[str, Any]]:
    return [("segmentor", pair.segmentor), ("discriminator", pair.discriminator)]


def reference(case: list[str]) -> dict[str, float]:
    """By the definitions, in one process on the whole batch, in float64."""
    config = make_config(case)
    segmentor, judge = (network.double() for network in make_networks(config))
    labelled, unlabelled = make_images(STEP, True), make_images(STEP, False)
    kinds = [labelled, unlabelled] if config.mode == "semi_supervised" else [labelled]
    logits = [segmentor(images.pixels) for images in kinds]
    if config.loss.map_resolution == "image":
        logits = [F.interpolate(z, (SIZE, SIZE), mode="bilinear") for z in logits]
    stride = SIZE // logits[0].shape[-1]
    small = [
        images.label[:, stride // 2 :: stride, stride // 2 :: stride].long() for images in kinds
    ]

    def outputs(images: Images, maps: Tensor, label: Tensor) -> Tensor:
        z = judge(images.pixels, maps)[0]
        return (
            z.flatten()
            if judge.head == "gap"
            else F.interpolate(z, label.shape[-2:], mode="bilinear")[:, 0][label != 255]
        )

    weights = (config.loss.adv_weight, config.semi.adv_weight)
    fakes = [outputs(i, z.softmax(1), s) for i, z, s in zip(kinds, logits, small, strict=True)]
    adversarial = sum(w * reward(config, z).mean() for w, z in zip(weights, fakes, strict=False))
    up = F.interpolate(logits[0], (SIZE, SIZE), mode="bilinear")
    cross_entropy = F.cross_entropy(up, labelled.label.long(), ignore_index=255)
    cross_entropy = config.loss.ce_weight * cross_entropy
    from_adversary = torch.autograd.grad(adversarial, logits, retain_graph=True)
    (own,) = torch.autograd.grad(cross_entropy, logits[:1])
    chances = logits[0].softmax(1).detach().permute(0, 2, 3, 1).clone()
    chances[small[0] != 255] = F.one_hot(small[0][small[0] != 255], chances.shape[-1]).double()
    on_real, on_fake = outputs(labelled, chances.permute(0, 3, 1, 2), small[0]), torch.cat(fakes)
    right = (on_real > 0).sum() + (on_fake <= 0).sum()
    norm = torch.stack([g.square().sum() for g in from_adversary]).sum().sqrt()
    found = {
        RATIO: float((norm / own.norm()).detach()),
        "discriminator/accuracy": int(right) / (on_real.numel() + on_fake.numel()),
        "discriminator/logit_gap": float((on_real.mean() - on_fake.mean()).detach()),
    }
    if config.loss.adv_form == "hinge":  # whose scores are no probabilities
        return found
    chance = torch.sigmoid
    if config.loss.adv_form == "least_squares":
        chance = lambda z: ((1 + z) / 2).clamp(0, 1)  # noqa: E731
    of_kinds = {"discriminator/on_real": on_real, "discriminator/on_fake": on_fake}
    return found | {name: float(chance(z.detach()).mean()) for name, z in of_kinds.items()}


def reward(config: Config, z: Tensor) -> Tensor:
    """The segmentor's loss on each score."""
    if config.loss.adv_form == "hinge":
        return -z
    if config.loss.adv_form == "least_squares":
        return ((z - 1) / 2).square()
    return F.softplus(-z)


def measure_all(ranks: Ranks) -> dict[str, dict[str, float]]:
    if ranks.world_size == 1:  # where networks are not joined
        return {s: measure(ranks, SEMI, s) for s in ("ddp", "fsdp")}
    values = {strategy: measure(ranks, SEMI, strategy) for strategy in STRATEGIES}
    values |= {"at image": measure(ranks, AT_IMAGE, "ddp"), "gap": measure(ranks, GAP, "ddp")}
    for name, case in (("weighted", WEIGHTED), ("hinge", HINGE), ("squares", LEAST_SQUARES)):
        values[name] = measure(ranks, case, "ddp")
    return values | {"in parts": measure(ranks, GAP, "ddp", 2)}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_signals_are_those_of_the_joined_batch_under_every_strategy(num_ranks: int) -> None:
    torch.set_num_threads(1)
    expected = dict.fromkeys(STRATEGIES, reference(SEMI)) | {"at image": reference(AT_IMAGE)}
    expected |= dict.fromkeys(("gap", "in parts"), reference(GAP))
    expected |= {"weighted": reference(WEIGHTED), "hinge": reference(HINGE)}
    expected["squares"] = reference(LEAST_SQUARES)
    norms = []
    for of_rank in run_ranks(num_ranks, measure_all):
        for case, values in of_rank.items():
            tolerance = 1e-5 if case.startswith("stage") else 1e-9
            told = [name for name in values if name.startswith("discriminator/")]
            assert set(told) == {n for n in expected[case] if n != RATIO}
            for name, wanted in expected[case].items():
                assert values[name] == pytest.approx(wanted, rel=tolerance, abs=tolerance), (
                    case,
                    name,
                )
        norms += [
            [of_rank[s][f"grad_norm/{n}"] for n in ("segmentor", "discriminator")]
            for s in STRATEGIES
            if s in of_rank
        ]
    for of_strategy in norms:  # one and the same on all ranks, under all strategies
        assert of_strategy == pytest.approx(norms[0], rel=1e-4)


def passes(ranks: Ranks) -> list[tuple[int, int]]:
    """How often the networks' forwards and the all-reduces run in a watched and in an unwatched
    step.
    """
    config = make_config(SEMI)
    optimizers = (config.segmentor_optimizer, config.discriminator_optimizer)
    learners = [
        wrap(*both, config, ranks) for both in zip(make_networks(config), optimizers, strict=True)
    ]
    counts = [0, 0]
    for learner in learners:
        for module in learner.network.modules():
            module.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    original = torch.distributed.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        counts[1] += 1
        return original(*arguments, **options)

    torch.distributed.all_reduce, found = counted, []
    share = slice(ranks.rank * 3, ranks.rank * 3 + 3)
    images = [
        Images(i.pixels[share], i.label[share])
        for i in (make_images(STEP, True), make_images(STEP, False))
    ]
    for watched in (False, True):
        counts[:] = [0, 0]
        training_step(
            Pair.of(config, *learners),
            replace(phase(STEP, config), watched=watched),
            *images,
        )
        found.append((counts[0], counts[1]))
        for learner in learners:
            learner.step(1.0)
    torch.distributed.all_reduce = original
    return found


def test_watching_costs_no_pass_and_no_message() -> None:
    for unwatched, watched in run_ranks(2, passes):
        assert unwatched == watched and min(watched) > 0


# seconds that rank 1 takes longer than the others, and above what a busy machine holds them up
LONGER = 0.3 * PATIENCE


class LateBackward(torch.autograd.Function):
    """The identity, whose gradient takes LONGER."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        time.sleep(LONGER)
        return gradient


def two_paces(ranks: Ranks, slow_in: str) -> dict[str, Any]:
    """What is made of a step in which rank 1 takes LONGER in a section."""
    config = make_config(GAP)
    segmentor, _ = make_networks(config)
    learner = wrap(segmentor, config.segmentor_optimizer, config, ranks)
    if ranks.rank == 1 and slow_in == "forward":
        segmentor.register_forward_hook(lambda *_: time.sleep(LONGER))
    if ranks.rank == 1 and slow_in == "backward":
        # at the network's input side: its first layer's gradients come after it
        first = next(m for m in segmentor.modules() if isinstance(m, torch.nn.Conv2d))
        first.register_forward_hook(lambda module, _, output: LateBackward.apply(output))
    pair, images = Pair.of(config, learner), make_images(STEP, True)
    part = Images(images.pixels[:2], images.label[:2])
    # the first step of a process takes long by itself
    training_step(pair, SUPERVISED, part)
    learner.step(0.0)
    learner.stopwatch.begin(True)
    metrics = training_step(pair, SUPERVISED, part)
    metrics |= learner.step(0.0)
    own = {"step": 1.0, "memory": 5.0 - ranks.rank, "data": 0.001 * ranks.rank}
    of_ranks = diagnostics.told(own | diagnostics.sections(pair.learners), ranks)
    learner.stopwatch.begin(False)
    training_step(pair, SUPERVISED, part)
    assert not any(learner.stopwatch.seconds().values()), "a step that was not to be timed"
    means = diagnostics.means(metrics, ranks)
    return {"rows": of_ranks, "pace": diagnostics.pace(of_ranks), "means": means}


@pytest.mark.parametrize("slow_in", ["forward", "backward"])
def test_the_slowest_rank_is_named_with_its_section_and_the_worst_wait_and_memory_kept(
    slow_in: str,
) -> None:
    main, *others = run_ranks(3, two_paces, slow_in)
    assert all(other["means"] == main["means"] for other in others)
    assert not any(other["rows"] or other["pace"] for other in others), "the main rank alone"
    values, rows = main["pace"], np.array(main["rows"])
    forward, backward, exchange = (
        rows[:, diagnostics.OF_A_RANK.index(name)] for name in ("forward", "backward", "exchange")
    )
    slow = {"forward": forward, "backward": backward}[slow_in]
    # beside the others, which a busy machine may make slow too
    assert slow[1] >= LONGER and slow[1] > max(slow[0], slow[2])
    assert (rows[:, 2:] >= 0).all() and (rows[:, -1] > 0).all(), "the optimizer's too"
    # the others wait for rank 1 when they have computed their own
    assert slow_in == "forward" or min(exchange[0], exchange[2]) > exchange[1]
    assert values["ranks/slowest"] == 1 and values["ranks/slowest_ratio"] > 2
    beyond = {name: values[name] for name in values if name.startswith("ranks/excess/")}
    del beyond["ranks/excess/exchange"]  # of which it has less
    assert max(beyond, key=beyond.__getitem__) == f"ranks/excess/{slow_in}"
    assert values["data_wait_seconds"] == pytest.approx(0.002) and values["memory_bytes"] == 5.0


def test_pace_of_one_rank_has_no_slowest_and_no_ratio_is_made_of_nothing() -> None:
    # of a step, bytes, data, forward, backward, exchange, optimizer
    assert diagnostics.pace([[2.0, 7.0, 0.1, 0.5, 0.4, 0.0, 0.2]]) == {
        "data_wait_seconds": 0.1,
        "memory_bytes": 7.0,
        "data_wait_share": 0.05,
        "sections/data": 0.1,
        "sections/forward": 0.5,
        "sections/backward": 0.4,
        "sections/exchange": 0.0,
        "sections/optimizer": 0.2,
    }
    quick, slow = [2.0, 1.0, 0.0, 0.5, 0.25, 1.0, 0.25], [2.0, 1.0, 0.5, 1.0, 0.25, 0.0, 0.25]
    values = diagnostics.pace([quick, slow])
    assert values["ranks/slowest_ratio"] == 2.0 and values["ranks/excess/forward"] == 0.5
    assert values["ranks/excess/exchange"] == 0.0, "the median rank of two is the lower one"
    squares = ("gradient/adversarial_squared", "gradient/cross_entropy_squared")
    assert diagnostics.summary(dict(zip(squares, (9.0, 4.0), strict=True)) | {"a": 1.0}) == {
        "a": 1.0,
        RATIO: 1.5,
    }
    assert diagnostics.summary(dict(zip(squares, (0.0, 0.0), strict=True))) == {}
    assert diagnostics.memory_bytes(torch.device("cpu")) > 5e7
