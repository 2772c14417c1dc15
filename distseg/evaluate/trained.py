"""The segmentor of a run's checkpoint."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torch import nn

from distseg.config import loading
from distseg.config.schema import Config
from distseg.distributed.launch import resolve_ranks
from distseg.models import build_discriminator, build_segmentor, of_output
from distseg.runs import checkpoint
from distseg.runs.checkpoint import Checkpoint
from shards import user_code
from shards.neighbours import neighbours
from shards.sample import ClassSet

log = logging.getLogger(__name__)


def trained_classes(found: Checkpoint) -> ClassSet:
    """The classes that a checkpoint was trained on, with their colours."""
    # of the checkpoint, not of the shards: these may have moved, or been packed anew
    identity = found.identity
    palette = tuple((red, green, blue) for red, green, blue in identity["palette"])
    return ClassSet(tuple(identity["classes"]), palette)


def trained_segmentor(run_dir: Path, which: str) -> tuple[nn.Module, Config, Checkpoint]:
    """The segmentor of a run's checkpoint in evaluation mode, its configuration, and what the
    checkpoint says of itself: its folder need not stay, as all of it has been read.

    A segmentor of the user's own is imported from the file that the configuration names. Raises
    InputError where that is not there, and says when it has changed since training; InputError too
    for a damaged checkpoint.
    """
    config = loading.from_file(run_dir / "config.yaml")
    with checkpoint.opened(run_dir, which) as found:
        _warn_of_changed_code(config)
        # random, as the checkpoint replaces all of it: the file of the first weights may be gone
        options = {**config.segmentor.options, "init": "random"}
        num_classes = len(found.identity["classes"])
        network = build_segmentor(config.segmentor.name, num_classes, **options)
        # its EMA weights where the run has them, as those are what training scored
        checkpoint.load_segmentor(found, network)
    _warn(found.caveat)
    target = checkpoint.target_of_best(run_dir) if which == "best" else ""
    if target:
        _warn(f"{run_dir}, best, which is step {found.step}: chosen by {target}; `last` is not")
    # dropout and batch statistics would make scores depend on chance and on the batch
    return network.eval(), config, found


def trained_discriminator(config: Config, found: Checkpoint, instead: str = "") -> nn.Module:
    """The discriminator of a run's checkpoint in evaluation mode; both of `trained_segmentor`. Of
    two outputs that of the logits, as no other are known outside of training.

    instead: what the user may write who has no run with a discriminator. Raises InputError for a
    run that had none, and where the checkpoint has been pruned since.
    """
    chosen = config.discriminator
    num_classes = len(found.identity["classes"])
    # first: a supervised run has the keys of a discriminator, and no discriminator
    with checkpoint.opened(found.path.parent.parent, str(found.step)) as still:
        _, tensors = checkpoint.read_network(still, "discriminator", instead)
    network = build_discriminator(chosen.name, num_classes, **chosen.options)
    network.load_state_dict(of_output(tensors))
    return network.eval()


def _warn(text: str) -> None:
    # the ranks have not joined yet, so the environment has to say who talks
    rank, _, _ = resolve_ranks(dict(os.environ))
    if text and rank == 0:
        log.warning("%s", text)


def _warn_of_changed_code(config: Config) -> None:
    reference, recorded = config.segmentor.name, config.code.get("segmentor")
    # runs of earlier versions recorded none
    if recorded is None or not user_code.is_reference(reference):
        return
    loaded = user_code.load(reference, "segmentor")
    # no error: a comment that was added changes no score, and only the user can tell
    now = {"segmentor": loaded.sha256}
    now |= {f"segmentor:{name}": sha256 for name, sha256 in neighbours(loaded).items()}
    for part in config.code.keys() & now.keys():
        if config.code[part] != now[part]:
            path = loaded.path.parent / (part.partition(":")[2] or loaded.path.name)
            _warn(f"{path} has changed since training: scores may not be the run's")
