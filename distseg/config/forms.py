"""What is known of each `loss.adv_form` without its formulas, which distseg/losses/adversarial.py
has: those need torch, and checks of a configuration, `--help` and reports must not wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FormFacts:
    """Of one form of the adversary's losses.

    meaning: for people. Where every score is 0, between real and fake: undecided, the
    discriminator's loss on either kind of label map, and undecided_segmentor, the segmentor's; and
    level, what to call that in a figure. unit: of both losses. has_target: whether real label maps
    may have a target below 1. has_probability: whether a score says with which probability a label
    map is real.
    """

    meaning: str
    undecided: float
    undecided_segmentor: float
    level: str = "undecided"
    unit: str = "loss"
    has_target: bool = True
    has_probability: bool = True


_BCE = "undecided (ln 2)"
_LN_2 = math.log(2)  # the binary cross entropy of a probability of 1/2
FORMS = {
    "non_saturating": FormFacts(
        "BCE; the segmentor's is BCE(D(fake), real)", _LN_2, _LN_2, _BCE, "loss, nats"
    ),
    "saturating": FormFacts(
        "BCE; the segmentor's is - BCE(D(fake), fake)", _LN_2, -_LN_2, _BCE, "loss, nats"
    ),
    "hinge": FormFacts(
        "max(0, 1 - s) of real, max(0, 1 + s) of fake; the segmentor's is - s",
        undecided=1.0,
        undecided_segmentor=0.0,
        has_target=False,
        # the best discriminator's score is -1 or 1, on whichever side of 1/2 the probability is
        has_probability=False,
    ),
    "least_squares": FormFacts(
        "(D - 1)^2 of real, D^2 of fake; the segmentor's is (D - 1)^2",
        undecided=0.25,
        undecided_segmentor=0.25,
    ),
}
DEFAULT = "non_saturating"
