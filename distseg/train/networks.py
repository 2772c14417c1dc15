"""The two networks of a run, as its configuration names them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from distseg.config.schema import ADAPTATION, WITH_DISCRIMINATOR, WITH_UNLABELLED, Config
from distseg.evaluate.judged import judges_auxiliary
from distseg.models import (
    OfBothOutputs,
    Weights,
    build_discriminator,
    build_segmentor,
    check_step,
    check_training,
    set_batch_norm,
)
from distseg.models.blocks import checkpoint_activations
from distseg.models.freezing import freeze
from distseg.models.trial import StepImages, shaped
from distseg.parallel import check_network
from distseg.parallel.sync_batch_norm import synchronise
from distseg.runs import checkpoint
from distseg.train.adversary import check_auxiliary, check_discriminator
from distseg.train.feature_dropout import FeatureDropout
from distseg.train.initial import initial_weights
from distseg.train.teacher import counts_unlabelled
from shards.errors import InputError


class Networks(NamedTuple):
    """A segmentor, and a discriminator in the modes that have one."""

    segmentor: nn.Module
    discriminator: nn.Module | None


def build_networks(config: Config, num_classes: int, world_size: int = 1) -> Networks:
    """Both networks, initialised from the seed.

    Those of the user's own are tried as a step on so many ranks uses them. Raises InputError for
    options and weights that do not fit, and for training crops that are too small for the
    discriminator.
    """
    # every rank draws the same weights, so that a seed means the same under every strategy
    torch.manual_seed(config.seed)
    # the segmentor first: with or without a discriminator a seed gives it the same weights
    segmentor = _segmentor(config, num_classes, world_size)
    segmentor.awaits_checkpoint = is_resumed(config)  # type: ignore[assignment]
    if config.mode not in WITH_DISCRIMINATOR:
        return Networks(segmentor, None)
    images = _step_images(config, world_size, segmentor)
    discriminator = _discriminator(config, segmentor, images, "of_logits")
    if judges_auxiliary(config):
        # drawn after the first, whose weights are then those of a run with one output
        other = _discriminator(config, segmentor, images, "of_auxiliary")
        discriminator = OfBothOutputs(discriminator, other)
    return Networks(segmentor, discriminator)


def check_segmentor(config: Config, segmentor: nn.Module) -> None:
    """Raise InputError for a segmentor, with or without values, that has not what the configuration
    asks of it.
    """
    FeatureDropout.of(config, segmentor)  # features on their way to a head
    check_network(segmentor, config)
    if judges_auxiliary(config):
        check_auxiliary(config, segmentor)


def _discriminator(
    config: Config, segmentor: nn.Module, images: StepImages, output: str
) -> nn.Module:
    """That of one of the segmentor's outputs, see of_output."""
    chosen, num_classes = config.discriminator, int(segmentor.num_classes)  # type: ignore[arg-type]
    init = _first_weights(config, "discriminator")
    discriminator = build_discriminator(
        chosen.name,
        num_classes,
        init=init,
        output=output,
        label_map_px=images.label_map_px,
        **chosen.options,
    )
    _check_size(config, images.label_map_px, _stride(config, segmentor), discriminator)
    check_discriminator(config, discriminator)
    # in training mode, on random images: a parameter without a gradient would leave other ranks
    # waiting
    check_training(chosen.name, discriminator)
    check_step(chosen.name, discriminator, images)
    return discriminator


def _step_images(config: Config, world_size: int, segmentor: nn.Module) -> StepImages:
    """What the networks get at a time, on one of so many ranks."""
    parts, crop_px = world_size * config.gradient_accumulation_steps, config.data.crop_px
    unlabelled = config.semi.batch_size or config.batch_size
    return StepImages(
        num_labelled=config.batch_size // parts,
        num_unlabelled=unlabelled // parts if config.mode in WITH_UNLABELLED else 0,
        side_px=crop_px,
        label_map_px=-(-crop_px // _stride(config, segmentor)),
    )


def _segmentor(config: Config, num_classes: int, world_size: int) -> nn.Module:
    chosen = config.segmentor
    segmentor = build_segmentor(
        chosen.name,
        num_classes,
        init=_first_weights(config, "segmentor"),
        init_partial=chosen.init_partial,
        **chosen.options,
    )
    # before batch norms are replaced and parameters frozen, as it tries the network as the user
    # wrote it
    check_training(chosen.name, segmentor)
    check_segmentor(config, segmentor)  # after it: whether the user's own has two outputs is tried
    images = _step_images(config, world_size, segmentor)
    # before these steps are of labelled images alone, and so are statistics where they are separate
    late = config.loss.adv_start_step or config.consistency.start_step
    if late or not counts_unlabelled(config):
        images = replace(images, num_unlabelled=0)
    if chosen.batch_norm == "synchronised":
        # its statistics are of all ranks' images together
        images = replace(images, num_labelled=images.num_labelled * world_size)
    else:
        set_batch_norm(segmentor, chosen.batch_norm)
    # as it is in a step, but for statistics over ranks, which have not joined yet
    check_step(chosen.name, segmentor, images)
    # freezing comes last: it keeps the statistics of batch norms that are frozen whole, as they are
    # by now
    if chosen.batch_norm == "synchronised":
        synchronise(segmentor)
    freeze(segmentor, chosen.freeze)
    checkpoint_activations(segmentor, chosen.activation_checkpointing)
    _check_learns(config, segmentor)
    return segmentor


def _first_weights(config: Config, network: str) -> str | Weights:
    """Of a network; "random" where a checkpoint is about to replace them.

    So a run goes on where its file of first weights is gone. `build_trainer` sees to it that there
    is a checkpoint then.
    """
    if is_resumed(config):
        return "random"
    chosen = config.segmentor if network == "segmentor" else config.discriminator
    adapts = config.mode in ADAPTATION or bool(config.data.unlabelled_shards)
    return initial_weights(chosen.init, network, adapts=adapts)


def is_resumed(config: Config) -> bool:
    """Whether the run has a checkpoint that it goes on from."""
    return bool(checkpoint.published(Path(config.run_dir) / checkpoint.FOLDER))


def _check_learns(config: Config, segmentor: nn.Module) -> None:
    """Raise InputError where all that the logits come from is frozen."""
    if all(parameter.requires_grad for parameter in segmentor.parameters()):
        return
    # in evaluation mode: layers that are synchronised ask for a job in training mode
    side = max(64, int(getattr(segmentor, "size_multiple", 1)))
    logits = shaped(copy.deepcopy(segmentor).eval(), torch.zeros(2, 3, side, side))
    # an auxiliary head alone can be trained, but for an adversary nothing leads to it
    has_auxiliary = getattr(segmentor, "has_auxiliary", False) and config.loss.aux_weight
    if not logits.requires_grad and not (has_auxiliary and config.mode not in WITH_DISCRIMINATOR):
        got = f"segmentor.freeze={list(config.segmentor.freeze)}: all that the logits come from"
        needed = "a parameter to train on the way from the image to the logits"
        raise InputError(got, needed, "freeze less, for example the encoder alone")


def _stride(config: Config, segmentor: nn.Module) -> int:
    """Of the label maps that the discriminator judges."""
    at_image_size = config.loss.map_resolution == "image"
    return 1 if at_image_size else int(segmentor.output_stride)  # type: ignore[arg-type]


def _check_size(config: Config, label_map_px: int, stride: int, discriminator: nn.Module) -> None:
    """Raise InputError unless label maps are as large as the discriminator needs."""
    crop_px = config.data.crop_px
    min_size_px = int(discriminator.min_size_px)  # type: ignore[arg-type]
    if label_map_px < min_size_px:
        got = f"data.crop_px={crop_px}: label maps of {label_map_px} pixels at stride {stride}"
        needed = f"at least {min_size_px} pixels for the discriminator {config.discriminator.name}"
        action = f"write data.crop_px={min_size_px * stride} or more, or loss.map_resolution=image"
        raise InputError(got, needed, action)
