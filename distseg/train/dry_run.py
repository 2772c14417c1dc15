"""`distseg train --dry-run`: what a command line comes to, as YAML that `train FILE.yaml` takes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from distseg.catalogue.run import num_parameters
from distseg.config import loading
from distseg.config.from_data import FROM_DATA
from distseg.config.names import SECTIONS, find
from distseg.config.schema import WITH_DISCRIMINATOR, Config
from distseg.config.world_size import check_world_size
from distseg.distributed.launch import resolve_ranks
from distseg.evaluate.judged import judges_auxiliary
from distseg.models import build_discriminator, build_segmentor
from distseg.parallel import check_settings
from distseg.train.networks import check_segmentor
from shards import user_code
from shards.manifest import FILE_NAME, Manifest
from shards.storage import is_file
from shards.words import counted

VALUE_COLUMNS = 44  # comments begin behind them, where the value is no longer
PLAIN = re.compile(r"[A-Za-z][\w./-]*")  # strings that need no quotes
Sizes = tuple[int, int] | None  # training images and classes


def show(overrides: list[str], config: Config, waiting: Collection[str] = ()) -> int:
    """Print the resolved configuration, and what a run of it is; returns the exit code.

    waiting: keys whose values come from images that are not there yet. Raises InputError for what
    training would refuse without looking at data.
    """
    rank, world_size, _ = resolve_ranks(dict(os.environ))
    # before the output, which promises that the same arguments could be trained
    check_settings(config)
    if "batch_size" not in waiting:
        check_world_size(config, world_size)
    if rank == 0:
        lines = summary(config, world_size, waiting)
        print("\n".join([*(f"# {line}" for line in lines), *explained(overrides, config, waiting)]))
    return 0


def explained(overrides: list[str], config: Config, waiting: Collection[str] = ()) -> list[str]:
    """The configuration as lines of YAML; behind each key where its value is from and its meaning.

    Commented so, they are still a file that `distseg train FILE.yaml` reads; what waits for images
    is left to them there too.
    """
    origins = loading.origins(overrides, config)
    lines: list[str] = []

    def add(values: dict[str, Any], above: str, depth: int) -> None:
        for word, value in values.items():
            name, indent = f"{above}{word}", "  " * depth
            if name in SECTIONS:
                lines.append(f"{indent}{word}:  # {SECTIONS[name].meaning}")
                add(value, f"{name}.", depth + 1)
                continue
            written, origin = _written(value), _origin(name, origins)
            if name in waiting:
                written, origin = FROM_DATA, f"{origin}, from your images"
            entry = f"{indent}{word}: {written}".ljust(VALUE_COLUMNS)
            lines.append(f"{entry}  # {origin}: {_meaning(name)}")

    add(loading.to_dict(config), "", 0)
    return lines


def _written(value: Any) -> str:
    """A value as YAML on one line, which leaves room for a comment."""
    if isinstance(value, str) and PLAIN.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    # JSON is YAML too
    return json.dumps(value, ensure_ascii=False)


def _origin(name: str, origins: dict[str, str]) -> str:
    # a dictionary's parts may come from several places
    inside = [place for key, place in origins.items() if f"{key}.".startswith(f"{name}.")]
    return ", ".join(dict.fromkeys(inside)) or "default"


def _meaning(name: str) -> str:
    found = find(name)
    return "" if found is None else found.meaning


def summary(config: Config, world_size: int, waiting: Collection[str] = ()) -> list[str]:
    """What a run of it is, in a few lines: steps and epochs, the batch of a rank, its networks."""
    sizes = sizes_of(config)
    num_classes = config.data.num_classes or (None if sizes is None else sizes[1])
    networks = _networks(config, num_classes)
    shards = ", ".join(config.data.shards)
    if waiting:
        place = f"{shards} is not there yet" if shards else "data.shards=DIR will name them"
        return [f"from your images: {', '.join(waiting)}; {place} (docs/your_data.md)", *networks]
    per_rank = config.batch_size // world_size
    batch = f"a batch of {counted(config.batch_size, 'image')}"
    lines = [f"{counted(config.steps, 'step')} with {batch}, {per_rank} on each of "]
    lines[0] += counted(world_size, "rank")
    if sizes is None:
        lines.append(f"epochs: not known before {shards or 'data.shards=DIR'} is opened")
    else:
        epochs = config.steps * config.batch_size / sizes[0]
        lines.append(f"{epochs:.1f} epochs of {counted(sizes[0], 'training image')}")
    return [*lines, *networks]


def sizes_of(config: Config) -> Sizes:
    """Of shards in a folder, from their manifest alone; None where there is none to read."""
    options = config.data
    manifests = []
    for shards in options.shards:
        if "://" in shards or not is_file(Path(shards) / FILE_NAME):
            return None
        manifests.append(Manifest.load(Path(shards)))
    splits = [manifest.splits.get(options.train_split) for manifest in manifests]
    # a choice of labelled images or classes is made when the shards are opened
    if options.labelled != "all" or not manifests:
        return None
    num_samples = sum(split.num_samples for split in splits if split is not None)
    num_classes = len(options.keep_classes) + 1 if options.keep_classes else None
    known = None not in splits
    return (num_samples, num_classes or manifests[0].classes.num_classes) if known else None


def _networks(config: Config, num_classes: int | None) -> list[str]:
    options: dict[str, Any] = {**config.segmentor.options, "init": "random"}
    built: list[tuple[str, str, Callable[..., nn.Module], dict[str, Any]]] = [
        ("segmentor", config.segmentor.name, build_segmentor, options)
    ]
    if config.mode in WITH_DISCRIMINATOR:
        own = dict(config.discriminator.options)
        kind = "discriminator of each output" if judges_auxiliary(config) else "discriminator"
        built.append((kind, config.discriminator.name, build_discriminator, own))
    lines = []
    for kind, name, build, keywords in built:
        # one of the user's own would be run: it is imported and tried when training starts
        if user_code.is_reference(name):
            lines.append(f"{kind} {user_code.short(name)}, your own")
            continue
        if num_classes is None:
            lines.append(f"{kind} {name}, for the classes of your images")
            continue
        # on the meta device, which has shapes but no memory
        with torch.device("meta"):
            network = build(name, num_classes, **keywords)
        if build is build_segmentor:
            check_segmentor(config, network)
        classes = counted(num_classes, "class", "classes")
        lines.append(f"{kind} {name}: {num_parameters(network):,} parameters for {classes}")
    return lines
