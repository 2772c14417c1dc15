"""`segmentor` and `discriminator`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distseg.config.keys import key
from distseg.config.schema.common import DISCRIMINATORS, SEGMENTORS, SEGMENTORS_TOLD


@dataclass
class SegmentorConfig:
    """The network that predicts a class for every pixel.

    `segmentor=NAME` on the command line sets the name.
    """

    name: str = key(
        "deeplabv3plus_efficientnet_lite0",
        "which network: one that `distseg models` lists, or your own, as path/to/file.py:name or "
        "package.module:name",
        choices=SEGMENTORS,
        told=SEGMENTORS_TOLD,
        own_code=True,
    )
    init: str = key(
        "imagenet",
        "first weights: imagenet, the encoder's published ones, whatever they were trained on; "
        "random; a file of weights; a run directory, of which RUN@last, "
        "RUN@best and RUN@500 name a checkpoint, and RUN the best, or the last where none was "
        "scored or the target's labels chose it (EMA weights where there are); parts for another "
        "number of classes are made anew",
    )
    # off: weights of another network would load a few tensors, and pass for a good start
    init_partial: bool = key(
        False, "accept weights that lack more than a quarter of the tensors, which stay random"
    )
    # patterns of names, as they stand in a checkpoint: no list of parts for every network
    freeze: list[str] = key(
        [],
        "parts that are not trained, by patterns of parameters' names: encoder, or "
        '[encoder.layer1,"*.bias"]; batch normalisation in them keeps its statistics',
    )
    # per rank by default: synchronised waits for all ranks in every layer, forward and backward
    batch_norm: str = key(
        "per_rank",
        "whose statistics normalise in training",
        choices={
            "per_rank": "those of the rank's images",
            "frozen": "the stored ones",
            "synchronised": "those of all ranks' images",
        },
    )
    # may change: values and gradients stay as they are
    activation_checkpointing: str = key(
        "none",
        "what a transformer's blocks compute again in the backward, to save memory",
        choices={
            "none": "nothing: all activations are kept",
            "selective": "all but the results of matrix products and of attention",
            "blocks": "all that is inside a block",
        },
        on_resume=True,
    )
    # free in form, as each network has its own; checked against its constructor when it is built
    options: dict[str, Any] = key({}, "further keyword arguments of the network")


@dataclass
class DiscriminatorConfig:
    """The adversary; `discriminator=NAME` on the command line sets the name.

    Not built in supervised mode.
    """

    name: str = key(
        "two_branch",
        "which network: one that `distseg models` lists, or your own, as path/to/file.py:name or "
        "package.module:name",
        choices=DISCRIMINATORS,
        own_code=True,
    )
    init: str = key(
        "random", "first weights: random; a file of weights; a run directory, as in segmentor.init"
    )
    options: dict[str, Any] = key({}, "further keyword arguments of the network")
