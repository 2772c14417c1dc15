"""Every metric once: what it is called, what it measures, where it is drawn and how it is printed.

The progress line, the tables of `distseg summarize`, model cards, curves.png, the report, the W&B
report and the health checks all read this. A metric that the program knows is a row of METRICS; one
whose name ends in a user's word (a loss term, a class) follows from its prefix, by FAMILIES.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from distseg.config.forms import DEFAULT, FORMS
from distseg.tracking.metric import Better, Metric, Panel

# names that the program itself reads back
SEGMENTOR_LOSS, CROSS_ENTROPY = "loss/segmentor", "loss/cross_entropy"
DISCRIMINATOR_REAL, DISCRIMINATOR_FAKE = "loss/discriminator_real", "loss/discriminator_fake"
DISCRIMINATOR_ACCURACY = "discriminator/accuracy"
MISMATCHED_ACCURACY = "discriminator/mismatched_accuracy"
AUXILIARY_ACCURACY = "discriminator/auxiliary_accuracy"
# of their norms, at the segmentor's output; see distseg.train.diagnostics
RATIO = "gradient/adversarial_to_cross_entropy"
ADVERSARIAL_WEIGHT, MASK_SHARE = "weight/adversarial", "semi/mask_share"
CONSISTENCY_WEIGHT, CONFIDENT_SHARE = "weight/consistency", "consistency/confident_share"
COPY_FAILURES = "checkpoint/copy_failures"
STEP_SECONDS, DATA_WAIT_SECONDS = "step_seconds", "data_wait_seconds"
SLOWEST_RANK, SLOWEST_RATIO = "ranks/slowest", "ranks/slowest_ratio"
# of a step: of the median rank, and what the slowest rank has more of it
SECTION, EXCESS = "sections/", "ranks/excess/"
GOODPUT = "goodput/"
LOSS, VALIDATION, CLASS_IOU, HEALTH = "loss/", "val/", "val/iou/", "health/"
# of the classes: among confident pseudo-labelled pixels, and among the labelled ones of that step
CLASS_SHARE, LABELLED_SHARE = "consistency/class_share/", "consistency/labelled_share/"
# of labelled images that no step sees; see distseg.train.held_out
HELD_OUT = "held_out/"
SOURCE = "source/"  # as VALIDATION, of the domain that has the labels, where that is another
AGREEMENT, CONFIDENT_AGREEMENT = "held_out/agreement", "held_out/confident_agreement"
HELD_OUT_CONFIDENT = "held_out/confident_share"
CLASS_CONFIDENT, CLASS_AGREEMENT = "held_out/confident_share/", "held_out/confident_agreement/"
# of classes that validation labels have and no prediction, which alone are there
NEVER_PREDICTED = "val/never_predicted/"
# of each class among the predictions for the target and for the source, where there are both
TARGET_SHARE, SOURCE_SHARE = "val/predicted_share/", "source/predicted_share/"
# of predictions in a step on images of two domains, see distseg.train.diagnostics
TARGET_ENTROPY, SOURCE_ENTROPY = "adaptation/target_entropy", "adaptation/source_entropy"
MEAN_IOU, CLASSES_COUNTED = "val/mean_iou", "val/num_classes_counted"
SUBSET, PREDICTED_SHARE = "mean_iou_of/", "predicted_share/"  # after the prefix of the split

_NATS = "loss, nats"

# two panels: their sum would hide which of the two is learnt
_ON_REAL = Panel(
    "Discriminator on real label maps", "loss", loss_of="discriminator", in_picture=True
)
_ON_FAKE = Panel("Discriminator on predictions", "loss", loss_of="discriminator", in_picture=True)
_SEGMENTOR = Panel("Segmentor", "loss", loss_of="both", in_picture=True)
_ADVERSARIAL = Panel("Adversarial term, unweighted", "loss", loss_of="segmentor", in_picture=True)
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
_R1 = Panel("Discriminator's squared gradient on real label maps", "squared norm", is_log=True)
_MATCHING = Panel("Feature matching term, unweighted", "loss", in_picture=True)
_SEMI = Panel("Semi-supervised term, unweighted", _NATS, in_picture=True)
# terms of the user's own, whose unit nobody knows
_OTHER_TERMS = Panel("Other terms, unweighted", "loss", in_picture=True)
_CONSISTENCY = Panel("Consistency term, unweighted", "loss", in_picture=True)
_ENTROPY = Panel(
    "Entropy of unlabelled predictions", "share of the largest", is_share=True, in_picture=True
)
_DOMAINS = Panel("Entropy of predictions, by domain", "share of the largest", is_share=True)
_MASK = Panel("Confidence mask", "share of unlabelled pixels", is_share=True, in_picture=True)
_HELD_OUT = Panel(
    "Pseudo-labels of held-out images", "share of pixels", is_share=True, in_picture=True
)
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
_SECTIONS = Panel("Sections of a step, of the median rank", "seconds")
_RANKS = Panel("Slowest rank over the median rank", "ratio", (1.0, "equal"))
_EPOCHS = Panel("Times that each data set was gone through", "epochs")
_MEMORY = Panel("Memory, the largest rank's peak", "bytes")

# in the order of the page; the panels of the published figures come first
PANELS = (
    *(_ON_REAL, _ON_FAKE, _SEGMENTOR, _ADVERSARIAL, _CERTAINTY, _ACCURACY, _GAP, _RATIO),
    *(
        _R1,
        _MATCHING,
        _SEMI,
        _CONSISTENCY,
        _ENTROPY,
        _DOMAINS,
        _OTHER_TERMS,
        _MASK,
        _HELD_OUT,
        _VALIDATION,
        _VALIDATION_LOSS,
        _GRADIENTS,
        _RATES,
        _WEIGHTS,
        _SCALE,
    ),
    *(_SKIPS, _SPEED, _PEAK, _TIME, _SECTIONS, _RANKS, _MEMORY, _EPOCHS),
)


def _score(name: str, title: str, better: Better = "higher", short: str = "") -> Metric:
    # no panel of its own: for the few that training watches, METRICS adds one
    return Metric(name, title, "share", better=better, short=short, is_score=True)


# in the order of the progress line, of tables and of legends
METRICS = (
    Metric(SEGMENTOR_LOSS, "segmentor's loss", "loss", _SEGMENTOR, "total", "lower", "loss"),
    Metric(CROSS_ENTROPY, "cross entropy", "nats", _SEGMENTOR, "cross entropy", "lower", "ce"),
    Metric("loss/adversarial", "adversarial term", "loss", _ADVERSARIAL, "labelled", "", "adv"),
    Metric(
        "loss/adversarial_unlabelled",
        "adversarial term on unlabelled images",
        "loss",
        _ADVERSARIAL,
        "unlabelled",
    ),
    Metric(
        "loss/adversarial_auxiliary",
        "adversarial term of the auxiliary output",
        "loss",
        _ADVERSARIAL,
        "auxiliary output",
    ),
    Metric(
        "loss/feature_matching",
        "feature matching term",
        "loss",
        _MATCHING,
        "feature matching",
        "",
        "features",
    ),
    Metric("loss/semi", "semi-supervised term", "nats", _SEMI, "semi-supervised", "", "semi"),
    Metric(MASK_SHARE, "confidence mask", "share", _MASK, "share", "", "mask"),
    Metric(
        "loss/entropy", "entropy of unlabelled predictions", "share", _ENTROPY, "entropy", "", ""
    ),
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
        CONFIDENT_AGREEMENT,
        "confident pixels of held-out images that are labelled right",
        "share",
        _HELD_OUT,
        "right among confident",
        "higher",
    ),
    Metric(
        AGREEMENT,
        "pixels of held-out images that are labelled right",
        "share",
        _HELD_OUT,
        "right",
        "higher",
    ),
    Metric(
        HELD_OUT_CONFIDENT,
        "pixels of held-out images that the teacher is confident of",
        "share",
        _HELD_OUT,
        "confident",
    ),
    Metric(
        DISCRIMINATOR_REAL,
        "discriminator's loss on real label maps",
        "loss",
        _ON_REAL,
        "real",
        "",
        "D real",
    ),
    Metric(
        DISCRIMINATOR_FAKE,
        "discriminator's loss on predictions",
        "loss",
        _ON_FAKE,
        "fake",
        "",
        "D fake",
    ),
    Metric(
        "loss/discriminator_mismatched",
        "discriminator's loss on mismatched pairs",
        "loss",
        _ON_FAKE,
        "mismatched pairs",
        "",
        "D mismatched",
    ),
    Metric(
        "loss/discriminator_auxiliary_real",
        "loss on the source of the auxiliary output's discriminator",
        "loss",
        _ON_REAL,
        "auxiliary output",
    ),
    Metric(
        "loss/discriminator_auxiliary_fake",
        "loss on the target of the auxiliary output's discriminator",
        "loss",
        _ON_FAKE,
        "auxiliary output",
    ),
    Metric(
        "loss/r1",
        "discriminator's squared gradient on ground truth",
        "squared norm",
        _R1,
        "R1",
        "",
        "R1",
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
    Metric(
        MISMATCHED_ACCURACY,
        "discriminator's accuracy on mismatched pairs",
        "share",
        _ACCURACY,
        "right on mismatched pairs",
    ),
    Metric(
        AUXILIARY_ACCURACY,
        "accuracy of the auxiliary output's discriminator",
        "share",
        _ACCURACY,
        "right on the auxiliary output",
    ),
    Metric("discriminator/logit_gap", "gap of the discriminator's logits", "logits", _GAP, "gap"),
    Metric(RATIO, "gradient ratio", "ratio", _RATIO, "ratio"),
    Metric(SOURCE_ENTROPY, "entropy of predictions for the source", "share", _DOMAINS, "source"),
    Metric(TARGET_ENTROPY, "entropy of predictions for the target", "share", _DOMAINS, "target"),
    # what one confusion matrix gives, then what only `distseg evaluate` computes
    replace(_score(MEAN_IOU, "mIoU", short="mIoU"), panel=_VALIDATION, label="mean IoU"),
    replace(
        _score("val/pixel_accuracy", "pixel accuracy", short="pixel accuracy"),
        panel=_VALIDATION,
        label="pixel accuracy",
    ),
    Metric(
        f"{SOURCE}mean_iou",
        "mIoU on the source",
        "share",
        _VALIDATION,
        "source: mIoU",
        "higher",
    ),
    Metric(f"{SOURCE}pixel_accuracy", "pixel accuracy on the source", "share", None, "", "higher"),
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
    # of the whole run, in W&B's summary
    Metric("goodput", "share of the time in steps that counted", "share", better="higher"),
    Metric("goodput/wall_seconds", "time from the first start to the end", "seconds"),
    # a rank's number: no curve, but the health check names it
    Metric(SLOWEST_RANK, "slowest rank", "count"),
    Metric("memory_bytes", "memory", "bytes", _MEMORY, "memory", "lower"),
    Metric(COPY_FAILURES, "tries in a row that copied no checkpoint", "count", better="lower"),
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
        words = rest if self.prefix in OF_CLASSES else rest.replace("_", " ")
        title = self.title.replace("{}", words)
        short = words if self.on_line else ""
        return Metric(name, title, self.unit, self.panel, words, self.better, short)


BOUNDARY_IOU, SOURCE_IOU = "val/boundary_iou/", f"{SOURCE}iou/"
# a value for each class: a table, as 150 curves show nothing
OF_CLASSES = (
    *(CLASS_IOU, BOUNDARY_IOU, NEVER_PREDICTED, CLASS_SHARE, LABELLED_SHARE),
    *(CLASS_CONFIDENT, CLASS_AGREEMENT, SOURCE_IOU, TARGET_SHARE, SOURCE_SHARE),
)
FAMILIES = (
    Family(f"{VALIDATION}{SUBSET}", "mIoU of {}", "share", better="higher"),
    Family(f"{SOURCE}{SUBSET}", "mIoU of {} on the source", "share", better="higher"),
    Family(CLASS_IOU, "IoU of {}", "share", better="higher"),
    Family(SOURCE_IOU, "IoU of {} on the source", "share", better="higher"),
    Family(BOUNDARY_IOU, "boundary IoU of {}", "share", better="higher"),
    Family(NEVER_PREDICTED, "labels of {}, which is in no prediction", "share", better="lower"),
    Family(TARGET_SHARE, "{} among predictions for the target", "share"),
    Family(SOURCE_SHARE, "{} among predictions for the source", "share"),
    Family(CLASS_SHARE, "{} among confident pseudo-labelled pixels", "share"),
    Family(LABELLED_SHARE, "{} among labelled pixels", "share"),
    Family(CLASS_CONFIDENT, "{} of held-out images: confident pixels", "share"),
    Family(
        CLASS_AGREEMENT, "{} of held-out images: right among confident", "share", None, "higher"
    ),
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
    Family(SECTION, "{} of the median rank", "seconds", _SECTIONS, "lower"),
    Family(EXCESS, "{} of the slowest rank, beyond the median rank's", "seconds"),
    Family(GOODPUT, "share of the time: {}", "share"),
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


# titles of panels and labels of metrics where the discriminator tells domains apart: there source
# stands for real
_OF_DOMAINS = {
    _ON_REAL.title: "Discriminator on predictions for the source",
    _ON_FAKE.title: "Discriminator on predictions for the target",
    _GAP.title: "Gap between its logits on source and target",
    DISCRIMINATOR_REAL: "source",
    DISCRIMINATOR_FAKE: "target",
    "discriminator/on_real": "source",
    "discriminator/on_fake": "target",
    "loss/adversarial": "target",
}


def panels_of(
    names: Iterable[str], forms: Iterable[str] = (DEFAULT,), of_domains: bool = False
) -> list[tuple[Panel, list[Metric]]]:
    """The panels that have something to draw, in the page's order, each with its metrics.

    forms: the loss.adv_form of every run that is drawn. of_domains: whether their discriminators
    tell domains apart.
    """
    found = ordered(names)
    words = _OF_DOMAINS if of_domains else {}
    facts = [FORMS.get(form, FORMS[DEFAULT]) for form in dict.fromkeys(forms)]
    panels = []
    for panel in PANELS:
        # by identity: panels of equal fields would be drawn twice
        metrics = [one for one in found if one.panel is panel]
        if metrics:
            titled = replace(panel.under(facts), title=words.get(panel.title, panel.title))
            named = [replace(one, label=words.get(one.name, one.label)) for one in metrics]
            panels.append((titled, named))
    return panels
