"""Domain adaptation: the adversary between predictions on two domains, against plain formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.config import loading
from distseg.distributed.ranks import Ranks
from distseg.evaluate.judged import confidence_map
from distseg.losses.adversarial import self_information
from distseg.train.networks import build_networks
from distseg.train.schedules import phase
from shards.errors import InputError
from tests.ranks import run_ranks
from tests.test_adversary import (
    BATCH,
    STEPS,
    make_config,
    make_images,
    make_networks,
    train,
    values_of,
)
from tests.test_engine import NUM_CLASSES, TinySegmentor

ADAPT = ["mode=domain_adaptation", "discriminator=large_fov"]
CASES: dict[str, list[str]] = {
    "a score per image": ADAPT,
    "a score per cell, unsureness": [
        *(*ADAPT, "discriminator.options.head=patch", "loss.adv_form=least_squares"),
        *("adaptation.input=self_information", "semi.entropy_weight=0.2"),
    ],
    "blocks": [*ADAPT, "alternation=blocks"],
}
ACCUMULATED = "a score per cell, unsureness"
MATCHES = {**CASES, "in parts": CASES[ACCUMULATED], "fsdp": CASES[ACCUMULATED]}


def entropy_of(chances: Tensor, valid: Tensor) -> float:
    """As a share of the largest, of each image's valid pixels, then of the images."""
    each = -(chances * chances.log()).sum(1) / math.log(NUM_CLASSES)
    # one that is void alone counts as 0
    pairs = zip(each, valid, strict=True)
    means = [float(entropy[inside].sum() / max(1, inside.sum())) for entropy, inside in pairs]
    return float(np.mean(means))


def reference(overrides: list[str]) -> Any:
    """The steps by the formulas of Tsai et al. 2018 and Vu et al. 2019, in one process.

    Labels tell what every mean is divided by, so micro-batches change nothing.
    """
    config, entropies = make_config(overrides), []
    segmentor, judge = networks = [network.double() for network in make_networks(config)]
    optimizers = [torch.optim.SGD(it.parameters(), lr=1e-3, momentum=0.9) for it in networks]
    for step in range(STEPS):
        now = phase(step, config)
        source, target = (make_images(config, step, labelled) for labelled in (True, False))
        logits = [segmentor(images.pixels) for images in (source, target)]
        valid = [images.label[:, 2::4, 2::4] != 255 for images in (source, target)]

        def judged(chances: Tensor, where: Tensor) -> Tensor:
            shown = chances
            if config.adaptation.input == "self_information":
                shown = -chances * chances.log() / math.log(NUM_CLASSES)
            (scores,) = judge(torch.zeros(BATCH, 3, 32, 32, dtype=torch.float64), shown)
            if judge.head != "patch":
                return scores.flatten()
            return F.interpolate(scores, where.shape[-2:], mode="bilinear")[:, 0][where]

        def loss_of(scores: Tensor, goal: float) -> Tensor:
            if config.loss.adv_form == "least_squares":
                return ((1 + scores) / 2 - goal).square().mean()
            return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, goal))

        chances = [each.softmax(1) for each in logits]
        entropies.append([entropy_of(c.detach(), v) for c, v in zip(chances, valid, strict=True)])
        on_source, on_target = (judged(c.detach(), v) for c, v in zip(chances, valid, strict=True))
        d_loss = loss_of(on_source, 1.0) + loss_of(on_target, 0.0)
        up = [F.interpolate(each, (32, 32), mode="bilinear") for each in logits]
        s_loss = F.cross_entropy(up[0], source.label.long(), ignore_index=255)
        # the target's predictions are to pass for the source's
        s_loss = s_loss + config.loss.adv_weight * loss_of(judged(chances[1], valid[1]), 1.0)
        p = up[1].softmax(1)
        entropy = -(p * p.log2()).sum(1)[target.label != 255].mean() / math.log2(NUM_CLASSES)
        s_loss = s_loss + config.semi.entropy_weight * entropy
        updated = ((s_loss, now.segmentor), (d_loss, now.discriminator))
        gradients = [
            torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
            for (loss, _), network in zip(updated, networks, strict=True)
        ]
        for k, (_, is_updated) in enumerate(updated):
            for parameter, gradient in zip(networks[k].parameters(), gradients[k], strict=True):
                parameter.grad = gradient
            if is_updated:
                optimizers[k].step()
    return *(values_of(network) for network in networks), entropies


def run_all(ranks: Ranks) -> dict[str, Any]:
    if ranks.world_size == 1:  # by the same formulas
        return {ACCUMULATED: train(ranks, CASES[ACCUMULATED])}
    found = {name: train(ranks, overrides) for name, overrides in CASES.items()}
    found["in parts"] = train(ranks, CASES[ACCUMULATED], 2)
    found["fsdp"] = train(ranks, [*CASES[ACCUMULATED], "parallel.strategy=fsdp"])
    return found


@pytest.fixture(scope="module")
def of_ranks() -> dict[int, list[dict[str, Any]]]:
    return {num_ranks: run_ranks(num_ranks, run_all) for num_ranks in (1, 3)}


@pytest.mark.parametrize("case", MATCHES)
def test_steps_equal_the_formulas_on_the_joined_batch(
    case: str, of_ranks: dict[int, list[dict[str, Any]]]
) -> None:
    *expected, entropies = reference(MATCHES[case])
    for results in of_ranks.values():
        for of_rank in (each for each in results if case in each):
            for ours, theirs in zip(of_rank[case][:2], expected, strict=True):
                assert max(abs(ours[name] - theirs[name]).max() for name in theirs) < 1e-12
        if case in ("a score per image", "in parts"):
            told = [of_rank[case][2] for of_rank in results if case in of_rank]
            for step, expected_step in enumerate(entropies if told else []):
                for kind, theirs in zip(("source", "target"), expected_step, strict=True):
                    name = f"adaptation/{kind}_entropy"
                    over_ranks = np.mean([of_rank[step][name] for of_rank in told])
                    assert over_ranks == pytest.approx(theirs, abs=1e-12)


def test_self_information_is_the_entropy_class_by_class_and_has_a_gradient_at_zero() -> None:
    chances = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    chances = chances[..., None, None].requires_grad_()
    found = self_information(chances)
    half = 0.5 * math.log(2) / math.log(3)
    expected = torch.tensor([[half, half, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found[..., 0, 0], expected, atol=1e-14, rtol=0)
    (gradient,) = torch.autograd.grad(found.sum(), chances)
    assert gradient.isfinite().all()


class Unsure(torch.nn.Module):
    """A discriminator whose score is the mean of what it is shown."""

    def forward(self, _: Tensor, label_map: Tensor) -> list[Tensor]:
        return [label_map.mean((1, 2, 3))[:, None, None, None]]


def test_maps_of_confidence_are_of_what_the_discriminator_has_learned_from() -> None:
    segmentor, image = TinySegmentor(), np.full((32, 32, 3), 99, np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    p = segmentor(pixels).detach().softmax(1)
    for kind, shown in (("probabilities", p), ("self_information", self_information(p))):
        words = ["data.shards=unused", "mode=domain_adaptation", f"adaptation.input={kind}"]
        config = loading.load(words)
        found = confidence_map(segmentor, Unsure(), config, image)
        np.testing.assert_allclose(found, float(shown.mean().sigmoid()), rtol=1e-6)
        # ground truth is what it has never seen
        with pytest.raises(InputError, match="never seen ground truth"):
            confidence_map(segmentor, Unsure(), config, image, torch.zeros(32, 32).byte())


TAUGHT = ["mode=domain_adaptation", "consistency.weight=1", "ema_decay=0.9"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mode=domain_adaptation", "loss.feature_weight=1"], "feature_weight=1.*adversarial or"),
        (["mode=domain_adaptation", "loss.r1_weight=1"], "r1_weight=1.*a mode with its term"),
        (["mode=domain_adaptation", "semi.adv_weight=1"], "semi.adv_weight=1"),
        ([*TAUGHT, "consistency.mix_with=labelled", "semi.batch_size=16"], "one domain each"),
    ],
)
def test_what_needs_ground_truth_or_mixes_domains_is_refused(
    words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        loading.load(["data.shards=unused", *words])


@pytest.mark.parametrize("name", ["two_branch", "image_conditioned"])
def test_a_discriminator_that_sees_the_image_is_refused(name: str) -> None:
    words = ["data.shards=unused", "segmentor=multiscale", "mode=domain_adaptation"]
    config = loading.load([*words, "segmentor.init=random", f"discriminator={name}"])
    with pytest.raises(InputError, match=f"(?s){name}.*predictions alone"):
        build_networks(config, NUM_CLASSES)
