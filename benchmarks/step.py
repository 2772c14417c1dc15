"""Our semi-supervised adversarial step against one with the passes that the public trainer for Hung et al. makes.

DeepLabV2-ResNet-101 and the fully convolutional discriminator, 2 + 2 images. The reference step is written here from a
description of those passes: the segmentor called on labelled and unlabelled images apart, the discriminator on the
predictions once for the segmentor and once more for itself, and on the ground truth apart; fp32, batch statistics.
Run: python -m benchmarks.step [--size 161] [--repetitions 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.conditions import conditions
from distseg import configuration
from distseg.config import Config
from distseg.distributed import Ranks, setup, teardown
from distseg.engine import Images, Pair, adversarial_step
from distseg.models import build_discriminator, build_segmentor, set_batch_norm
from distseg.parallel import wrap
from distseg.schedules import phase
from distseg.work import convolution_peak
from shards.files import say, tracked

NUM_CLASSES, BATCH = 21, 2
SEMI_STEP = 6000  # after semi.start_step, when every term is on


def networks(batch_norm: str) -> tuple[nn.Module, nn.Module]:
    """The two networks of voc_hung_semi, from the same seed each time."""
    torch.manual_seed(0)
    segmentor = build_segmentor("deeplabv2_resnet101", NUM_CLASSES, init="random")
    norms = [layer for layer in segmentor.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        segmentor(torch.rand(BATCH, 3, 96, 96))  # statistics of this network, as trained ones are; else values explode
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
    pair = Pair(*learners, config.loss, config.semi)
    parts = [images(size, labelled) for labelled in (True, False)]
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    labelled, unlabelled = (Images(part.pixels.contiguous(memory_format=layout), part.label) for part in parts)

    def step() -> None:
        adversarial_step(pair, phase(SEMI_STEP, config), labelled, unlabelled)
        for learner in learners:
            learner.step(1e-6)  # the rates stay near 0, so that every repetition does the same work

    return step


def our_config(precision: str) -> Config:
    return configuration.load(["preset=voc_hung_semi", f"precision={precision}", "device=cpu"])


def reference_step(size: int) -> Callable[[], None]:
    """The same update by the reference's passes."""
    segmentor, judge = networks("per_rank")
    s_optimizer = torch.optim.SGD(segmentor.parameters(), lr=1e-9, momentum=0.9, weight_decay=5e-4)
    d_optimizer = torch.optim.Adam(judge.parameters(), lr=1e-9, betas=(0.9, 0.99))
    labelled, unlabelled = images(size, True), images(size, False)

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
        (0.001 * bce(up(z), 1.0) + 0.1 * F.cross_entropy(unsure, target, ignore_index=255)).backward()
        sure = up(segmentor(labelled.pixels))
        (z,) = judge(labelled.pixels, sure.softmax(1))
        (F.cross_entropy(sure, labelled.label.long(), ignore_index=255) + 0.01 * bce(up(z), 1.0)).backward()
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


class _Untracked(nullcontext):
    """For a FlopCounterMode that need not know the modules: its hooks fail on a gradient to a leaf."""

    parents = frozenset({"Global"})


def flops_of(step: Callable[[], None]) -> int:
    """Floating-point operations of all convolutions and products of one step, each multiply-add as two."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    with counter:
        step()
    return counter.get_total_flops()


def medians(steps: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Median seconds of each, in alternating repetitions after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    turns = [(repetition, name) for repetition in range(repetitions + 1) for name in steps]
    for repetition, name in tracked(turns, len(turns), "steps"):
        start = time.perf_counter()
        steps[name]()
        if repetition:
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=161, help="side of the images, pixels")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    ranks = setup("cpu", 60)
    torch.set_num_threads(options.threads)
    say("building the networks and counting their operations: half a minute")
    steps = {"reference, fp32": reference_step(options.size)}
    steps |= {f"ours, {name}": our_step(ranks, options.size, name) for name in ("fp32", "bf16")}
    flops = {name: flops_of(step) for name, step in steps.items()}
    peaks = {precision: convolution_peak(ranks.device, precision) for precision in ("fp32", "bf16")}
    found = medians(steps, options.repetitions)
    base = found["reference, fp32"]
    print(conditions(options.threads))
    for name, value in found.items():
        share = flops[name] / value / peaks[name[-4:]]
        work = f"{flops[name] / 1e9:6.0f} GFLOP, {share:4.0%} of the convolution peak"
        print(f"{name:16}  {value:6.3f} s a step   {base / value:5.2f} x   {work}")
    print("peak: " + ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in peaks.items()))
    teardown()


if __name__ == "__main__":
    main()
