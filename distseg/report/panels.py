"""The curves of a report, on the page and in W&B alike.

Which metrics stand in one panel, and what to compare with.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from distseg.tracking.verdicts import NAMED, RATIO


@dataclass(frozen=True)
class Panel:
    """One set of axes: metrics as (name in metrics.jsonl, name for people), drawn solid, dashed and
    dotted in turn.
    """

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    reference: tuple[float, str] | None = None  # a level worth knowing, and what it is
    is_log: bool = False
    is_share: bool = False  # from 0 to 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_UNDECIDED = (math.log(2), "undecided (ln 2)")

PANELS = (
    # the three panels of the published figures come first
    Panel(
        "Discriminator on real label maps",
        "loss, nats",
        (("loss/discriminator_real", "real"),),
        _UNDECIDED,
    ),
    Panel(
        "Discriminator on predictions",
        "loss, nats",
        (("loss/discriminator_fake", "fake"),),
        _UNDECIDED,
    ),
    Panel(
        "Segmentor",
        "loss, nats",
        (("loss/segmentor", "total"), ("loss/cross_entropy", "cross entropy")),
    ),
    Panel(
        "Adversarial term, unweighted",
        "loss, nats",
        (("loss/adversarial", "labelled"), ("loss/adversarial_unlabelled", "unlabelled")),
        _UNDECIDED,
    ),
    Panel(
        "What the discriminator believes",
        "probability of being real",
        (("discriminator/on_real", "ground truth"), ("discriminator/on_fake", "predictions")),
        (0.5, "undecided"),
        is_share=True,
    ),
    Panel(
        "Discriminator's accuracy",
        "share",
        (("discriminator/accuracy", "right"),),
        (0.5, "chance"),
        is_share=True,
    ),
    Panel(
        "Gap between its logits on real and fake",
        "logits",
        (("discriminator/logit_gap", "gap"),),
        (0.0, "blind"),
    ),
    Panel(
        "Gradient ratio",
        "adversarial over cross entropy, at the output",
        ((RATIO, "ratio"),),
        (NAMED["no_influence"].raise_at, "no influence below"),
        is_log=True,
    ),
    Panel("Semi-supervised term, unweighted", "loss, nats", (("loss/semi", "semi"),)),
    Panel(
        "Unlabelled pixels that are believed",
        "share",
        (("semi/mask_share", "share"),),
        is_share=True,
    ),
    Panel(
        "Validation",
        "score",
        (("val/mean_iou", "mean IoU"), ("val/pixel_accuracy", "pixel accuracy")),
        is_share=True,
    ),
    Panel("Validation loss", "nats", (("val/loss", "loss"),)),
    Panel(
        "Gradient norms",
        "before clipping",
        (("grad_norm/segmentor", "segmentor"), ("grad_norm/discriminator", "discriminator")),
        is_log=True,
    ),
    Panel(
        "Learning rates",
        "rate",
        (("lr/segmentor", "segmentor"), ("lr/discriminator", "discriminator")),
        is_log=True,
    ),
    Panel(
        "Weights of the terms",
        "weight",
        (
            ("weight/adversarial", "adversarial"),
            ("weight/adversarial_unlabelled", "on unlabelled"),
            ("weight/semi", "semi"),
        ),
    ),
    Panel(
        "Loss scale",
        "factor",
        (("loss_scale/segmentor", "segmentor"), ("loss_scale/discriminator", "discriminator")),
        is_log=True,
    ),
    Panel(
        "Skipped updates so far",
        "updates",
        (("skips/segmentor", "segmentor"), ("skips/discriminator", "discriminator")),
    ),
    Panel("Speed", "images per second", (("images_per_second", "speed"),)),
    Panel(
        "Arithmetic done, of what a convolution does on this device",
        "share",
        (("peak_share", "share of peak"),),
    ),
    Panel(
        "Time of a step",
        "seconds",
        (("step_seconds", "step"), ("data_wait_seconds", "waiting for data")),
    ),
    Panel(
        "Slowest rank over the median rank",
        "ratio",
        (("ranks/slowest_ratio", "ratio"),),
        (1.0, "equal"),
    ),
    Panel("Memory, the largest rank's peak", "bytes", (("memory_bytes", "memory"),)),
)
