"""Rules of the loss terms and of the adversary's."""

from __future__ import annotations

import math
import re
from typing import Any

from distseg.config.forms import FORMS
from distseg.config.schema import (
    ADAPTATION,
    WITH_DISCRIMINATOR,
    WITH_GROUND_TRUTH,
    WITH_UNLABELLED,
    Config,
)
from distseg.config.world_size import mixes_pairs
from shards.errors import InputError

# of distseg/losses/terms.py, by the names of their metrics
# here too, and not imported: the schema must not wait for torch, which losses need
BUILT_IN_TERMS = (
    *("cross_entropy", "auxiliary", "adversarial", "adversarial_unlabelled", "semi", "consistency"),
    *("segmentor", "discriminator", "discriminator_real", "discriminator_fake"),
    *("feature_matching", "discriminator_mismatched", "entropy", "r1"),
    *("adversarial_auxiliary", "discriminator_auxiliary_real", "discriminator_auxiliary_fake"),
)


def a_loss_to_minimise(config: Config) -> None:
    """The segmentor has a term above 0; that of an adversary will do."""
    # without one there is nothing to differentiate, which torch says at the first backward
    loss, named = config.loss, "loss.ce_weight=0"
    weights = [loss.ce_weight, *(term.weight for term in loss.terms.values())]
    if config.mode == "adversarial":
        weights += [loss.adv_weight, loss.feature_weight]
        named += ", loss.adv_weight=0, loss.feature_weight=0"
    if config.mode in ADAPTATION:
        weights += [loss.adv_weight, config.semi.entropy_weight, config.consistency.weight]
        weights.append(config.adaptation.aux_adv_weight)
        named += ", loss.adv_weight=0, adaptation.aux_adv_weight=0, semi.entropy_weight=0, "
        named += "consistency.weight=0"
    # of the other modes: unlabelled_images_have_a_term, consistency_with_a_teacher
    others = config.mode in WITH_UNLABELLED and config.mode not in ADAPTATION
    if not (others or any(weights)):
        got = f"mode={config.mode} with {named} and no loss.terms"
        raise InputError(got, "a loss", "write loss.ce_weight=1, or for example loss.terms.dice=1")


def class_weights_of_a_kind(config: Config) -> None:
    """loss.class_weights is a word, or a number for every class."""
    weights, words = config.loss.class_weights, ("none", "balanced", "median_frequency")
    if isinstance(weights, str) and weights in words:
        return
    # whether it is one for every class is only known with the data
    numbers = weights if isinstance(weights, list) else []
    if not all(_is_weight(number) for number in numbers) or not any(numbers):
        needed = f"one of: {', '.join(words)}; or a number from 0 on for every class, not all 0"
        raise InputError(f"loss.class_weights={weights}", needed, "correct loss.class_weights")


def focal_or_smoothed(config: Config) -> None:
    """The focal loss looks at the true class alone, label smoothing at all."""
    loss = config.loss
    # no paper says what their product would be
    if loss.focal_gamma and loss.label_smoothing:
        got = (
            f"loss.focal_gamma={loss.focal_gamma} with loss.label_smoothing={loss.label_smoothing}"
        )
        raise InputError(got, "one of them", "write loss.label_smoothing=0")


def further_terms_within_bounds(config: Config) -> None:
    """Weights and steps of loss.terms are not negative, and no name is taken twice."""
    for name, term in config.loss.terms.items():
        # a part of names of metrics: a slash would make another family of it
        if not re.fullmatch(r"[\w-]+", str(name)):
            needed = "a name of letters, digits, _ and -"
            raise InputError(f"loss.terms.{name}", needed, "write loss.terms.NAME")
        # both would be logged as loss/NAME, one over the other
        if name in BUILT_IN_TERMS:
            action = "give it another name, and name what it is in use"
            raise InputError(f"loss.terms.{name}", "a name that no built-in term has", action)
        # here, as keys inside of a dictionary have no bounds in the schema
        numbers = {"weight": term.weight, "start_step": term.start_step}
        numbers["warmup_steps"] = term.warmup_steps
        for field, value in numbers.items():
            if not _is_weight(value):
                where = f"loss.terms.{name}.{field}"
                raise InputError(f"{where}={value}", "a number from 0 on", f"correct {where}")


def _is_weight(value: Any) -> bool:
    # True is an int to Python
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


def scores_of_a_form(config: Config) -> None:
    """What is meant for the scores of one form of the adversary's losses stands with no other."""
    loss = config.loss
    if config.mode not in WITH_DISCRIMINATOR:
        return
    form = FORMS[loss.adv_form]
    if loss.real_target != 1 and not form.has_target:
        got = f"loss.real_target={loss.real_target} with loss.adv_form={loss.adv_form}, which has "
        got += "no target"
        raise InputError(got, "loss.real_target=1", "remove it, or write another loss.adv_form")
    if config.mode == "semi_supervised" and config.semi.weight and not form.has_probability:
        got = f"semi.weight={config.semi.weight} with loss.adv_form={loss.adv_form}"
        needed = "scores that are probabilities, for the mask of semi.threshold"
        raise InputError(got, needed, "write semi.weight=0, or loss.adv_form=non_saturating")


def penalty_of_second_order(config: Config) -> None:
    """The R1 penalty is trained through a gradient, which not every way of computing allows."""
    if config.mode not in WITH_GROUND_TRUTH or not config.loss.r1_weight:
        return
    got, strategy = f"loss.r1_weight={config.loss.r1_weight} with ", config.parallel.strategy
    if strategy != "ddp":
        needed = "parallel.strategy=ddp: the others gather parameters, and reduce gradients, by "
        needed += "hooks of one backward, and R1 is a backward through a backward"
        action = "write parallel.strategy=ddp, or loss.r1_weight=0"
        raise InputError(f"{got}parallel.strategy={strategy}", needed, action)
    if config.compile:
        needed = "compile=false: compiled networks have no second derivative"
        raise InputError(f"{got}compile=true", needed, "write compile=false, or loss.r1_weight=0")
    if config.precision == "fp16":
        needed = "another precision: fp16 has no room for gradients at a label map's pixels"
        raise InputError(f"{got}precision=fp16", needed, "write precision=bf16 or fp32")


def pairs_that_do_not_match(config: Config) -> None:
    """loss.mismatched_weight is of neighbours that have no part of each other."""
    strong, weight = config.strong, config.loss.mismatched_weight
    if config.mode not in WITH_GROUND_TRUTH or not (weight and strong.labelled):
        return
    # the pairs are the same ones: where a piece lies over one of two neighbours alone, the image of
    # the one and the label of the other are of the same pixels, a true pair that is called fake
    if mixes_pairs(strong.mix, strong.mix_probability):
        got = f"loss.mismatched_weight={weight} with strong.labelled=true and "
        got += f"strong.mix={strong.mix}, which lays a piece of one neighbour over the other"
        needed = "neighbours of which neither shows the other"
        action = "write strong.mix=cutout or none, strong.labelled=false, or "
        raise InputError(got, needed, f"{action}loss.mismatched_weight=0")


RULES = (
    a_loss_to_minimise,
    class_weights_of_a_kind,
    focal_or_smoothed,
    further_terms_within_bounds,
    scores_of_a_form,
    penalty_of_second_order,
    pairs_that_do_not_match,
)
