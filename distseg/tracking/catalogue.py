"""Every metric once: what it is called, what it measures, where it is drawn and how it is printed.

The progress line, the tables of `distseg summarize`, model cards, curves.png, the report, the W&B
report and the health checks all read this. A metric that the program knows is a row of METRICS; one
whose name ends in a user's word (a loss term, a class) follows from its prefix, by FAMILIES.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

# names that the program itself reads back
SEGMENTOR_LOSS, CROSS_ENTROPY = "loss/segmentor", "loss/cross_entropy"
DISCRIMINATOR_REAL, DISCRIMINATOR_FAKE = "loss/discriminator_real", "loss/discriminator_fake"
DISCRIMINATOR_ACCURACY = "discriminator/accuracy"
# of their norms, at the segmentor's output; see distseg.train.diagnostics
RATIO = "gradient/adversarial_to_cross_entropy"
ADVERSARIAL_WEIGHT, MASK_SHARE = "weight/adversarial", "semi/mask_share"
CONSISTENCY_WEIGHT, CONFIDENT_SHARE = "weight/consistency", "consistency/confident_share"
STEP_SECONDS, DATA_WAIT_SECONDS = "step_seconds", "data_wait_seconds"
SLOWEST_RANK, SLOWEST_RATIO = "ranks/slowest", "ranks/slowest_ratio"
LOSS, VALIDATION, CLASS_IOU, HEALTH = "loss/", "val/", "val/iou/", "health/"
# of classes that validation labels have and no prediction, which alone are there
NEVER_PREDICTED = "val/never_predicted/"
MEAN_IOU, CLASSES_COUNTED = "val/mean_iou", "val/num_classes_counted"

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Panel:
    """One set of axes, over training steps.

    reference: a level worth knowing, and what it is; or check: the health check whose threshold is
    that level. in_picture: also drawn in a run's curves.png.
    """

    title: str
    unit: str
    reference: tuple[float, str] | None = None
    check: str = ""
    is_log: bool = False
    is_share: bool = False  # from 0 to 1
    in_picture: bool = False


@dataclass(frozen=True)
class Metric:
    """name: in metrics.jsonl and evaluation.json. unit: nats, share (in [0, 1]), seconds, bytes,
    count, or another word.

    panel: where its curve is drawn, None: nowhere; label: its name in that panel's legend. better:
    which direction is. short: its name on the progress line, "" where it is not shown there.
    is_score: whether it is a column in tables of evaluations.
    """

    name: str
    title: str
    unit: str
    panel: Panel | None = None
    label: str = ""
    better: Better = ""
    short: str = ""
    is_score: bool = False

    def text(self, value: float | None) -> str:
        """A value for people, with its unit."""
        # a dash, as 0 is a measurement
        if value is None:
            return "–"
        if self.unit == "share":
            return f"{value:.1%}"
        if self.unit == "count":
            return f"{value:,.0f}"
        if self.unit == "bytes":
            return f"{value / 1e9:.2f} GB"
        return f"{value:.2f} s" if self.unit == "seconds" else f"{value:.3f}"

    def best(self, values: Sequence[float | None]) -> float | None:
        """The best of several values; None where none is known or no direction is better."""
        # a NaN would win or lose by its place in the list
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known or not self.better:
            return None
        return max(known) if self.better == "higher" else min(known)


# what a binary cross entropy costs that always answers 1/2; it says so, as loss.adv_form has others
_UNDECIDED = (math.log(2), "undecided, of BCE (ln 2)")
_NATS = "loss, nats"

# two panels: their sum would hide which of the two is learnt
_ON_REAL = Panel("Discriminator on real label maps", _NATS, _UNDECIDED, in_picture=True)
_ON_FAKE = Panel("Discriminator on predictions", _NATS, _UNDECIDED, in_picture=True)
_SEGMENTOR = Panel("Segmentor", _NATS, in_picture=True)
_ADVERSARIAL = Panel("Adversarial term, unweighted", _NATS, _UNDECIDED, in_picture=True)
_CERTAINTY = Panel(
    "Discriminator's certainty", "probability of being real", (0.5, "undecided"), is_share=True
)
_ACCURACY = Panel("Discriminator's accuracy", "share", (0.5, "chance"), is_share=True)
_GAP = Panel("Gap between its logits on real and fake", "logits", (0.0, "blind"))
# its threshold is the health check's, so that picture and verdict cannot disagree
_RATIO = Panel(
    "Gradient ratio",
    "adversarial over cross entropy, at the output",
    check="no_influence",
    is_log=True,
)
_SEMI = Panel("Semi-supervised term, unweighted", _NATS, in_picture=True)
# terms of the user's own, whose unit nobody knows
_OTHER_TERMS = Panel("Other terms, unweighted", "loss", in_picture=True)
_CONSISTENCY = Panel("Consistency term, unweighted", "loss", in_picture=True)
_MASK = Panel("Confidence mask", "share of unlabelled pixels", is_share=True, in_picture=True)
_VALIDATION = Panel("Validation", "score", is_share=True, in_picture=True)
_VALIDATION_LOSS = Panel("Validation loss", "nats")
_GRADIENTS = Panel("Gradient norms", "before clipping", is_log=True)
_RATES = Panel("Learning rates", "rate", is_log=True)
_WEIGHTS = Panel("Weights of the terms", "weight")
_SCALE = Panel("Loss scale", "factor", is_log=True)
_SKIPS = Panel("Skipped updates so far", "updates")
_SPEED = Panel("Speed", "images per second")
_PEAK = Panel("Arithmetic done, of what a convolution does on this device", "share", is_share=True)
_TIME = Panel("Time of a step", "seconds")
_RANKS = Panel("Slowest rank over the median rank", "ratio", (1.0, "equal"))
_EPOCHS = Panel("Times that each data set was gone through", "epochs")
_MEMORY = Panel("Memory, the largest rank's peak", "bytes")

# in the order of the page; the panels of the published figures come first
PANELS = (
    *(_ON_REAL, _ON_FAKE, _SEGMENTOR, _ADVERSARIAL, _CERTAINTY, _ACCURACY, _GAP, _RATIO, _SEMI),
    *(
        _CONSISTENCY,
        _OTHER_TERMS,
        _MASK,
        _VALIDATION,
        _VALIDATION_LOSS,
        _GRADIENTS,
        _RATES,
        _WEIGHTS,
        _SCALE,
    ),
    *(_SKIPS, _SPEED, _PEAK, _TIME, _RANKS, _MEMORY, _EPOCHS),
)


def _score(name: str, title: str, better: Better = "higher", short: str = "") -> Metric:
    # no panel of its own: for the few that training watches, METRICS adds one
    return Metric(name, title, "share", better=better, short=short, is_score=True)


# in the order of the progress line, of tables and of legends
METRICS = (
    Metric(SEGMENTOR_LOSS, "segmentor's loss", "nats", _SEGMENTOR, "total", "lower", "loss"),
    Metric(CROSS_ENTROPY, "cross entropy", "nats", _SEGMENTOR, "cross entropy", "lower", "ce"),
    Metric("loss/adversarial", "adversarial term", "nats", _ADVERSARIAL, "labelled", "", "adv"),
    Metric(
        "loss/adversarial_unlabelled",
        "adversarial term on unlabelled images",
        "nats",
        _ADVERSARIAL,
        "unlabelled",
    ),
    Metric("loss/semi", "semi-supervised term", "nats", _SEMI, "semi-supervised", "", "semi"),
    Metric(MASK_SHARE, "confidence mask", "share", _MASK, "share", "", "mask"),
    Metric(
        "loss/consistency",
        "consistency term",
        "loss",
        _CONSISTENCY,
        "consistency",
        "",
        "consistency",
    ),
    Metric(
        CONFIDENT_SHARE,
        "pixels that the teacher is confident of",
        "share",
        _MASK,
        "teacher confident",
        "",
        "confident",
    ),
    Metric(
        DISCRIMINATOR_REAL,
        "discriminator's loss on real label maps",
        "nats",
        _ON_REAL,
        "real",
        "",
        "D real",
    ),
    Metric(
        DISCRIMINATOR_FAKE,
        "discriminator's loss on predictions",
        "nats",
        _ON_FAKE,
        "fake",
        "",
        "D fake",
    ),
    Metric(
        "discriminator/on_real",
        "discriminator's certainty on ground truth",
        "share",
        _CERTAINTY,
        "ground truth",
    ),
    Metric(
        "discriminator/on_fake",
        "discriminator's certainty on predictions",
        "share",
        _CERTAINTY,
        "predictions",
    ),
    Metric(DISCRIMINATOR_ACCURACY, "discriminator's accuracy", "share", _ACCURACY, "right"),
    Metric("discriminator/logit_gap", "gap of the discriminator's logits", "logits", _GAP, "gap"),
    Metric(RATIO, "gradient ratio", "ratio", _RATIO, "ratio"),
    # what one confusion matrix gives, then what only `distseg evaluate` computes
    replace(_score(MEAN_IOU, "mIoU", short="mIoU"), panel=_VALIDATION, label="mean IoU"),
    replace(
        _score("val/pixel_accuracy", "pixel accuracy", short="pixel accuracy"),
        panel=_VALIDATION,
        label="pixel accuracy",
    ),
    _score("val/mean_class_accuracy", "class accuracy", short="class accuracy"),
    _score("val/frequency_weighted_iou", "frequency-weighted IoU"),
    # needs outlines, so absent from evaluations within training
    _score("val/boundary_f1", "boundary F1"),
    _score("val/mean_boundary_iou", "boundary IoU"),
    _score("val/trimap_iou", "trimap IoU"),
    _score("val/calibration_error", "calibration error", better="lower"),
    _score("val/max_f1", "maximum F1"),
    # of two classes alone, as these two are
    Metric("val/max_f1_threshold", "threshold of the maximum F1", "probability"),
    Metric("val/loss", "validation loss", "nats", _VALIDATION_LOSS, "loss", "lower"),
    Metric(CLASSES_COUNTED, "classes that mIoU counts", "count"),
    Metric("val/num_pixels", "labelled pixels", "count"),
    Metric("images_per_second", "speed", "images per second", _SPEED, "speed", "higher"),
    Metric("peak_share", "share of peak", "share", _PEAK, "share of peak", "higher"),
    Metric(STEP_SECONDS, "time of a step", "seconds", _TIME, "step", "lower"),
    Metric(DATA_WAIT_SECONDS, "waiting for data", "seconds", _TIME, "waiting for data", "lower"),
    Metric("data_wait_share", "share of a step spent waiting for data", "share", better="lower"),
    Metric(SLOWEST_RATIO, "slowest rank over the median", "ratio", _RANKS, "ratio", "lower"),
    # a rank's number: no curve, but the health check names it
    Metric(SLOWEST_RANK, "slowest rank", "count"),
    Metric("memory_bytes", "memory", "bytes", _MEMORY, "memory", "lower"),
)


@dataclass(frozen=True)
class Family:
    """Metrics whose names begin with a prefix; {} in the title is the rest of the name.

    on_line: whether they stand on the progress line, under that rest.
    """

    prefix: str
    title: str
    unit: str
    panel: Panel | None = None
    better: Better = ""
    on_line: bool = False

    def member(self, name: str) -> Metric:
        """The metric of that name."""
        rest = name.removeprefix(self.prefix)
        # class names are the data set's, underscores and all; names of terms are keys
        words = rest if self.prefix in _OF_CLASSES else rest.replace("_", " ")
        title = self.title.replace("{}", words)
        short = words if self.on_line else ""
        return Metric(name, title, self.unit, self.panel, words, self.better, short)


BOUNDARY_IOU = "val/boundary_iou/"
_OF_CLASSES = (CLASS_IOU, BOUNDARY_IOU, NEVER_PREDICTED)
FAMILIES = (
    Family(CLASS_IOU, "IoU of {}", "share", better="higher"),
    Family(BOUNDARY_IOU, "boundary IoU of {}", "share", better="higher"),
    Family(NEVER_PREDICTED, "labels of {}, which is in no prediction", "share", better="lower"),
    # of a term that a configuration adds
    # after METRICS, which come first: a known term keeps its title
    Family(LOSS, "{} term", "loss", _OTHER_TERMS, on_line=True),
    Family("weight/", "weight of the {} term", "weight", _WEIGHTS),
    Family("grad_norm/", "gradient norm of the {}", "norm", _GRADIENTS),
    Family("lr/", "learning rate of the {}", "rate", _RATES),
    Family("loss_scale/", "loss scale of the {}", "factor", _SCALE),
    Family("skips/", "skipped updates of the {}", "count", _SKIPS, "lower"),
    # no panel: it is 0 but for moments that the verdict tells of
    Family("skips_in_a_row/", "updates of the {} skipped in a row", "count", better="lower"),
    Family(HEALTH, "{}", "flag", better="lower"),
    # of several data sets; constant, so that curves would show nothing
    Family("data/share/", "share of {} in a step's images", "share"),
    Family("data/unlabelled_share/", "share of {} in a step's unlabelled images", "share"),
    Family("data/epochs/", "epochs of {}", "epochs", _EPOCHS),
    Family("data/unlabelled_epochs/", "epochs of {}, unlabelled", "epochs", _EPOCHS),
)

SCORES = tuple(metric for metric in METRICS if metric.is_score)
_KNOWN = {metric.name: place for place, metric in enumerate(METRICS)}


def metric(name: str) -> Metric:
    """What is known of a metric; of a name that nothing is known of, the name itself."""
    if name in _KNOWN:
        return METRICS[_KNOWN[name]]
    for family in FAMILIES:
        if name.startswith(family.prefix):
            return family.member(name)
    # no error: files of later versions, and of users, have names that are not here
    return Metric(name, name, "")


def ordered(names: Iterable[str]) -> list[Metric]:
    """The metrics of these names in the catalogue's order; those of families follow, as they
    come.
    """
    # the sort is stable, so that members of families stay in the order of the file
    distinct = dict.fromkeys(names)
    return [metric(name) for name in sorted(distinct, key=lambda n: _KNOWN.get(n, len(_KNOWN)))]


def panels_of(names: Iterable[str]) -> list[tuple[Panel, list[Metric]]]:
    """The panels that have something to draw, in the page's order, each with its metrics."""
    found = ordered(names)
    panels = []
    for panel in PANELS:
        # by identity: panels of equal fields would be drawn twice
        metrics = [one for one in found if one.panel is panel]
        if metrics:
            panels.append((panel, metrics))
    return panels
