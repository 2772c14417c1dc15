"""Segmentation losses beside the plain cross entropy: by their definitions, over any ranks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from distseg.config import loading
from distseg.config.schema import TermConfig
from distseg.distributed.ranks import Ranks
from distseg.losses.class_weights import balanced, median_frequency
from distseg.losses.cross_entropy import PixelOptions, cross_entropy_sum, hard_pixels
from distseg.losses.overlap import dice_sum, lovasz_softmax_sum
from distseg.losses.predicted import Predicted, Targets
from distseg.losses.terms import Adversarial, CrossEntropy, FunctionTerm, Term
from distseg.parallel import wrap
from distseg.train.batch import Images, MicroBatch
from distseg.train.counts import Counts, mean
from distseg.train.finite import not_finite as not_finite_step
from distseg.train.headline import never_begun, without_effect
from distseg.train.objective import (
    Judging,
    Objective,
    build_objective,
    build_term,
    check_terms,
)
from distseg.train.schedules import Phase, phase
from distseg.train.step import Pair, _targets, term_mean, training_step
from shards.errors import InputError
from shards.sample import ClassSet
from tests.ranks import run_ranks

NUM_CLASSES, SIZE = 4, 8
WEIGHTS = torch.tensor([1.0, 0.25, 3.0, 0.5], dtype=torch.float64)


def make(seed: int = 0, images: int = 3) -> tuple[Tensor, Tensor]:
    """Logits at a quarter of the label's size, and labels: part void, one image all void."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, NUM_CLASSES, 2, 2, generator=generator, dtype=torch.float64)
    label = torch.randint(0, NUM_CLASSES - 1, (images, SIZE, SIZE), generator=generator)
    label[0, 2:4] = 255
    label[-1] = 255
    return logits.requires_grad_(), label.to(torch.uint8)


def full(logits: Tensor) -> Tensor:
    return F.interpolate(logits, (SIZE, SIZE), mode="bilinear", align_corners=False)


def pixels(logits: Tensor, label: Tensor) -> list[tuple[Tensor, int]]:
    """(logits (C,), class) of every valid pixel."""
    up = full(logits)
    return [
        (up[n, :, y, x], int(label[n, y, x]))
        for n, y, x in np.ndindex(*label.shape)
        if label[n, y, x] != 255
    ]


def check_same(mine: Tensor, theirs: Tensor, logits: Tensor) -> None:
    assert abs((mine - theirs).item()) < 1e-10
    (own,) = torch.autograd.grad(mine, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs, logits, retain_graph=True)
    assert (own - expected).abs().max() < 1e-10 and own.abs().max() > 0


def log_softmax(scores: Tensor) -> Tensor:
    return scores - scores.exp().sum().log()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_and_smoothing_are_their_formula(smoothing: float) -> None:
    logits, label = make()
    expected = torch.zeros((), dtype=torch.float64)
    for scores, truth in pixels(logits, label):
        spread = (WEIGHTS * -log_softmax(scores)).sum() * smoothing / NUM_CLASSES
        sharp = WEIGHTS[truth] * -log_softmax(scores)[truth] * (1 - smoothing)
        expected = expected + sharp + spread
    options = PixelOptions(class_weights=WEIGHTS, label_smoothing=smoothing)
    check_same(cross_entropy_sum(logits, label, options), expected, logits)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_is_its_formula(gamma: float) -> None:
    logits, label = make()
    expected = torch.zeros((), dtype=torch.float64)
    for scores, truth in pixels(logits, label):
        chance = scores.softmax(0)[truth]
        expected = expected - WEIGHTS[truth] * (1 - chance) ** gamma * chance.log()
    options = PixelOptions(class_weights=WEIGHTS, focal_gamma=gamma)
    check_same(cross_entropy_sum(logits, label, options), expected, logits)


def test_focal_loss_of_a_certain_pixel_has_a_finite_gradient() -> None:
    logits = torch.tensor([[[[40.0]], [[-40.0]]]], requires_grad=True)
    label = torch.zeros(1, 1, 1, dtype=torch.uint8)
    total = cross_entropy_sum(logits, label, PixelOptions(focal_gamma=0.5))
    (gradient,) = torch.autograd.grad(total, logits)
    assert total == 0 and gradient.isfinite().all()


def test_adjusted_logits_are_their_formula() -> None:
    logits, label = make()
    shares = torch.tensor([0.6, 0.3, 0.09, 0.01], dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for scores, truth in pixels(logits, label):
        # Menon et al. 2021, eq. 10: each other class by its margin
        others = (scores - scores[truth] + 0.5 * (shares / shares[truth]).log()).exp().sum()
        expected = expected + others.log()
    options = PixelOptions(prior=0.5 * shares.log())
    check_same(cross_entropy_sum(logits, label, options), expected, logits)


@pytest.mark.parametrize(("threshold", "share"), [(0.3, 0.0), (0.05, 0.27), (0.01, 1.0)])
def test_hard_pixels_are_those_of_a_sorted_list_of_each_image(
    threshold: float, share: float
) -> None:
    logits, label = make()
    options = PixelOptions(ohem_threshold=threshold, ohem_min_share=share)
    hard = hard_pixels(logits, label, options)
    chances = full(logits).softmax(1)
    for n in range(len(label)):
        places = [p for p in np.ndindex(SIZE, SIZE) if label[n][p] != 255]
        chance = {p: float(chances[n, int(label[n][p]), p[0], p[1]]) for p in places}
        ranked = sorted(places, key=lambda p: chance[p])
        kept = set(ranked[: math.ceil(share * len(places))])
        kept |= {p for p in places if chance[p] < threshold}
        found = {p for p in np.ndindex(SIZE, SIZE) if hard[n][p] != 255}
        assert found == kept
        assert all(hard[n][p] == label[n][p] for p in found)


def test_a_mean_of_nothing_is_zero_with_a_live_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    values = torch.zeros(3, requires_grad=True)
    found = mean(values.sum(), torch.zeros((), dtype=torch.float64))
    found.backward()
    assert found.detach() == 0 and values.grad is not None and values.grad.isfinite().all()
    # of two ranks, whose gradients are averaged
    assert mean(torch.tensor(6.0), torch.tensor(4.0, dtype=torch.float64)) == 3


def test_scores_are_counted_apart_from_what_their_loss_is_divided_by() -> None:
    sums = {"divisor/labelled": 2, "scores/labelled": 50}
    sums |= {"divisor/unlabelled": 3, "scores/unlabelled": 70}
    counts = Counts({name: torch.tensor(float(value)) for name, value in sums.items()}, 1)
    assert counts.judged(["labelled", "unlabelled"]) == (5, 120)


def test_targets_have_the_size_of_outputs_whose_stride_does_not_divide_the_image() -> None:
    images = Images(torch.zeros(1, 3, 20, 17), torch.zeros(1, 20, 17, dtype=torch.uint8))
    network: Any = SimpleNamespace(network=SimpleNamespace(output_stride=8))
    pair = Pair(network, None, Objective((), Judging()))
    assert _targets(pair, MicroBatch(images))["labelled"].index.shape == (1, 3, 3)


def test_sums_of_hard_pixels_are_divided_by_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    logits, label = make()
    options = PixelOptions(ohem_threshold=0.3)
    term = CrossEntropy(options, per_image=True)
    targets = Targets.at(label, label.shape[-2:])
    counts = Counts.over_ranks(Objective((term,), Judging()), {"labelled": targets}, 1)
    found, share = term_mean(term, Predicted(torch.zeros(0), targets, logits), counts)
    hard = hard_pixels(logits, label, options)
    expected = cross_entropy_sum(logits, hard, options) / len(label)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    valid = int((label != 255).sum())
    assert float(share["share/cross_entropy"]) == pytest.approx(int((hard != 255).sum()) / valid)


def test_dice_is_its_formula_image_by_image() -> None:
    logits, label = make()
    chances, expected = full(logits).softmax(1), torch.zeros((), dtype=torch.float64)
    for n in range(2):  # the last image is void
        valid, losses = label[n] != 255, []
        for c in sorted(set(label[n][valid].tolist())):
            chance, truth = chances[n, c][valid], (label[n][valid] == c).double()
            overlap = 2 * (chance * truth).sum() + 1.0
            losses.append(1 - overlap / (chance.sum() + truth.sum() + 1.0))
        expected = expected + sum(losses) / len(losses)
    check_same(dice_sum(logits, label), expected, logits)


def lovasz_extension(errors: Tensor, truth: Tensor) -> Tensor:
    """By its definition: the set function 1 - IoU of ever larger sets of wrong pixels."""

    def one_minus_iou(wrong: set[int]) -> float:
        predicted = {i for i in range(len(truth)) if bool(truth[i]) != (i in wrong)}
        actual = {i for i in range(len(truth)) if truth[i]}
        return 1 - len(predicted & actual) / max(1, len(predicted | actual))

    order = errors.argsort(descending=True).tolist()
    value, before = torch.zeros((), dtype=torch.float64), 0.0
    for count, index in enumerate(order):
        after = one_minus_iou(set(order[: count + 1]))
        value, before = value + errors[index] * (after - before), after
    return value


def test_lovasz_softmax_is_the_extension_of_one_minus_iou() -> None:
    logits, label = make()
    chances, expected = full(logits).softmax(1), torch.zeros((), dtype=torch.float64)
    for n in range(2):
        valid, losses = label[n] != 255, []
        for c in sorted(set(label[n][valid].tolist())):
            truth = label[n][valid] == c
            losses.append(lovasz_extension((truth.double() - chances[n, c][valid]).abs(), truth))
        expected = expected + sum(losses) / len(losses)
    check_same(lovasz_softmax_sum(logits, label), expected, logits)


@pytest.mark.parametrize("loss", [dice_sum, lovasz_softmax_sum])
def test_overlap_of_void_alone_is_zero_with_a_live_graph(loss: Any) -> None:
    logits, _ = make()
    total = loss(logits, torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8))
    (gradient,) = torch.autograd.grad(total, logits)
    assert total == 0 and (gradient == 0).all()


def test_class_weights_from_pixels() -> None:
    counts = np.array([[6, 2, 0, 0], [0, 8, 4, 0]])
    flat = np.repeat(np.arange(3), counts.sum(0)[:3])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=flat)
    assert balanced(counts) == pytest.approx([*expected, 0.0])
    # frequencies in the samples that show a class: 6/8, 10/20, 4/12
    assert median_frequency(counts) == pytest.approx([0.5 / 0.75, 1.0, 0.5 / (4 / 12), 0.0])


class TinySegmentor(nn.Module):
    """At stride 4, with an auxiliary head in training; nothing depends on the batch's split."""

    output_stride, has_auxiliary = 4, True

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Conv2d(8, NUM_CLASSES, 3, padding=1)
        self.auxiliary = nn.Conv2d(8, NUM_CLASSES, 1)

    def forward(self, image: Tensor) -> Any:
        features = self.encoder(image).relu()
        logits = self.head(features)
        return {"out": logits, "aux": self.auxiliary(features)} if self.training else logits


CASES = {
    "all at once": [
        "loss.class_weights=[1,0.25,3,0.5]",
        "loss.label_smoothing=0.1",
        "loss.terms.dice=0.7",
        "loss.terms.region={use: lovasz, weight: 0.3}",
    ],
    "focal": ["loss.focal_gamma=2", "loss.ce_weight=0.5"],
    "hard pixels": [
        "loss.ohem_threshold=0.25",
        "loss.ohem_min_share=0.1",
        "loss.logit_adjustment=0.5",
    ],
    "without cross entropy": ["loss.ce_weight=0", "loss.terms.dice=1", "loss.aux_weight=0.2"],
    "no term of the auxiliary head": ["loss.aux_weight=0"],
    "no term of the logits at first": [
        "loss.ce_weight=0",
        "loss.terms.dice={weight: 1, start_step: 2}",
    ],
}
BATCH = 6


def images_of(step: int) -> Images:
    generator = torch.Generator().manual_seed(step)
    image = torch.rand(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    label = torch.randint(0, NUM_CLASSES, (BATCH, 16, 16), generator=generator).to(torch.uint8)
    label[-2:] = 255  # of three ranks the last has nothing to learn from
    label[0, :5] = 255
    return Images(image, label)


def configure(overrides: list[str]) -> Any:
    common = ["data.shards=unused", "precision=fp64", "mode=supervised", "schedule=constant"]
    common += ["segmentor_optimizer.name=sgd", "segmentor_optimizer.clip_norm=0"]
    common += ["segmentor_optimizer.weight_decay=0", "segmentor_optimizer.lr=0.01"]
    return loading.load([*common, *overrides])


def class_weights_of(config: Any) -> Tensor | None:
    asked = config.loss.class_weights
    return None if asked == "none" else torch.tensor(asked, dtype=torch.float64)


class FourClasses:
    """As much of a SampleSet as an objective looks at."""

    classes = ClassSet(("a", "b", "c", "d"), ((0, 0, 0),) * 4)

    def class_pixels(self) -> np.ndarray:
        return np.array([[30, 0, 4, 60], [0, 0, 6, 0]])


def train(ranks: Ranks, overrides: list[str], num_micro_batches: int = 1) -> dict[str, Any]:
    config = configure(overrides)
    torch.manual_seed(0)
    learner = wrap(TinySegmentor(), config.segmentor_optimizer, config, ranks)
    samples: Any = FourClasses()
    pair = Pair(learner, None, build_objective(config, learner.network, samples=samples))
    size = BATCH // ranks.world_size
    for step in range(3):
        images = images_of(step)[ranks.rank * size : (ranks.rank + 1) * size]
        training_step(pair, phase(step, config), images, None, num_micro_batches)
        learner.step(1.0)
    return {name: p.detach().numpy().copy() for name, p in learner.network.named_parameters()}


def train_all(ranks: Ranks, num_micro_batches: int = 1) -> list[dict[str, Any]]:
    cases = CASES.items()
    chosen = [case for name, case in cases if num_micro_batches == 1 or "hard" not in name]
    return [train(ranks, case, num_micro_batches) for case in chosen]


def reference_loss(config: Any, output: dict[str, Tensor], label: Tensor, step: int) -> Tensor:
    """On the whole batch, by the functions that are tested above, and plain division."""
    loss = config.loss
    weights = class_weights_of(config)
    factors = torch.ones(NUM_CLASSES, dtype=torch.float64) if weights is None else weights
    options = PixelOptions(weights, loss.label_smoothing, loss.focal_gamma)
    # class b, which has no pixel, as the rarest of the others
    shares = torch.tensor([0.3, 0.1, 0.1, 0.6], dtype=torch.float64)
    prior = loss.logit_adjustment * shares.log()[:, None, None]

    def cross_entropy(logits: Tensor) -> Tensor:
        logits = logits + prior
        mining = PixelOptions(None, 0, 0, loss.ohem_threshold, loss.ohem_min_share)
        chosen = hard_pixels(logits, label, mining) if loss.ohem_threshold else label
        return (
            cross_entropy_sum(logits, chosen, options) / factors[chosen[chosen != 255].long()].sum()
        )

    total = loss.ce_weight * cross_entropy(output["out"])
    total = total + loss.aux_weight * cross_entropy(output["aux"])
    num_images = int((label != 255).flatten(1).any(1).sum())
    for name, term in loss.terms.items():
        function = {"dice": dice_sum, "lovasz": lovasz_softmax_sum}[term.use or name]
        weight = term.weight if step >= term.start_step else 0.0
        total = total + weight * function(output["out"], label) / num_images
    return total


def reference(overrides: list[str]) -> dict[str, Any]:
    config = configure(overrides)
    torch.manual_seed(0)
    network = TinySegmentor().double()
    part = config.segmentor_optimizer
    optimizer = torch.optim.SGD(network.parameters(), part.lr, part.beta1, foreach=False)
    for step in range(3):
        images = images_of(step)
        optimizer.zero_grad()
        reference_loss(config, network(images.pixels), images.label, step).backward()
        optimizer.step()
    return {name: p.detach().numpy().copy() for name, p in network.named_parameters()}


def run_one(ranks: Ranks) -> tuple[Any, Any]:
    return train_all(ranks), train_all(ranks, 3)


def run_three(ranks: Ranks) -> tuple[Any, Any]:
    return train_all(ranks), divided(ranks)


@pytest.fixture(scope="module")
def one_rank() -> list[Any]:
    return run_ranks(1, run_one)


@pytest.fixture(scope="module")
def three_ranks() -> list[Any]:
    return run_ranks(3, run_three)


@pytest.fixture(scope="module")
def references() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [reference(case) for case in CASES.values()]


def test_terms_are_means_over_the_joined_batch(
    one_rank: list[Any], three_ranks: list[Any], references: list[Any]
) -> None:
    for of_rank, _ in (*one_rank, *three_ranks):
        for case, got, wanted in zip(CASES, of_rank, references, strict=True):
            worst = max(abs(got[name] - wanted[name]).max() for name in wanted)
            assert worst < 1e-12, f"{case} differs by {worst}"


def test_terms_with_gradient_accumulation_are_the_same_means(
    one_rank: list[Any], references: list[Any]
) -> None:
    expected = [
        of_case for name, of_case in zip(CASES, references, strict=True) if "hard" not in name
    ]
    ((_, got),) = one_rank
    for mine, wanted in zip(got, expected, strict=True):
        assert max(abs(mine[name] - wanted[name]).max() for name in wanted) < 1e-12


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        (
            ["segmentor_optimizer.encoder_lr_factor=0.1"],
            "segmentor_optimizer.encoder_lr_factor=0.1",
        ),
        (["loss.aux_weight=0.2"], "loss.aux_weight=0.2"),
        (["loss.ohem_min_share=0.5"], "loss.ohem_min_share=0.5"),
        (["loss.ce_weight=0", "loss.terms.dice=1", "loss.focal_gamma=2"], "loss.focal_gamma=2.0"),
        (["strong.mix=classmix"], "strong.mix=classmix"),
    ],
)
def test_a_setting_without_effect_is_told(asked: list[str], key: str) -> None:
    plain = nn.Conv2d(3, NUM_CLASSES, 1)  # no encoder, no auxiliary head
    (line,) = without_effect(configure(asked), plain)
    assert line.startswith(f"note: {key} has no effect, as ")
    plain.encoder, plain.has_auxiliary = nn.Identity(), True
    assert not without_effect(
        configure([*asked, "loss.ohem_threshold=0.7", "strong.labelled=true"]), plain
    )
    assert not without_effect(configure([]), nn.Conv2d(3, NUM_CLASSES, 1))


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        (["mode=semi_supervised", "semi.weight=0.1"], ["semi.start_step=5000"]),
        (["mode=semi_supervised", "semi.weight=0", "semi.adv_weight=0.1"], []),
        (
            [
                *("mode=semi_supervised", "semi.weight=0", "semi.adv_weight=0.1"),
                *("loss.adv_weight=0", "loss.adv_start_step=1000"),
            ],
            ["loss.adv_start_step=1000"],
        ),
        (
            [
                "mode=adversarial",
                "loss.adv_start_step=1000",
                "loss.terms={dice: {start_step: 1001}}",
            ],
            ["loss.terms.dice.start_step=1001", "loss.adv_start_step=1000"],
        ),
        (["mode=adversarial", "loss.adv_start_step=999"], []),
        (
            ["mode=consistency", "semi.entropy_weight=1", "semi.entropy_start_step=1000"],
            ["semi.entropy_start_step=1000"],
        ),
    ],
)
def test_a_term_that_never_begins_is_told(asked: list[str], keys: list[str]) -> None:
    lines = never_begun(configure(["steps=1000", *asked]))
    assert len(lines) == len(keys)
    for line, key in zip(lines, keys, strict=True):
        assert line.startswith(f"note: {key}, and the run ends at step 1000")


def mean_square(logits: Tensor, label: Tensor, power: float = 2.0) -> tuple[Tensor, Tensor]:
    valid = label != 255
    return (logits.abs() ** power).sum(1)[valid].sum(), valid.sum()


class OfMyOwn(Term):
    name = "mine"

    def count(self, targets: Targets) -> Tensor:
        return torch.tensor(float(len(targets.label)), dtype=torch.float64)

    def local_sum(self, seen: Predicted) -> Any:
        return seen.full_logits.square().mean((1, 2, 3)).sum()


GOOD: dict[str, Term] = {
    "a function": FunctionTerm(mean_square, "mine", {"power": 3.0}),
    "a class": OfMyOwn(),
}


@pytest.mark.parametrize("term", GOOD.values(), ids=GOOD)
def test_a_term_of_ones_own_passes_the_check(term: Term) -> None:
    check_terms([term], NUM_CLASSES)


def without_gradient(logits: Tensor, label: Tensor) -> tuple[Tensor, int]:
    return logits.argmax(1).double().sum(), 1


def not_finite(logits: Tensor, label: Tensor) -> tuple[Tensor, int]:
    return (logits * math.nan).sum(), 1


BAD: dict[str, tuple[Any, str]] = {
    "no gradient": (without_gradient, "no gradient"),
    "not finite": (not_finite, "nan"),
    "a mean": (lambda logits, label: logits.mean(), "sum and a count"),
    "a map": (lambda logits, label: (logits, 1), r"shape \(2, 4,"),
    "an error": (lambda logits, label: logits[:, 99], "IndexError"),
    "other arguments": (lambda logits: (logits.sum(), 1), "TypeError"),
}


@pytest.mark.parametrize(("function", "named"), BAD.values(), ids=BAD)
def test_a_term_that_cannot_train_is_refused_before_training(function: Any, named: str) -> None:
    with pytest.raises(InputError, match=rf"loss\.terms\.mine[\s\S]*{named}"):
        check_terms([FunctionTerm(function, "mine")], NUM_CLASSES)


def in_place(logits: Tensor, label: Tensor) -> tuple[Tensor, int]:
    label[label == 255] = 0  # of the label that all terms read
    return logits.square().sum(), 1


@pytest.mark.parametrize("count", [-5, math.nan, math.inf])
def test_a_count_that_divides_by_nothing_is_refused(count: float) -> None:
    term = FunctionTerm(lambda logits, label: (logits.square().sum(), count), "mine")
    with pytest.raises(InputError, match="a count of"):
        check_terms([term], NUM_CLASSES)


def test_a_term_that_changes_what_others_read_is_refused() -> None:
    with pytest.raises(InputError, match="changes its label in place"):
        check_terms([FunctionTerm(in_place, "mine")], NUM_CLASSES)


def test_a_term_of_probabilities_needs_the_adversary_in_every_step() -> None:
    class Sharp(OfMyOwn):
        def local_sum(self, seen: Predicted) -> Tensor:
            return seen.probabilities.square().sum()  # type: ignore[union-attr]

    check_terms([Sharp()], NUM_CLASSES)
    with pytest.raises(InputError, match="a step without the adversary"):
        check_terms([Sharp()], NUM_CLASSES, without_adversary=True)


@pytest.mark.parametrize("smooth", [-1, "a", math.nan])
def test_dice_takes_no_smoothing_below_0(smooth: Any) -> None:
    with pytest.raises(InputError, match="smooth="):
        build_term("dice", TermConfig(options={"smooth": smooth}))


class Chooser(OfMyOwn):
    """Chooses its pixels, so that it needs no count of its own."""

    chooses = True

    def __init__(self, answer: Any):
        self.answer = answer

    def count(self, targets: Targets) -> Tensor:
        raise AssertionError("asked for")

    def local_sum(self, seen: Predicted) -> Any:
        return self.answer(seen.full_logits.square().sum(), (seen.label != 255).sum())


class WithoutTensor(OfMyOwn):
    def count(self, targets: Targets) -> Any:
        return len(targets.label)


def test_what_a_class_counts_is_checked() -> None:
    check_terms([Chooser(lambda total, number: (total, number))], NUM_CLASSES)
    check_terms([Chooser(lambda total, number: (total, 7))], NUM_CLASSES)
    for term, named in (
        (Chooser(lambda total, number: total), "a Tensor instead of a sum and how many"),
        (Chooser(lambda total, number: (total, number[None])), "a count that is no"),
        (WithoutTensor(), "a count that is no tensor of one number"),
    ):
        with pytest.raises(InputError, match=rf"loss\.terms\.mine: {named}"):
            check_terms([term], NUM_CLASSES)


TERM_FILE = """
from distseg.losses import Term


class OnUnlabelled(Term):
    images = "unlabelled"


class Rewarded(Term):
    through_discriminator = True
"""


@pytest.mark.parametrize(
    ("name", "mode", "needed"),
    [
        ("OnUnlabelled", "supervised", "mode=semi_supervised"),
        ("OnUnlabelled", "adversarial", "mode=semi_supervised"),
        ("Rewarded", "supervised", "mode=adversarial or semi_supervised"),
    ],
)
def test_a_term_that_the_mode_never_computes_is_refused(
    tmp_path: Path, name: str, mode: str, needed: str
) -> None:
    (tmp_path / "term.py").write_text(TERM_FILE)
    use = f"loss.terms.mine.use={tmp_path}/term.py:{name}"
    config = configure([f"mode={mode}", use])
    with pytest.raises(InputError, match=rf"loss\.terms\.mine, a term[\s\S]*{needed}"):
        build_objective(config, TinySegmentor())
    build_objective(configure([f"mode={mode}", use, "loss.terms.mine.weight=0"]), TinySegmentor())


def test_unknown_terms_and_options_are_refused_by_name() -> None:
    config = configure(["loss.terms.dicey=1", "loss.terms.dice={options: {smoth: 2}}"])
    with pytest.raises(InputError, match=r"loss\.terms\.dicey\.use=dicey[\s\S]*dice, lovasz"):
        build_term("dicey", config.loss.terms["dicey"])
    with pytest.raises(InputError, match="smoth"):
        build_term("dice", config.loss.terms["dice"])


def divided(ranks: Ranks) -> list[float]:
    """A term of 20 pixels on every rank but the last, over all ranks' counts."""
    logits, label = make()
    seen = Predicted(torch.zeros(3, 3, 8, 8), Targets.at(label, (2, 2)), logits.detach())
    values = []
    for count in (math.nan, -1.0, math.inf, 0.0, 20.0):
        own = count if ranks.rank == ranks.world_size - 1 else 20.0
        term = FunctionTerm(lambda logits, label, own=own: (logits.sum(), own), "mine")
        of_step = Counts.over_ranks(Objective((term,), Judging()), {"labelled": seen.targets}, 1)
        values.append(float(term_mean(term, seen, of_step)[0] / seen.full_logits.sum()))
    return values


def test_a_count_that_is_none_on_one_rank_is_nan_on_all(three_ranks: list[Any]) -> None:
    for _, found in three_ranks:
        assert all(math.isnan(value) for value in found[:3])
        # 3 ranks, whose gradients are averaged
        assert found[3:] == pytest.approx([3 / 40, 3 / 60])


def test_a_run_that_is_not_finite_any_more_ends_with_an_error() -> None:
    config = loading.load(["data.shards=unused", "steps=50", "loss.terms.mine.use=a.py:f"])
    bad = {"loss/cross_entropy": 2.0, "loss/mine": math.nan, "loss/segmentor": math.nan}
    error = not_finite_step(config, 10, bad)
    assert error is not None and "loss.terms.mine is nan at step 10" in error.got
    all_bad = dict.fromkeys(bad, math.inf)
    # one such step is a blip, twenty in a row are not, nor is the last
    assert not_finite_step(config, 10, all_bad | {"skips_in_a_row/segmentor": 1.0}) is None
    error = not_finite_step(config, 40, all_bad | {"skips_in_a_row/segmentor": 20.0})
    assert error is not None and "20 non-finite gradients in a row" in error.got
    assert "cross_entropy, mine, segmentor" in error.got
    error = not_finite_step(config, 50, all_bad | {"skips_in_a_row/segmentor": 1.0})
    assert error is not None and "at the last step, 50" in error.got
    assert not_finite_step(config, 50, dict.fromkeys(bad, 1.0)) is None


def test_a_term_takes_part_where_there_is_what_it_needs() -> None:
    class Unlabelled(Term):
        name, images = "mine", "unlabelled"

    class Through(Term):
        name, through_discriminator = "through", True

    weights = {"cross_entropy": 1.0, "mine": 0.5, "through": 0.5, "adversarial": 0.0}
    terms = (CrossEntropy(), Unlabelled(), Through(), Adversarial())
    objective = Objective(terms, Judging(on_unlabelled=True))
    plain = Phase(segmentor=True, discriminator=False, weights=weights)
    assert [term.name for term, _ in objective.active(plain)] == ["cross_entropy"]
    assert not objective.uses_unlabelled(plain)
    judged = Phase(segmentor=True, discriminator=False, adversary=True, weights=weights)
    # the adversarial term without a weight too, which is watched
    assert [term.name for term, _ in objective.active(judged)] == [term.name for term in terms]
    assert objective.uses_unlabelled(judged)
    turn = Phase(segmentor=False, discriminator=True, adversary=True)
    assert objective.uses_unlabelled(turn)
    labelled = Objective(terms, Judging(on_unlabelled=False))
    assert not labelled.uses_unlabelled(turn)
