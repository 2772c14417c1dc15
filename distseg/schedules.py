"""What follows from the step alone: the learning rate's factor, and which network is updated."""

from __future__ import annotations

from dataclasses import dataclass

from distseg.config import AlternationConfig, ScheduleConfig


@dataclass(frozen=True)
class Phase:
    """Which networks are updated in one step."""

    segmentor: bool
    discriminator: bool


def phase(step: int, alternation: AlternationConfig) -> Phase:
    """The phase of a step (counted from 0), the same on every rank because it depends on nothing else.

    "simultaneous": both (Hung et al. 2018); "blocks": so many steps of the segmentor, then so many of the
    discriminator, and so on (Luc et al. 2016, "slow alternating scheme"; the paper does not say who begins).
    """
    if alternation.name == "simultaneous":
        return Phase(segmentor=True, discriminator=True)
    in_cycle = step % (alternation.segmentor + alternation.discriminator)
    return Phase(segmentor=in_cycle < alternation.segmentor, discriminator=in_cycle >= alternation.segmentor)


def lr_factor(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """What the base learning rates are multiplied by at a step (counted from 0), in [0, 1].

    poly: (1 - step / num_steps) ** power (Chen et al. 2016); warm-up: times (step + 1) / warmup_steps.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    decay = max(0.0, 1.0 - step / num_steps) ** schedule.power if schedule.name == "poly" else 1.0
    return warmup * decay
