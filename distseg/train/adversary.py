"""The adversary's further ways to help: what they need of a run, and what they make of a step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from distseg.config.schema import ADAPTATION, WITH_GROUND_TRUTH, WITH_UNLABELLED, Config
from distseg.distributed.ranks import all_reduce_sum
from distseg.losses.adversarial import squared_gradient_sum
from distseg.losses.predicted import FeatureMeans
from distseg.models.own_discriminator import OwnDiscriminator
from distseg.models.trial import random_images, random_label_maps, undisturbed
from shards import user_code
from shards.errors import InputError


def _check_second_order(network: OwnDiscriminator, name: str) -> None:
    """Raise InputError unless the R1 penalty can be differentiated."""
    side = max(32, network.min_size_px)
    label_map = random_label_maps(2, network.num_classes, side).requires_grad_()
    # in training mode, as the penalty is computed there
    copied = copy.deepcopy(network).train()
    trained = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    try:
        with undisturbed(), torch.enable_grad():
            (scores,) = copied(random_images(2, side, side), label_map)
            penalty = squared_gradient_sum(scores, label_map)
            found = torch.autograd.grad(penalty, trained, allow_unused=True)
        reason = "no gradient of the penalty reaches a parameter"
    except RuntimeError as error:  # of an operation that has no second derivative
        found, reason = (), str(error).splitlines()[0]
    # an operation that is differentiable once may just as well cut the graph, without an error
    if all(gradient is None for gradient in found):
        needed = "a discriminator that can be differentiated twice"
        action = "write loss.r1_weight=0, or use other operations"
        raise InputError(f"loss.r1_weight with discriminator={name}: {reason}", needed, action)


def check_discriminator(config: Config, network: nn.Module) -> None:
    """Raise InputError for a discriminator that cannot do what `loss` asks of it."""
    loss, name = config.loss, user_code.short(config.discriminator.name)
    if config.mode in ADAPTATION and getattr(network, "sees_image", False):
        got = f"mode={config.mode} with discriminator={name}"
        needed = "a discriminator that looks at predictions alone: images say which domain it is"
        raise InputError(got, needed, "write discriminator=fully_convolutional")
    if config.mode not in WITH_GROUND_TRUTH:
        return
    if loss.feature_weight and not getattr(network, "has_features", False):
        got = f"loss.feature_weight={loss.feature_weight} with discriminator={name}"
        needed = "a discriminator whose forward takes features=False (docs/own_code.md)"
        raise InputError(got, needed, "give it that option, or write loss.feature_weight=0")
    if loss.mismatched_weight and not getattr(network, "sees_image", False):
        got = f"loss.mismatched_weight={loss.mismatched_weight} with discriminator={name}"
        needed = "a discriminator that sees the image: to others such a pair is real"
        action = "write discriminator=image_conditioned or two_branch (of the field-of-view "
        action += "networks discriminator.options.inputs=product), or loss.mismatched_weight=0"
        raise InputError(got, needed, action)
    if loss.r1_weight and isinstance(network, OwnDiscriminator):  # those of the package can
        _check_second_order(network, name)


def image_tells(config: Config, network: nn.Module | None) -> str | None:
    """A warning where a discriminator that sees the image can tell predictions for unlabelled ones
    from ground truth by the image alone: the one is in strong views and the other is not.
    """
    strong, labelled = config.strong, config.strong.labelled
    changes = [strong.jitter_probability, strong.gray_probability, strong.blur_probability]
    changes.append(0.0 if strong.mix == "none" else strong.mix_probability)
    unlabelled = config.consistency.weight > 0
    seen = config.mode in WITH_GROUND_TRUTH and getattr(network, "sees_image", False)
    # without unlabelled images all it gets is in the same views
    if config.mode not in WITH_UNLABELLED or not seen or labelled == unlabelled or not any(changes):
        return None
    which = "unlabelled" if unlabelled else "labelled"
    text = f"the discriminator sees images, of which only the {which} are in strong views: it can "
    text += "tell predictions from ground truth by colours and seams, and not by the label map. "
    also = "strong.labelled=true shows" if unlabelled else "strong.labelled=false leaves"
    return f"{text}{also} both alike; discriminator=fully_convolutional sees label maps alone"


def check_auxiliary(config: Config, segmentor: nn.Module) -> None:
    """Raise InputError for a segmentor without the auxiliary output that is to be judged."""
    if getattr(segmentor, "has_auxiliary", False):
        return
    got = f"adaptation.aux_adv_weight={config.adaptation.aux_adv_weight} with "
    got += f"segmentor={user_code.short(config.segmentor.name)}, which has no auxiliary output"
    action = "write segmentor.options.auxiliary=true, which DeepLabs and HEAD_ENCODER have, answer "
    action += 'with "aux" too (one of your own), or leave adaptation.aux_adv_weight out'
    raise InputError(got, "an auxiliary output in training", action)


@torch.no_grad()
def feature_means(real: Tensor, fake: Tensor) -> FeatureMeans:
    """Over all ranks' images of a micro-batch; called on every rank.

    real, fake: the discriminator's features (n, K) of this rank's label maps.
    """
    # float64, and the numbers of images with them: one message for all
    sums = [part.double().sum(0) for part in (real, fake)]
    # filled on the device: numbers that are sent there are waited for
    counts = [part.new_full((1,), len(part), dtype=torch.float64) for part in (real, fake)]
    total = all_reduce_sum(torch.cat([*sums, *counts]))
    width = real.shape[1]
    # each by its own number: there may be more unlabelled images than labelled ones
    of_real, of_fake = total[:width] / total[-2], total[width : 2 * width] / total[-1]
    return FeatureMeans(of_real.to(real.dtype), of_fake.to(fake.dtype))
