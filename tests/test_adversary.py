"""The adversary's further ways against plain formulas, in float64 and on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

import distseg
from distseg.config import loading
from distseg.config.schema import WITH_UNLABELLED, Config
from distseg.config.world_size import check_neighbours
from distseg.distributed.ranks import Ranks
from distseg.evaluate.judged import judges_auxiliary
from distseg.losses.adversarial import squared_gradient_sum
from distseg.models import OfBothOutputs, build_discriminator
from distseg.models.spectral_norm import norms_of
from distseg.parallel import wrap
from distseg.parallel.torch_learner import dtype_of
from distseg.tracking.tracker import read_metrics
from distseg.train.adversary import check_discriminator, image_tells
from distseg.train.batch import Images
from distseg.train.networks import build_networks
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from shards.errors import InputError
from tests.ranks import leave_out, run_ranks
from tests.test_engine import NUM_CLASSES, TinySegmentor
from tests.tiny import contents

BATCH, STEPS = 12, 3
SEMI = ["mode=semi_supervised", "semi.weight=0", "semi.adv_weight=0.4"]
FEATURES, MISMATCHED = "loss.feature_weight=0.3", "loss.mismatched_weight=0.4"
# else it works at four times the label maps' resolution
R1, NORM = "loss.r1_weight=20", "discriminator.options.spectral_norm=true"
SMALL = "discriminator.options.image_pool=false"
CELLS = ["discriminator.options.head=patch", SMALL]
CASES: dict[str, list[str]] = {
    "features of labelled images": [FEATURES, SMALL],
    "features, blocks": [*SEMI, *CELLS, FEATURES, "alternation=blocks", "semi.adv_weight=0"],
    "mismatched, a score per cell": [*CELLS, MISMATCHED, "loss.real_target=0.9"],
    "both, of the discriminator that joins them": [
        *(*SEMI, FEATURES, MISMATCHED, "discriminator=image_conditioned", "loss.adv_form=hinge"),
        *("discriminator.options.dropout=0", "semi.discriminate=false"),
    ],
    "R1, a score per image": [R1, SMALL, "loss.r1_every=2"],
    "R1 and all else, a score per cell": [
        *(*SEMI, FEATURES, MISMATCHED, R1, "discriminator=image_conditioned"),
        *("discriminator.options.dropout=0", "discriminator.options.head=patch"),
    ],
    "spectral norm, R1": [*CELLS, R1, NORM],
    "spectral norm, blocks, features": [FEATURES, SMALL, NORM, "alternation=blocks"],
    "both, sums": [*SEMI, *CELLS, FEATURES, MISMATCHED, "loss.adv_reduction=sum"],
}
ACCUMULATED = "both, sums"  # in two micro-batches as well
ALONE = "R1 and all else, a score per cell"  # on one rank as well
FSDP = ["parallel.strategy=fsdp"]


def make_config(overrides: list[str]) -> Config:
    common = ["data.shards=unused", "precision=fp64", "steps=10", "schedule=constant"]
    common += ["loss.adv_weight=0.7", "alternation.segmentor=1", "alternation.discriminator=1"]
    for network in ("segmentor", "discriminator"):
        common += [f"{network}_optimizer.{rest}" for rest in ("name=sgd", "clip_norm=0")]
        common += [f"{network}_optimizer.{rest}" for rest in ("weight_decay=0", "lr=1e-3")]
    return loading.load([*common, "discriminator.options.width=0.1", *overrides])


class TwoOutputs(TinySegmentor):
    """In training mode with the logits of an auxiliary head, of half the resolution."""

    has_auxiliary = True

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(8, NUM_CLASSES, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> Any:
        x = self.encoder(image)
        return {"out": self.head(x), "aux": self.auxiliary(x)} if self.training else self.head(x)


def make_networks(config: Config) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    chosen, both = config.discriminator, judges_auxiliary(config)
    segmentor = TwoOutputs() if both else TinySegmentor()
    judges = [
        build_discriminator(chosen.name, NUM_CLASSES, **chosen.options) for _ in range(1 + both)
    ]
    return segmentor, OfBothOutputs(*judges) if both else judges[0]


def make_images(config: Config, step: int, labelled: bool) -> Images:
    # for label maps of 16 px, the least that image_conditioned takes, or 8
    size = 64 if config.discriminator.name == "image_conditioned" else 32
    generator = torch.Generator().manual_seed(2 * step + labelled)
    pixels = torch.rand(BATCH, 3, size, size, generator=generator, dtype=torch.float64)
    label = torch.randint(0, NUM_CLASSES, pixels.shape[2:], generator=generator).to(torch.uint8)
    label = label.repeat(BATCH, 1, 1).roll(step, 0)
    for n in range(BATCH):
        label[n] = label[n].roll(n, 1)
    if not labelled:
        label.zero_()
    label[1::3, 9:20] = 255
    label[-BATCH // 3 :] = 255  # of three ranks the last has void alone
    return Images(pixels, label)


def train(ranks: Ranks, overrides: list[str], num_parts: int = 1) -> Any:
    """Our steps on this rank's part of each batch: both networks' parameters, and the metrics."""
    config = make_config(overrides)
    networks = make_networks(config)
    optimizers = (config.segmentor_optimizer, config.discriminator_optimizer)
    learners = [wrap(*both, config, ranks) for both in zip(networks, optimizers, strict=True)]
    pair = Pair.of(config, *learners)
    size = BATCH // ranks.world_size
    share = slice(ranks.rank * size, (ranks.rank + 1) * size)
    told = []
    for step in range(STEPS):
        images = [make_images(config, step, labelled) for labelled in (True, False)]
        labelled, unlabelled = (
            Images(each.pixels[share].to(dtype_of(config)), each.label[share]) for each in images
        )
        now = replace(phase(step, config), watched=config.mode == "domain_adaptation")
        is_semi = config.mode in WITH_UNLABELLED and pair.objective.uses_unlabelled(now)
        rest = unlabelled if is_semi else None
        metrics = training_step(pair, now, labelled, rest, num_parts)
        told.append({name: float(value.detach()) for name, value in metrics.items()})
        updated = (now.segmentor, now.discriminator)
        for learner, is_updated in zip(learners, updated, strict=True):
            given = [p.grad is not None for p in learner.network.parameters()]
            # DeepSpeed keeps them elsewhere
            assert any(given) == is_updated or config.parallel.strategy == "deepspeed"
            if is_updated:
                learner.step(1.0)
    return *(values_of(learner.full_network()) for learner in learners), told


def values_of(network: nn.Module) -> dict[str, Any]:
    """Parameters, and the singular vectors of spectral norms."""
    return {name: it.detach().numpy().copy() for name, it in network.state_dict().items()}


def reference(overrides: list[str], groups: list[list[int]] | None = None) -> Any:
    """The same steps by the formulas, in one process on the whole batch.

    groups: the images of each micro-batch.
    """
    config = make_config(overrides)
    networks = [network.double() for network in make_networks(config)]
    optimizers = [torch.optim.SGD(it.parameters(), lr=1e-3, momentum=0.9) for it in networks]
    told = []
    for step in range(STEPS):
        now = phase(step, config)
        losses, metrics = losses_of(config, step, networks, groups or [list(range(BATCH))])
        told.append(metrics)
        gradients = [
            torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
            for loss, network in zip(losses, networks, strict=True)
        ]
        for k, is_updated in enumerate((now.segmentor, now.discriminator)):
            for parameter, gradient in zip(networks[k].parameters(), gradients[k], strict=True):
                parameter.grad = gradient
            if is_updated:
                optimizers[k].step()
    return *(values_of(network) for network in networks), told


def losses_of(
    config: Config, step: int, networks: list[nn.Module], groups: list[list[int]]
) -> tuple[list[Tensor], dict[str, float]]:
    loss, semi = config.loss, config.mode == "semi_supervised"
    segmentor, judge = networks
    norms = norms_of(judge)
    for norm in norms:
        norm.train(phase(step, config).discriminator)
    kinds = [make_images(config, step, labelled) for labelled in (True, False)[: 1 + semi]]
    logits = [segmentor(images.pixels) for images in kinds]
    chances = [each.softmax(1) for each in logits]
    small = [images.label[:, 2::4, 2::4].long() for images in kinds]
    valid = [each != 255 for each in small]
    real = chances[0].detach().clone().permute(0, 2, 3, 1)
    real[valid[0]] = F.one_hot(small[0][valid[0]], NUM_CLASSES).double()
    real = real.permute(0, 3, 1, 2)
    real.requires_grad_()
    neighbour = [n ^ 1 for n in range(BATCH)]

    # the one power iteration of a step that updates the discriminator; below they stay
    judge(kinds[0].pixels, real)
    for norm in norms:
        norm.eval()

    def judged(kind: int, maps: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """The scores that count, in a row, and the features."""
        (scores,), (features,) = judge(kinds[kind].pixels, maps, features=True)
        if judge.head != "patch":
            return scores.flatten(), features
        up = F.interpolate(scores, where.shape[-2:], mode="bilinear")
        return up[:, 0][where], features

    def mean(values: Tensor, num_kinds: int = 1) -> Tensor:
        in_sums = loss.adv_reduction == "sum"
        return values.sum() / (num_kinds * BATCH if in_sums else len(values))

    def own(scores: Tensor, target: float) -> Tensor:
        if loss.adv_form == "hinge":
            return (1 - scores if target else 1 + scores).clamp(min=0)
        return -(target * F.logsigmoid(scores) + (1 - target) * F.logsigmoid(-scores))

    def reward(scores: Tensor) -> Tensor:
        return -scores if loss.adv_form == "hinge" else own(scores, 1.0)

    on_real, of_real = judged(0, real, valid[0])
    on_fake = [judged(k, chances[k], valid[k]) for k in range(len(kinds))]
    constant = [judged(k, chances[k].detach(), valid[k])[0] for k in range(len(kinds))]
    told = {"loss/discriminator_real": mean(own(on_real, loss.real_target))}
    if not (semi and config.semi.discriminate):
        constant = constant[:1]
    told["loss/discriminator_fake"] = mean(own(torch.cat(constant), 0.0), len(constant))
    d_loss = told["loss/discriminator_real"]
    d_loss = d_loss + (1 - loss.mismatched_weight) * told["loss/discriminator_fake"]
    if loss.mismatched_weight:
        wrong, _ = judged(0, real.detach()[neighbour], valid[0][neighbour])
        told["loss/discriminator_mismatched"] = mean(own(wrong, 0.0))
        d_loss = d_loss + loss.mismatched_weight * told["loss/discriminator_mismatched"]
    if loss.r1_weight and step % loss.r1_every == 0:
        image_scores = judge(kinds[0].pixels, real)[0].flatten(1).mean(1)
        penalty = torch.zeros((), dtype=torch.float64)
        for n in range(BATCH):  # one by one
            gradient = torch.autograd.grad(image_scores[n], real, create_graph=True)[0][n]
            penalty = penalty + gradient.square().sum() / BATCH
        told["loss/r1"] = penalty
        d_loss = d_loss + loss.r1_weight / 2 * loss.r1_every * penalty
    up = F.interpolate(logits[0], kinds[0].label.shape[-2:], mode="bilinear")
    s_loss = F.cross_entropy(up, kinds[0].label.long(), ignore_index=255)
    s_loss = s_loss + loss.adv_weight * mean(reward(on_fake[0][0]))
    if semi:
        s_loss = s_loss + config.semi.adv_weight * mean(reward(on_fake[1][0]))
    if loss.feature_weight:
        of_fake = on_fake[-1][1]
        apart = [(of_real[g].detach().mean(0) - of_fake[g].mean(0)).abs().sum() for g in groups]
        told["loss/feature_matching"] = torch.stack(apart).mean()
        s_loss = s_loss + loss.feature_weight * told["loss/feature_matching"]
    return [s_loss, d_loss], {name: float(value.detach()) for name, value in told.items()}


def groups_of(world_size: int) -> list[list[int]]:
    """The images of each of two micro-batches: the first and the second half of every rank's."""
    size = BATCH // world_size
    by_rank = torch.arange(BATCH).view(world_size, 2, size // 2)
    return [by_rank[:, part].flatten().tolist() for part in (0, 1)]


def run_all(ranks: Ranks) -> dict[str, Any]:
    """All cases; on one rank, whose formulas are theirs, the one that has every way of its own."""
    if ranks.world_size == 1:
        return {ALONE: train(ranks, CASES[ALONE])}
    found = {name: train(ranks, overrides) for name, overrides in CASES.items()}
    found["in parts"] = train(ranks, CASES[ACCUMULATED], 2)
    found["fsdp"] = train(ranks, [*CASES[ACCUMULATED], *FSDP])
    return found


@pytest.fixture(scope="module")
def of_ranks() -> dict[int, list[dict[str, Any]]]:
    """What all tests look at: starting ranks takes longer than what they do for one."""
    return {num_ranks: run_ranks(num_ranks, run_all) for num_ranks in (1, 3)}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {name: reference(overrides) for name, overrides in CASES.items()}
    return found | {"fsdp": found[ACCUMULATED]}


@pytest.mark.parametrize(
    ("case", "num_ranks"), [(ALONE, 1), *((case, 3) for case in (*CASES, "fsdp", "in parts"))]
)
def test_steps_equal_the_formulas_on_the_joined_batch(
    case: str, num_ranks: int, of_ranks: dict[int, Any], references: dict[str, Any]
) -> None:
    expected = references.get(case)
    if case == "in parts":
        expected = reference(CASES[ACCUMULATED], groups_of(num_ranks))
    found = [of_rank[case] for of_rank in of_ranks[num_ranks]]
    for of_rank in found:
        for ours, theirs in zip(of_rank[:2], expected[:2], strict=True):
            assert max(abs(ours[name] - theirs[name]).max() for name in theirs) < 1e-12
    for step in range(STEPS):
        for name, value in expected[2][step].items():
            told = [of_rank[2][step][name] for of_rank in found if name in of_rank[2][step]]
            assert told or "blocks" in case
            if told:  # blocks: what the phase's network is not trained for is not known
                assert sum(told) / num_ranks == pytest.approx(value, rel=1e-10), (step, name)
    metrics = set().union(*found[0][2])
    names = {FEATURES: "feature_matching", MISMATCHED: "discriminator_mismatched", R1: "r1"}
    for key, name in names.items():
        assert (f"loss/{name}" in metrics) == (key in CASES.get(case, CASES[ACCUMULATED]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.feature_weight=-1"], "loss.feature_weight=-1.*from 0 on"),
        (["loss.mismatched_weight=1"], "loss.mismatched_weight=1.*from 0 to 0.99"),
        (["mode=supervised", FEATURES], "mode=supervised"),
        (["loss.r1_every=0"], "loss.r1_every=0.*from 1 to"),
        ([R1, "parallel.strategy=fsdp"], "strategy=fsdp.*backward through a backward"),
        ([R1, "parallel.strategy=deepspeed"], "strategy=deepspeed.*parallel.strategy=ddp"),
        ([NORM, "parallel.strategy=fsdp"], "spectral_norm=True.*strategy=fsdp.*strategy=ddp"),
        ([NORM, "parallel.strategy=deepspeed"], "spectral_norm=True.*strategy=deepspeed"),
        ([R1, "compile=true"], "compile=true.*no second derivative"),
        ([R1, "precision=fp16"], "precision=fp16.*precision=bf16"),
        (["mode=supervised", R1], "mode=supervised"),
        ([MISMATCHED, "strong.labelled=true"], "strong.mix=cutmix.*strong.mix=cutout or none"),
        (["loss.terms.feature_matching.use=dice"], "a name that no built-in term has"),
    ],
)
def test_bad_values_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        loading.load(["data.shards=unused", *words])


def test_mismatched_pairs_stand_beside_views_that_are_not_mixed_in_pairs() -> None:
    views = [MISMATCHED, "strong.labelled=true", "strong.mix=classmix"]
    for words in (["strong.mix=cutout"], ["strong.mix=none"], ["strong.mix_probability=0"]):
        assert loading.load(["data.shards=unused", *views, *words]).strong.labelled
    # which nothing looks at
    loading.load(["data.shards=unused", *views, "mode=adversarial", "strong.labelled=false"])


class Blind(nn.Module):
    """A discriminator of a user's own that sees label maps alone and has no features."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.layer = nn.Conv2d(num_classes, 1, 3)

    def forward(self, label_map: Tensor) -> Tensor:
        return self.layer(label_map)


class OnceOnly(torch.autograd.Function):
    """The identity, whose gradient is computed by what autograd does not follow."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class FirstOrder(Blind):
    def forward(self, label_map: Tensor) -> Tensor:
        return self.layer(OnceOnly.apply(label_map) ** 2)


OWN = f"discriminator={__file__}:Blind"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["discriminator=fully_convolutional", MISMATCHED], "fully_convolutional.*sees the image"),
        (["discriminator=small_fov", MISMATCHED], "small_fov.*inputs=product"),
        ([OWN, MISMATCHED], "Blind.*sees the image"),
        ([OWN, FEATURES], "Blind.*takes features=False"),
        ([OWN.replace("Blind", "FirstOrder"), R1], "FirstOrder.*differentiated twice"),
    ],
)
def test_discriminators_that_cannot_do_it_are_refused(words: list[str], message: str) -> None:
    config = loading.load(
        ["data.shards=unused", "segmentor=multiscale", "data.crop_px=256", *words]
    )
    config.segmentor.init = "random"
    with pytest.raises(InputError, match=f"(?s){message}"):
        build_networks(config, NUM_CLASSES)
    able = "discriminator.options.inputs=product"
    config = loading.load(["data.shards=unused", "discriminator=small_fov", able, MISMATCHED])
    network = build_discriminator("small_fov", NUM_CLASSES, inputs="product", width=0.1)
    check_discriminator(config, network)


@pytest.mark.parametrize(
    ("words", "which"),
    [
        (["consistency.weight=1"], "unlabelled"),
        (["strong.labelled=true"], "labelled"),
        (["consistency.weight=1", "strong.labelled=true"], None),
        (["consistency.weight=1", "discriminator=fully_convolutional"], None),
        # s4GAN: both views are the crop itself
        (["preset=voc_s4gan"], None),
    ],
)
def test_strong_views_of_only_some_images_are_warned_of(
    words: list[str], which: str | None
) -> None:
    told = ["data.shards=unused", *SEMI, "ema_decay=0.9", "discriminator=image_conditioned", *words]
    config = loading.load(told)
    name = config.discriminator.name
    text = image_tells(config, build_discriminator(name, NUM_CLASSES))
    assert (text is None) if which is None else f"only the {which} are in strong views" in str(text)


def test_half_a_pair_of_labelled_images_is_refused() -> None:
    config = loading.load(["data.shards=unused", "batch_size=6", MISMATCHED])
    with pytest.raises(
        InputError, match=r"3 labelled images a rank and micro-batch[\s\S]*batch_size=8"
    ):
        check_neighbours(config, 2)
    check_neighbours(config, 3)
    config.gradient_accumulation_steps = 2
    with pytest.raises(InputError, match="even number"):
        check_neighbours(config, 1)
    config.loss.mismatched_weight = 0.0
    check_neighbours(config, 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two_branch", {"head": "patch", "image_pool": False, "width": 0.1}),
        ("image_conditioned", {"width": 0.1}),
        ("small_fov_light", {"width": 0.1}),
    ],
)
def test_the_penaltys_gradient_is_that_of_finite_differences(
    name: str, options: dict[str, Any]
) -> None:
    """Along a direction in the space of all parameters; dropout draws the same each time."""
    judge = build_discriminator(name, NUM_CLASSES, **options).double()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    maps = torch.randn(2, NUM_CLASSES, 16, 16, generator=generator, dtype=torch.float64)
    maps = maps.softmax(1).requires_grad_()
    parameters = list(judge.parameters())
    direction = [torch.randn(p.shape, generator=generator).double() for p in parameters]

    def penalty(moved: float) -> Tensor:
        torch.manual_seed(1)
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data.add_(along, alpha=moved)
        (scores,) = judge(pixels, maps)
        total = squared_gradient_sum(scores, maps)
        for parameter, along in zip(parameters, direction, strict=True):
            parameter.data.sub_(along, alpha=moved)
        return total

    gradients = torch.autograd.grad(penalty(0.0), parameters, allow_unused=True)
    pairs = zip(gradients, direction, strict=True)
    slope = sum(float((g * d).sum()) for g, d in pairs if g is not None)
    step = 1e-6
    differences = float(penalty(step).detach() - penalty(-step).detach()) / (2 * step)
    assert slope == pytest.approx(differences, rel=1e-6) and abs(slope) > 1e-6


ALL: dict[str, Any] = {
    "mode": "semi_supervised",
    "batch_size": 2,
    "data": {"crop_px": 48, "labelled": "1/2", "num_threads": 0},
    "segmentor": {"name": "multiscale", "init": "random", "options": {"hidden": 8}},
    "discriminator": {
        "name": "image_conditioned",
        "options": {"width": 0.1, "dropout": 0.5, "spectral_norm": True},
    },
    "loss": {
        "map_resolution": "image",
        "adv_form": "hinge",
        "feature_weight": 0.5,
        "mismatched_weight": 0.5,
        "r1_weight": 10.0,
        "r1_every": 2,
    },
    "semi": {"weight": 0.0, "adv_weight": 0.1},
    "checkpoint": {"every_steps": 2},
    "tracking": {"log_every": 1},
    "evaluate": {"num_pictures": 0},
    "schedule": {"name": "constant"},
}


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits_with_all_of_it(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out(monkeypatch.setattr)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    data = ALL["data"] | {"shards": str(toy_shards)}
    for run_dir, steps in ((whole, (4,)), (parts, (2, 4))):
        for count in steps:
            more = {"extend": True} if count == 4 and len(steps) == 2 else {}
            distseg.fit(**ALL | {"data": data, "run_dir": str(run_dir), "steps": count} | more)
    first, last = (contents(path / "checkpoints" / "step-00000004") for path in (whole, parts))
    assert first == last and "discriminator.network.safetensors" in first
    rows = read_metrics(whole / "metrics.jsonl")
    for name in (
        "loss/feature_matching",
        "loss/discriminator_mismatched",
        "weight/feature_matching",
    ):
        assert all(row[name] > 0 for row in rows if "loss/segmentor" in row), name
    assert [row["step"] for row in rows if "loss/r1" in row] == [1, 3]
    assert "discriminator/mismatched_accuracy" in rows[0] and "discriminator/on_fake" not in rows[0]
    # who loads the run has the discriminator with the vectors of its last step
    judge = distseg.load(whole).discriminator
    saved = load(first["discriminator.network.safetensors"])
    assert saved.keys() == judge.state_dict().keys()
    assert any(name.endswith("._u") for name in saved)
    assert all(torch.equal(judge.state_dict()[name], it) for name, it in saved.items())


def test_the_penalty_is_due_by_the_discriminators_updates() -> None:
    words = ["data.shards=unused", "loss.r1_weight=10", "loss.r1_every=3"]
    words += ["loss.adv_start_step=2", "alternation.segmentor=2", "alternation.discriminator=2"]

    def due(alternation: str) -> list[int]:
        config = loading.load([*words, f"alternation={alternation}"])
        found = [step for step in range(20) if phase(step, config).r1]
        assert all(phase(step, config).r1 == 15 for step in found)  # 10 / 2, times 3
        return found

    assert due("simultaneous") == [2, 5, 8, 11, 14, 17]
    # its updates are at 4 and 5, 8 and 9, 12 and 13, 16 and 17: the first, fourth and seventh
    assert due("blocks") == [4, 9, 16]
    # of a preset's: a mode that shows the discriminator no ground truth has no such gradient
    config = loading.load([*words, "alternation=simultaneous"])
    config.mode = "domain_adaptation"
    assert not any(phase(step, config).r1 for step in range(20))
