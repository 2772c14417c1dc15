"""Loss terms of the segmentor: each one a thing of its own, which the step sums.

A term of your own is a class with the members of `Term`, or just a function of (logits, label) that
returns a sum and a count (see `FunctionTerm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.losses.adversarial import FORMS, Form, pseudo_label, sum_of
from distseg.losses.cross_entropy import (
    PLAIN,
    PixelOptions,
    cross_entropy_sum,
    hard_pixels,
    pixel_weights,
)
from distseg.losses.overlap import dice_sum, lovasz_softmax_sum, valid_images
from distseg.losses.predicted import GROUND_TRUTH, Head, Kind, Predicted, PseudoLabels, Targets
from shards.errors import InputError
from shards.sample import IGNORE_INDEX


class Term:
    """One term of the segmentor's loss; its value is the sum of `local_sum` over all ranks and
    micro-batches, divided by the sum of `count`.

    name: of its metrics, loss/<name> and weight/<name>.
    images: whose term it is; unlabelled ones are there in mode=semi_supervised, and for a term
    without_adversary in mode=consistency too, and in steps before the adversary begins.
    through_discriminator: its gradient comes through the discriminator's scores, or, of a term that
    needs_features, its features. All others' comes through `head`, the segmentor's logits or
    auxiliary logits.
    chooses: which pixels take part is only known when they are predicted; `local_sum` then returns
    (sum, how many), and that is what the sum is divided by, unless the term is
    per_image: divided by `count` all the same, as the number of images.
    share: of a term that chooses, the metric that says how many took part of the candidates.
    """

    name: str
    images: Kind = "labelled"
    without_adversary: bool = False
    through_discriminator: bool = False
    needs_features: bool = False
    head: Head = "logits"
    chooses: bool = False
    per_image: bool = False
    share: str = ""

    @property
    def is_counted(self) -> bool:
        """Whether the labels alone tell what the sum is divided by."""
        return self.per_image or not self.chooses

    def count(self, targets: Targets) -> Tensor:
        """What this rank's sum is divided by where it `is_counted`: a scalar, float64.

        So the counts of all terms are summed over the ranks at once, before the first forward.
        """
        raise NotImplementedError(f"{type(self).__name__} has no count")

    def candidates(self, targets: Targets) -> Tensor:
        """Of how many `share` is a share: a scalar, float64, known from the labels alone."""
        return self.count(targets)

    def local_sum(self, seen: Predicted) -> Any:
        """The sum over this rank's images, a scalar with a graph, even where nothing is counted."""
        raise NotImplementedError(f"{type(self).__name__} has no local_sum")


@dataclass
class CrossEntropy(Term):
    """The cross entropy of labelled pixels (Luc et al. 2016, l_mce; Hung et al. 2018, eq. 3).

    per_image: the sum over pixels for each image, instead of the mean over valid pixels.
    """

    options: PixelOptions = PLAIN
    per_image: bool = False
    name: str = "cross_entropy"

    def __post_init__(self) -> None:
        self.chooses = self.options.ohem_threshold > 0
        self.share = f"share/{self.name}" if self.chooses else ""

    def count(self, targets: Targets) -> Tensor:
        return _number_of(targets.label) if self.per_image else self.candidates(targets)

    def candidates(self, targets: Targets) -> Tensor:
        # known before the forward even where pixels are chosen later: then for the metric `share`
        return self._weight_of(targets.label)

    def local_sum(self, seen: Predicted) -> Any:
        return self._sum(seen.logits, seen.label)

    def _sum(self, logits: Tensor, label: Tensor) -> Any:
        if not self.chooses:
            return cross_entropy_sum(logits, label, self.options)
        hard = hard_pixels(logits, label, self.options)
        return cross_entropy_sum(logits, hard, self.options), self._weight_of(hard)

    def _weight_of(self, label: Tensor) -> Tensor:
        """The valid pixels, each as much as its class weighs."""
        weights = self.options.class_weights
        if weights is None:
            return (label != IGNORE_INDEX).sum().double()
        # float64: it is summed over ranks, and fp32 would round counts above 2^24
        return pixel_weights(label, weights, torch.float64).sum()


@dataclass
class Auxiliary(CrossEntropy):
    """Deep supervision: the same cross entropy of an auxiliary head (Zhao et al. 2017, PSPNet,
    section 3.3).
    """

    name: str = "auxiliary"
    head: Head = "auxiliary"

    def local_sum(self, seen: Predicted) -> Any:
        if seen.auxiliary is None:
            raise no_auxiliary()
        return self._sum(seen.auxiliary, seen.label)


@dataclass
class Adversarial(Term):
    """The segmentor's reward for label maps that the discriminator takes for real.

    per_cell: the discriminator gives a score per cell, and valid ones count; otherwise one per
    image. per_image: the sum over cells for each image, instead of their mean. head: which of the
    segmentor's outputs the label maps are.
    """

    name: str = "adversarial"
    images: Kind = "labelled"
    form: Form = FORMS["non_saturating"]
    per_cell: bool = True
    per_image: bool = False
    head: Head = "logits"
    through_discriminator = True

    def count(self, targets: Targets) -> Tensor:
        return count_scores(targets, self.per_cell and not self.per_image)

    def local_sum(self, seen: Predicted) -> Tensor:
        scores = seen.scores if self.head == "logits" else seen.auxiliary_scores
        assert scores is not None  # only asked for where the discriminator judges
        # one score for a whole image counts, however much of the image is void
        valid = seen.targets.valid if self.per_cell else None
        return sum_of(self.form.of_segmentor, scores, valid)


@dataclass
class FeatureMatching(Term):
    """The distance between the discriminator's mean features of ground truth and of predictions,
    summed over the features (Salimans et al. 2016, section 3.1, by absolute values as Mittal et al.
    2019 have it).

    The means are over all ranks' images of a micro-batch.
    """

    images: Kind = "labelled"
    name: str = "feature_matching"
    through_discriminator = True
    needs_features = True

    def count(self, targets: Targets) -> Tensor:
        return _number_of(targets.label)

    def local_sum(self, seen: Predicted) -> Tensor:
        assert seen.features is not None and seen.feature_means is not None
        real, fake = seen.feature_means.real, seen.feature_means.fake
        # Summed over all ranks' images and divided by their number this is |real - fake|, and its
        # gradient at a feature is - sign(real - fake) / number: so it is a sum like all others.
        return ((real - seen.features) * (real - fake).sign()).sum()


@dataclass
class MaskedCrossEntropy(Term):
    """Cross entropy of unlabelled pixels against the segmentor's own classes, under the confidence
    mask of the discriminator (Hung et al. 2018, eq. 5).

    threshold: T_semi. per_image: the sum for each image, instead of the mean over the mask.
    """

    threshold: float = 0.2
    per_image: bool = False
    form: Form = FORMS["non_saturating"]
    name: str = "semi"
    share: str = "semi/mask_share"
    images: Kind = "unlabelled"
    chooses = True

    def count(self, targets: Targets) -> Tensor:
        return _number_of(targets.label)

    def candidates(self, targets: Targets) -> Tensor:
        return targets.valid.sum().double()

    def local_sum(self, seen: Predicted) -> tuple[Tensor, Tensor]:
        assert seen.scores is not None and seen.probabilities is not None
        inside = seen.targets.valid
        pseudo = pseudo_label(seen.probabilities, seen.scores, inside, self.threshold, self.form)
        # divided by the pixels kept, as Hung et al. do; UniMatch (Yang et al. 2023) divides by all
        return cross_entropy_sum(seen.logits, pseudo), (pseudo != IGNORE_INDEX).sum().double()


@dataclass
class Consistency(Term):
    """Weak-to-strong consistency: the prediction of a strong view is held to what the teacher says
    of the weak one (Sohn et al. 2020, eq. 4; on pixels French et al. 2020, Yang et al. 2023).

    threshold: a pixel is confident where the teacher's largest probability is at least this.
    by_image: all pixels of an image count as much as its share of confident ones (Olsson et al.
    2021); else the confident ones alone. Ground truth that is laid over an image counts as it is,
    and is none of the teacher's pixels, of which `share` tells (Tranheden et al. 2021). soft: the
    squared difference of the probabilities, mean over the classes, instead of the cross entropy.
    The sum is divided by all pixels inside of images, confident or not, as Yang et al. have it: by
    the confident ones alone, the few of a poor teacher would weigh as much as the many of a good
    one. view_weights: of each view of an image, which stand together, 1 on average; (): all weigh
    the same.
    """

    threshold: float = 0.95
    by_image: bool = False
    soft: bool = False
    view_weights: tuple[float, ...] = ()
    name: str = "consistency"
    share: str = "consistency/confident_share"
    images: Kind = "unlabelled"
    without_adversary = True
    chooses = True
    per_image = True  # divided by `count`

    def count(self, targets: Targets) -> Tensor:
        return (targets.label != IGNORE_INDEX).sum().double()

    def candidates(self, targets: Targets) -> Tensor:
        return _of_teacher(targets.label).sum().double()

    def local_sum(self, seen: Predicted) -> tuple[Tensor, Tensor]:
        assert seen.pseudo is not None  # only asked for in steps with a teacher
        pseudo, taught = seen.pseudo, _of_teacher(seen.label)  # (n, H, W)
        confident = taught & (pseudo.confidence >= self.threshold)
        weight: Tensor = confident
        if self.by_image:
            share = confident_share(confident, taught) if pseudo.share is None else pseudo.share
            weight = share[:, None, None] * taught
        loss = self._per_pixel(seen, pseudo)
        weight = weight.to(loss.dtype).where(seen.label != GROUND_TRUTH, 1)
        loss = weight * loss  # (n, H, W)
        if self.view_weights:
            views = loss.unflatten(0, (-1, len(self.view_weights))).unbind(1)
            # by numbers of the host: a tensor of them would have to be sent
            pairs = zip(self.view_weights, views, strict=True)
            loss = torch.stack([number * view for number, view in pairs])
        return loss.sum(), confident.sum().double()

    def _per_pixel(self, seen: Predicted, pseudo: PseudoLabels) -> Tensor:
        """(n, H, W): of each pixel, 0 outside of the image."""
        if self.soft:
            assert pseudo.probabilities is not None
            difference = seen.full_logits.softmax(1) - pseudo.probabilities
            return difference.square().mean(1)
        target = pseudo.label.where(seen.label != IGNORE_INDEX, IGNORE_INDEX).long()
        return F.cross_entropy(
            seen.full_logits, target, ignore_index=IGNORE_INDEX, reduction="none"
        )


def _of_teacher(label: Tensor) -> Tensor:
    """(n, H, W) bool: where an unlabelled image has no more than a teacher's label."""
    return (label != IGNORE_INDEX) & (label != GROUND_TRUTH)


def confident_share(confident: Tensor, inside: Tensor) -> Tensor:
    """Of each image, both (n, H, W) bool: (n,) float64, 0 where nothing is inside."""
    return confident.sum((1, 2)).double() / inside.sum((1, 2)).clamp(min=1)


@dataclass
class Entropy(Term):
    """The entropy of predictions of unlabelled pixels, in units of the largest one, log C: so from
    0 to 1 (Grandvalet and Bengio 2004; Vu et al. 2019, eq. 4, MinEnt). The mean over all pixels
    inside of images.
    """

    name: str = "entropy"
    images: Kind = "unlabelled"
    without_adversary = True

    def count(self, targets: Targets) -> Tensor:
        return (targets.label != IGNORE_INDEX).sum().double()

    def local_sum(self, seen: Predicted) -> Tensor:
        # of logarithms: a probability that was rounded to 0 has none
        logs = seen.full_logits.log_softmax(1)  # (n, C, H, W)
        # in units of the largest, so that a weight means the same for any number of classes
        entropy = -(logs.exp() * logs).sum(1) / math.log(logs.shape[1])
        return (entropy * (seen.label != IGNORE_INDEX)).sum()


@dataclass
class Dice(Term):
    """1 - soft Dice, of each image, the mean over its classes; see `overlap.dice_sum`."""

    smooth: float = 1.0
    name: str = "dice"

    def __post_init__(self) -> None:
        # below 0 the quotient may be divided by nothing
        is_number = isinstance(self.smooth, int | float) and not isinstance(self.smooth, bool)
        if not is_number or not 0 <= self.smooth < math.inf:
            raise InputError(f"smooth={self.smooth}", "a number from 0 on", "correct smooth")

    def count(self, targets: Targets) -> Tensor:
        return valid_images(targets.label)

    def local_sum(self, seen: Predicted) -> Tensor:
        return dice_sum(seen.full_logits, seen.label, self.smooth)


@dataclass
class LovaszSoftmax(Term):
    """The Lovasz-softmax loss of each image; see `overlap.lovasz_softmax_sum`."""

    name: str = "lovasz"

    def count(self, targets: Targets) -> Tensor:
        return valid_images(targets.label)

    def local_sum(self, seen: Predicted) -> Tensor:
        return lovasz_softmax_sum(seen.full_logits, seen.label)


@dataclass
class FunctionTerm(Term):
    """A function (logits (n, C, H, W), label (n, H, W) uint8, **options) -> (sum, count) as a term.

    The mean is over all ranks; with gradient accumulation, over the micro-batches of their global
    means, as the count comes only with each of them.
    """

    function: Callable[..., Any]
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    chooses = True

    def local_sum(self, seen: Predicted) -> tuple[Tensor, Any]:
        # upsampled for it, so that who writes one needs to know nothing of output strides
        found = self.function(seen.full_logits, seen.label, **self.options)
        if not isinstance(found, tuple) or len(found) != 2:
            raise InputError(
                f"loss.terms.{self.name}: the function returned a {type(found).__name__}",
                "a sum and a count: means are taken over all ranks, which one rank's mean is not",
                "return for example losses.sum(), valid.sum()",
            )
        return found


# by loss.terms.NAME.use; the terms that every run may have are built from keys of their own
TERMS: dict[str, type[Term]] = {"dice": Dice, "lovasz": LovaszSoftmax}


def no_auxiliary() -> InputError:
    """Of a network of the user's own, that had them when it was tried."""
    got = "a segmentor that returns no auxiliary logits while it trains"
    action = "return them in every training step, or in none"
    return InputError(got, 'a dict with "out" and "aux"', action)


def count_scores(targets: Targets, per_cell: bool) -> Tensor:
    """How many scores there are on label maps: valid cells, or images; a scalar, float64."""
    return targets.valid.sum().double() if per_cell else _number_of(targets.label)


def _number_of(label: Tensor) -> Tensor:
    # filled there: torch.tensor would send it, for which the host waits
    return torch.full((), len(label), dtype=torch.float64, device=label.device)
