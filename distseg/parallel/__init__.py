"""Learners: a network with its optimizer and its way of being spread over the ranks, behind one
small interface.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from distseg.config.schema import Config, OptimizerConfig
from distseg.distributed.ranks import Ranks
from distseg.parallel.ddp import DDPLearner
from distseg.parallel.stopwatch import Stopwatch
from distseg.parallel.torch_learner import BackwardStart
from shards.errors import InputError

__all__ = [
    "BackwardStart",
    "Learner",
    "backward",
    "check_installed",
    "check_network",
    "check_settings",
    "wrap",
]


class Learner(Protocol):
    """A network that can be trained, whatever spreads it over the ranks."""

    network: nn.Module  # bare: its attributes and parameter count; its parameters may be shards
    stopwatch: Stopwatch  # of this rank's part of a step

    def full_network(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The network with all its parameters on this rank, for evaluation; called on every rank.

        tensors: values to copy in instead of its own, named and sharded as in its state_dict.
        """

    def twin(self) -> nn.Module:
        """A second network, spread over the ranks as this one and with its present values, in
        evaluation mode; called on every rank.
        """

    def infer(self, network: nn.Module, *inputs: Tensor) -> Any:
        """What this network or its twin says, in evaluation mode and without a graph, under
        autocast: of a segmentor the logits alone.
        """

    def __call__(self, *inputs: Tensor, num_tracked: int | None = None, **options: Any) -> Any:
        """Forward under autocast.

        The gradients of a later backward will be averaged over the ranks. num_tracked: batch
        norm takes so many of the first images, or below 0 of the last, by themselves, its running
        statistics too; None: all together.
        """

    def forward_frozen(self, *inputs: Tensor, **options: bool) -> Any:
        """Forward under autocast that leaves this learner's parameters and gradients alone."""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times this learner's loss scale (fp16), as every start of `backward` must be.

        Else itself.
        """

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, a forward and its backward add up gradients that are not yet exchanged. May be
        entered again within.
        """

    # of several learners, since DDP and FSDP have one backward for both networks: so the
    # discriminator's all-reduce runs beside the segmentor's backward
    @staticmethod
    def backward(work: Sequence[tuple[Any, Sequence[BackwardStart]]]) -> None:
        """Gradients of several learners of this kind, each from its own starts.

        See `backward` below.
        """

    def step(self, lr_factor: float) -> dict[str, Tensor]:
        """Clip, update unless the gradient is not finite, clear the gradients.

        The norm and the skip counts.
        """

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by part ("network", "optimizer", "counters"), each by name.

        The learner's own memory.
        """

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy in what `state_dict` gave."""


def backward(work: Sequence[tuple[Learner, Sequence[BackwardStart]]]) -> None:
    """Gradients of all learners of a step, each from its own starts, averaged over the ranks when
    this returns.

    The learners are of one kind, and the starts of one lead to no parameter of another.
    """
    learner, starts = work[0]
    # the graph of the first is gone through last
    with learner.stopwatch.running_backward(starts[0][0]):
        type(learner).backward(work)


def wrap(network: nn.Module, optimizer: OptimizerConfig, config: Config, ranks: Ranks) -> Learner:
    """Move a network to the rank's device and make it a learner by `config.parallel.strategy`."""
    # two of them by functions that import late: a run waits for the one that it has chosen
    strategies = {"ddp": DDPLearner, "fsdp": _fsdp, "deepspeed": _deepspeed}
    return strategies[config.parallel.strategy](network, optimizer, config, ranks)


def check_settings(config: Config) -> None:
    """Raise InputError for what does not go with `config.parallel.strategy`."""
    if config.parallel.strategy == "deepspeed":
        from distseg.parallel.deepspeed_config import check

        check(config)


def check_network(network: nn.Module, config: Config) -> None:
    """Raise InputError for a segmentor that does not go with `config.parallel`."""
    if config.parallel.gather_dtype == "bf16":
        from distseg.parallel.fsdp import check_gathering

        check_gathering(network)


def check_installed(strategy: str) -> None:
    """Raise InputError when a strategy's package is not there."""
    # looked for and not imported: DeepSpeed takes seconds
    if strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        action = "pip install -e '.[deepspeed]' in the repository, or write parallel.strategy=ddp"
        raise InputError(
            "parallel.strategy=deepspeed, and DeepSpeed is not installed",
            "the package deepspeed",
            action,
        )


def _fsdp(*arguments: Any) -> Learner:
    from distseg.parallel.fsdp import FSDPLearner  # takes seconds that other runs need not wait

    return FSDPLearner(*arguments)


def _deepspeed(*arguments: Any) -> Learner:
    # as above, and it need not be installed
    from distseg.parallel.deepspeed import DeepSpeedLearner

    return DeepSpeedLearner(*arguments)
