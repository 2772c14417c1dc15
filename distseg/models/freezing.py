"""Parts of a network that are not trained, by the names of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from distseg.models.batch_norm import BatchNorm2d
from shards.errors import InputError


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters that any of `patterns` matches out of training.

    patterns: of names as in state_dict, with *, ? and [abc]; one that matches a module stands for
    all in it ("encoder", "encoder.layer[12]"). A frozen parameter has requires_grad=False: it gets
    no gradient, no optimizer state and no weight decay. A batch normalisation that is frozen whole
    keeps its stored statistics, too. Raises InputError for a pattern that matches nothing, and
    where nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        names = [name for name in parameters if _matches(name, pattern)]
        if not names:
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))
            got = f"segmentor.freeze: {pattern!r} matches no parameter"
            action = "correct the pattern, for example segmentor.freeze=encoder"
            raise InputError(got, f"names that begin with {parts}", action)
        for name in names:
            # before the learner is built: DDP must not wait for a gradient that never comes
            parameters[name].requires_grad_(False)
    # a step without any gradient would fail in the backward, some minutes later
    if not any(parameter.requires_grad for parameter in parameters.values()):
        got = f"segmentor.freeze={list(patterns)}: all {len(parameters)} parameters are frozen"
        raise InputError(got, "something to train", "freeze less, for example the encoder alone")
    if patterns:
        _keep_statistics(network)


def _matches(name: str, pattern: str) -> bool:
    # by case on every system: names of parameters are no file names
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _keep_statistics(network: nn.Module) -> None:
    """Statistics of a layer that does not learn must not move either, or it would change."""
    for layer in network.modules():
        if isinstance(layer, BatchNorm2d) and not any(p.requires_grad for p in layer.parameters()):
            # the flag alone acts at the next train() or eval(), which is called here so that it
            # acts at once
            layer.frozen = True
            layer.train(layer.training)
