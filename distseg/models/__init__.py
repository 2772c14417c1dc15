"""Networks in plain PyTorch, chosen by name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from distseg.models import own_discriminator, own_segmentor
from distseg.models.batch_norm import BatchNorm2d, set_batch_norm
from distseg.models.composed import COMPOSITIONS, Composed
from distseg.models.deeplab import (
    DeepLabV2ResNet101,
    DeepLabV3Lite0,
    DeepLabV3Lite1,
    DeepLabV3Lite2,
    DeepLabV3PlusLite0,
    DeepLabV3PlusLite1,
    DeepLabV3PlusLite2,
    DeepLabV3PlusResNet50,
    DeepLabV3PlusResNet101,
    DeepLabV3ResNet50,
    DeepLabV3ResNet101,
)
from distseg.models.dilated import Dilated8
from distseg.models.discriminators import (
    FullyConvolutional,
    ImageConditioned,
    LargeFOV,
    LargeFOVLight,
    OfBothOutputs,
    SmallFOV,
    SmallFOVLight,
    TwoBranch,
    of_output,
)
from distseg.models.efficientnet import imagenet_weights_file as lite_weights_file
from distseg.models.encoders import ENCODERS
from distseg.models.fcn import FCN8s, FCN8sAtOnce, FCN16s, FCN32s
from distseg.models.heads import HEADS
from distseg.models.multiscale import MultiScale
from distseg.models.resnet import imagenet_weights_file as resnet_weights_file
from distseg.models.trial import StepImages
from distseg.models.vgg import imagenet_weights_file as vgg_weights_file
from distseg.models.weights import (
    LoadReport,
    Weights,
    load_discriminator,
    load_own,
    load_segmentor,
    read_weights,
)
from shards.errors import InputError
from shards.user_code import FORMS, is_reference
from shards.words import nearest

__all__ = [
    "COMPOSITIONS",
    "ENCODERS",
    "HEADS",
    "BatchNorm2d",
    "LoadReport",
    "OfBothOutputs",
    "Weights",
    "build_discriminator",
    "build_segmentor",
    "check_step",
    "check_training",
    "of_output",
    "set_batch_norm",
]

Segmentor = (
    DeepLabV2ResNet101
    | DeepLabV3ResNet50
    | DeepLabV3ResNet101
    | DeepLabV3Lite0
    | DeepLabV3Lite1
    | DeepLabV3Lite2
    | DeepLabV3PlusResNet50
    | DeepLabV3PlusResNet101
    | DeepLabV3PlusLite0
    | DeepLabV3PlusLite1
    | DeepLabV3PlusLite2
    | FCN32s
    | FCN16s
    | FCN8s
    | Dilated8
    | MultiScale
    | Composed
    | own_segmentor.OwnSegmentor
)

# a dict in sight of its use and no registry: whoever looks for a name finds its class by a search
SEGMENTORS: dict[str, Callable[..., Segmentor]] = {
    "deeplabv2_resnet101": DeepLabV2ResNet101,
    "deeplabv3_resnet50": DeepLabV3ResNet50,
    "deeplabv3_resnet101": DeepLabV3ResNet101,
    "deeplabv3_efficientnet_lite0": DeepLabV3Lite0,
    "deeplabv3_efficientnet_lite1": DeepLabV3Lite1,
    "deeplabv3_efficientnet_lite2": DeepLabV3Lite2,
    "deeplabv3plus_resnet50": DeepLabV3PlusResNet50,
    "deeplabv3plus_resnet101": DeepLabV3PlusResNet101,
    "deeplabv3plus_efficientnet_lite0": DeepLabV3PlusLite0,
    "deeplabv3plus_efficientnet_lite1": DeepLabV3PlusLite1,
    "deeplabv3plus_efficientnet_lite2": DeepLabV3PlusLite2,
    "fcn32s_vgg16": FCN32s,
    "fcn16s_vgg16": FCN16s,
    "fcn8s_vgg16": FCN8s,
    "fcn8s_atonce_vgg16": FCN8sAtOnce,
    "dilated8_vgg16": Dilated8,
    "multiscale": MultiScale,
    **COMPOSITIONS,
}
DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "two_branch": TwoBranch,
    "fully_convolutional": FullyConvolutional,
    "large_fov": LargeFOV,
    "large_fov_light": LargeFOVLight,
    "small_fov": SmallFOV,
    "small_fov_light": SmallFOVLight,
    "image_conditioned": ImageConditioned,
}
# where the encoder's published weights lie
# called only for init=imagenet: looking for a file must not fail those who need none
IMAGENET: dict[str, Callable[[], Path]] = {
    "deeplabv2_resnet101": partial(resnet_weights_file, 101),
    "deeplabv3_resnet50": partial(resnet_weights_file, 50),
    "deeplabv3_resnet101": partial(resnet_weights_file, 101),
    "deeplabv3_efficientnet_lite0": partial(lite_weights_file, 0),
    "deeplabv3_efficientnet_lite1": partial(lite_weights_file, 1),
    "deeplabv3_efficientnet_lite2": partial(lite_weights_file, 2),
    "deeplabv3plus_resnet50": partial(resnet_weights_file, 50),
    "deeplabv3plus_resnet101": partial(resnet_weights_file, 101),
    "deeplabv3plus_efficientnet_lite0": partial(lite_weights_file, 0),
    "deeplabv3plus_efficientnet_lite1": partial(lite_weights_file, 1),
    "deeplabv3plus_efficientnet_lite2": partial(lite_weights_file, 2),
    "fcn32s_vgg16": vgg_weights_file,
    "fcn16s_vgg16": vgg_weights_file,
    "fcn8s_vgg16": vgg_weights_file,
    "fcn8s_atonce_vgg16": vgg_weights_file,
    "dilated8_vgg16": vgg_weights_file,
    **{name: made.weights_file for name, made in COMPOSITIONS.items() if made.weights_file},
}

log = logging.getLogger(__name__)


def build_segmentor(
    name: str,
    num_classes: int,
    *,
    init: str | Weights = "imagenet",
    init_partial: bool = False,
    **options: Any,
) -> Segmentor:
    """A segmentor: image (N, 3, H, W) float in [0, 1], RGB -> logits (N, C, H/s, W/s), s its
    output_stride.

    name: one of SEGMENTORS, or code of the user's own (see shards.user_code). init: "imagenet" (the
    encoder's published weights), "random", or a .safetensors or .pth file with weights of the
    encoder or of the whole segmentor, or these weights themselves; what they have for another
    number of classes is made anew. init_partial: accept weights that lack more than a quarter of
    the tensors. What was loaded is logged and kept as `init_report` (None for random). Raises
    InputError for an unknown name or option, a bad value, and weights that are absent or do not
    fit.
    """
    if is_reference(name):
        _check_num_classes(num_classes)
        weights = None if init == "random" else _own_weights(name, init)
        # a wrapper, so that nothing else has to ask whose network it is
        own = own_segmentor.own_segmentor(name, num_classes, weights, options)
        _log_report(own)
        return own
    _check("segmentor", name, SEGMENTORS, num_classes, options)
    if init == "random":
        return SEGMENTORS[name](num_classes, **options)
    if init == "imagenet" and name not in IMAGENET:
        action = "write segmentor.init=random, or a file of its weights"
        raise InputError(
            f"segmentor.init=imagenet for {name}", "a network with published weights", action
        )
    # the file first: building a network only to find no weights would waste the user's time
    weights = _weights(IMAGENET[name]() if init == "imagenet" else init)
    segmentor = SEGMENTORS[name](num_classes, **options)
    segmentor.init_report = load_segmentor(segmentor, weights, allow_partial=init_partial)
    _log_report(segmentor)
    return segmentor


def build_discriminator(
    name: str,
    num_classes: int,
    *,
    init: str | Weights = "random",
    output: str = "of_logits",
    label_map_px: int | None = None,
    **options: Any,
) -> nn.Module:
    """A discriminator: image and label maps (k, C, h, w) float -> a tuple of logits, > 0 = real,
    one per map.

    name: one of DISCRIMINATORS, or code of the user's own (see shards.user_code). init: "random", a
    file of a discriminator's weights, or these themselves; its input layer is made anew for another
    number of classes. output: which part of them is taken where they are of both outputs' (see
    of_output). label_map_px: the side of the label maps that one of the user's own is to
    judge; None: any. Raises InputError for an unknown name or option, for a bad value, and for
    weights that are absent or do not fit.
    """
    if is_reference(name):
        _check_num_classes(num_classes)
        own = own_discriminator.own_discriminator(name, num_classes, options, label_map_px)
        if init != "random":
            own.init_report = load_own(own.network, _of_output(init, output), num_classes)
            log.info("%s", own.init_report)
        return own
    _check("discriminator", name, DISCRIMINATORS, num_classes, options)
    weights = None if init == "random" else _of_output(init, output)
    discriminator = DISCRIMINATORS[name](num_classes, **options)
    if weights is not None:
        report = load_discriminator(discriminator, weights)
        discriminator.init_report = report  # type: ignore[assignment]
        log.info("%s", report)
    return discriminator


def _own_weights(name: str, init: str | Weights) -> Weights:
    """Of a network of the user's own, which has none that are published."""
    if init == "imagenet":
        got = f"segmentor.init=imagenet for segmentor={name}"
        action = "write segmentor.init=random: weights are as its constructor makes them"
        raise InputError(got, "random, or a file of its weights", action)
    return _weights(init)


def _weights(init: str | Path | Weights) -> Weights:
    return init if isinstance(init, Weights) else Weights(read_weights(init), str(init))


def _of_output(init: str | Path | Weights, output: str) -> Weights:
    weights = _weights(init)
    return replace(weights, state=of_output(weights.state, output))


def check_training(name: str, network: nn.Module) -> None:
    """Try a network of the user's own in training mode; those of the package are tested.

    Raises InputError for an answer that is none, and for a parameter without a gradient.
    """
    if isinstance(network, own_segmentor.OwnSegmentor):
        own_segmentor.check_training(network, name)
    if isinstance(network, own_discriminator.OwnDiscriminator):
        own_discriminator.check_training(network, name)


def check_step(name: str, network: nn.Module, images: StepImages) -> None:
    """Try a network of the user's own in training mode on what a step gives it.

    Raises InputError for what goes wrong in it.
    """
    if isinstance(network, own_segmentor.OwnSegmentor):
        own_segmentor.check_step(network, name, images)
    if isinstance(network, own_discriminator.OwnDiscriminator):
        own_discriminator.check_step(network, name, images)


def _log_report(segmentor: Segmentor) -> None:
    if segmentor.init_report is not None:
        log.info("%s", segmentor.init_report)


def _check(
    kind: str,
    name: str,
    choices: Mapping[str, Callable],
    num_classes: int,
    options: Mapping[str, Any],
) -> None:
    if name not in choices:
        parts = f"HEAD_ENCODER of the heads {', '.join(HEADS)} and encoders {', '.join(ENCODERS)}; "
        composed = parts if choices is SEGMENTORS else ""
        listed = [known for known in choices if known not in COMPOSITIONS]
        needed = f"one of: {', '.join(listed)}; {composed}or your own, as {FORMS}"
        raise InputError(f"{kind}={name}", needed, nearest(name, choices, 0.5))
    # from the constructor's own signature: an option has no second list that could be forgotten
    accepted = [key for key in inspect.signature(choices[name]).parameters if key != "num_classes"]
    for key in options:
        if key not in accepted:
            got = f"{kind}.options.{key}, which {name} does not have"
            raise InputError(got, f"among: {', '.join(accepted)}", f"remove {kind}.options.{key}")
    _check_num_classes(num_classes)


def _check_num_classes(num_classes: int) -> None:
    # labels are bytes, in which 255 is void
    if not 1 <= num_classes <= 255:
        raise InputError(
            f"num_classes={num_classes}", "1 to 255", "check the classes of the shards"
        )
