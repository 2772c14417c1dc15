"""What follows from the step alone.

The learning rate's factor, which network is updated, and the terms' weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distseg.config.schema import Config, ScheduleConfig


@dataclass(frozen=True)
class Phase:
    """Which networks are updated in one step, and the weights of the terms that the adversary
    brings.

    watched: whether the step is logged, so that signals are measured which no loss needs.
    """

    segmentor: bool
    discriminator: bool
    adv_weight: float = 0.0  # on labelled images
    semi_adv_weight: float = 0.0  # on unlabelled images
    semi_weight: float = 0.0  # of the masked cross entropy on unlabelled images
    watched: bool = False

    @property
    def is_supervised(self) -> bool:
        """Whether nothing but the labelled images' cross entropy matters."""
        return not (self.discriminator or self.adv_weight or self.has_unlabelled_terms)

    @property
    def has_unlabelled_terms(self) -> bool:
        """Whether unlabelled images change the segmentor's loss."""
        return bool(self.semi_adv_weight or self.semi_weight)


def phase(step: int, config: Config) -> Phase:
    """The phase of a step (counted from 0), the same on every rank because it depends on nothing
    else.

    "simultaneous": both (Hung et al. 2018); "blocks": so many steps of the segmentor, then so many
    of the discriminator, and so on (Luc et al. 2016, "slow alternating scheme"; the paper does not
    say who begins).
    """
    loss, semi, alternation = config.loss, config.semi, config.alternation
    since_start = step - loss.adv_start_step
    if config.mode == "supervised" or since_start < 0:
        return Phase(segmentor=True, discriminator=False)
    turn = since_start % (alternation.segmentor + alternation.discriminator)
    if alternation.name == "blocks" and turn >= alternation.segmentor:
        return Phase(segmentor=False, discriminator=True)
    rise = min(1.0, (since_start + 1) / loss.adv_warmup_steps) if loss.adv_warmup_steps else 1.0
    unlabelled = config.mode == "semi_supervised"
    return Phase(
        segmentor=True,
        discriminator=alternation.name == "simultaneous",
        adv_weight=loss.adv_weight * rise,
        semi_adv_weight=semi.adv_weight * rise
        if unlabelled and step >= semi.adv_start_step
        else 0.0,
        semi_weight=semi.weight if unlabelled and step >= semi.start_step else 0.0,
    )


def lr_factor(
    step: int, num_steps: int, schedule: ScheduleConfig, val_losses: Sequence[float] = ()
) -> float:
    """What the base learning rates are multiplied by at a step (counted from 0), in [0, 1].

    poly: (1 - step / num_steps) ** power (Chen et al. 2016); plateau: plateau_factor for each time
    that the validation losses so far (`val_losses`, in order) did not improve; warm-up: times (step
    + 1) / warmup_steps.
    """
    factor = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.name == "poly":
        factor *= max(0.0, 1.0 - step / num_steps) ** schedule.power
    if schedule.name == "plateau":
        factor *= schedule.plateau_factor ** num_plateaus(val_losses, schedule.plateau_patience)
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
    finite = [loss for loss in val_losses if loss == loss]
    return len(val_losses) - 1 - list(val_losses).index(min(finite)) if finite else len(val_losses)
