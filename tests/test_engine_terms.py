"""Every term of the losses, on labelled and unlabelled images and any number of ranks, against
plain formulas.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.config import loading
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks
from distseg.losses.predicted import Predicted, Targets
from distseg.losses.terms import Term
from distseg.models import build_discriminator
from distseg.parallel import wrap
from distseg.parallel.torch_learner import dtype_of
from distseg.train.batch import Images
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from tests.ranks import run_ranks
from tests.test_engine import NUM_CLASSES, TinySegmentor

BATCH, STEPS, SIZE = 6, 4, 48
RESOLUTIONS = ["output", "image"]
SEMI = [
    "mode=semi_supervised",
    "semi.weight=0.6",
    "semi.adv_weight=0.4",
    "semi.threshold=0.5",
    "semi.start_step=1",
]
CASES: dict[str, list[str]] = {
    "semi, a score per cell": [*SEMI, "discriminator.options.head=patch"],
    "semi, a score per image": [*SEMI, "semi.discriminate=false"],
    "semi, blocks": [*SEMI, "discriminator.options.head=patch", "alternation=blocks"],
    "scaling, smoothing, sums": [
        "loss.real_map=scaling",
        "loss.scaling_tau=0.7",
        "loss.real_target=0.9",
        "loss.ce_reduction=sum",
        "loss.adv_reduction=sum",
        "discriminator.options.head=patch",
        "segmentor_optimizer.lr=1e-5",
    ],
    "hinge, a score per image": ["loss.adv_form=hinge"],
    "least squares": [
        *SEMI,
        "semi.weight=0",
        "loss.adv_form=least_squares",
        "loss.real_target=0.9",
        "discriminator.options.head=patch",
    ],
    "saturating, at the image's resolution": [
        *SEMI,
        "loss.adv_form=saturating",
        "loss.map_resolution=image",
        "discriminator.options.head=patch",
        # else it works at four times this resolution
        "discriminator.options.image_pool=false",
        "loss.adv_warmup_steps=4",
    ],
}


def make_config(overrides: list[str]) -> Config:
    common = [
        "data.shards=unused",
        "precision=fp64",
        "steps=10",
        "loss.adv_weight=0.7",
        "schedule=constant",
    ]
    common += ["discriminator_optimizer.lr=1e-5", "segmentor_optimizer.lr=1e-4"]
    common += [
        "alternation.segmentor=2",
        "alternation.discriminator=1",
        "segmentor_optimizer.clip_norm=0",
    ]
    common += ["discriminator_optimizer.clip_norm=0", "discriminator.options.width=0.1"]
    common += ["segmentor_optimizer.name=sgd", "discriminator_optimizer.name=sgd"]
    common += ["segmentor_optimizer.weight_decay=0", "discriminator_optimizer.weight_decay=0"]
    return loading.load([*common, *overrides])


def make_networks(config: Config) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    judge = build_discriminator(
        config.discriminator.name, NUM_CLASSES, **config.discriminator.options
    )
    segmentor = TinySegmentor()
    # verdicts around 0 and far apart, for a mask that is neither full nor empty
    with torch.no_grad():
        pixels = make_images(0, False).pixels.float()
        (z,) = judge(pixels, segmentor(pixels).softmax(1))
        judge.verdict.weight *= 3 / z.std()
        (z,) = judge(pixels, segmentor(pixels).softmax(1))
        judge.verdict.bias[1] -= z.mean()
    return segmentor, judge


def make_images(step: int, labelled: bool) -> Images:
    generator = torch.Generator().manual_seed(2 * step + labelled)
    pixels = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    label = torch.randint(
        0, NUM_CLASSES, (BATCH, SIZE, SIZE), generator=generator, dtype=torch.uint8
    )
    if not labelled:
        label.zero_()
    label[-3, 9:] = 255
    # void alone: of three ranks the last has nothing to learn from, and an empty mask
    label[-2:] = 255
    return Images(pixels, label)


def train(ranks: Ranks, overrides: list[str], num_parts: int = 1) -> tuple[dict, dict]:
    """Our steps on this rank's part of each batch: final parameters of both networks."""
    config = make_config(overrides)
    segmentor, judge = make_networks(config)
    learners = [
        wrap(network, optimizer, config, ranks)
        for network, optimizer in (
            (segmentor, config.segmentor_optimizer),
            (judge, config.discriminator_optimizer),
        )
    ]
    pair = Pair.of(config, *learners)
    share = slice(
        ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size
    )
    for step in range(STEPS):
        parts = [make_images(step, labelled) for labelled in (True, False)]
        labelled, unlabelled = (
            Images(part.pixels[share].to(dtype_of(config)), part.label[share]) for part in parts
        )
        now = phase(step, config)
        training_step(
            pair, now, labelled, unlabelled if config.mode == "semi_supervised" else None, num_parts
        )
        if now.segmentor:
            learners[0].step(1.0)
        if now.discriminator:
            learners[1].step(1.0)
    return values_of(learners[0].full_network()), values_of(learners[1].full_network())


def values_of(network: nn.Module) -> dict[str, Any]:
    return {
        name: parameter.detach().numpy().copy() for name, parameter in network.named_parameters()
    }


def reference(overrides: list[str], num_micro_batches: int = 1) -> tuple[dict, dict]:
    """The same steps by the papers' formulas, in one process on the whole batch."""
    config = make_config(overrides)
    segmentor, judge = (network.double() for network in make_networks(config))
    optimizers = [
        torch.optim.SGD(network.parameters(), lr=part.lr, momentum=part.beta1, foreach=False)
        for network, part in (
            (segmentor, config.segmentor_optimizer),
            (judge, config.discriminator_optimizer),
        )
    ]
    for step in range(STEPS):
        losses = reference_losses(config, step, segmentor, judge, num_micro_batches)
        now = phase(step, config)
        networks = [(segmentor, now.segmentor), (judge, now.discriminator)]
        gradients = [
            torch.autograd.grad(loss, list(n.parameters()), retain_graph=True)
            for loss, (n, _) in zip(losses, networks, strict=True)
        ]
        for (network, updated), optimizer, grads in zip(
            networks, optimizers, gradients, strict=True
        ):
            for parameter, gradient in zip(network.parameters(), grads, strict=True):
                parameter.grad = gradient
            if updated:
                optimizer.step()
    return values_of(segmentor), values_of(judge)


def reference_losses(
    config: Config, step: int, segmentor: nn.Module, judge: nn.Module, num_micro_batches: int = 1
) -> tuple[Tensor, Tensor]:
    loss, semi = config.loss, config.semi
    labelled, unlabelled = make_images(step, True), make_images(step, False)
    at_image = loss.map_resolution == "image"

    def predict(images: Images) -> Tensor:
        logits = segmentor(images.pixels)
        return F.interpolate(logits, (SIZE, SIZE), mode="bilinear") if at_image else logits

    def smaller(label: Tensor) -> Tensor:
        return label.long() if at_image else label[:, 2::4, 2::4].long()

    def mean(values: Tensor, by_image: bool) -> Tensor:
        """The mean of a flat list, or its sum over the number of images."""
        return values.sum() / (BATCH if by_image else max(1, values.numel()))

    def scores(images: Images, maps: Tensor, valid: Tensor) -> Tensor:
        z = judge(images.pixels, maps)[0]
        if judge.head == "gap":
            return z.flatten()
        return F.interpolate(z, valid.shape[-2:], mode="bilinear")[:, 0][valid]

    def judged(z: Tensor, target: float) -> Tensor:
        if loss.adv_form == "hinge":
            return (1 - z if target else 1 + z).clamp(min=0)
        if loss.adv_form == "least_squares":
            return ((1 + z) / 2 - target) ** 2
        return -(target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z))

    def rewarded(z: Tensor) -> Tensor:
        if loss.adv_form == "hinge":
            return -z
        return -judged(z, 0.0) if loss.adv_form == "saturating" else judged(z, 1.0)

    logits = predict(labelled)
    chances = logits.softmax(1)
    index, inside = smaller(labelled.label), smaller(unlabelled.label) == 0
    valid = index != 255
    real = chances.detach().clone().permute(0, 2, 3, 1)
    truth = F.one_hot(index[valid], NUM_CLASSES).double()
    if loss.real_map == "scaling":
        for row, predicted in enumerate(real[valid]):
            on_truth = int(truth[row].argmax())
            mass = max(loss.scaling_tau, float(predicted[on_truth]))
            softened = predicted * (1 - mass) / (1 - predicted[on_truth])
            softened[on_truth] = mass
            truth[row] = softened
    real[valid] = truth
    sums = loss.adv_reduction == "sum"
    on_fake = scores(labelled, chances, valid)
    on_fake_constant = scores(labelled, chances.detach(), valid)
    d_loss = mean(judged(scores(labelled, real.permute(0, 3, 1, 2), valid), loss.real_target), sums)

    rise = min(1, (step + 1) / loss.adv_warmup_steps) if loss.adv_warmup_steps else 1
    up = F.interpolate(logits, (SIZE, SIZE), mode="bilinear")
    pixels = F.cross_entropy(up, labelled.label.long(), ignore_index=255, reduction="none")[
        labelled.label != 255
    ]
    s_loss = mean(pixels, loss.ce_reduction == "sum") + loss.adv_weight * rise * mean(
        rewarded(on_fake), sums
    )
    if config.mode == "semi_supervised":
        logits_u = predict(unlabelled)
        chances_u = logits_u.softmax(1)
        s_loss = s_loss + semi.adv_weight * rise * mean(
            rewarded(scores(unlabelled, chances_u, inside)), sums
        )
        on_unlabelled = scores(unlabelled, chances_u.detach(), inside)
        if semi.discriminate:
            on_fake_constant = torch.cat([on_fake_constant, on_unlabelled])
        if step >= semi.start_step:
            z = F.interpolate(
                judge(unlabelled.pixels, chances_u.detach())[0], inside.shape[-2:], mode="bilinear"
            )
            believed = inside & (torch.sigmoid(z[:, 0]) > semi.threshold).detach()
            assert 0 < believed.sum() < inside.sum() or not semi.weight  # a mask worth testing
            own = F.cross_entropy(logits_u, chances_u.detach().argmax(1), reduction="none")
            # how many pixels the mask has is known of a micro-batch only when it is predicted
            for some, mask in zip(
                own.chunk(num_micro_batches), believed.chunk(num_micro_batches), strict=True
            ):
                value = mean(some[mask], loss.ce_reduction == "sum")
                s_loss = s_loss + semi.weight * value / num_micro_batches
    d_loss = d_loss + mean(judged(on_fake_constant, 0.0), sums)
    return s_loss, d_loss


def run_one(ranks: Ranks) -> dict[str, Any]:
    return {
        "whole": [train(ranks, overrides) for overrides in CASES.values()],
        "in parts": train_in_parts(ranks, 3),
        "masked": train(ranks, CASES["semi, a score per cell"], 3),
        "norms": [judges_norm(ranks, terms) for terms in ([], [Trusted()])],
        "cells": {resolution: mean_of_cells(ranks, resolution) for resolution in RESOLUTIONS},
    }


def run_three(ranks: Ranks) -> dict[str, Any]:
    whole = [train(ranks, overrides) for overrides in CASES.values()]
    return {"whole": whole, "in parts": train_in_parts(ranks, 2)}


@pytest.fixture(scope="module")
def of_ranks() -> dict[int, list[dict[str, Any]]]:
    """What all tests look at: starting ranks takes longer than what they do for one."""
    return {1: run_ranks(1, run_one), 3: run_ranks(3, run_three)}


@pytest.fixture(scope="module")
def references() -> list[Any]:
    torch.set_num_threads(1)
    return [reference(overrides) for overrides in CASES.values()]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_steps_equal_the_formulas_on_the_joined_batch(
    num_ranks: int, of_ranks: dict[int, Any], references: list[Any]
) -> None:
    for of_rank in of_ranks[num_ranks]:
        for case, got, expected in zip(CASES, of_rank["whole"], references, strict=True):
            check_equal(case, got, expected)


def check_equal(case: str, got: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        worst = max(abs(mine[name] - theirs[name]).max() for name in theirs)
        assert worst <= 1e-12, f"{case} differs by {worst}"


IN_PARTS = [CASES["scaling, smoothing, sums"], [*CASES["semi, a score per cell"], "semi.weight=0"]]


def train_in_parts(ranks: Ranks, num_parts: int) -> list[Any]:
    return [train(ranks, overrides, num_parts) for overrides in IN_PARTS]


def test_images_taken_in_parts_give_the_same_steps(of_ranks: dict[int, Any]) -> None:
    """Three parts on one rank, two on each of three."""
    expected = [reference(overrides) for overrides in IN_PARTS]
    for of_rank in (*of_ranks[1], *of_ranks[3]):
        for got, wanted in zip(of_rank["in parts"], expected, strict=True):
            check_equal("in parts", got, wanted)


def test_the_masked_term_is_the_mean_over_the_micro_batches_of_their_means(
    of_ranks: dict[int, Any],
) -> None:
    got = of_ranks[1][0]["masked"]
    check_equal("masked", got, reference(CASES["semi, a score per cell"], 3))


class Trusted(Term):
    """Weighs the entropy by the discriminator's scores, and forgets to detach them."""

    name = "mine"

    def count(self, targets: Targets) -> Tensor:
        return targets.valid.sum().double()

    def local_sum(self, seen: Predicted) -> Tensor:
        assert seen.scores is not None
        log_p = seen.logits.log_softmax(1)
        trust = seen.scores.sigmoid().mean((1, 2, 3))[:, None, None]
        return (-(log_p.exp() * log_p).sum(1) * trust * seen.targets.valid).sum()


def judges_norm(ranks: Ranks, terms: list[Term]) -> float:
    """Of the discriminator's gradient."""
    config = make_config(CASES["semi, a score per cell"])
    optimizers = (config.segmentor_optimizer, config.discriminator_optimizer)
    networks = zip(make_networks(config), optimizers, strict=True)
    pair = Pair.of(config, *(wrap(*both, config, ranks) for both in networks))
    pair.objective = replace(pair.objective, terms=(*pair.objective.terms, *terms))
    now = phase(2, config)
    now = replace(now, weights={**now.weights, "mine": 5.0})
    training_step(pair, now, make_images(2, True), make_images(2, False))
    return float(pair.discriminator.step(1.0)["grad_norm"])  # type: ignore[union-attr]


def test_a_term_of_ones_own_does_not_train_the_discriminator(of_ranks: dict[int, Any]) -> None:
    alone, beside = of_ranks[1][0]["norms"]
    assert alone == beside > 0


class Cells(Term):
    """1 for each valid cell of the label maps."""

    name = "mine"

    def count(self, targets: Targets) -> Tensor:
        return targets.valid.sum().double()

    def local_sum(self, seen: Predicted) -> Tensor:
        assert seen.logits.shape[-2:] == seen.targets.valid.shape[-2:]
        return 0 * seen.logits.sum() + seen.targets.valid.sum()


def mean_of_cells(ranks: Ranks, resolution: str) -> list[float]:
    """In a step before the adversary, and in one with it."""
    config = make_config([f"loss.map_resolution={resolution}", "loss.adv_start_step=1"])
    optimizers = (config.segmentor_optimizer, config.discriminator_optimizer)
    networks = zip(make_networks(config), optimizers, strict=True)
    pair = Pair.of(config, *(wrap(*both, config, ranks) for both in networks))
    pair.objective = replace(pair.objective, terms=(*pair.objective.terms, Cells()))
    values = []
    for step in (0, 1):
        now = phase(step, config)
        now = replace(now, weights={**now.weights, "mine": 1.0})
        metrics = training_step(pair, now, make_images(step, True))
        values.append(float(metrics["loss/mine"]))
    return values


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_label_maps_have_one_size_in_all_steps_of_a_run(
    resolution: str, of_ranks: dict[int, Any]
) -> None:
    values = of_ranks[1][0]["cells"][resolution]
    assert values == pytest.approx([1.0, 1.0])
