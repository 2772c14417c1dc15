"""The two networks of a run, as its configuration names them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from distseg.config.schema import Config
from distseg.models import build_discriminator, build_segmentor, check_training, set_batch_norm
from distseg.models.freezing import freeze
from distseg.parallel.sync_batch_norm import synchronise
from distseg.train.initial import initial_weights
from shards.errors import InputError


class Networks(NamedTuple):
    """A segmentor, and a discriminator unless the mode is supervised."""

    segmentor: nn.Module
    discriminator: nn.Module | None


def build_networks(config: Config, num_classes: int) -> Networks:
    """Both networks, initialised from the seed.

    Raises InputError for options and weights that do not fit, and for training crops that are too
    small for the discriminator.
    """
    # every rank draws the same weights, so that a seed means the same under every strategy
    torch.manual_seed(config.seed)
    # the segmentor first: with or without a discriminator a seed gives it the same weights
    segmentor = _segmentor(config, num_classes)
    if config.mode == "supervised":
        return Networks(segmentor, None)
    chosen = config.discriminator
    init = initial_weights(chosen.init, "discriminator")
    discriminator = build_discriminator(chosen.name, num_classes, init=init, **chosen.options)
    # in training mode, on random images: a parameter without a gradient would leave other ranks
    # waiting
    check_training(chosen.name, discriminator)
    stride = int(segmentor.output_stride)  # type: ignore[arg-type]
    if config.loss.map_resolution == "image":
        stride = 1
    _check_size(config, stride, int(discriminator.min_size_px))  # type: ignore[arg-type]
    return Networks(segmentor, discriminator)


def _segmentor(config: Config, num_classes: int) -> nn.Module:
    chosen = config.segmentor
    segmentor = build_segmentor(
        chosen.name,
        num_classes,
        init=initial_weights(chosen.init, "segmentor"),
        init_partial=chosen.init_partial,
        **chosen.options,
    )
    # before batch norms are replaced and parameters frozen, as it tries the network as the user
    # wrote it
    check_training(chosen.name, segmentor)
    # freezing comes last: it keeps the statistics of batch norms that are frozen whole, as they are
    # by now
    if chosen.batch_norm == "synchronised":
        synchronise(segmentor)
    else:
        set_batch_norm(segmentor, chosen.batch_norm)
    freeze(segmentor, chosen.freeze)
    return segmentor


def _check_size(config: Config, stride: int, min_size_px: int) -> None:
    """Raise InputError unless label maps at a stride are as large as the discriminator needs."""
    crop_px = config.data.crop_px
    label_map_px = -(-crop_px // stride)
    if label_map_px < min_size_px:
        got = f"data.crop_px={crop_px}: label maps of {label_map_px} pixels at stride {stride}"
        needed = f"at least {min_size_px} pixels for the discriminator {config.discriminator.name}"
        action = f"write data.crop_px={min_size_px * stride} or more, or loss.map_resolution=image"
        raise InputError(got, needed, action)
