"""Keep of two real runs what the README's picture shows: data/unlabelled.npz.

    distseg prepare toy --out data/toy.h5 && distseg pack data/toy.h5 --out data/toy
    python -m distseg.train preset=toy seed=10 data.labelled_seed=10 data.labelled=1/60 steps=600 \\
        ema_decay=0.99 mode=supervised run_dir=runs/without
    python -m distseg.train preset=toy seed=10 data.labelled_seed=10 data.labelled=1/60 steps=600 \\
        ema_decay=0.99 mode=semi_supervised run_dir=runs/with consistency.weight=1 \\
        consistency.start_step=100 consistency.warmup_steps=100 consistency.threshold=0.9 \\
        consistency.weighting=image consistency.logit_adjustment=0.5 strong.color_jitter=0.4 \\
        strong.hue_jitter=0.05 strong.gray_probability=0 semi.weight=0 loss.adv_weight=0.01 \\
        semi.adv_weight=0.01 discriminator.options.head=patch discriminator_optimizer.lr=3e-5
    python -m docs.figures.unlabelled_data runs/without runs/with

Which scenes is no choice of ours: those at the median and at the upper quartile of what the
unlabelled images gain in pixel accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distseg.evaluate.run import open_samples
from distseg.evaluate.trained import trained_segmentor
from distseg.losses.tensors import upsample
from docs.figures.run_data import keep, scene
from docs.figures.style import UNLABELLED
from shards.sample import IGNORE_INDEX


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures.unlabelled_data")
    parser.add_argument("without", type=Path)
    parser.add_argument("with_unlabelled", type=Path)
    options = parser.parse_args()
    before, after = predictions(options.without), predictions(options.with_unlabelled)
    gains = sorted((right(*after[key]) - right(*before[key]), key) for key in before)
    chosen = [gains[len(gains) * part // 4] for part in (2, 3)]
    print(*(f"{key}: {gain:+.1%} of its pixels" for gain, key in chosen), sep="\n")
    keys = [key for _, key in chosen]
    scenes = [scene(options.with_unlabelled, "last", key) for key in keys]
    stacked: dict[str, Any] = {
        name: np.stack([one[name] for one in scenes]) for name in ("image", "label", "on_fake")
    }
    stacked["with"] = np.stack([one["prediction"] for one in scenes])
    stacked["without"] = np.stack([before[key][0] for key in keys])
    keep(UNLABELLED, stacked | {name: scenes[0][name] for name in ("names", "palette")})


def right(prediction: np.ndarray, label: np.ndarray) -> float:
    """Share of the pixels that are not void."""
    return float((prediction == label)[label != IGNORE_INDEX].mean())


@torch.no_grad()
def predictions(run_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each validation image, by its key: the prediction and the label, (H, W) uint8."""
    segmentor, config, path = trained_segmentor(run_dir, "last")
    samples, found = open_samples(config, path), {}
    for index, key in enumerate(samples.keys):
        _, image, label = samples.load(index)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
        classes = upsample(segmentor(pixels), label.shape)[0].argmax(0)
        found[key] = (classes.numpy().astype(np.uint8), label)
    return found


if __name__ == "__main__":
    main()
