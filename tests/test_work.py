"""The count of a step's operations against what torch counts while it is made.

The share of the device's speed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.step import flops_of
from distseg.config import loading
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks
from distseg.models import OfBothOutputs, build_discriminator
from distseg.parallel import wrap
from distseg.train.batch import Images
from distseg.train.clock import StepClock
from distseg.train.flops import StepWork, convolution_peak
from distseg.train.schedules import Phase, phase
from distseg.train.step import Pair, training_step
from tests.ranks import run_ranks

NUM_CLASSES, SIDE = 5, 129
SETTINGS = [
    *(
        "data.shards=unused",
        "mode=semi_supervised",
        "data.labelled=1/2",
        f"data.crop_px={SIDE}",
        "precision=fp32",
    ),
    *("segmentor.name=multiscale", "segmentor.init=random", "channels_last=false"),
    *(
        "discriminator.name=fully_convolutional",
        "semi.start_step=0",
        "semi.adv_start_step=0",
        "semi.adv_weight=0.1",
    ),
]
TWO_OUTPUTS = ["mode=domain_adaptation", "semi.adv_weight=0", "semi.start_step=0"]
TWO_OUTPUTS += ["adaptation.aux_adv_weight=0.1"]
OWN = {"cross_entropy": 1.0}
FOOL = {"adversarial": 0.1}
MORE = {"adversarial_unlabelled": 0.1, "semi": 1.0}
BOTH = Phase(True, True, True, OWN | FOOL)
PHASES = {
    "supervised": (Phase(True, False, False, OWN), False),
    "both": (BOTH, False),
    "both, unlabelled too": (Phase(True, True, True, OWN | FOOL | MORE), True),
    "the segmentor's turn": (Phase(True, False, True, OWN | FOOL), False),
    "the discriminator's turn": (Phase(False, True, True), False),
}


class SmallSegmentor(nn.Module):
    """An encoder and a classifier."""

    output_stride, num_classes = 4, NUM_CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1)
        )
        self.classifier = nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1), nn.Conv2d(32, NUM_CLASSES, 1))

    def forward(self, image: torch.Tensor) -> Any:
        return self.classifier(self.encoder(image))


class WithFrozenParts(SmallSegmentor):
    """And an auxiliary head."""

    has_auxiliary = True

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(16, NUM_CLASSES, 3, 1, 1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.encoder(image)
        return {"out": self.classifier(x), "aux": self.auxiliary(x)}


def make_config(*overrides: str) -> Config:
    return loading.load([*SETTINGS, *overrides])


def two_outputs(config: Config) -> tuple[nn.Module, nn.Module]:
    """A segmentor with two, and a discriminator of each."""
    judges = [build_discriminator(config.discriminator.name, NUM_CLASSES) for _ in range(2)]
    return WithFrozenParts(), OfBothOutputs(*judges)


def work_of(config: Config) -> StepWork:
    segmentor = SmallSegmentor()
    if config.mode == "supervised":
        return StepWork.of(config, segmentor, None)
    options = config.discriminator.options
    return StepWork.of(
        config, segmentor, build_discriminator(config.discriminator.name, NUM_CLASSES, **options)
    )


def counted(ranks: Ranks, overrides: list[str]) -> dict[str, int]:
    """Operations of our own steps on 2 + 1 images, by torch (which overrates gradients of grouped
    convolutions).
    """
    config = make_config(*overrides)
    side, segmentor = config.data.crop_px, SmallSegmentor()
    judge = build_discriminator(
        config.discriminator.name, NUM_CLASSES, **config.discriminator.options
    )
    pair = Pair.of(
        config,
        wrap(segmentor, config.segmentor_optimizer, config, ranks),
        wrap(judge, config.discriminator_optimizer, config, ranks),
    )
    labelled, unlabelled = (
        Images(
            torch.rand(number, 3, side, side), torch.zeros(number, side, side, dtype=torch.uint8)
        )
        for number in (2, 1)
    )

    def step(now: Phase, is_semi: bool) -> None:
        training_step(pair, now, labelled, unlabelled if is_semi else None)
        for learner in (pair.segmentor, pair.discriminator):
            learner.network.zero_grad(set_to_none=True)

    found = {name: flops_of(lambda of=of: step(*of)) for name, of in PHASES.items()}
    config = make_config(*overrides, *TWO_OUTPUTS)
    networks = two_outputs(config)
    optimizers = config.segmentor_optimizer, config.discriminator_optimizer
    both = zip(networks, optimizers, strict=True)
    pair = Pair.of(config, *(wrap(*each, config, ranks) for each in both))
    return found | {"two outputs": flops_of(lambda: step(phase(0, config), True))}


# label maps of the least that the discriminator takes, or somewhat more
@pytest.mark.parametrize(("resolution", "side"), [("output", SIDE), ("image", 45)])
def test_operations_of_a_step_are_those_that_torch_counts(resolution: str, side: int) -> None:
    overrides = [f"loss.map_resolution={resolution}", f"data.crop_px={side}"]
    work = work_of(make_config(*overrides))
    (found,) = run_ranks(1, counted, overrides)
    for name, (now, is_semi) in PHASES.items():
        # ours are a little more: nobody asks for the gradients of pixels and label maps of ground
        # truth
        assert work.of_step(now, 2, int(is_semi)) == pytest.approx(found[name], rel=0.03), name
    assert work.of_step(BOTH, 4, 0) == 2 * work.of_step(BOTH, 2, 0)
    config = make_config(*overrides, *TWO_OUTPUTS)
    work = StepWork.of(config, *two_outputs(config))
    # of ground truth none: it is never judged
    of_step = work.of_step(phase(0, config), 2, 1)
    assert of_step == pytest.approx(found["two outputs"], rel=0.03)


def test_without_an_adversary_no_discriminator_is_counted() -> None:
    config = loading.load(
        ["data.shards=unused", f"data.crop_px={SIDE}", SETTINGS[5], "mode=supervised"]
    )
    work = work_of(config)
    of_step = work.of_step(phase(0, config), 1, 0)
    # nobody asks for the gradient of the pixels, which would cost what the first convolution does
    first = 2 * 65**2 * 16 * 3 * 3**2
    assert work.discriminator == 0 and of_step == 3 * work.segmentor - first


@pytest.mark.parametrize(
    "frozen", [(), ("encoder",), ("encoder.0",), ("classifier.0", "encoder"), ("auxiliary",)]
)
def test_frozen_parts_and_auxiliary_heads_count_as_torch_counts_them(
    frozen: tuple[str, ...],
) -> None:
    config = loading.load(["data.shards=unused", "data.crop_px=64", "mode=supervised"])
    network = WithFrozenParts()
    for name in frozen:
        network.get_submodule(name).requires_grad_(False)
    work = StepWork.of(config, network, None)
    forward = flops_of(lambda: network(torch.rand(2, 3, 64, 64)))
    assert 2 * work.segmentor == forward
    whole = flops_of(
        lambda: sum(it.sum() for it in network(torch.rand(2, 3, 64, 64)).values()).backward()
    )
    assert work.of_step(Phase(True, False, False, OWN), 2, 0) == whole


def test_share_of_peak_is_operations_over_time_over_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("distseg.train.clock.time.perf_counter", lambda: now[0])
    clock = StepClock(batch_size=4, peak=100.0, start_step=7)
    clock.count(30.0)
    clock.count(50.0)
    now[0] = 12.0
    assert clock.lap(9, 0.0)["peak_share"] == pytest.approx((30 + 50) / (2 * 100))
    clock.count(10.0)
    now[0] = 13.0
    assert clock.lap(10, 0.0)["peak_share"] == pytest.approx(10 / 100)


@pytest.mark.cpu
def test_a_convolution_is_measured_in_every_precision() -> None:
    for precision in ("fp32", "bf16", "fp64"):
        assert convolution_peak(torch.device("cpu"), precision) > 1e8  # 0.1 GFLOP/s: any CPU at all
