"""A job's rank without the job: what it holds, sends and computes in a step, counted."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.data.stream import Batch
from distseg.distributed.compat import fake_group, reduce_by_hook
from distseg.distributed.ranks import Ranks, check_alone
from distseg.estimate.hollow import Block, Collective, Hollow, Work
from distseg.estimate.job import (
    build_job,
    filled,
    fullest_step,
    learners,
    made_up,
    take_step,
    tensors_of,
)
from distseg.parallel.parameter_shards import shard_of
from distseg.train.networks import Networks
from distseg.train.trainer import Trainer

# the first cuts DDP's buckets anew, and shows ZeRO-3 the order of the layers
NUM_STEPS = 2
KINDS = (
    *("parameters", "gradients", "optimizer", "buffers", "average", "exchange", "images"),
    "activations",
)


@dataclass(frozen=True)
class Simulated:
    """A rank of a job, in bytes.

    totals: what is held after each change, (n,) int64. parts: what is there when there is most, by
    kind (of KINDS) and network ("" where it is of both or of neither). between: what is held
    between steps. collectives, work: of one step.
    """

    totals: np.ndarray
    parts: dict[tuple[str, str], int]
    between: int
    collectives: list[Collective]
    work: list[Work]

    @property
    def peak(self) -> int:
        """The most at a time."""
        return int(self.totals.max())

    def of_kind(self, kind: str) -> int:
        """Bytes at the peak, of both networks."""
        return sum(size for (name, _), size in self.parts.items() if name == kind)

    @property
    def operations(self) -> float:
        """Of the products of a step, a multiply-add counted as two."""
        return sum(it.operations for it in self.work)


@contextmanager
def pretended(world_size: int) -> Iterator[Ranks]:
    """Within it this process is rank 0 of a job of which there is nothing else.

    Raises InputError where it has joined a job.
    """
    check_alone()
    # DeepSpeed's stage 3 leaves LOCAL_RANK there, and half of torchrun's variables are refused
    launched_with = dict(os.environ)
    try:
        with fake_group(world_size):
            yield Ranks(0, world_size, 0, torch.device("cpu"))
    finally:
        os.environ.clear()
        os.environ.update(launched_with)


def simulate(config: Config, networks: Networks, ranks: Ranks) -> Simulated:
    """Build a rank of a pretended job as training does, and take steps.

    config: as `prepared` makes it. networks: of the meta device; they stay as they are.
    """
    # a copy: filling and wrapping change a network in place
    hollow, networks = Hollow(), copy.deepcopy(networks)
    with hollow.counting():
        trainer = build_job(config, filled(networks), ranks)
        for learner in learners(trainer).values():
            if config.parallel.strategy == "ddp":
                reduce_by_hook(learner.ddp)
        _name_what_stays(hollow, trainer)
        # before anything is run, as a step changes what the names stand for
        step = fullest_step(config)
        with _naming_what_comes(hollow, trainer):
            for _ in range(NUM_STEPS):
                hollow.forget()
                hollow.ledger.network = ""
                # anew for each step, as a stream makes them
                batch = made_up(config, step, ranks.world_size)
                _say(hollow, [*_tensors(batch)], "images")
                take_step(trainer, batch)
        del batch
        # within the mode: what is freed outside of it is noted too
        totals, held = hollow.ledger.totals(), hollow.ledger.at_most()
        between = sum(block.size for block in hollow.ledger.live())
    parts: dict[tuple[str, str], int] = defaultdict(int)
    for block, size in held.items():
        parts[block.kind or "activations", block.network] += size
    return Simulated(totals, dict(parts), between, hollow.collectives, hollow.work)


def _name_what_stays(hollow: Hollow, trainer: Trainer) -> None:
    """Say of everything that a job holds before its first step what it is for."""
    for network, learner in learners(trainer).items():
        optimizer = learner.optimizer
        # ZeRO's optimizers work on flat pieces, which no parameter of the network is
        pieces = [piece for group in optimizer.param_groups for piece in group["params"]]
        states = [it for state in optimizer.state.values() for it in state.values()]
        held = tensors_of(learner.network)
        _say(hollow, [*held["parameters"], *pieces], "parameters", network)
        _say(hollow, states, "optimizer", network)
        _say(hollow, held["buffers"], "buffers", network)
    if trainer.ema is not None:
        average = trainer.ema.state_dict()["network"].values()
        _say(hollow, [shard_of(it).rows for it in average], "average", "segmentor")
    # buckets and flat copies, which gradients may turn out to lie in
    for block in hollow.ledger.live():
        block.kind = block.kind or "exchange"


@contextmanager
def _naming_what_comes(hollow: Hollow, trainer: Trainer) -> Iterator[None]:
    """Within it, of what a step makes it is said what it is for."""
    ledger, handles = hollow.ledger, []

    def entered(network: str, *_: Any) -> None:
        if network == "segmentor" and not ledger.network:
            # before the first forward there is nothing but images, and views of them
            for block in ledger.live():
                block.kind = block.kind or "images"
        ledger.network = network

    def left(*_: Any) -> None:
        # not "", which is of before the first forward
        ledger.network = "backward"

    def updated(step: Callable[..., Any], lr_factor: float) -> Any:
        for network, learner in learners(trainer).items():
            gradients = [it.grad for it in learner.network.parameters() if it.grad is not None]
            _say(hollow, (shard_of(it).rows for it in gradients), "gradients", network)
        # what lives on when the graph has gone: ZeRO's own
        for block in ledger.live():
            block.kind = block.kind or "gradients"
        return step(lr_factor)

    for name, learner in learners(trainer).items():
        network = learner.network
        handles.append(network.register_forward_pre_hook(partial(entered, name)))
        handles.append(network.register_forward_hook(left))
        learner.step = partial(updated, learner.step)
    yield
    # the hooks hold the trainer
    for handle in handles:
        handle.remove()


def _say(hollow: Hollow, tensors: Iterable[Tensor], kind: str, network: str = "") -> None:
    for tensor in tensors:
        block: Block = hollow.ledger.add(tensor)
        # buckets of DDP are made anew before a forward, as images are
        if block.kind in ("", "exchange", "images"):
            block.kind, block.network = kind, network


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield from (batch.image, batch.label)
    if batch.unlabelled is not None:
        yield from _tensors(batch.unlabelled)
