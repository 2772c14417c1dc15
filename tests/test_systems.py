"""Every segmentor and every discriminator.

Each trains on two ranks, and every segmentor can learn four images by heart.
"""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distseg.config import loading
from distseg.config.schema import Config
from distseg.data.plan import Plan
from distseg.data.samples import SampleSet
from distseg.data.stream import TrainStream
from distseg.data.transforms import TrainView
from distseg.distributed.ranks import Ranks
from distseg.evaluate.metrics import confusion_matrix, scores
from distseg.models import (
    COMPOSITIONS,
    DISCRIMINATORS,
    ENCODERS,
    HEADS,
    SEGMENTORS,
    build_discriminator,
    build_segmentor,
    efficientnet,
    resnet,
    vgg,
)
from distseg.parallel import wrap
from distseg.train.batch import Images
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step
from distseg.train.trainer import to_device
from shards.reader import ShardReader
from tests.ranks import run_ranks
from tests.test_engine import SUPERVISED
from tests.tiny import NARROW_VGG, every_part, narrow_encoder

CROP = 48
# of those that are a head on an encoder, each part at least once
NAMES = [name for name in SEGMENTORS if name not in COMPOSITIONS]
NAMES += every_part(HEADS, list(ENCODERS))


def narrow_options(name: str) -> dict[str, Any]:
    """Options that make layers narrow; what is left is the network itself."""
    if "resnet" in name:
        return {"width": 16}
    if name in COMPOSITIONS:
        has_width = "channels" in inspect.signature(HEADS[name.partition("_")[0]]).parameters
        return {"channels": 24} if has_width else {}
    return (
        {"fc_channels": 32} if "vgg16" in name else {"hidden": 64} if name == "multiscale" else {}
    )


def make_config(*overrides: str) -> Config:
    common = [
        "data.shards=unused",
        "precision=fp32",
        "loss.map_resolution=image",
        "loss.adv_weight=0.1",
    ]
    return loading.load(
        [*common, "segmentor_optimizer.lr=1e-3", "discriminator_optimizer.lr=1e-4", *overrides]
    )


def batches(ranks: Ranks, shards: Path, config: Config, count: int) -> list[Images]:
    samples = SampleSet(ShardReader(shards, "train"))
    stream = TrainStream(
        samples,
        Plan(len(samples), seed=1),
        TrainView(CROP, 0.7, 1.4),
        batch_size=4,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_threads=0,
    )
    return [to_device(next(stream), ranks.device, config) for _ in range(count)]


def pairs() -> list[tuple[str, str]]:
    """Every segmentor and every discriminator, in turn.

    A discriminator is shown maps and images of one size, whichever segmentor they come from.
    """
    judges = itertools.cycle(DISCRIMINATORS)
    assert len(NAMES) >= len(DISCRIMINATORS)
    return list(zip(NAMES, judges, strict=False))


def train_pairs(ranks: Ranks, shards: Path) -> dict[tuple[str, str], tuple[float, bool, bytes]]:
    """For each pair: its loss, whether both networks moved, and what they hold at the end."""
    config, found = make_config(), {}
    # in this process: depth and width change nothing here
    resnet.NUM_BLOCKS = dict.fromkeys(resnet.NUM_BLOCKS, (1, 1, 1, 1))
    efficientnet.SCALES = dict.fromkeys(efficientnet.SCALES, (1.0, 0.25))
    vgg.LAYOUT = NARROW_VGG
    ENCODERS.update({name: narrow_encoder(entry) for name, entry in ENCODERS.items()})
    (images,) = batches(ranks, shards, config, 1)
    for name, other in pairs():
        torch.manual_seed(0)
        network = build_segmentor(name, 8, init="random", **narrow_options(name))
        narrow = {} if other == "fully_convolutional" else {"width": 0.125}
        judge = build_discriminator(other, 8, **narrow)
        pair = Pair.of(
            config,
            wrap(network, config.segmentor_optimizer, config, ranks),
            wrap(judge, config.discriminator_optimizer, config, ranks),
        )
        before = fingerprint(network), fingerprint(judge)
        metrics = training_step(pair, phase(0, config), images)
        for learner in (pair.segmentor, pair.discriminator):
            learner.step(1.0)
        after = fingerprint(network), fingerprint(judge)
        moved = all(one != other for one, other in zip(before, after, strict=True))
        found[name, other] = (float(metrics["loss/segmentor"]), moved, after[0] + after[1])
    return found


def fingerprint(network: torch.nn.Module) -> bytes:
    sums = [parameter.detach().double().sum() for parameter in network.parameters()]
    return torch.stack(sums).numpy().tobytes()


def test_every_segmentor_and_every_discriminator_trains_on_two_ranks(toy_shards: Path) -> None:
    one, other = run_ranks(2, train_pairs, toy_shards)
    for known, of_pairs in zip((NAMES, DISCRIMINATORS), zip(*one, strict=True), strict=True):
        assert set(of_pairs) == set(known)
    for pair, (loss, moved, content) in one.items():
        assert math.isfinite(loss) and math.isfinite(other[pair][0]), pair
        assert moved, f"{pair}: a network was not updated"
        assert content == other[pair][2], f"{pair}: the ranks hold different networks"


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTORS)  # every head on every encoder
def test_every_segmentor_learns_four_images_by_heart(name: str, toy_shards: Path) -> None:
    (score,) = run_ranks(1, learn_by_heart, toy_shards, name, timeout_seconds=3600)
    assert score > 0.95


def learn_by_heart(ranks: Ranks, shards: Path, name: str) -> float:
    """mIoU on four fixed images after training on nothing else."""
    config = make_config("mode=supervised", "loss.adv_weight=0", "segmentor_optimizer.lr=2e-3")
    torch.manual_seed(0)
    ENCODERS.update({each: narrow_encoder(entry) for each, entry in ENCODERS.items()})
    learner = wrap(
        build_segmentor(name, 8, init="random", **narrow_options(name)),
        config.segmentor_optimizer,
        config,
        ranks,
    )
    images = blocks_of_colour(4 * max(16, learner.network.output_stride))
    pair = Pair.of(config, learner)
    score = 0.0
    for step in range(600):
        training_step(pair, SUPERVISED, images)
        learner.step(1.0)
        if step % 25 == 24:
            score = miou(learner, images)
            if score > 0.95:
                break
    return score


def miou(learner: Any, images: Images) -> float:
    learner.network.eval()
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(
            learner.network(images.pixels), images.label.shape[-2:], mode="bilinear"
        )
    learner.network.train()
    return scores(confusion_matrix(logits.argmax(1), images.label, 8)).mean_iou


def blocks_of_colour(block_px: int) -> Images:
    """Four images, each of four squares of block_px.

    A border between two scores shifts with how sure the network is of each, by up to half its
    output stride: squares of two strides, which have no score away from a border, keep FCN-32s at a
    mIoU of 0.78.
    """
    rng = np.random.default_rng(0)
    label = (
        rng.permutation(np.repeat(np.arange(8), 2))
        .reshape(4, 2, 2)
        .repeat(block_px, 1)
        .repeat(block_px, 2)
    )
    colors = rng.random((8, 3))
    pixels = colors[label] + rng.normal(scale=0.05, size=(*label.shape, 3))
    image = torch.from_numpy(pixels.clip(0, 1).astype(np.float32)).permute(0, 3, 1, 2).contiguous()
    return Images(image, torch.from_numpy(label.astype(np.uint8)))
