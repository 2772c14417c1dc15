"""What follows from the step alone.

The learning rate's factor, which network is updated, and the terms' weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from distseg.config.schema import (
    WITH_DISCRIMINATOR,
    WITH_GROUND_TRUTH,
    WITH_UNLABELLED,
    Config,
    ScheduleConfig,
)
from distseg.evaluate.judged import judges_auxiliary


@dataclass(frozen=True)
class Phase:
    """Which networks are updated in one step, and the weights of the segmentor's terms by name.

    adversary: whether the discriminator judges at all; else the step is a plain supervised one.
    watched: whether the step is logged, so that signals are measured which no loss needs. r1: the
    factor of the discriminator's squared gradient; 0: it is not computed. taught: whether
    unlabelled images are seen in strong views that a teacher has labelled, by either network.
    """

    segmentor: bool
    discriminator: bool
    adversary: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    watched: bool = False
    r1: float = 0.0
    taught: bool = False


def phase(step: int, config: Config) -> Phase:
    """The phase of a step (counted from 0).

    The same on every rank because it depends on nothing else. "simultaneous": both (Hung et al.
    2018); "blocks": so many steps of the segmentor, then so many of the discriminator, and so on
    (Luc et al. 2016, "slow alternating scheme"; the paper does not say who begins).
    """
    # Called at the same step on every rank, and several times: it reads neither state nor data, so
    # no rank can be in another phase, and a resumed run is in the right one.
    own = _own_weights(step, config)
    # in blocks of the discriminator too: it is to judge what the segmentor's own blocks show it
    return replace(_turn(step, config, own), taught=own.get("consistency", 0) > 0)


def _turn(step: int, config: Config, own: Mapping[str, float]) -> Phase:
    """Whose step it is; own: the weights of the terms that need no adversary."""
    alternation = config.alternation
    since_start = step - config.loss.adv_start_step
    # before adv_start_step the discriminator is not even run: a warm-up costs what supervised
    # training does
    if config.mode not in WITH_DISCRIMINATOR or since_start < 0:
        return Phase(segmentor=True, discriminator=False, weights=own)
    # counted from adv_start_step, or a late start would fall into the middle of a block
    turn = since_start % (alternation.segmentor + alternation.discriminator)
    # no weights: nothing of the segmentor's loss is computed while it stands still
    if alternation.name == "blocks" and turn >= alternation.segmentor:
        earlier = since_start // (alternation.segmentor + alternation.discriminator)
        num_updates = earlier * alternation.discriminator + turn - alternation.segmentor
        r1 = _r1_factor(num_updates, config)
        return Phase(segmentor=False, discriminator=True, adversary=True, r1=r1)
    both, brought = alternation.name == "simultaneous", _adversarial_weights(step, config)
    further = any(term.weight for term in config.loss.terms.values())  # which may ask it
    if not (both or further or any(brought.values())):  # nobody would look at what it says
        return Phase(segmentor=True, discriminator=False, weights=own)
    r1 = _r1_factor(since_start, config) if both else 0.0
    return Phase(
        segmentor=True, discriminator=both, adversary=True, weights={**own, **brought}, r1=r1
    )


def _r1_factor(num_updates: int, config: Config) -> float:
    """Of the squared gradient, in the discriminator's update after so many."""
    loss = config.loss
    # by its updates and not by steps: under `blocks` no multiple of r1_every need be its turn
    is_due = config.mode in WITH_GROUND_TRUTH and num_updates % loss.r1_every == 0
    return loss.r1_weight / 2 * loss.r1_every if is_due else 0.0


def _own_weights(step: int, config: Config) -> dict[str, float]:
    """Of the terms that need no adversary, and of the user's, which may."""
    loss, taught, semi = config.loss, config.consistency, config.semi
    weights = {"cross_entropy": loss.ce_weight, "auxiliary": loss.aux_weight}
    for name, term in loss.terms.items():
        weights[name] = term.weight * _rise(step - term.start_step, term.warmup_steps)
    if config.mode in WITH_UNLABELLED and semi.entropy_weight:
        rise = _rise(step - semi.entropy_start_step, semi.entropy_warmup_steps)
        weights["entropy"] = semi.entropy_weight * rise
    if config.mode in WITH_UNLABELLED and taught.weight:
        rise = _rise(step - taught.start_step, taught.warmup_steps)
        weights["consistency"] = taught.weight * rise
    return weights


def _adversarial_weights(step: int, config: Config) -> dict[str, float]:
    """Of the terms that the adversary brings."""
    loss, semi = config.loss, config.semi
    # one rise for all of its terms, which are one discriminator's
    rise = _rise(step - loss.adv_start_step, loss.adv_warmup_steps)
    weights = {"adversarial": loss.adv_weight * rise}
    if judges_auxiliary(config):
        weights["adversarial_auxiliary"] = config.adaptation.aux_adv_weight * rise
    if loss.feature_weight:
        weights["feature_matching"] = loss.feature_weight * rise
    if config.mode == "semi_supervised":
        started = step >= semi.adv_start_step
        # a start of its own: Hung et al. 2018 use the confidence mask once the discriminator has
        # learnt
        weights["adversarial_unlabelled"] = semi.adv_weight * rise if started else 0.0
        weights["semi"] = semi.weight if step >= semi.start_step else 0.0
    return weights


def _rise(since_start: int, warmup_steps: int) -> float:
    """The share of a weight, `since_start` steps after its first: 0 before, then linearly to 1."""
    if since_start < 0:
        return 0.0
    # + 1, so that the first step of a warm-up is not a step without the term
    return min(1.0, (since_start + 1) / warmup_steps) if warmup_steps else 1.0


def lr_factor(step: int, num_steps: int, schedule: ScheduleConfig, plateaus: int = 0) -> float:
    """What the base learning rates are multiplied by at a step (counted from 0), in [0, 1].

    poly: (1 - step / num_steps) ** power (Chen et al. 2016); plateau: plateau_factor for each time
    that the validation losses so far did not improve (`plateaus`, see num_plateaus); warm-up: times
    (step + 1) / warmup_steps.
    """
    factor = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.name == "poly":
        # of num_steps, so a run that is extended goes on as one of so many steps from the start
        # would
        factor *= max(0.0, 1.0 - step / num_steps) ** schedule.power
    if schedule.name == "plateau":
        # a pure function of the losses so far: no scheduler object that a checkpoint would have to
        # hold beside them
        factor *= schedule.plateau_factor**plateaus
    return factor


def num_plateaus(val_losses: Sequence[float], patience: int) -> int:
    """How often `patience` evaluations in a row, counted anew after each time, brought no loss
    below the best.
    """
    best, waited, plateaus = math.inf, 0, 0
    for loss in val_losses:
        waited = 0 if loss < best else waited + 1
        best = min(best, loss) if loss == loss else best  # NaN is no improvement
        if waited == patience:
            plateaus, waited = plateaus + 1, 0
    return plateaus


def stops_early(val_losses: Sequence[float], schedule: ScheduleConfig) -> bool:
    """Whether the last `early_stop_patience` evaluations all brought no loss below the best before
    them.
    """
    patience = schedule.early_stop_patience
    return patience > 0 and len(val_losses) > patience and _since_best(val_losses) >= patience


def _since_best(val_losses: Sequence[float]) -> int:
    # NaN compares false with everything, itself included: `min` of a list with one depends on the
    # order
    finite = [loss for loss in val_losses if loss == loss]
    return len(val_losses) - 1 - list(val_losses).index(min(finite)) if finite else len(val_losses)
