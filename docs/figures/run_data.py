"""Keep of a real run what its figures show: data/run.json and data/scene.npz.

    distseg prepare toy --out data/toy.h5 && distseg pack data/toy.h5 --out data/toy
    torchrun --standalone --nproc_per_node=2 -m distseg.train preset=toy run_dir=runs/toy \\
        discriminator.options.head=patch steps=160 precision=fp32 tracking.log_every=2 \\
        evaluate.every_steps=20 checkpoint.every_steps=20 checkpoint.keep_last=8
    python -m docs.figures.run_data runs/toy val-00010 --early 40
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distseg.evaluate.run import open_samples
from distseg.evaluate.trained import trained_classes, trained_discriminator, trained_segmentor
from distseg.losses.adversarial import real_label_map
from distseg.losses.tensors import label_at, upsample
from distseg.tracking.tracker import METRICS_FILE, read_metrics
from docs.figures.style import RUN, SCENE
from shards.files import published, write_json

KEPT = (
    *("loss/cross_entropy", "loss/adversarial", "loss/discriminator_real"),
    *("loss/discriminator_fake", "discriminator/accuracy", "val/mean_iou"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures.run_data")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("key", help="of a validation sample")
    parser.add_argument("--early", required=True, help="step of a checkpoint: its label maps")
    options = parser.parse_args()
    write_json(RUN, curves(options.run_dir))
    arrays = scene(options.run_dir, "last", options.key)
    early = scene(options.run_dir, options.early, options.key)
    arrays["early_probabilities"] = early["probabilities"]
    keep(SCENE, arrays)


def keep(file: Path, arrays: dict[str, Any]) -> None:
    """Written compressed, whole or not at all."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    with published(file) as partial:
        partial.write_bytes(packed.getvalue())


def curves(run_dir: Path) -> dict[str, Any]:
    """{"command", "code" (the commit), ..., "metrics": {name: [[step, value], ...]}}."""
    series: dict[str, list[list[float]]] = {name: [] for name in KEPT}
    for row in read_metrics(run_dir / METRICS_FILE):
        for name in KEPT:
            if name in row:
                # four digits are more than a drawing shows
                series[name].append([row["step"], float(f"{row[name]:.4g}")])
    environment = json.loads((run_dir / "environment.json").read_text())
    told = {name: environment[name] for name in ("code", "device", "world_size", "python")}
    told["torch"] = environment["versions"]["torch"]
    command = " ".join(line.strip(" \\") for line in (__doc__ or "").splitlines()[3:6])
    return {"command": command, **told, "metrics": series}


@torch.no_grad()
def scene(run_dir: Path, which: str, key: str) -> dict[str, Any]:
    """A validation sample, and what both networks of a checkpoint make of it.

    image (H, W, 3), label, prediction (H, W) uint8; probabilities (C, h, w) float16; on_real,
    on_fake (h', w') float16, the discriminator's logits; names (C,), palette (C, 3).
    """
    segmentor, config, path = trained_segmentor(run_dir, which)
    classes = trained_classes(path)
    discriminator = trained_discriminator(config, path)
    samples = open_samples(config, path)
    _, image, label = samples.load(samples.keys.index(key))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255  # (1, 3, H, W)
    logits = segmentor(pixels)
    probabilities = logits.softmax(1)  # (1, C, h, w)
    index, valid = label_at(torch.from_numpy(label)[None], probabilities.shape[-2:])
    real = real_label_map(index, valid, probabilities)
    on_real, on_fake = discriminator(pixels, real, probabilities)
    return {
        "image": image,
        "label": label,
        "prediction": upsample(logits, label.shape)[0].argmax(0).numpy().astype(np.uint8),
        "probabilities": _half(probabilities[0]),
        "on_real": _half(on_real[0, 0]),
        "on_fake": _half(on_fake[0, 0]),
        "names": np.array(classes.names),
        "palette": np.array(classes.palette, np.uint8),
    }


def _half(tensor: Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.float16)


if __name__ == "__main__":
    main()
