"""Encoders that any head can stand on, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distseg.models.encoders import convnext, dinov3, mit, vit
from distseg.models.encoders.dinov3 import DINOv3
from distseg.models.encoders.vit import DINOv2
from distseg.models.levels import Encoder


@dataclass(frozen=True)
class Entry:
    """An encoder of one size.

    make: its class; size: the arguments that make it this size, which are no options of the user's;
    weights_file: where its published weights lie, called for segmentor.init=imagenet alone; raises
    InputError where they are not there. head_options: by a head's name, what it was published with
    on this encoder, where that is not its default.
    """

    make: Callable[..., Encoder]
    size: Mapping[str, Any] = field(default_factory=dict)
    weights_file: Callable[[], Path] | None = None
    head_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def options(self) -> dict[str, inspect.Parameter]:
        """The options left to the user, by name."""
        parameters = inspect.signature(self.make).parameters
        return {name: value for name, value in parameters.items() if name not in self.size}


ENCODERS: dict[str, Entry] = {
    **{
        name: Entry(DINOv2, {"size": size}, partial(vit.weights_file, name))
        for name, size in vit.SIZES.items()
    },
    **{
        name: Entry(DINOv3, {"size": size}, partial(dinov3.weights_file, name))
        for name, size in dinov3.SIZES.items()
    },
    **{
        name: Entry(
            mit.MixTransformer,
            {"size": size},
            partial(mit.weights_file, name),
            {"segformer": {"channels": mit.HEAD_CHANNELS[name]}},
        )
        for name, size in mit.SIZES.items()
    },
    **{
        name: Entry(convnext.ConvNeXt, {"size": size}, partial(convnext.weights_file, size))
        for name, size in convnext.SIZES.items()
    },
}
