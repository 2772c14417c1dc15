"""The segmentor of a run's checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from distseg.config import loading
from distseg.config.schema import Config
from distseg.models import build_segmentor
from distseg.runs import checkpoint
from shards.sample import ClassSet


def trained_classes(path: Path) -> ClassSet:
    """The classes that a checkpoint was trained on, with their colours."""
    identity = checkpoint.read_state(path)["identity"]
    palette = tuple((red, green, blue) for red, green, blue in identity["palette"])
    return ClassSet(tuple(identity["classes"]), palette)


def trained_segmentor(run_dir: Path, which: str) -> tuple[nn.Module, Config, Path]:
    """The segmentor of a run's checkpoint in evaluation mode, its configuration, and the
    checkpoint's path.
    """
    config = loading.from_file(run_dir / "config.yaml")
    path = checkpoint.find(run_dir, which)
    num_classes = len(checkpoint.read_state(path)["identity"]["classes"])
    options = {**config.segmentor.options, "init": "random"}
    network = build_segmentor(config.segmentor.name, num_classes, **options)
    checkpoint.load_segmentor(path, network)
    return network.eval(), config, path
