"""Domain adaptation: the adversary between predictions on two domains, against plain formulas."""

from __future__ import annotations

import math
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

import distseg
from distseg.config import loading
from distseg.config.world_size import check_pairs
from distseg.distributed.ranks import Ranks
from distseg.evaluate.judged import confidence_map
from distseg.losses.adversarial import self_information
from distseg.losses.predicted import Targets
from distseg.models import OfBothOutputs, Weights, build_discriminator
from distseg.tracking.tracker import read_metrics
from distseg.train.assembly import with_views
from distseg.train.batch import Images, MicroBatch
from distseg.train.diagnostics import entropies
from distseg.train.headline import without_effect
from distseg.train.inputs import open_data, open_streams
from distseg.train.networks import build_networks
from distseg.train.objective import build_objective
from distseg.train.schedules import phase
from distseg.train.step import Pair
from distseg.train.strong_views import StrongViews
from distseg.train.trainer import Trainer, TrainState
from shards.errors import InputError
from tests.ranks import leave_out, run_ranks
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
from tests.tiny import SETTINGS, contents

ADAPT = ["mode=domain_adaptation", "discriminator=large_fov"]
CASES: dict[str, list[str]] = {
    "a score per image": ADAPT,
    "a score per cell, unsureness": [
        *(*ADAPT, "discriminator.options.head=patch", "loss.adv_form=least_squares"),
        *("adaptation.input=self_information", "semi.entropy_weight=0.2"),
    ],
    "blocks": [*ADAPT, "alternation=blocks"],
    # the first step without an adversary, so that its entropy alone sees the target
    "an adversary that begins late": [*ADAPT, "semi.entropy_weight=0.2", "loss.adv_start_step=1"],
    "two outputs": [*ADAPT, "adaptation.aux_adv_weight=0.3", "loss.aux_weight=0.2"],
    "two outputs, cells, unsureness": [
        *(*ADAPT, "discriminator.options.head=patch", "loss.adv_form=least_squares"),
        *("adaptation.input=self_information", "semi.entropy_weight=0.2"),
        *("adaptation.aux_adv_weight=0.3", "loss.aux_weight=0", "loss.map_resolution=image"),
    ],
}
ACCUMULATED = "two outputs, cells, unsureness"
MATCHES = {**CASES, "in parts": CASES[ACCUMULATED], "fsdp": CASES[ACCUMULATED]}


def entropy_of(chances: Tensor, valid: Tensor) -> float:
    """As a share of the largest, of each image's valid pixels, then of the images."""
    each = -(chances * chances.log()).sum(1) / math.log(NUM_CLASSES)
    # one that is void alone counts as 0
    pairs = zip(each, valid, strict=True)
    means = [float(entropy[inside].sum() / max(1, inside.sum())) for entropy, inside in pairs]
    return float(np.mean(means))


def outputs_of(segmentor: torch.nn.Module, pixels: Tensor) -> list[Tensor]:
    """The logits, and those of an auxiliary head where there is one."""
    answer = segmentor(pixels)
    return list(answer.values()) if isinstance(answer, dict) else [answer]


def resized(logits: Tensor, side: int) -> Tensor:
    return F.interpolate(logits, (side, side), mode="bilinear")


def reference(overrides: list[str]) -> Any:
    """The steps by the formulas of Tsai et al. 2018 and Vu et al. 2019, in one process.

    Labels tell what every mean is divided by, so micro-batches change nothing. A segmentor of two
    outputs has a discriminator for each.
    """
    config, entropies = make_config(overrides), []
    segmentor, judge = networks = [network.double() for network in make_networks(config)]
    optimizers = [torch.optim.SGD(it.parameters(), lr=1e-3, momentum=0.9) for it in networks]
    for step in range(STEPS):
        now = phase(step, config)
        source, target = (make_images(config, step, labelled) for labelled in (True, False))
        side, cells = 8, slice(2, None, 4)
        if config.loss.map_resolution == "image":
            side, cells = 32, slice(None)
        outputs = [outputs_of(segmentor, images.pixels) for images in (source, target)]
        valid = [images.label[:, cells, cells] != 255 for images in (source, target)]

        def judged(judge: Any, chances: Tensor, where: Tensor) -> Tensor:
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

        first = [resized(each[0].detach(), side).softmax(1) for each in outputs]
        entropies.append([entropy_of(c, v) for c, v in zip(first, valid, strict=True)])
        judges = [judge] if len(outputs[0]) == 1 else [judge.of_logits, judge.of_auxiliary]
        weights = [(1.0, config.loss.adv_weight * now.adversary)]
        weights += [(config.loss.aux_weight, config.adaptation.aux_adv_weight)]
        d_loss = s_loss = torch.zeros((), dtype=torch.float64)
        for judge_of, (weight, adv_weight), *logits in zip(judges, weights, *outputs, strict=False):
            chances = [resized(each, side).softmax(1) for each in logits]
            scores = [judged(judge_of, c.detach(), v) for c, v in zip(chances, valid, strict=True)]
            d_loss = d_loss + loss_of(scores[0], 1.0) + loss_of(scores[1], 0.0)
            up = resized(logits[0], 32)
            on_source = F.cross_entropy(up, source.label.long(), ignore_index=255)
            # the target's predictions are to pass for the source's
            on_target = loss_of(judged(judge_of, chances[1], valid[1]), 1.0)
            s_loss = s_loss + weight * on_source + adv_weight * on_target
        p = resized(outputs[1][0], 32).softmax(1)
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
        if case in ("a score per image", "in parts", "an adversary that begins late"):
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
STRONG = ["mode=domain_adaptation", "strong.labelled=true"]
COMPLEMENTARY = "consistency.feature_perturbation=complementary"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mode=domain_adaptation", "loss.feature_weight=1"], "feature_weight=1.*adversarial or"),
        (["mode=domain_adaptation", "loss.r1_weight=1"], "r1_weight=1.*a mode with its term"),
        (["mode=domain_adaptation", "semi.adv_weight=1"], "semi.adv_weight=1"),
        ([*TAUGHT, "consistency.mix_with=labelled", "semi.batch_size=16"], "one domain each"),
        (["mode=adversarial", "adaptation.aux_adv_weight=1"], "aux_adv_weight=1 with mode=adv"),
        (["mode=domain_adaptation", "adaptation.aux_adv_weight=-1"], "from 0 on"),
        # views of another kind in each domain
        (TAUGHT, "strong.labelled=false.*views of one kind.*strong.labelled=true"),
        (
            [*STRONG, *TAUGHT, "consistency.num_views=2", COMPLEMENTARY],
            "complementary.*views of one kind",
        ),
        ([*STRONG, "strong.mix=classmix"], "no teacher.*write strong.mix=none or cutmix$"),
        (
            [*STRONG, *TAUGHT, "strong.mix=classmix", "consistency.start_step=9"],
            "adv_start_step=0 and consistency.start_step=9.*or loss.adv_start_step=9",
        ),
    ],
)
def test_what_needs_ground_truth_or_mixes_domains_is_refused(
    words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        loading.load(["data.shards=unused", *words])


def test_what_shows_both_domains_alike_is_accepted() -> None:
    late = ["consistency.start_step=9", "loss.adv_start_step=9"]
    for words in (
        STRONG,  # rectangles
        [*STRONG, "strong.mix=classmix", "strong.mix_probability=0"],
        [*STRONG, *TAUGHT, "strong.mix=classmix"],
        [*STRONG, *TAUGHT, "strong.mix=classmix", *late],
        # no discriminator that could tell
        ["mode=consistency", *TAUGHT[1:], "strong.labelled=true", "strong.mix=classmix", late[0]],
    ):
        config = loading.load(["data.shards=unused", *words])
    # without a teacher's classes nothing is cut by them
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    assert StrongViews.of_untaught(config, NUM_CLASSES, alone).view.mix == "none"
    # pairs of target images too, without a teacher
    odd = loading.load(["data.shards=unused", *STRONG, "semi.batch_size=3"])
    with pytest.raises(InputError, match="3 unlabelled images"):
        check_pairs(odd, 1)
    check_pairs(replace(odd, strong=replace(config.strong, mix="cutout")), 1)


APART = ["adaptation.batch_norm=separate", "consistency.weight=1", "consistency.start_step=1"]


@pytest.mark.parametrize("words", [[], APART])
def test_both_domains_come_in_views_of_one_kind_before_a_teacher_and_without(
    toy_shards: Path, words: list[str]
) -> None:
    """All that a strong view does is done to every image of either."""
    told = [f"data.shards={toy_shards}", "data.labelled=1/2", "batch_size=4", *STRONG, *words]
    told += ["strong.gray_probability=1", "strong.blur_probability=0", "strong.mix=cutout"]
    told += ["strong.mix_probability=1", "consistency.teacher=segmentor", "data.crop_px=32"]
    ranks, batches = Ranks(0, 1, 0, torch.device("cpu")), []
    for jitter in (0.4, 0.0):
        config = loading.load([*told, f"data.color_jitter={jitter}", "data.num_threads=0"])
        with closing(open_streams(config, ranks, open_data(config, 1), 0)) as stream:
            batches.append(next(stream))
    unlabelled = [batch.unlabelled.image for batch in batches if batch.unlabelled is not None]
    assert torch.equal(*unlabelled)  # its colours are those of the strong view alone
    segmentor: Any = SimpleNamespace(network=TinySegmentor())
    segmentor.network.num_classes = NUM_CLASSES
    pair = replace(Pair.of(config, segmentor), segmentor=segmentor)
    trainer = object.__new__(Trainer)
    trainer.config, trainer.ranks, trainer.state = config, ranks, TrainState()
    trainer.pair, _ = with_views(config, ranks, pair)
    source, target, taught = trainer._images(batches[0], phase(0, config))
    assert taught is None and target is not None
    assert target.is_tracked and source.is_tracked == (not words)
    crops = (batches[0].label, torch.zeros(4, 32, 32, dtype=torch.uint8))
    for images, label in zip((source, target), crops, strict=True):
        seen = images.label != 255
        colours = images.pixels.amax(1) - images.pixels.amin(1)
        assert (colours[seen] < 1e-3).float().mean() > 0.99
        cut = (images.label == 255) & (label != 255)
        assert (cut.flatten(1).sum(1) > 0).all()


def test_the_entropy_begins_late_and_rises() -> None:
    words = ["data.shards=unused", "mode=domain_adaptation", "semi.entropy_weight=0.3"]
    words += ["semi.entropy_start_step=4", "semi.entropy_warmup_steps=3"]
    config = loading.load(words)
    found = [phase(step, config).weights["entropy"] for step in range(3, 8)]
    assert found == pytest.approx([0, 0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["segmentor.batch_norm=frozen", APART[0]], "adaptation.batch_norm"),
        ([*STRONG, *TAUGHT, "consistency.batch_norm=separate"], "consistency.batch_norm"),
    ],
)
def test_a_choice_of_batch_norm_without_effect_is_told(words: list[str], key: str) -> None:
    config = loading.load(["data.shards=unused", "mode=domain_adaptation", *words])
    (line,) = without_effect(config, TinySegmentor())
    assert f"{key}=separate has no effect" in line


def test_pieces_of_the_source_do_not_count_in_the_targets_entropy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distseg.train.counts.dist.get_world_size", lambda: 1)
    label = torch.ones(2, 4, 4, dtype=torch.uint8)  # of the source this is a class
    label[1, 2:] = 0
    chances = torch.full((2, 2, 4, 4), 0.5)
    chances[1, :, :2] = torch.tensor([1.0, 0.0])[:, None, None]  # sure of what is laid over it
    batch = MicroBatch(*(Images(chances[n : n + 1], label[n : n + 1]) for n in range(2)))
    counts: Any = SimpleNamespace(images=lambda kind: torch.ones((), dtype=torch.float64))
    found = entropies(chances, Targets.at(label, (4, 4)), batch, counts)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"adaptation/source_entropy": 1.0, "adaptation/target_entropy": 1.0}
    )


def test_entropies_are_of_two_data_sets_alone() -> None:
    words = ["data.shards=unused", "mode=consistency", "semi.entropy_weight=1"]
    for more, expected in ((["data.unlabelled_shards=other"], True), ([], False)):
        config = loading.load([*words, *more])
        assert build_objective(config, TinySegmentor()).of_domains == expected


@pytest.mark.parametrize("name", ["two_branch", "image_conditioned"])
def test_a_discriminator_that_sees_the_image_is_refused(name: str) -> None:
    words = ["data.shards=unused", "segmentor=multiscale", "mode=domain_adaptation"]
    config = loading.load([*words, "segmentor.init=random", f"discriminator={name}"])
    with pytest.raises(InputError, match=f"(?s){name}.*predictions alone"):
        build_networks(config, NUM_CLASSES)


def test_a_second_output_is_asked_of_a_segmentor_that_has_one() -> None:
    words = ["data.shards=unused", "segmentor=multiscale", "segmentor.init=random", *ADAPT]
    config = loading.load([*words, "adaptation.aux_adv_weight=0.1"])
    with pytest.raises(InputError, match=r"(?s)multiscale.*no auxiliary.*options.auxiliary=true"):
        build_networks(config, NUM_CLASSES)


def test_each_output_begins_with_the_weights_of_its_own_discriminator() -> None:
    made = [build_discriminator("large_fov_light", 3, width=0.1) for _ in range(2)]
    both = Weights(OfBothOutputs(*made).state_dict(), "both")
    for output, one in zip(("of_logits", "of_auxiliary"), made, strict=True):
        # of one alone whichever asks
        for weights in (both, Weights(one.state_dict(), "one")):
            found = build_discriminator(
                "large_fov_light", 3, init=weights, output=output, width=0.1
            )
            wanted = one.state_dict()
            assert all(torch.equal(it, wanted[key]) for key, it in found.state_dict().items())


OWN = """
from torch import nn

class TwoOutputs(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, num_classes, 1)
        self.other = nn.Conv2d(8, num_classes, 1, 2)

    def forward(self, image):
        x = self.encoder(image)
        return {"out": self.head(x), "aux": self.other(x)} if self.training else self.head(x)
"""


def test_a_run_of_two_outputs_goes_on_to_the_same_bits_and_shows_its_first(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch.setattr)
    (tmp_path / "own.py").write_text(OWN)
    words = [f"data.shards={toy_shards}", "data.labelled=1/2", "checkpoint.every_steps=1"]
    words += [*ADAPT, "adaptation.aux_adv_weight=0.1"]
    named = {"name": f"{tmp_path}/own.py:TwoOutputs", "init": "random", "options": {}}
    keys: Any = SETTINGS | {"segmentor": named}
    runs = [tmp_path / name for name in ("one", "two")]
    distseg.fit([*words, f"run_dir={runs[0]}"], **keys)
    shutil.copytree(*runs)
    shutil.rmtree(runs[1] / "checkpoints/step-00000002")
    distseg.fit([*words, f"run_dir={runs[1]}"], **keys)
    one, two = (contents(run / "checkpoints/step-00000002") for run in runs)
    assert one == two
    rows = read_metrics(runs[0] / "metrics.jsonl")
    for name in ("loss/adversarial_auxiliary", "discriminator/auxiliary_accuracy"):
        assert all(np.isfinite(row[name]) for row in rows if name in row)
        assert any(name in row for row in rows)
    trained = distseg.load(runs[0], device="cpu")
    tensors = load(one["discriminator.network.safetensors"])
    own = trained.discriminator.state_dict()
    assert all(torch.equal(it, tensors[f"of_logits.{key}"]) for key, it in own.items())
    assert isinstance(trained.network(torch.zeros(1, 3, 48, 48)), Tensor)
