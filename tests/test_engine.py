"""The alternating step against a plain single-process reference, for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distseg.config import loading
from distseg.config.schema import AlternationConfig, Config
from distseg.distributed.ranks import Ranks
from distseg.models import BatchNorm2d, build_discriminator
from distseg.parallel import wrap
from distseg.parallel.sync_batch_norm import synchronise
from distseg.train.batch import Images
from distseg.train.schedules import Phase, lr_factor, phase
from distseg.train.step import Pair, training_step
from distseg.train.trainer import logged
from tests.ranks import run_ranks

NUM_CLASSES, BATCH, STEPS = 4, 12, 6
# of one with so many parameters two are enough: the first, and one after DDP has made its buckets
# anew
NUM_STEPS = {"two_branch": STEPS, "fully_convolutional": 2}
SUPERVISED = Phase(segmentor=True, discriminator=False, weights={"cross_entropy": 1.0})
# its label maps, a quarter, must be 32 wide
IMAGE_PX = {"two_branch": 32, "fully_convolutional": 128}


# three: no mean over them is exact, as it would be over two or four
NUM_RANKS = [1, 3]
OfRanks = dict[int, list[tuple[Any, Any, Any]]]


class TinySegmentor(nn.Module):
    """Two convolutions at stride 4, with group norm.

    No statistics that depend on the split of the batch.
    """

    output_stride = 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Sequential(
            nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, NUM_CLASSES, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(image))


def make_config(
    precision: str, alternation: str, mode: str, overrides: Sequence[str] = ()
) -> Config:
    common = ["data.shards=unused", f"precision={precision}", f"mode={mode}", "steps=10"]
    config = loading.load([*common, *overrides])
    config.alternation = AlternationConfig(alternation, segmentor=2, discriminator=1)
    config.segmentor_optimizer = replace(
        config.segmentor_optimizer, encoder_lr_factor=0.25, clip_norm=0.5
    )
    # AdamW divides by the gradient's size and so magnifies fp32's rounding; fp64 shows that its
    # steps are right
    name = "sgd" if precision == "fp32" else "adamw"
    config.segmentor_optimizer.name = config.discriminator_optimizer.name = name
    config.loss.adv_weight = 0.7
    return config


def make_networks(discriminator: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    options: dict[str, Any] = (
        {"head": "gap", "width": 0.125} if discriminator == "two_branch" else {}
    )
    return TinySegmentor(), build_discriminator(discriminator, NUM_CLASSES, **options)


def make_batch(step: int, dtype: torch.dtype, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    image = torch.rand(BATCH, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    label = torch.randint(
        0, NUM_CLASSES, (BATCH, size, size), generator=generator, dtype=torch.uint8
    )
    label[-3:, 5:] = 255  # void pixels on the last rank only, whatever the number of ranks
    return image, label


def train(ranks: Ranks, case: Sequence[str], overrides: Sequence[str] = ()) -> Any:
    """Our steps on this rank's part of each batch.

    Final parameters, and bytes all-reduced per step.
    """
    precision, alternation, discriminator, mode = (*case, "adversarial")[:4]
    config = make_config(precision, alternation, mode, overrides)
    segmentor, judge = make_networks(discriminator)
    learners = [wrap(segmentor, config.segmentor_optimizer, config, ranks)]
    if mode == "adversarial":
        learners.append(wrap(judge, config.discriminator_optimizer, config, ranks))
    pair = Pair.of(config, *learners)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    payload, leaks = count_payload(pair) if config.parallel.strategy == "ddp" else [], []
    share = slice(
        ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size
    )
    for step in range(NUM_STEPS[discriminator]):
        batch = make_batch(step, dtype, IMAGE_PX[discriminator])
        image, label = (part[share].to(ranks.device) for part in batch)
        now = phase(step, config)
        training_step(pair, now, Images(image, label))
        leaks += [f"segmentor at {step}"] * (not now.segmentor and has_gradient(segmentor))
        leaks += [f"discriminator at {step}"] * (not now.discriminator and has_gradient(judge))
        factor = lr_factor(step, config.steps, config.schedule)
        if now.segmentor or mode == "supervised":
            pair.segmentor.step(factor)
        if now.discriminator and pair.discriminator is not None:
            pair.discriminator.step(factor)
    judge = judge if pair.discriminator is None else pair.discriminator.full_network()
    return parameters_of(pair.segmentor.full_network()), parameters_of(judge), payload, leaks


def count_payload(pair: Pair) -> list[int]:
    """A list that grows by the number of elements of every gradient all-reduce."""
    payload: list[int] = []

    def hook(state, bucket):  # DDP refuses annotations that are strings, as all are here
        payload.append(bucket.buffer().numel())
        future = dist.all_reduce(
            bucket.buffer().div_(dist.get_world_size()), async_op=True
        ).get_future()
        return future.then(lambda done: done.value()[0])

    for learner in (pair.segmentor, pair.discriminator):
        if learner is not None:
            learner.ddp.register_comm_hook(None, hook)  # type: ignore[attr-defined]
    return payload


def has_gradient(network: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in network.parameters())


def parameters_of(network: nn.Module) -> dict[str, Any]:
    return {
        name: parameter.detach().cpu().numpy().copy()
        for name, parameter in network.named_parameters()
    }


def reference(
    precision: str, alternation: str, discriminator: str, mode: str = "adversarial"
) -> Any:
    """The same steps written as the papers have them.

    One process, whole batch, plain losses and AdamW.
    """
    config = make_config(precision, alternation, mode)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    segmentor, judge = (network.to(dtype) for network in make_networks(discriminator))
    s_optimizer = reference_optimizer(reference_groups(segmentor, 1e-3, 0.25), precision)
    d_optimizer = reference_optimizer(reference_groups(judge, 1e-3, 1.0), precision)
    for step in range(NUM_STEPS[discriminator]):
        image, label = make_batch(step, dtype, IMAGE_PX[discriminator])
        now = phase(step, config)
        logits = segmentor(image)
        probabilities = logits.softmax(1)
        valid, real = reference_real(label, probabilities.detach())
        if discriminator == "two_branch":
            valid = None  # one score per image
        d_loss = bce(judge(image, real)[0], 1.0, valid) + bce(
            judge(image, probabilities.detach())[0], 0.0, valid
        )
        up = F.interpolate(logits, label.shape[-2:], mode="bilinear")
        s_loss = F.cross_entropy(up, label.long(), ignore_index=255)
        if mode == "adversarial":
            s_loss = s_loss + config.loss.adv_weight * bce(
                judge(image, probabilities)[0], 1.0, valid
            )
        s_gradients = torch.autograd.grad(s_loss, list(segmentor.parameters()))
        d_gradients = torch.autograd.grad(d_loss, list(judge.parameters()))
        if now.segmentor or mode == "supervised":
            reference_update(s_optimizer, segmentor, s_gradients, 0.5, (1 - step / 10) ** 0.9)
        if now.discriminator and mode == "adversarial":
            reference_update(d_optimizer, judge, d_gradients, 5.0, (1 - step / 10) ** 0.9)
    return parameters_of(segmentor), parameters_of(judge)


def reference_groups(network: nn.Module, lr: float, encoder_factor: float) -> list[dict]:
    groups = []
    for name, parameter in network.named_parameters():
        rate = lr * (encoder_factor if name.startswith("encoder") else 1.0)
        groups.append(
            {
                "params": [parameter],
                "lr": rate,
                "base": rate,
                "weight_decay": 0.01 * (parameter.ndim > 1),
            }
        )
    return groups


def reference_optimizer(groups: list[dict], precision: str) -> Any:
    if precision == "fp32":
        return torch.optim.SGD(groups, momentum=0.9, foreach=False)
    return torch.optim.AdamW(groups, foreach=False)


def reference_update(
    optimizer: Any, network: nn.Module, gradients: Any, clip_norm: float, factor: float
) -> None:
    norm = torch.sqrt(sum((gradient.double() ** 2).sum() for gradient in gradients))
    scale = min(1.0, clip_norm / (float(norm) + 1e-6))
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter.grad = gradient * scale
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor
    optimizer.step()


def reference_real(label: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    # nearest to the centre of each 4 x 4 cell, the later of the two
    small = label[:, 2::4, 2::4].long()
    valid = small != 255
    real = probabilities.clone().permute(0, 2, 3, 1)
    real[valid] = F.one_hot(small[valid], NUM_CLASSES).to(real.dtype)
    return valid, real.permute(0, 3, 1, 2)


def bce(logits: Tensor, target: float, valid: Tensor | None) -> Tensor:
    if valid is not None:
        logits = F.interpolate(logits, valid.shape[-2:], mode="bilinear")[:, 0][valid]
    return F.softplus(logits * (1 - 2 * target)).mean()


def bad_batch_on_one_rank(ranks: Ranks, overrides: Sequence[str] = ()) -> Any:
    """Three steps of a network with batch norm; in the second, the last rank's image has a NaN."""
    config = make_config("fp32", "simultaneous", "adversarial", overrides)
    torch.manual_seed(5)
    segmentor = nn.Sequential(nn.Conv2d(3, NUM_CLASSES, 4, stride=4), nn.BatchNorm2d(NUM_CLASSES))
    segmentor.output_stride = 4
    judge = build_discriminator("two_branch", NUM_CLASSES, width=0.125)
    pair = Pair.of(
        config,
        wrap(segmentor, config.segmentor_optimizer, config, ranks),
        wrap(judge, config.discriminator_optimizer, config, ranks),
    )
    share = slice(
        ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size
    )
    history = []
    for step in range(3):
        image, label = (part[share] for part in make_batch(step, torch.float32))
        if step == 1 and ranks.rank == ranks.world_size - 1:
            image[0, 0, 0, 0] = float("nan")
        with torch.no_grad():  # the layer itself, outside of what spreads it over the ranks
            own = pair.segmentor.full_network()[0](image)  # type: ignore[index]
        training_step(pair, phase(step, config), Images(image, label))
        counts = {
            name: learner.step(1.0)
            for name, learner in (("S", pair.segmentor), ("D", pair.discriminator))
        }
        skips = {
            name: (float(c["skips"]), float(c["skips_in_a_row"])) for name, c in counts.items()
        }
        state = {
            name: tensor.clone().numpy()
            for name, tensor in pair.segmentor.full_network().state_dict().items()
        }
        history.append((own.mean((0, 2, 3)).numpy(), skips, state))
    return history


def run_all(ranks: Ranks) -> tuple[Any, Any, Any]:
    steps = [train(ranks, case) for case in CASES]
    return steps, bad_batch_on_one_rank(ranks), train_synchronised(ranks)


@pytest.fixture(scope="module")
def of_ranks() -> OfRanks:
    """What all tests look at: starting ranks takes longer than what they do for one."""
    return {num_ranks: run_ranks(num_ranks, run_all) for num_ranks in NUM_RANKS}


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_a_bad_batch_on_one_rank_is_left_out_by_all(num_ranks: int, of_ranks: OfRanks) -> None:
    check_bad_batch([bad for _, bad, _ in of_ranks[num_ranks]])


def check_bad_batch(ranks: list[Any]) -> None:
    """All skipped together, and hold the same network and the mean of their statistics."""
    for history in ranks:
        assert [skips["S"] for _, skips, _ in history] == [(0, 0), (1, 1), (1, 0)]
        before, after = history[0][2], history[1][2]
        for name, array in before.items():
            assert name.endswith("num_batches_tracked") or (array == after[name]).all(), name
        for step in range(3):  # and all hold the same network
            for name, array in ranks[0][step][2].items():
                assert (array == history[step][2][name]).all(), name
    # of the ranks' batch means, after one step from 0
    mean = sum(history[0][0] for history in ranks) / len(ranks)
    assert abs(ranks[0][0][2]["1.running_mean"] - 0.1 * mean).max() < 1e-6


class WithBatchNorm(nn.Module):
    """Two convolutions at stride 4 with batch norm between."""

    output_stride = 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4, bias=False),
            BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, NUM_CLASSES, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def train_synchronised(ranks: Ranks, overrides: Sequence[str] = ()) -> dict[str, Any]:
    config = make_config("fp64", "simultaneous", "adversarial", overrides)
    torch.manual_seed(5)
    segmentor, judge = WithBatchNorm(), build_discriminator("two_branch", NUM_CLASSES, width=0.125)
    assert synchronise(segmentor) == 1
    optimizers = (config.segmentor_optimizer, config.discriminator_optimizer)
    learners = [
        wrap(*both, config, ranks) for both in zip((segmentor, judge), optimizers, strict=True)
    ]
    share = slice(
        ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size
    )
    for step in range(STEPS):
        image, label = (part[share] for part in make_batch(step, torch.float64))
        training_step(Pair.of(config, *learners), phase(step, config), Images(image, label))
        for learner in learners:
            learner.step(1.0)
    return {
        name: tensor.clone().numpy()
        for name, tensor in learners[0].full_network().state_dict().items()
    }


def test_synchronised_batch_norm_on_any_number_of_ranks_is_that_of_one(of_ranks: OfRanks) -> None:
    ((_, _, one),) = of_ranks[1]  # torch's own batch norm
    for _, _, of_rank in of_ranks[3]:
        assert max(abs(of_rank[name] - one[name]).max() for name in one) < 1e-12


def test_under_blocks_the_curves_of_both_networks_go_on() -> None:
    # two steps of the segmentor, one of the discriminator
    config = make_config("fp32", "blocks", "adversarial")
    config.tracking.log_every, config.steps = 4, 10
    assert [step for step in range(10) if logged(step, config)] == [2, 3, 5, 7, 8, 9]
    config.alternation.name = "simultaneous"
    assert [step for step in range(10) if logged(step, config)] == [3, 7, 9]


CASES = [
    ("fp64", "simultaneous", "two_branch"),
    ("fp64", "blocks", "two_branch"),
    ("fp64", "simultaneous", "fully_convolutional"),
    ("fp64", "simultaneous", "two_branch", "supervised"),
    ("fp32", "blocks", "two_branch"),
]


@pytest.fixture(scope="module")
def references() -> list[Any]:
    torch.set_num_threads(1)
    return [reference(*case) for case in CASES]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_steps_equal_the_reference_on_the_joined_batch(
    num_ranks: int, of_ranks: OfRanks, references: list[Any]
) -> None:
    for steps, _, _ in of_ranks[num_ranks]:
        for case, got, expected in zip(CASES, steps, references, strict=True):
            check_equal(case, got, expected)
            check_payload(case, got[0], got[1], got[2])


def check_equal(case: Sequence[str], got: Any, expected: Any) -> None:
    """The parameters of both networks are the reference's, and no network got a gradient that was
    not its own.
    """
    pairs = zip(got[:2], expected, strict=True)
    worst = max(abs(mine[name] - theirs[name]).max() for mine, theirs in pairs for name in theirs)
    assert worst <= (1e-12 if case[0] == "fp64" else 1e-6), f"{case} differs by {worst}"
    assert not got[3], f"{case}: a gradient on {got[3]}"


def check_payload(
    case: tuple[str, ...], segmentor: dict, discriminator: dict, payload: list[int]
) -> None:
    """Per step exactly the gradients of the networks that are updated, once."""
    sizes = [sum(array.size for array in part.values()) for part in (segmentor, discriminator)]
    config = make_config(case[0], case[1], "adversarial")
    phases = [phase(step, config) for step in range(NUM_STEPS[case[2]])]
    supervised = len(case) > 3
    segmentor_steps = len(phases) if supervised else sum(now.segmentor for now in phases)
    discriminator_steps = 0 if supervised else sum(now.discriminator for now in phases)
    assert sum(payload) == segmentor_steps * sizes[0] + discriminator_steps * sizes[1]
