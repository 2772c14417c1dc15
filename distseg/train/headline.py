"""What is about to run, told in a few lines."""

from __future__ import annotations

import torch

from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks
from distseg.parallel.slices import num_elements
from distseg.parallel.sync_batch_norm import SynchronisedBatchNorm2d
from distseg.train.inputs import Data
from distseg.train.step import Pair
from shards import user_code


def headline(config: Config, ranks: Ranks, pair: Pair, data: Data, step: int) -> str:
    """What is about to run, in a few lines.

    Networks, ranks, losses with their reductions, where it goes.
    """
    segmentor, discriminator = map(
        user_code.short, (config.segmentor.name, config.discriminator.name)
    )
    networks = [f"segmentor {segmentor} {_millions(pair.segmentor.network)}"]
    if pair.discriminator is not None:
        networks += [f"discriminator {discriminator} {_millions(pair.discriminator.network)}"]
    images = f"{len(data.train)} labelled"
    batch = (
        f"batch {config.batch_size} = {ranks.world_size} x {config.batch_size // ranks.world_size}"
    )
    if data.unlabelled is not None:
        images += f" and {len(data.unlabelled)} unlabelled"
        batch += f", + {config.semi.batch_size or config.batch_size} unlabelled"
    lines = [" | ".join(networks), f"loss: {' + '.join(_terms(config))}"]
    num_layers = sum(
        isinstance(m, SynchronisedBatchNorm2d) for m in pair.segmentor.network.modules()
    )
    if num_layers and ranks.world_size > 1:
        lines += [
            f"batch norm: synchronised, {num_layers} layers that wait for all ranks in forward and backward"
        ]
    lines += [f"images: {images} for training, {len(data.val)} for validation"]
    where = f"{ranks.world_size} x {ranks.device.type} | {config.parallel.strategy}"
    lines += [f"{where} | {config.precision} | {batch} | {config.run_dir}"]
    if step:
        lines += [f"resumed at step {step} of {config.steps}"]
    return "\n".join(lines)


def _terms(config: Config) -> list[str]:
    """The segmentor's loss, each term with its weight and reduction.

    A weight means nothing without it.
    """
    loss, semi = config.loss, config.semi
    terms = [f"cross entropy ({loss.ce_reduction})"]
    if config.mode != "supervised":
        late = f", from step {loss.adv_start_step}" if loss.adv_start_step else ""
        how = f"{loss.adv_form}, {loss.adv_reduction}, {config.alternation.name}{late}"
        terms += [f"{loss.adv_weight} x adversarial ({how})"]
    if config.mode == "semi_supervised":
        terms += [f"{semi.adv_weight} x adversarial on unlabelled ({loss.adv_reduction})"]
        where = f"{loss.ce_reduction} where D > {semi.threshold}, from step {semi.start_step}"
        terms += [f"{semi.weight} x semi-supervised cross entropy ({where})"]
    return terms


def _millions(network: torch.nn.Module) -> str:
    return f"({sum(num_elements(parameter) for parameter in network.parameters()) / 1e6:.2f} M)"
