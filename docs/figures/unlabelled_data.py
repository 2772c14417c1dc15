"""Keep of two real runs what the README's picture shows: data/unlabelled.npz.

    distseg prepare toy --out data/toy.h5 && distseg pack data/toy.h5 --out data/toy
    python -m distseg.train preset=toy_consistency seed=10 data.labelled_seed=10 \\
        mode=supervised run_dir=runs/without
    python -m distseg.train preset=toy_consistency seed=10 data.labelled_seed=10 run_dir=runs/with
    python -m docs.figures.unlabelled_data runs/without runs/with

Which scene is no choice of ours: the one at the median of what the unlabelled images gain in pixel
accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from distseg.evaluate.run import open_samples
from distseg.evaluate.trained import trained_classes, trained_segmentor
from distseg.losses.tensors import upsample
from docs.figures.run_data import keep
from docs.figures.style import UNLABELLED
from shards.sample import IGNORE_INDEX, ClassSet

Seen = tuple[np.ndarray, np.ndarray, np.ndarray]  # image (H, W, 3), label, prediction (H, W) uint8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures.unlabelled_data")
    parser.add_argument("without", type=Path)
    parser.add_argument("with_unlabelled", type=Path)
    options = parser.parse_args()
    (before, classes), (after, _) = map(predictions, (options.without, options.with_unlabelled))
    gains = sorted((right(after[key]) - right(before[key]), key) for key in before)
    gain, key = gains[len(gains) // 2]
    print(f"{key}: {gain:+.1%} of its pixels")
    image, label, prediction = after[key]
    arrays = {"image": image, "label": label, "without": before[key][2], "with": prediction}
    arrays["names"] = np.array(classes.names)
    arrays["palette"] = np.array(classes.palette, np.uint8)
    keep(UNLABELLED, arrays)


def right(seen: Seen) -> float:
    """Share of the pixels that are not void."""
    _, label, prediction = seen
    return float((prediction == label)[label != IGNORE_INDEX].mean())


@torch.no_grad()
def predictions(run_dir: Path) -> tuple[dict[str, Seen], ClassSet]:
    """Of each validation image, by its key; and the classes."""
    segmentor, config, path = trained_segmentor(run_dir, "last")
    samples, found = open_samples(config, path), {}
    for index, key in enumerate(samples.keys):
        _, image, label = samples.load(index)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
        classes = upsample(segmentor(pixels), label.shape)[0].argmax(0)
        found[key] = (image, label, classes.numpy().astype(np.uint8))
    return found, trained_classes(path)


if __name__ == "__main__":
    main()
