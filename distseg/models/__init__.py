"""Networks in plain PyTorch, chosen by name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from distseg.models.batch_norm import BatchNorm2d, set_batch_norm
from distseg.models.deeplab import DeepLabV3Plus
from distseg.models.discriminators import FullyConvolutional, TwoBranch
from distseg.models.efficientnet import imagenet_weights_file
from distseg.models.fcn import FCN8s
from distseg.models.vgg import imagenet_weights_file as vgg_weights_file
from distseg.models.weights import LoadReport, load_into, read_weights
from shards.errors import InputError

__all__ = ["BatchNorm2d", "LoadReport", "build_discriminator", "build_segmentor", "set_batch_norm"]

SEGMENTORS: dict[str, type[nn.Module]] = {
    "deeplabv3plus_efficientnet_lite0": DeepLabV3Plus,
    "fcn8s_vgg16": FCN8s,
}
DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "two_branch": TwoBranch,
    "fully_convolutional": FullyConvolutional,
}
IMAGENET: dict[type[nn.Module], Callable] = {
    DeepLabV3Plus: imagenet_weights_file,
    FCN8s: vgg_weights_file,
}

log = logging.getLogger(__name__)


def build_segmentor(name: str, num_classes: int, *, init: str = "imagenet", **options: Any) -> nn.Module:
    """A segmentor: image (N, 3, H, W) float in [0, 1], RGB -> logits (N, C, H/s, W/s), s its output_stride.

    init: "imagenet" (the encoder's published weights), "random", or a .safetensors or .pth file of the
    encoder's weights. What was loaded is logged and kept as `init_report` (None for random).
    Raises InputError for an unknown name or option, a bad value, and weights that are absent or do not fit.
    """
    network = SEGMENTORS[_known("segmentor", name, SEGMENTORS)]
    _check_options("segmentor", name, network, options)
    # the file first: building a network only to find no weights would waste the user's time
    path = None if init == "random" else IMAGENET[network]() if init == "imagenet" else init
    state = None if path is None else read_weights(path)
    segmentor = network(_checked(num_classes), **options)
    segmentor.init_report = None
    if state is not None:
        report = load_into(segmentor.encoder, state, str(path))
        log.info("%s", report)
        segmentor.init_report = report
    return segmentor


def build_discriminator(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A discriminator: image and label maps (N, C, h, w) float -> a tuple of logits, > 0 = real, one per map.

    Raises InputError for an unknown name or option, and for a bad value.
    """
    network = DISCRIMINATORS[_known("discriminator", name, DISCRIMINATORS)]
    _check_options("discriminator", name, network, options)
    return network(_checked(num_classes), **options)


def _known(kind: str, name: str, choices: dict[str, type[nn.Module]]) -> str:
    if name not in choices:
        raise InputError(f"{kind}={name}", f"one of: {', '.join(choices)}", f"correct {kind}.name")
    return name


def _check_options(kind: str, name: str, network: type[nn.Module], options: dict[str, Any]) -> None:
    accepted = [key for key in inspect.signature(network).parameters if key != "num_classes"]
    for key in options:
        if key not in accepted:
            got = f"{kind}.options.{key}, which {name} does not have"
            raise InputError(got, f"among: {', '.join(accepted)}", f"remove {kind}.options.{key}")


def _checked(num_classes: int) -> int:
    if not 1 <= num_classes <= 255:
        raise InputError(f"num_classes={num_classes}", "1 to 255", "check the classes of the shards")
    return num_classes
