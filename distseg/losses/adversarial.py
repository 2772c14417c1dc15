"""The adversary: the label maps that the discriminator sees, and the losses on its scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.losses.tensors import at_least_float32, upsample
from shards.sample import IGNORE_INDEX


class Form:
    """A form of the losses on the discriminator's scores s, above 0 = real in all of them.

    has_probability: whether `realness` is the probability that a label map is real.
    """

    has_probability = True

    def of_discriminator(self, scores: Tensor, target: float) -> Tensor:
        """Its loss for each score, of the same shape.

        target: 1 is real, 0 is fake; between is one-sided label smoothing (Salimans et al. 2016,
        section 3.4).
        """
        raise NotImplementedError

    def of_segmentor(self, scores: Tensor) -> Tensor:
        """Its loss for each score on its predictions: the discriminator's if they were real, with
        the same fixed points and a gradient where the discriminator is sure (Goodfellow et al.
        2014, section 3).
        """
        return self.of_discriminator(scores, 1.0)

    def realness(self, scores: Tensor) -> Tensor:
        """How real label maps are taken to be, in [0, 1], 0.5 at a score of 0."""
        return scores.sigmoid()


class NonSaturating(Form):
    """The binary cross entropy of sigmoid(s) (Goodfellow et al. 2014)."""

    def of_discriminator(self, scores: Tensor, target: float) -> Tensor:
        # from logits: the logarithm of a sigmoid that was rounded to 0 is infinite
        targets = torch.full_like(scores, target)
        return F.binary_cross_entropy_with_logits(scores, targets, reduction="none")


class Saturating(NonSaturating):
    """The same; the segmentor's loss is minus the discriminator's (Luc et al. 2016, eq. 3)."""

    def of_segmentor(self, scores: Tensor) -> Tensor:
        return -self.of_discriminator(scores, 0.0)


class Hinge(Form):
    """max(0, 1 - s) of real, max(0, 1 + s) of fake, and - s for the segmentor (Lim and Ye 2017).

    It has no target between.
    """

    has_probability = False

    def of_discriminator(self, scores: Tensor, target: float) -> Tensor:
        return F.relu(1 - scores if target > 0 else 1 + scores)

    def of_segmentor(self, scores: Tensor) -> Tensor:
        return -scores


class LeastSquares(Form):
    """(D - target)^2 with D = (1 + s) / 2 (Mao et al. 2017, eq. 9), whose best D is a
    probability.
    """

    def of_discriminator(self, scores: Tensor, target: float) -> Tensor:
        return ((1 + scores) / 2 - target).square()

    def realness(self, scores: Tensor) -> Tensor:
        return ((1 + scores) / 2).clamp(0, 1)


# by loss.adv_form; what is known of them without torch stands in distseg/config/forms.py
FORMS: dict[str, Form] = {
    "non_saturating": NonSaturating(),
    "saturating": Saturating(),
    "hinge": Hinge(),
    "least_squares": LeastSquares(),
}


def real_label_map(
    index: Tensor, valid: Tensor, probabilities: Tensor, tau: float | None = None
) -> Tensor:
    """The ground truth as the discriminator sees it, (N, C, h, w).

    index, valid: (N, h, w), of `label_at`; probabilities: (N, C, h, w), each pixel summing to 1,
    taken as constants. Where the label is void, it equals the prediction, so that void is no tell
    between real and fake. tau None: one-hot. A number: "Scaling" of Luc et al. 2016, the
    distribution nearest to the prediction with at least that mass on the true class: max(tau, s_l)
    there, and the other classes share the rest in the prediction's proportions (evenly where it
    leaves them nothing).
    """
    # the segmentor must not learn to make the ground truth look like its predictions
    predicted = probabilities.detach()
    one_hot = torch.zeros_like(predicted).scatter_(1, index[:, None], 1.0)  # (N, C, h, w)
    if tau is None:
        return torch.where(valid[:, None], one_hot, predicted)
    on_truth = (predicted * one_hot).sum(1, keepdim=True)  # (N, 1, h, w)
    others = predicted * (1 - one_hot)
    rest = others.sum(1, keepdim=True)  # 1 - on_truth, without its rounding
    even = (1 - one_hot) / max(1, predicted.shape[1] - 1)
    # below 1e-6 the quotient is noise; the clamp keeps 0 / 0 out of the branch that is not taken
    shares = torch.where(rest > 1e-6, others / rest.clamp(min=1e-6), even)
    mass = on_truth.clamp(min=tau, max=1.0)
    return torch.where(valid[:, None], one_hot * mass + shares * (1 - mass), predicted)


def self_information(probabilities: Tensor) -> Tensor:
    """- p log p / log C of probabilities (N, C, h, w): their sum over the classes is the entropy as
    a share of its largest value (Vu et al. 2019, eq. 8).
    """
    # at 0 the product is 0, and its derivative infinite: cut off where a double's log is -36
    safe = probabilities.clamp(min=torch.finfo(probabilities.dtype).eps)
    # the factor before the logarithm is not cut off: at 0 the product is exactly 0
    return -probabilities * safe.log() / math.log(probabilities.shape[1])


def pseudo_label(
    probabilities: Tensor,
    scores: Tensor,
    inside: Tensor,
    threshold: float,
    form: Form = FORMS["non_saturating"],
) -> Tensor:
    """Hung et al. 2018, eq. 5: the predicted class under the confidence mask, else 255.

    probabilities: (N, C, h, w); scores: the discriminator's on them, (N, 1, h', w'), brought to (h,
    w); inside: (N, h, w) bool, pixels of the image proper. The mask is where the realness of the
    scores is above `threshold`. All are constants here. Returns (N, h, w) uint8.
    """
    confident = inside & (realness_at(scores, inside.shape[-2:], form) > threshold)  # (N, h, w)
    return probabilities.detach().argmax(1).where(confident, IGNORE_INDEX).to(torch.uint8)


def realness_at(scores: Tensor, size: tuple[int, int] | torch.Size, form: Form) -> Tensor:
    """How real the discriminator takes each pixel to be, (N, h, w) in [0, 1], without a graph.

    scores: (N, 1, h', w') or (N, 1, 1, 1), brought to `size`.
    """
    # scores are upsampled and not probabilities, as in the loss that the discriminator learns by
    return form.realness(upsample(at_least_float32(scores.detach()), size))[:, 0]


def sum_of(loss: Callable[[Tensor], Tensor], scores: Tensor, valid: Tensor | None) -> Tensor:
    """Sum of a loss of each score, such as a form's: a scalar.

    valid None: one score per image, scores (N, 1, 1, 1), summed over the images. Otherwise scores
    (N, 1, h', w') are upsampled to the valid mask (N, h, w) and summed over valid pixels (Hung et
    al. 2018, eq. 1).
    """
    scores, weight = _weighted(scores, valid)
    losses = loss(scores)
    return (losses if weight is None else losses * weight).sum()


def squared_gradient_sum(scores: Tensor, label_map: Tensor) -> Tensor:
    """Sum over images of the squared gradient of an image's score, the mean of its cells', at its
    label map (Mescheder et al. 2018, eq. 9): a scalar that can be differentiated again.

    scores: (N, 1, h', w') or (N, 1, 1, 1), with a graph that leads to label_map (N, C, h, w).
    """
    # images do not touch each other, so the gradient of the sum holds that of each one's score
    total = at_least_float32(scores).mean((1, 2, 3)).sum()
    (gradient,) = torch.autograd.grad(total, label_map, create_graph=True)
    return at_least_float32(gradient).square().sum()


def score_sums(scores: Tensor, valid: Tensor | None, real: bool, form: Form) -> Tensor:
    """Sums over the (valid) scores, (3,) float64.

    How many are on the right side of 0, the scores themselves, and their realness. scores, valid:
    as of `sum_of`; real: whether the label maps were.
    """
    scores, weight = _weighted(scores.detach(), valid)
    # float64, as these are summed over all ranks: fp32 counts no further than 2^24
    scores = scores.double()
    sums = torch.stack([((scores > 0) == real).double(), scores, form.realness(scores)])
    # sums, weight: (3, N, 1, h, w), (N, 1, h, w)
    return (sums if weight is None else sums * weight).flatten(1).sum(1)


def _weighted(scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores in at least fp32, and their weights.

    1 at valid pixels, None when there is one score per image.
    """
    scores = at_least_float32(scores)
    if valid is None:
        return scores, None
    return upsample(scores, valid.shape[-2:]), valid[:, None].to(scores.dtype)  # both (N, 1, h, w)
