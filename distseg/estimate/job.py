"""One rank of a job without its data: the trainer's own step, on pixels that are made up."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from distseg.config.schema import WITH_DISCRIMINATOR, WITH_UNLABELLED, Config
from distseg.data.stream import Batch
from distseg.distributed.ranks import Ranks
from distseg.parallel.parameter_shards import shard_of
from distseg.train.assembly import spread, with_views
from distseg.train.networks import Networks, build_networks
from distseg.train.objective import build_objective
from distseg.train.schedules import phase
from distseg.train.trainer import Trainer, logged
from shards import user_code
from shards.errors import InputError

LAST_STEPS = 2000  # of a run, in which every term is on; more than a round of any recipe's blocks


def prepared(config: Config) -> Config:
    """The configuration as a step is counted: no weights to look for, kernels as they are written.

    A precision that is left to the device is bf16, as on every GPU of the last years.
    """
    return replace(
        config,
        device="cpu",
        compile=False,
        precision="bf16" if config.precision == "auto" else config.precision,
        segmentor=replace(config.segmentor, init="random"),
        discriminator=replace(config.discriminator, init="random"),
    )


def without_memory(config: Config, num_classes: int, world_size: int) -> Networks:
    """Both networks on the meta device. Raises InputError as `build_networks` does."""
    names = {"segmentor": config.segmentor.name}
    if config.mode in WITH_DISCRIMINATOR:
        names["discriminator"] = config.discriminator.name
    # one of the user's own is tried, which needs values
    own = {key: name for key, name in names.items() if user_code.is_reference(name)}
    with nullcontext() if own else torch.device("meta"):
        networks = build_networks(config, num_classes, world_size)
    for key, name in own.items():
        _check_python(f"{key}={name}", getattr(networks, key))
    judge = networks.discriminator
    return Networks(networks.segmentor.to("meta"), None if judge is None else judge.to("meta"))


def _check_python(what: str, network: nn.Module) -> None:
    """Raise InputError for a network of the user's own that torch.jit has compiled."""
    # its parameters cannot be taken away from it, nor its operations be seen
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        got = f"{what}: a network of torch.jit.script or torch.jit.trace, in whole or in part"
        needed = "one that runs in Python, so that a step can be followed without values"
        raise InputError(got, needed, "estimate the network as it is before torch.jit")


def filled(networks: Networks) -> Networks:
    """Networks of the meta device in memory, with whatever stands there."""
    for network in networks:
        if network is not None:
            network.to_empty(device="cpu")
    return networks


def build_job(config: Config, networks: Networks, ranks: Ranks) -> Trainer:
    """The trainer of a rank that has joined a job, with all that its steps need and no more."""
    # the samples, which class weights come from, change no size
    pair = spread(config, networks, build_objective(config, *networks), ranks)
    pair, ema = with_views(config, ranks, pair)
    num_classes: Any = pair.segmentor.network.num_classes
    names = tuple(map(str, range(num_classes)))
    # a step asks for the names of the classes, and neither saves nor scores
    named: Any = SimpleNamespace(samples=SimpleNamespace(classes=SimpleNamespace(names=names)))
    unused: Any = None
    rest = dict.fromkeys(("checkpoints", "tracker", "progress", "watchdog", "work"), unused)
    return Trainer(
        config=config, ranks=ranks, pair=pair, ema=ema, evaluator=named, peak=0.0, **rest
    )


def fullest_step(config: Config) -> int:
    """The step, of the last ones of a run, that does most: both networks, all terms, logged."""

    def done(step: int) -> tuple[int, ...]:
        found = phase(step, config)
        weights = sum(weight != 0 for weight in found.weights.values())
        # the segmentor's backward is what most is kept for
        turns = int(found.segmentor), int(found.adversary), int(found.discriminator)
        return *turns, int(found.taught), weights, int(found.r1 > 0), int(logged(step, config))

    return max(range(max(0, config.steps - LAST_STEPS), config.steps), key=done)


def made_up(config: Config, step: int, world_size: int) -> Batch:
    """A rank's batch of a step, of noise: (n, 3, crop_px, crop_px) uint8, as a stream gives it."""

    def images(count: int, num_values: int) -> tuple[torch.Tensor, torch.Tensor]:
        side = config.data.crop_px
        pixels = torch.rand(count, 3, side, side).mul_(255).to(torch.uint8)
        label = torch.rand(count, side, side).mul_(num_values).to(torch.uint8)
        return pixels.contiguous(memory_format=torch.channels_last), label

    # as many as a rank of that job gets
    unlabelled = None
    if config.mode in WITH_UNLABELLED:
        count = (config.semi.batch_size or config.batch_size) // world_size
        unlabelled = Batch(*images(count, 1), step)
    return Batch(*images(config.batch_size // world_size, 2), step, unlabelled)


def take_step(trainer: Trainer, batch: Batch) -> None:
    """A step of the trainer, updates and average included."""
    trainer.state.step = batch.step
    trainer.train_step(batch)


def learners(trainer: Trainer) -> dict[str, Any]:
    """Its learners by their networks' names."""
    named = {"segmentor": trainer.pair.segmentor, "discriminator": trainer.pair.discriminator}
    return {name: learner for name, learner in named.items() if learner is not None}


def tensors_of(network: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Parameters and buffers of a network, as far as this rank holds them."""
    held = [getattr(it, "ds_tensor", shard_of(it).rows) for it in network.parameters()]
    # under ZeRO-3 a shard, and of what stays whole the whole too
    whole = [it.data for it in network.parameters() if hasattr(it, "ds_tensor")]
    return {"parameters": [*held, *whole], "buffers": list(network.buffers())}
