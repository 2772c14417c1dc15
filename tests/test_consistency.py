"""Weak-to-strong consistency: the strong views, the term, and its step on any number of ranks."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import distseg
from distseg.config import loading
from distseg.config.schema import Config
from distseg.config.world_size import check_pairs
from distseg.data.plan import augmentation_rng
from distseg.data.strong import FILL, MIXED, NUM_DRAWS, StrongView, strong_draws
from distseg.data.transforms import FILL_RGB
from distseg.distributed.ranks import Ranks
from distseg.losses.predicted import GROUND_TRUTH, Predicted, PseudoLabels, Targets
from distseg.losses.tensors import of_neighbours
from distseg.losses.terms import Consistency
from distseg.models import build_discriminator, build_segmentor
from distseg.models.levels import scaled
from distseg.parallel import wrap
from distseg.train.batch import Images, MicroBatch
from distseg.train.ema import MovingAverage
from distseg.train.feature_dropout import FeatureDropout
from distseg.train.networks import build_networks
from distseg.train.schedules import lr_factor, phase
from distseg.train.step import Pair, training_step
from distseg.train.strong_views import OF_LABELLED, StrongViews
from distseg.train.teacher import Alignment, Gate, WeakToStrong, logit_adjustment
from shards.errors import InputError
from tests.ranks import leave_out, run_ranks
from tests.test_engine import BATCH, NUM_CLASSES, TinySegmentor, make_batch
from tests.tiny import contents

STEPS, SIDE = 4, 48
PIXELS = torch.arange(1, NUM_CLASSES + 1, dtype=torch.float64) ** 2  # of each class, labelled
ALWAYS = {"jitter_probability": 1.0, "gray_probability": 0.3, "mix_probability": 0.7}


def crops(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random pixels, and labels that are 255 outside of the image, on the right of every other."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(n, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)
    label = torch.zeros(n, SIDE, SIDE, dtype=torch.uint8)
    label[::2, :, 40:] = 255
    pixels = pixels.where(label[:, None] != 255, FILL.to(dtype))
    return pixels.contiguous(memory_format=torch.channels_last), label


@pytest.mark.parametrize("mix", ["cutmix", "classmix", "cutout", "none"])
def test_strong_views_are_the_same_however_the_batch_is_split(mix: str) -> None:
    view = StrongView(mix=mix, **ALWAYS)
    pixels, label = crops(12)
    taught = torch.randint(0, NUM_CLASSES, label.shape, generator=torch.Generator().manual_seed(1))
    taught = taught.to(torch.uint8).where(label != 255, 255)
    whole = strong(view, pixels, label, taught, range(12))
    for size in (2, 4, 6):
        parts = [
            strong(view, pixels[i : i + size], label[i : i + size], taught[i : i + size], places)
            for i in range(0, 12, size)
            for places in [range(i, i + size)]
        ]
        for joined, expected in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(joined), expected)
    again = strong(view, pixels, label, taught, range(12, 24))
    assert not torch.equal(again[0], whole[0])  # other positions, other views


def strong(
    view: StrongView, pixels: Tensor, label: Tensor, taught: Tensor, places: range
) -> list[Tensor]:
    draws = strong_draws(7, places, NUM_CLASSES)
    mask = view.mask(of_neighbours(taught), draws)
    changed = view.changed(pixels, label != 255, draws)
    mixed = [(changed, FILL), (label, 255)]
    return [*(view.mixed(each, of_neighbours(each), mask, empty) for each, empty in mixed), mask]


def test_colours_and_blur_equal_their_formulas_image_by_image() -> None:
    """NumPy, float64, with SciPy's filter for the blur."""
    ndimage = pytest.importorskip("scipy.ndimage")
    view = StrongView(jitter_probability=0.8, gray_probability=0.3, blur_probability=0.6)
    pixels, label = crops(16, dtype=torch.float64)
    draws = strong_draws(3, range(16), NUM_CLASSES)
    found = view.changed(pixels, label != 255, draws).numpy()
    luma, pivot = np.array([0.299, 0.587, 0.114]), np.dot([0.299, 0.587, 0.114], (124, 116, 104))
    for n, draw in enumerate(draws.numpy()):
        rgb = pixels[n].numpy().transpose(1, 2, 0)
        if draw[0] < 0.8:
            brightness, contrast, saturation = 0.5 + draw[1:4]
            rgb = rgb * brightness
            rgb = (rgb - pivot / 255) * contrast + pivot / 255
            gray = (rgb @ luma)[..., None]
            rgb = gray + (rgb - gray) * saturation
            gray = (rgb @ luma)[..., None]  # luma stays; the two colour axes are turned
            to_axes = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
            i, q = np.moveaxis(rgb @ to_axes.T, -1, 0)
            angle = 2 * np.pi * 0.25 * (2 * draw[4] - 1)
            turned = np.stack(
                [
                    gray[..., 0],
                    i * np.cos(angle) - q * np.sin(angle),
                    i * np.sin(angle) + q * np.cos(angle),
                ],
                -1,
            )
            rgb = turned @ np.linalg.inv(np.vstack([luma, to_axes])).T
        if draw[5] < 0.3:
            rgb = np.repeat((rgb @ luma)[..., None], 3, axis=2)
        rgb = rgb.clip(0, 1)
        if draw[6] < 0.6:
            sigma = 0.1 + 1.9 * draw[7]
            weights = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
            for axis in (0, 1):
                rgb = ndimage.correlate1d(rgb, weights / weights.sum(), axis, mode="nearest")
        inside = (label[n] != 255).numpy()
        expected = np.where(inside[..., None], rgb, pixels[n].numpy().transpose(1, 2, 0))
        np.testing.assert_allclose(found[n].transpose(1, 2, 0), expected, atol=1e-12)


def test_rectangles_have_the_share_of_the_crop_that_was_drawn() -> None:
    view = StrongView(mix="cutmix", mix_probability=0.5)
    draws = strong_draws(5, range(400), NUM_CLASSES)
    mask = view.mask(torch.zeros(400, 96, 96, dtype=torch.uint8), draws)
    mixed = draws[:, MIXED] < 0.5
    assert torch.equal(mask.flatten(1).any(1), mixed)
    share = mask.double().mean((1, 2))
    asked = 0.02 + 0.38 * draws[:, MIXED + 1]
    assert (share - asked)[mixed].abs().max() < 0.02
    assert mask[:, :1].any() and mask[:, -1:].any()  # every place can be reached
    assert mask[:, :, :1].any() and mask[:, :, -1:].any()


def test_classmix_lays_half_of_the_partners_classes_over_an_image() -> None:
    generator = torch.Generator().manual_seed(2)
    taught = torch.randint(0, 7, (20, SIDE, SIDE), generator=generator).to(torch.uint8)
    taught[:4] = 3  # of one class, the half is that one
    taught[1, :20] = 255
    draws = strong_draws(1, range(20), 9)
    mask = StrongView(mix="classmix", mix_probability=1.0).mask(of_neighbours(taught), draws)
    for n in range(20):
        partner = taught[n ^ 1].numpy()
        shown = [c for c in range(9) if (partner == c).any()]
        by_draw = sorted(shown, key=lambda c: draws[n, NUM_DRAWS + c])
        half = by_draw[: (len(shown) + 1) // 2]
        assert np.array_equal(mask[n].numpy(), np.isin(partner, half))


@pytest.mark.parametrize("by_image", ["", "of the view", "of the weak view"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_term_equals_its_formula_pixel_by_pixel(soft: bool, by_image: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 8, 8, dtype=torch.float64, generator=generator).requires_grad_()
    label = torch.zeros(3, 8, 8, dtype=torch.uint8)
    label[0, :3] = 255
    label[2] = 255  # nothing of the third is the teacher's
    # the teacher has said something there, which counts nowhere
    label[0, 2:, 4:] = label[1, :3] = label[2, 6:] = GROUND_TRUTH
    teacher = (3 * torch.randn(3, 5, 8, 8, dtype=torch.float64, generator=generator)).softmax(1)
    confidence, index = teacher.max(1)
    of_weak = None
    if by_image == "of the weak view":
        of_weak = torch.tensor([0.25, 0.0, 0.5], dtype=torch.float64)
    pseudo = PseudoLabels(index.to(torch.uint8), confidence, teacher if soft else None, of_weak)
    seen = Predicted(torch.zeros(3, 3, 8, 8), Targets.at(label, (8, 8)), logits, pseudo=pseudo)
    term = Consistency(0.9, by_image=bool(by_image), soft=soft)
    total, confident = term.local_sum(seen)
    expected, number = torch.zeros((), dtype=torch.float64), 0
    for n in range(3):
        inside = [(y, x) for y in range(8) for x in range(8) if label[n, y, x] != 255]
        own = [at for at in inside if label[n][at] == 0]
        sure = [at for at in own if confidence[n][at] >= 0.9]
        number += len(sure)
        share = len(sure) / max(1, len(own)) if of_weak is None else of_weak[n]
        for y, x in inside:
            p = logits[n, :, y, x].softmax(0)
            one = -p[index[n, y, x]].log()
            if soft:
                one = ((p - teacher[n, :, y, x]) ** 2).mean()
            weight = share if by_image else (y, x) in sure
            expected = expected + one * (weight if (y, x) in own else 1)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(each, logits)[0] for each in (total, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert int(confident) == number
    assert int(term.count(seen.targets)) == int((label != 255).sum())
    assert int(term.candidates(seen.targets)) == int((label == 0).sum())


class SplitSegmentor(TinySegmentor):
    """One whose encoder gives two feature maps to a head, by factors for each channel."""

    feature_channels = (8, 5)

    def forward(self, image: Tensor, feature_factors: Any = None) -> Tensor:
        first = self.encoder(image)
        maps = scaled((first, first[:, :5].square()), feature_factors)
        return self.head(maps[0] + F.pad(maps[1], (0, 0, 0, 0, 0, 3)))


def make_judge() -> torch.nn.Module:
    return build_discriminator("two_branch", NUM_CLASSES, head="gap", width=0.1)


def make_config(precision: str, overrides: Sequence[str]) -> Config:
    common = ["data.shards=unused", f"precision={precision}", "mode=consistency", "steps=10"]
    common += [f"batch_size={BATCH}", "segmentor_optimizer.name=sgd", "ema_decay=0.9"]
    common += ["consistency.weight=0.8", "consistency.threshold=0.3", "consistency.start_step=1"]
    common += ["strong.mix_probability=0.8", "segmentor_optimizer.lr=0.2"]
    return loading.load([*common, *overrides])


def unlabelled(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pixels, label = crops(BATCH, 100 + step, dtype)
    label[-4:] = 255  # of the last of three or four ranks nothing is inside
    return pixels, label


def train(ranks: Ranks, precision: str, overrides: Sequence[str]) -> Any:
    """Some of our steps on this rank's part of each batch: the networks' final parameters."""
    config = make_config(precision, overrides)
    torch.manual_seed(3)
    network = SplitSegmentor()
    network.num_classes = NUM_CLASSES  # type: ignore[assignment]
    learners = [wrap(network, config.segmentor_optimizer, config, ranks)]
    if config.mode == "semi_supervised":
        judge = make_judge()
        learners.append(wrap(judge, config.discriminator_optimizer, config, ranks))
    pair = Pair.of(config, *learners)
    ema = MovingAverage(pair.segmentor, 0.9, as_network=True)
    teacher = WeakToStrong.of(config, pair.segmentor, ema, ranks, pair.discriminator)
    if config.consistency.logit_adjustment:
        adjustment = logit_adjustment(config.consistency.logit_adjustment, PIXELS.numpy()[None])
        teacher = replace(teacher, adjustment=adjustment)
    if config.consistency.alignment:
        alignment = Alignment(config.consistency.alignment, PIXELS.numpy()[None], ranks)
        teacher = replace(teacher, alignment=alignment)
    of_labelled = StrongViews.of_labelled(config, NUM_CLASSES, ranks)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    size = BATCH // ranks.world_size
    share = slice(ranks.rank * size, (ranks.rank + 1) * size)
    kept = []
    for step in range(STEPS):
        now, count = phase(step, config), config.gradient_accumulation_steps
        images = Images(*(part[share] for part in make_batch(step, dtype, SIDE)))
        if config.strong.labelled:
            images = of_labelled.alone(images, step)
        weak = None
        if pair.objective.uses_unlabelled(now):
            weak = Images(*(part[share] for part in unlabelled(step, dtype)))
            if now.taught:
                weak = teacher(weak, images, step, count)
        metrics = training_step(pair, now, images, weak, count)
        kept.append(float(metrics.get("consistency/confident_share", torch.tensor(-1.0))))
        for learner in learners:
            learner.step(lr_factor(step, config.steps, config.schedule))
        ema.update()
    if config.parallel.strategy == "fsdp" and config.consistency.teacher == "ema":
        # or FSDP's list of forwards would grow with every step
        assert ema.network is not None
        assert not ema.network._get_fsdp_state()._comm_ctx.post_forward_order  # type: ignore[operator]
    networks = (pair.segmentor.full_network(), ema.full_network())
    return *([p.detach().clone().numpy() for p in each.parameters()] for each in networks), kept


def reference(config: Config) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """The same in one process, plainly, in float64: the segmentor's parameters, the EMA's, and the
    share of confident pixels of each step.
    """
    torch.manual_seed(3)
    student = SplitSegmentor().double()
    judge = make_judge().double()  # of a learning rate of 0
    teacher = copy.deepcopy(student)
    chosen, momentum = config.consistency, [torch.zeros_like(p) for p in student.parameters()]
    view = StrongView(mix=config.strong.mix, mix_probability=0.8)
    shares = PIXELS / PIXELS.sum()  # of the labels
    running, shift = shares.clone(), torch.zeros_like(shares)  # of the pseudo-labels
    told = []
    for step in range(STEPS):
        pixels, label = make_batch(step, torch.float64, SIDE)
        other = [n ^ 1 for n in range(BATCH)]  # mixed with each other
        if config.strong.labelled:
            places = range(step * BATCH, (step + 1) * BATCH)
            draws = strong_draws(OF_LABELLED, places, NUM_CLASSES)
            mask = view.mask(label[other], draws)
            # no pixel has the fill's colour
            pixels = view.changed(pixels, torch.ones_like(mask), draws)
            pixels = torch.where(mask[:, None], pixels[other], pixels)
            label = torch.where(mask, label[other], label)
        output = student(pixels)
        loss = F.cross_entropy(at_full_size(output), label.long(), ignore_index=255)
        weak, where = unlabelled(step, torch.float64)
        seen = [(weak, where != 255, None)]
        told.append(-1.0)
        if step >= 1:
            seen = []
            with torch.no_grad():
                taught = teacher(weak)
                opened = torch.ones(BATCH, dtype=torch.bool)
                if chosen.gate == "rank":  # the half of the images that have the highest scores
                    scores = judge(weak, taught.softmax(1))[0].flatten()
                    opened = scores > scores.median()
                    assert opened.sum() == BATCH // 2
                moved = shift - chosen.logit_adjustment * shares.log()
                chances = at_full_size(taught + moved.view(-1, 1, 1)).softmax(1)
                sure, index = chances.max(1)
                sure = sure * opened[:, None, None]
            index[where == 255] = 255
            if chosen.alignment:
                said = torch.bincount(index[index != 255], minlength=NUM_CLASSES).double()
                running = 0.95 * running + 0.05 * said / said.sum()
                error = (shares.log() - running.clamp(min=1e-5).log()).clamp(-2, 2)
                shift = (shift + chosen.alignment * error).clamp(-4, 4)
            with_labelled = chosen.mix_with == "labelled"
            of_labels = F.one_hot(label.long().where(label != 255, 0), NUM_CLASSES)
            places, terms, counts = range(step * BATCH, (step + 1) * BATCH), [], []
            own_pixels, own_sure = 0.0, 0.0  # the teacher's
            first, second = features_of(chosen.feature_perturbation, places)
            for number in range(chosen.num_views):
                draws = strong_draws(2**33 + number * 2**34, places, NUM_CLASSES)
                changed = view.changed(weak, where != 255, draws)
                shown = label if with_labelled else index.to(torch.uint8)[other]
                mask = view.mask(shown, draws)
                laid = [changed[other], index[other], chances[other]]
                if with_labelled:
                    laid = [pixels, label.long(), of_labels.permute(0, 3, 1, 2).double()]
                changed = torch.where(mask[:, None], laid[0], changed)
                target = torch.where(mask, laid[1], index)
                soft = torch.where(mask[:, None], laid[2], chances)
                known = torch.where(mask, sure[other], sure)
                factors = (first, second)[number] if first else None
                logits = at_full_size(student(changed, factors))
                each = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
                if chosen.target == "probabilities":
                    each = (logits.softmax(1) - soft).square().mean(1)
                inside = target != 255
                own = inside & ~mask if with_labelled else inside
                confident = own & (known >= chosen.threshold)
                weight = confident.double()
                if chosen.weighting == "image":
                    of_image = (confident, own)
                    if with_labelled:  # what is laid over a view does not change its share
                        of_image = ((where != 255) & (sure >= chosen.threshold), where != 255)
                    some, every = (part.double().sum((1, 2)) for part in of_image)
                    weight = (some / every.clamp(min=1))[:, None, None] * own
                weight = weight + (inside & ~own)
                seen.append((changed, inside, factors))
                terms.append((each * weight).sum())
                counts.append(inside.sum())
                own_pixels += float(own.sum())
                own_sure += float(confident.sum())
            if chosen.feature_perturbation == "dropout":
                logits = at_full_size(student(weak, second))
                each = F.cross_entropy(logits, index, ignore_index=255, reduction="none")
                strong, inside = sum(terms) / len(terms), where != 255
                seen.append((weak, inside, second))
                counts.append(inside.sum())
                confident = (sure >= chosen.threshold) & inside
                own_pixels += float(inside.sum())
                own_sure += float(confident.sum())
                # half of the term, each half by the mean number of pixels of a view
                terms = [strong / 2, (each * confident).sum() / 2]
                counts = [sum(counts) / len(counts)]
            loss = loss + chosen.weight * sum(terms) / sum(counts)
            told[-1] = own_sure / own_pixels
        if config.semi.entropy_weight:
            unsure = pixels.new_zeros(())
            for images, inside, factors in seen:
                p = at_full_size(student(images, factors)).softmax(1)
                unsure = unsure - (p * p.log2()).sum(1)[inside].sum() / math.log2(NUM_CLASSES)
            count = sum(inside.sum() for _, inside, _ in seen)
            loss = loss + config.semi.entropy_weight * unsure / count
        if config.mode == "semi_supervised":
            ((images, _, _),) = seen
            loss = loss + of_judge(
                config, judge, (pixels, output, label), (images, student(images))
            )
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        update(config, step, student, gradients, momentum)
        decay = min(0.9, (2 + step) / (11 + step))
        for average, new in zip(teacher.parameters(), student.parameters(), strict=True):
            average.data.mul_(decay).add_(new.data, alpha=1 - decay)
    return list(student.parameters()), list(teacher.parameters()), told


def at_full_size(logits: Tensor) -> Tensor:
    return F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear")


def of_judge(
    config: Config,
    judge: torch.nn.Module,
    labelled: tuple[Tensor, Tensor, Tensor],
    unlabelled: tuple[Tensor, Tensor],
) -> Tensor:
    """What the segmentor's loss has of a discriminator: its score of the labelled images, and its
    mean features of ground truth and of predictions of the unlabelled ones.
    """
    pixels, logits, label = labelled
    (scores,) = judge(pixels, logits.softmax(1))
    small, real = label[:, 2::4, 2::4].long(), logits.softmax(1).detach().permute(0, 2, 3, 1)
    one_hot = F.one_hot(small.where(small != 255, 0), NUM_CLASSES).double()
    real = torch.where((small != 255)[..., None], one_hot, real).permute(0, 3, 1, 2)
    means = [
        judge(images, maps, features=True)[1][0].mean(0)
        for images, maps in ((pixels, real), (unlabelled[0], unlabelled[1].softmax(1)))
    ]
    distance = (means[0] - means[1]).abs().sum()
    adversarial = -F.logsigmoid(scores).mean()
    return config.loss.adv_weight * adversarial + config.loss.feature_weight * distance


def features_of(kind: str, places: range) -> tuple[Any, Any]:
    """What is multiplied with the two feature maps of each image: of the strong views where they
    complement each other, else of none and of the weak view.
    """
    if kind == "none":
        return None, None
    some: tuple[list[Tensor], list[Tensor]] = ([], [])
    other: tuple[list[Tensor], list[Tensor]] = ([], [])
    for place in places:
        drawn = augmentation_rng(2**38, place).random(14)
        is_whole, kept = drawn[0] < 0.5, torch.from_numpy(2.0 * (drawn[1:] < 0.5))
        for index, start in ((0, 0), (1, 8)):
            mask = kept[start:][: (8, 5)[index]]
            if kind == "complementary":
                mask = torch.ones(8).double() if is_whole else kept[:8]
                mask = mask[: (8, 5)[index]]
            some[index].append(mask)
            other[index].append(2 - mask)
    joined, rest = ([torch.stack(part) for part in each] for each in (some, other))
    return (None, joined) if kind == "dropout" else (joined, rest)


@torch.no_grad()
def update(
    config: Config,
    step: int,
    network: torch.nn.Module,
    gradients: Sequence[Tensor],
    momentum: list[Tensor],
) -> None:
    """SGD with momentum and clipping."""
    chosen = config.segmentor_optimizer
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    scale = min(1.0, chosen.clip_norm / float(norm)) if chosen.clip_norm else 1.0
    rate = chosen.lr * lr_factor(step, config.steps, config.schedule)
    for parameter, gradient, velocity in zip(
        network.parameters(), gradients, momentum, strict=True
    ):
        gradient = gradient * scale
        if parameter.ndim > 1:
            gradient = gradient + chosen.weight_decay * parameter
        velocity.mul_(chosen.beta1).add_(gradient)
        parameter -= rate * velocity


COMPLEMENTARY = "consistency.feature_perturbation=complementary"
JOINED = {
    1: [
        *("consistency.weighting=image", "strong.mix=classmix", "consistency.mix_with=labelled"),
        *("consistency.logit_adjustment=0.7", "consistency.threshold=0.6"),
    ],
    2: [
        *("strong.labelled=true", "consistency.num_views=2", "semi.entropy_weight=0.3"),
        *("consistency.target=probabilities", COMPLEMENTARY),
    ],
    3: [
        *("strong.mix=classmix", "gradient_accumulation_steps=2", "strong.labelled=true"),
        *("consistency.alignment=0.6", "consistency.feature_perturbation=dropout"),
    ],
    4: [
        *("mode=semi_supervised", "consistency.gate=rank", "discriminator_optimizer.lr=0"),
        *("loss.adv_weight=0.2", "loss.feature_weight=0.1", "semi.weight=0", "semi.adv_weight=0"),
        *("consistency.target=probabilities", "consistency.mix_with=labelled"),
    ],
}
FSDP = "parallel.strategy=fsdp"
BESIDE = {
    "ema": [FSDP],
    "segmentor": [
        *(FSDP, "consistency.teacher=segmentor", "consistency.num_views=2"),
        "consistency.feature_perturbation=dropout",
    ],
    "gate": ["mode=semi_supervised", "consistency.gate=rank", "gradient_accumulation_steps=2"],
}


def train_all(ranks: Ranks) -> dict[str, Any]:
    """All that the tests look at, of one number of ranks; DDP alone on one."""
    n = ranks.world_size
    cases = {"joined": JOINED[n]} | (BESIDE if n < 3 else {})
    found: dict[str, Any] = {
        name: train(ranks, "fp64", [each for each in overrides if n > 1 or each != FSDP])
        for name, overrides in cases.items()
    }
    return found | ({} if len(SCORES) % n else {"opened": opened_by(ranks)})


SCORES = [0.5, 2.0, -1.0, 2.0, 0.7, 0.1, -3.0, 0.6]


def opened_by(ranks: Ranks) -> list[bool]:
    """A gate's choice from scores of which each rank has some."""
    scores = torch.tensor(SCORES, dtype=torch.float64)
    gate = Gate(lambda *seen: scores, ranks, len(SCORES), False, None, 0.4)
    return gate.opens(scores.chunk(ranks.world_size)[ranks.rank]).tolist()


@pytest.fixture(scope="module")
def of_ranks() -> dict[int, list[dict[str, Any]]]:
    """Starting ranks takes longer than what they do for one test."""
    return {num_ranks: run_ranks(num_ranks, train_all) for num_ranks in JOINED}


@pytest.mark.parametrize("num_ranks", JOINED, ids=["one rank", "two", "three, accumulated", "four"])
def test_steps_equal_a_plain_process_on_the_joined_batch(
    num_ranks: int, of_ranks: dict[int, Any]
) -> None:
    results = [of_rank["joined"] for of_rank in of_ranks[num_ranks]]
    *expected, told = reference(make_config("fp64", JOINED[num_ranks]))
    for parameters, averages, _ in results:
        for found, wanted in zip((parameters, averages), expected, strict=True):
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(one, other.detach(), rtol=1e-12, atol=1e-12)
    # of the ranks' metrics the mean is logged
    shares = np.mean([shares for _, _, shares in results], axis=0)
    np.testing.assert_allclose(shares, told, rtol=1e-12)
    assert shares[0] == -1 and 0.1 < shares[1] < 0.9


def test_the_order_of_scores_is_that_of_all_ranks(of_ranks: dict[int, Any]) -> None:
    # 0.4 x 8 is 3.2: the three highest
    expected = [False, True, False, True, True, False, False, False]
    for num_ranks in (1, 2, 4):
        opened = [of_rank["opened"] for of_rank in of_ranks[num_ranks]]
        assert [*itertools.chain(*opened)] == expected


@pytest.mark.parametrize("name", BESIDE)
def test_fsdp_shards_the_teacher_and_a_gate_may_stand_beside_it(
    name: str, of_ranks: dict[int, Any]
) -> None:
    """Two ranks against one of DDP; with a discriminator, its terms are there too."""
    alone = of_ranks[1][0][name]
    for of_rank in of_ranks[2]:
        for ours, theirs in zip(of_rank[name][:2], alone[:2], strict=True):
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-11)


def test_a_gate_lets_the_images_of_the_highest_scores_through() -> None:
    """Of scores by cell the mean over those inside of the image."""
    pixels, label = crops(4, dtype=torch.float64)
    label[3] = 255
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(4, 1, 6, 6, generator=generator, dtype=torch.float64)
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    logits = torch.zeros(4, NUM_CLASSES, 12, 12)
    for scores in (cells, cells.mean((2, 3), keepdim=True)):
        gate = Gate(lambda *seen, scores=scores: scores, alone, 4, False, 0.5, 0.5)
        found = gate.scores(pixels, label != 255, logits)
        for n in range(4):
            # cells of 8 x 8 pixels, of which the last column lies beyond every other image
            values = scores[n, 0] if scores.shape[-1] == 1 else scores[n, 0, :, : 5 + n % 2]
            none_inside = n == 3 and scores.shape[-1] > 1
            assert float(found[n]) == pytest.approx(0 if none_inside else float(values.mean()))
    assert gate.opens(torch.tensor([0.1, -0.1, 3, -3])).tolist() == [True, False, True, False]


def test_a_gate_between_domains_judges_what_its_discriminator_has_learned_from() -> None:
    pixels, label = crops(2, dtype=torch.float64)
    seen: list[Tensor] = []

    class Judge:
        network = None

        def infer(self, _: Any, pixels: Tensor, label_map: Tensor) -> list[Tensor]:
            seen.append(label_map)
            return [label_map.sum((1, 2, 3))[:, None, None, None]]

    words = ["data.shards=unused", "mode=domain_adaptation", "consistency.weight=1"]
    words += ["ema_decay=0.9", "consistency.gate=rank", "consistency.start_step=1"]
    words += ["strong.labelled=true"]
    logits = torch.randn(2, NUM_CLASSES, 12, 12, dtype=torch.float64)
    for kind in ("probabilities", "self_information"):
        config = loading.load([*words, f"adaptation.input={kind}"])
        gate = Gate.of(config, Judge(), Ranks(0, 1, 0, torch.device("cpu")))  # type: ignore[arg-type]
        gate.scores(pixels, label != 255, logits)
    p = logits.softmax(1)
    torch.testing.assert_close(seen[0], p)
    torch.testing.assert_close(seen[1], -p * p.log() / math.log(NUM_CLASSES))


def test_the_fill_keeps_its_colour_however_a_device_divides_bytes() -> None:
    config = make_config("fp32", ["strong.labelled=true", "strong.mix=none"])
    views = StrongViews.of_labelled(config, NUM_CLASSES, Ranks(0, 1, 0, torch.device("cpu")))
    fill = torch.tensor(FILL_RGB, dtype=torch.float32)[:, None, None]
    # a GPU multiplies by the inverse, which is another number in the last bit
    for filled in (fill / 255, fill * torch.tensor(1 / 255)):
        pixels, label = crops(BATCH)
        pixels[:, :, :7] = filled
        label[:, :7] = 255
        strong = views.alone(Images(pixels, label), 0).pixels
        assert torch.equal(strong[:, :, :7], pixels[:, :, :7])
        assert not torch.equal(strong[:, :, 7:], pixels[:, :, 7:])


@pytest.mark.parametrize("mix", ["cutmix", "classmix", "cutout"])
def test_images_that_are_never_mixed_need_no_partner(mix: str) -> None:
    """An odd number of them will do, as for views without a mix, which they are."""
    images, draws = Images(*crops(3)), strong_draws(0, range(3), NUM_CLASSES)
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    views = StrongViews(StrongView(mix=mix, mix_probability=0.0), alone, 0, 3, NUM_CLASSES)
    found = views.mixed(images, views.partners(images), draws)
    assert torch.equal(found.pixels, images.pixels) and torch.equal(found.label, images.label)


def test_labels_laid_over_an_image_are_none_of_its_teachers() -> None:
    """A teacher that is sure of nothing is told as one, and so is one that is sure of all."""
    words = ["consistency.mix_with=labelled", "strong.mix=classmix", "consistency.num_views=2"]
    config = make_config("fp64", [*words, "consistency.weighting=image"])
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    labelled = Images(*make_batch(1, torch.float64, SIDE))
    weak = Images(*unlabelled(1, torch.float64))
    views = StrongViews.of_unlabelled(config, NUM_CLASSES, alone)
    for factor, told in ((0.0, 0.0), (99.0, 1.0)):
        logits = torch.zeros(BATCH, NUM_CLASSES, SIDE, SIDE, dtype=torch.float64)
        logits[:, 1] = factor
        teacher = WeakToStrong(
            lambda pixels, logits=logits: logits, views, num_views=2, with_labelled=True
        )
        strong = teacher(weak, labelled, 1)
        assert strong.pseudo is not None and strong.pseudo.share is not None
        some = (weak.label != 255).flatten(1).any(1).double()
        assert torch.equal(strong.pseudo.share, told * some.repeat_interleave(2))
        # what is laid over is said by the truth, of void nothing
        truth = labelled.label.repeat_interleave(2, 0)
        laid = strong.label == GROUND_TRUTH
        assert laid.any() and torch.equal(strong.pseudo.label[laid], truth[laid])
        assert not laid[truth == 255].any()
        term = Consistency(0.95, by_image=True)
        targets = Targets.at(strong.label, (SIDE, SIDE))
        seen = Predicted(strong.pixels, targets, torch.zeros_like(logits).repeat(2, 1, 1, 1))
        total, number = term.local_sum(replace(seen, pseudo=strong.pseudo))
        assert float(number) == told * float(term.candidates(targets))
        # logits of 0 cost log C a pixel, and a label counts whatever the teacher says
        counted = laid.sum() + number
        assert float(total) == pytest.approx(float(counted) * math.log(NUM_CLASSES), rel=1e-12)


def test_a_micro_batch_has_all_views_of_its_images_as_a_rank_has() -> None:
    """So that batch normalisation sees the same images together."""

    def views_of(rank: int, world_size: int) -> Images:
        config = make_config("fp64", ["consistency.num_views=2"])
        ranks = Ranks(rank, world_size, 0, torch.device("cpu"))
        views = StrongViews.of_unlabelled(config, NUM_CLASSES, ranks)
        teacher = WeakToStrong(lambda pixels: pixels, views, num_views=2)
        share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        weak = Images(*(part[share] for part in unlabelled(1, torch.float64)))
        return teacher(weak, weak, 1)

    alone = MicroBatch(views_of(0, 1), views_of(0, 1))
    for rank, part in enumerate(alone.split(3)):
        ours, of_rank = part.unlabelled, views_of(rank, 3)
        assert ours is not None and ours.pseudo is not None and of_rank.pseudo is not None
        assert torch.equal(ours.pixels, of_rank.pixels)
        assert torch.equal(ours.label, of_rank.label)
        assert torch.equal(ours.pseudo.confidence, of_rank.pseudo.confidence)


def test_channels_are_left_out_by_image_and_the_other_view_has_them() -> None:
    like = torch.zeros(1, dtype=torch.float32)
    draw = FeatureDropout((300, 200), 7, 2, is_complementary=True)
    first, second = draw.factors(range(400), like)
    assert first.shape == (800, 300) and torch.equal(first[:, :200], second)
    one, other = first.unflatten(0, (-1, 2)).unbind(1)
    assert torch.equal(one + other, torch.full_like(one, 2)) and set(one.unique().tolist()) == {
        0.0,
        1.0,
        2.0,
    }
    whole = (one == 1).all(1)
    assert torch.equal((one == 1).any(1), whole)
    assert float(whole.double().mean()) == pytest.approx(0.5, abs=0.1)
    assert float(one[~whole].mean()) == pytest.approx(1, abs=0.02)
    # of the weak view alone, of each map by itself
    views = FeatureDropout((300, 200), 7, 3, is_complementary=False).factors(range(400), like)
    for factors in views:
        strong, weak = factors.unflatten(0, (-1, 4)).split([3, 1], 1)
        assert (strong == 1).all() and set(weak.unique().tolist()) == {0.0, 2.0}
        assert float(weak.mean()) == pytest.approx(1, abs=0.02)
    assert not torch.equal(views[0][:, :200], views[1])
    # by the place alone
    again = draw.factors(range(3, 5), like)
    assert torch.equal(again[1], second[6:10])


def test_every_network_with_a_head_on_features_takes_factors_of_its_channels() -> None:
    """A channel that is left out is one that the encoder gives as zeros."""
    names = ["deeplabv2_resnet101", "deeplabv3_resnet50", "deeplabv3plus_resnet50"]
    names += ["deeplabv3_efficientnet_lite0", "deeplabv3plus_efficientnet_lite0"]
    names += ["segformer_mitb0"]
    image = torch.rand(2, 3, 64, 64)
    for name in names:
        torch.manual_seed(0)
        narrow = {"width": 4} if "resnet" in name else {}
        network = build_segmentor(name, 3, init="random", **narrow).eval().requires_grad_(False)
        channels = network.feature_channels  # type: ignore[union-attr]
        kept = [2.0 * (torch.rand(2, number) < 0.5) for number in channels]
        found = network(image, feature_factors=kept)

        def changed(module: Any, inputs: Any, maps: Any, kept: Any = kept) -> Any:
            last = len(maps) - len(kept)
            pairs = zip(maps[last:], kept, strict=True)
            return (*maps[:last], *(x * factor[:, :, None, None] for x, factor in pairs))

        plain = network(image)
        network.encoder.register_forward_hook(changed)  # type: ignore[union-attr]
        assert torch.equal(found, network(image)), name
        assert not torch.equal(found, plain), name


def test_a_class_without_labels_is_raised_as_the_rarest_of_the_others() -> None:
    found = logit_adjustment(2.0, np.array([[30, 0, 4, 60], [0, 0, 6, 0]]))[:, 0, 0]
    expected = [-2 * math.log(share) for share in (0.3, 0.1, 0.1, 0.6)]
    assert found.tolist() == pytest.approx(expected)


ZERO_3 = ["parallel.strategy=deepspeed", "parallel.zero_stage=3"]
RUN: dict[str, Any] = {
    "mode": "consistency",
    "batch_size": 2,
    "ema_decay": 0.9,
    "data": {"crop_px": 48, "labelled": "1/2", "num_threads": 0},
    "segmentor": {
        "name": "deeplabv3_resnet50",
        "init": "random",
        "options": {"width": 4},
    },
    "consistency": {
        "weight": 1.0,
        "threshold": 0.05,
        "held_out": 1,
        "alignment": 0.5,
        "feature_perturbation": "dropout",
    },
    "strong": {"mix": "classmix"},
    "checkpoint": {"every_steps": 3},
    "evaluate": {"num_pictures": 0},
}


def test_what_cannot_be_is_refused(toy_shards: Path) -> None:
    shards = f"data.shards={toy_shards}"
    taught = [shards, "mode=consistency", "consistency.weight=1"]
    gated = [shards, "mode=semi_supervised", "consistency.weight=1", "ema_decay=0.9"]
    gated += ["semi.weight=0", "consistency.start_step=1"]
    in_blocks = ["alternation.name=blocks", "alternation.segmentor=3"]
    for words, what in (
        ([shards, "mode=consistency"], "consistency.weight=0"),
        (taught, "ema_decay=0"),
        ([*taught, "ema_decay=0.9", "consistency.threshold=1.5"], "consistency.threshold=1.5"),
        ([*taught, "ema_decay=0.9", "strong.mix_area_min=0.5"], "mix_area_max"),
        ([shards, "mode=supervised", "consistency.weight=1"], "mode=supervised"),
        ([shards, "mode=adversarial", "semi.entropy_weight=1"], "mode=adversarial"),
        ([shards, "mode=adversarial", "consistency.weight=1"], "mode=adversarial"),
        ([*taught, "ema_decay=0.9", "loss.adv_weight=0.1"], "mode=consistency"),
        ([*taught, "ema_decay=0.9", "consistency.gate=rank"], "mode=consistency"),
        (
            [*taught, "ema_decay=0.9", "consistency.mix_with=labelled", "strong.mix=none"],
            "mix_with",
        ),
        (
            [*taught, "ema_decay=0.9", "consistency.mix_with=labelled", "semi.batch_size=2"],
            "semi.batch_size=16",
        ),
        ([*gated, "consistency.gate=rank", "loss.adv_start_step=9"], "adv_start_step=9"),
        ([*gated, "consistency.gate=rank", "consistency.start_step=0"], "start_step=1"),
        ([*gated, "consistency.gate=rank", "loss.adv_start_step=1"], "ends step 1"),
        (
            [*gated, "consistency.gate=rank", *in_blocks, "consistency.start_step=3"],
            "write consistency.start_step=4",
        ),
        ([*gated, "consistency.gate=score", "loss.adv_form=hinge"], "adv_form=hinge"),
        ([*gated, "consistency.gate=rank", "consistency.gate_share=0.02"], "one image of each"),
        ([*taught, "ema_decay=0.9", COMPLEMENTARY], "consistency.num_views=1\n"),
        (
            [*taught, "consistency.teacher=segmentor", *ZERO_3],
            "stage 3",
        ),
    ):
        with pytest.raises(InputError, match=what):
            loading.load(words)
    trained = loading.load([*gated, "consistency.gate=rank"])
    # one that was trained before there was such a rule can still be scored
    trained.consistency.start_step = 0
    assert loading.override(trained, []).consistency.start_step == 0
    loading.load([*gated, "consistency.gate=rank", *in_blocks, "consistency.start_step=4"])
    words = ["segmentor=multiscale", "segmentor.init=random", "consistency.num_views=2"]
    whole = loading.load([*taught, "ema_decay=0.9", COMPLEMENTARY, *words])
    with pytest.raises(InputError, match="complementary with segmentor=multiscale"):
        build_networks(whole, 3)
    config = loading.load([*taught, "ema_decay=0.9", "batch_size=6"])
    with pytest.raises(InputError, match="even number"):
        check_pairs(config, 2)
    check_pairs(config, 3)
    alone = loading.load([shards, "mode=supervised", "batch_size=3", "strong.labelled=true"])
    with pytest.raises(InputError, match="3 labelled images"):
        check_pairs(alone, 1)
    check_pairs(replace(alone, strong=mixed_by(alone, "none")), 1)
    never = replace(alone.strong, mix_probability=0.0)
    check_pairs(replace(alone, strong=never), 1)
    check_pairs(replace(config, batch_size=3, strong=mixed_by(config, "cutout")), 1)


def mixed_by(config: Config, mix: str) -> Any:
    return replace(config.strong, mix=mix)


def test_a_stopped_run_goes_on_to_the_same_bits(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's memory is the average's: a resumed run labels as the undisturbed one does."""
    leave_out(monkeypatch.setattr)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    data = RUN["data"] | {"shards": str(toy_shards)}
    for run_dir, steps in ((whole, (6,)), (parts, (3, 6))):
        for count in steps:
            more = {"extend": True} if count == 6 and len(steps) == 2 else {}
            schedule = {"schedule": {"name": "constant"}}
            keys = RUN | {"data": data, "run_dir": str(run_dir), "steps": count} | more | schedule
            distseg.fit(**keys)
    last = [path / "checkpoints" / "step-00000006" for path in (whole, parts)]
    names = [sorted(file.name for file in folder.glob("*.safetensors")) for folder in last]
    assert names[0] == names[1] and "ema.network.safetensors" in names[0]
    for name in names[0]:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    # the image that is held out stays the same one, and so does what is told of it
    lists = [(path / "held_out.txt").read_text() for path in (whole, parts)]
    assert lists[0] == lists[1] and lists[0] in (whole / "labelled.txt").read_text()
    told = [held_out_at_the_end(path) for path in (whole, parts)]
    assert told[0] == told[1] and 0 < told[0]["held_out/confident_share"] <= 1
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("loss/consistency", 0) > 0 for row in rows)


def test_pictures_show_what_the_next_step_trains_on_and_change_nothing(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, ...]] = []
    leave_out(monkeypatch.setattr)
    monkeypatch.setattr("distseg.train.showcase.figures.taught_panel", lambda *a: drawn.append(a))
    keys = RUN | {"data": RUN["data"] | {"shards": str(toy_shards)}, "steps": 2}
    keys |= {"schedule": {"name": "constant"}, "strong": {"mix": "cutmix", "mix_probability": 1.0}}
    for name, number in (("without", 0), ("with", 9)):
        run_dir = str(tmp_path / name)
        distseg.fit(**keys | {"run_dir": run_dir, "evaluate": {"num_pictures": number}})
    last = [tmp_path / name / "checkpoints" / "step-00000002" for name in ("without", "with")]
    assert contents(last[0]) == contents(last[1])
    seen: list[Images] = []

    def step(pair: Pair, now: Any, labelled: Images, strong: Images, *more: Any) -> Any:
        seen.append(strong)
        return training_step(pair, now, labelled, strong, *more)

    monkeypatch.setattr("distseg.train.trainer.training_step", step)
    distseg.fit(**keys | {"run_dir": str(tmp_path / "without"), "steps": 3, "extend": True})
    assert len(drawn) == 2 and len(seen) == 1  # a batch has two
    for n, (weak, strong, _, threshold, _) in enumerate(drawn):
        labels = seen[0].pseudo
        assert labels is not None and threshold == 0.05
        first = 2 * n  # of its strong and its weak view
        shown = (seen[0].pixels[first] * 255).round().permute(1, 2, 0)
        assert np.array_equal(strong.image, shown)
        assert np.array_equal(strong.label, labels.label[first])
        assert np.array_equal(strong.confident, labels.confidence[first] >= threshold)
        # the rest of both is of one crop
        same = (weak.label == strong.label) & (weak.label != 255)
        assert same.mean() > 0.5 and not np.array_equal(weak.image, strong.image)


def held_out_at_the_end(run_dir: Path) -> dict[str, float]:
    """What the last evaluation says of held-out images."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    row = next(row for row in map(json.loads, reversed(lines)) if "val/mean_iou" in row)
    return {name: value for name, value in row.items() if name.startswith("held_out/")}
