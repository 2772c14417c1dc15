"""Our semi-supervised adversarial step against one with the passes that the public trainer for Hung
et al. makes.

DeepLabV2-ResNet-101 and the fully convolutional discriminator, 2 + 2 images. The reference step is
written here from a description of those passes: the segmentor called on labelled and unlabelled
images apart, the discriminator on the predictions once for the segmentor and once more for itself,
and on the ground truth apart; fp32, batch statistics. Each step has a process of its own, and they
take turns. Run: python -m benchmarks.step [--size 161] [--repetitions 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.conditions import conditions
from distseg.config import loading
from distseg.config.schema import Config
from distseg.distributed.device import reuse_memory
from distseg.distributed.ranks import Ranks, setup
from distseg.models import build_discriminator, build_segmentor, set_batch_norm
from distseg.parallel import wrap
from distseg.train.batch import Images
from distseg.train.flops import convolution_peak
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from shards.files import say, tracked

NUM_CLASSES, BATCH = 21, 2
SEMI_STEP = 6000  # after semi.start_step, when every term is on


def networks(batch_norm: str, width: int = 64) -> tuple[nn.Module, nn.Module]:
    """The two networks of voc_hung_semi, from the same seed each time; width: of the segmentor's
    first stage.
    """
    torch.manual_seed(0)
    segmentor = build_segmentor("deeplabv2_resnet101", NUM_CLASSES, init="random", width=width)
    norms = [layer for layer in segmentor.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        # statistics of this network, as trained ones are; else values explode
        segmentor(torch.rand(BATCH, 3, 96, 96))
    for layer in norms:
        layer.momentum = 0.1
    set_batch_norm(segmentor, batch_norm)
    return segmentor, build_discriminator("fully_convolutional", NUM_CLASSES)


def images(size: int, labelled: bool, batch: int = BATCH) -> Images:
    """A batch of noise with blocks of labels."""
    generator = torch.Generator().manual_seed(int(labelled))
    pixels = torch.rand(batch, 3, size, size, generator=generator)
    coarse = torch.randint(0, NUM_CLASSES, (batch, 1, 6, 6), generator=generator).float()
    label = F.interpolate(coarse, (size, size))[:, 0].to(torch.uint8)
    return Images(pixels, label if labelled else torch.zeros_like(label))


def our_step(ranks: Ranks, size: int, precision: str) -> Callable[[], None]:
    """The step of preset=voc_hung_semi as the trainer makes it, updates included."""
    config = our_config(precision)
    segmentor, judge = networks("frozen")
    learners = [
        wrap(segmentor, config.segmentor_optimizer, config, ranks),
        wrap(judge, config.discriminator_optimizer, config, ranks),
    ]
    pair = Pair.of(config, *learners)
    parts = [images(size, labelled) for labelled in (True, False)]
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    labelled, unlabelled = (
        Images(part.pixels.contiguous(memory_format=layout), part.label) for part in parts
    )

    def step() -> None:
        training_step(pair, phase(SEMI_STEP, config), labelled, unlabelled)
        for learner in learners:
            learner.step(1e-6)  # the rates stay near 0, so that every repetition does the same work

    return step


def our_config(precision: str) -> Config:
    return loading.load(["preset=voc_hung_semi", f"precision={precision}", "device=cpu"])


def reference_step(
    size: int, batch: int = BATCH, device: torch.device | str = "cpu", width: int = 64
) -> Callable[[], None]:
    """The same update by the reference's passes, of `batch` images of each kind."""
    segmentor, judge = (network.to(device) for network in networks("per_rank", width))
    segmentor.aspp = _Sum(segmentor.aspp.children())  # type: ignore[operator, union-attr]
    s_optimizer = torch.optim.SGD(segmentor.parameters(), lr=1e-9, momentum=0.9, weight_decay=5e-4)
    d_optimizer = torch.optim.Adam(judge.parameters(), lr=1e-9, betas=(0.9, 0.99))
    labelled, unlabelled = (
        images(size, is_labelled, batch).each(lambda tensor: tensor.to(device))
        for is_labelled in (True, False)
    )

    def up(x: Tensor) -> Tensor:
        return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)

    def bce(z: Tensor, target: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, torch.full_like(z, target))

    def step() -> None:
        s_optimizer.zero_grad()
        d_optimizer.zero_grad()
        judge.requires_grad_(False)
        unsure = up(segmentor(unlabelled.pixels))
        (z,) = judge(unlabelled.pixels, unsure.softmax(1))
        believed = up(z).sigmoid()[:, 0] > 0.2
        target = unsure.argmax(1).where(believed, 255)
        (
            0.001 * bce(up(z), 1.0) + 0.1 * F.cross_entropy(unsure, target, ignore_index=255)
        ).backward()
        sure = up(segmentor(labelled.pixels))
        (z,) = judge(labelled.pixels, sure.softmax(1))
        (
            F.cross_entropy(sure, labelled.label.long(), ignore_index=255) + 0.01 * bce(up(z), 1.0)
        ).backward()
        judge.requires_grad_(True)
        fake = torch.cat([sure, unsure]).detach().softmax(1)
        (z,) = judge(torch.cat([labelled.pixels, unlabelled.pixels]), fake)
        (bce(up(z), 0.0) / 2).backward()
        real = F.one_hot(labelled.label.long(), NUM_CLASSES).permute(0, 3, 1, 2).float()
        (z,) = judge(labelled.pixels, real)
        (bce(up(z), 1.0) / 2).backward()
        s_optimizer.step()
        d_optimizer.step()

    return step


class _Sum(nn.ModuleList):
    """Layers side by side, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self)  # type: ignore[return-value]


class _Untracked(nullcontext):
    """For a FlopCounterMode that need not know modules: its hooks fail on a gradient to a leaf."""

    parents = frozenset({"Global"})


def flops_of(step: Callable[[], None]) -> int:
    """Floating-point operations of all convolutions and products of one step, each multiply-add as
    two.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    with counter:
        step()
    return counter.get_total_flops()


class Contestant:
    """A step in a process of its own, which waits while the others take theirs.

    "reference", or a precision of ours.
    """

    def __init__(self, name: str, size: int, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, name, size, threads), daemon=True
        )
        self._process.start()

    def ask(self) -> float:
        """First the operations of a step, then the device's speed in convolutions, then seconds of
        one step each.
        """
        self._pipe.send(True)
        return self._pipe.recv()

    def end(self) -> None:
        self._pipe.send(False)
        self._process.join()


def _serve(pipe: Connection, name: str, size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    ranks = setup("cpu", 60)
    if name == "reference":
        step, precision = reference_step(size), "fp32"
    else:
        reuse_memory()  # as distseg.train does
        step, precision = our_step(ranks, size, name), name
    pipe.recv()
    pipe.send(flops_of(step))
    pipe.recv()
    pipe.send(convolution_peak(ranks.device, precision))
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=161, help="side of the images, pixels")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    say("building the networks and counting their operations: half a minute")
    names = ("reference", "fp32", "bf16")
    contestants = {name: Contestant(name, options.size, options.threads) for name in names}
    flops = {name: of.ask() for name, of in contestants.items()}
    peaks = {name: of.ask() for name, of in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turns = [name for _ in range(options.repetitions + 1) for name in names]
    for name in tracked(turns, len(turns), "steps"):
        seconds[name].append(contestants[name].ask())
    for of in contestants.values():
        of.end()
    # the first one warms up
    found = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(conditions(options.threads))
    for name, value in found.items():
        share = flops[name] / value / peaks[name]
        work = f"{flops[name] / 1e9:6.0f} GFLOP, {share:4.0%} of the convolution peak"
        label = "reference, fp32" if name == "reference" else f"ours, {name}"
        print(f"{label:16}  {value:6.3f} s a step   {found['reference'] / value:5.2f} x   {work}")
    print(
        "peak: " + ", ".join(f"{name} {peaks[name] / 1e9:.0f} GFLOP/s" for name in ("fp32", "bf16"))
    )


if __name__ == "__main__":
    main()
