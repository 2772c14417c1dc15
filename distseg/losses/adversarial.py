"""The adversary: the label maps that the discriminator sees, and the losses on its scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.losses.tensors import at_least_float32, upsample
from shards.sample import IGNORE_INDEX


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


def pseudo_label(probabilities: Tensor, scores: Tensor, inside: Tensor, threshold: float) -> Tensor:
    """Hung et al. 2018, eq. 5: the predicted class under the confidence mask, else 255.

    probabilities: (N, C, h, w); scores: the discriminator's logits on them, (N, 1, h', w'), brought
    to (h, w); inside: (N, h, w) bool, pixels of the image proper. The mask is where the sigmoid of
    the scores is above `threshold`. All are constants here. Returns (N, h, w) uint8.
    """
    # logits are upsampled and not probabilities, as in the loss that the discriminator learns by
    confidence = upsample(at_least_float32(scores.detach()), inside.shape[-2:]).sigmoid()[:, 0]
    confident = inside & (confidence > threshold)  # (N, h, w)
    return probabilities.detach().argmax(1).where(confident, IGNORE_INDEX).to(torch.uint8)


def discriminator_sum(
    scores: Tensor, valid: Tensor | None, target: float, form: str = "non_saturating"
) -> Tensor:
    """Sum of the discriminator's loss over its scores on label maps of one kind.

    target: 1 is real, 0 is fake; between is one-sided label smoothing (Salimans et al. 2016,
    section 3.4), which hinge has not. By form, with s a score, above 0 = real in all of them:
      non_saturating, saturating   the binary cross entropy of sigmoid(s) (Goodfellow et al. 2014)
      hinge                        max(0, 1 - s) of real, max(0, 1 + s) of fake (Lim and Ye 2017)
      least_squares                (D - target)^2 with D = (1 + s) / 2 (Mao et al. 2017, eq. 9)
    valid None: one score per image, scores (N, 1, 1, 1), summed over the images. Otherwise scores
    (N, 1, h', w') are upsampled to the valid mask (N, h, w) and summed over valid pixels (Hung et
    al. 2018, eq. 1). Returns a scalar.
    """
    scores, weight = _weighted(scores, valid)
    if form == "hinge":
        losses = F.relu(1 - scores if target > 0 else 1 + scores)
    elif form == "least_squares":
        losses = ((1 + scores) / 2 - target).square()
    else:
        # from logits: the logarithm of a sigmoid that was rounded to 0 is infinite
        targets = torch.full_like(scores, target)
        losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return (losses if weight is None else losses * weight).sum()


def adversarial_sum(scores: Tensor, valid: Tensor | None, form: str = "non_saturating") -> Tensor:
    """Sum of the segmentor's loss over the discriminator's scores on its predictions.

    saturating: - the discriminator's own loss (Luc et al. 2016, eq. 3). hinge: - s (Lim and Ye
    2017). Otherwise the discriminator's loss as if they were real, with the same fixed points and a
    gradient where the discriminator is sure (Goodfellow et al. 2014, section 3). Shapes as of
    `discriminator_sum`.
    """
    if form == "saturating":
        return -discriminator_sum(scores, valid, 0.0, form)
    if form == "hinge":
        scores, weight = _weighted(scores, valid)
        return -(scores if weight is None else scores * weight).sum()
    return discriminator_sum(scores, valid, 1.0, form)


def score_sums(scores: Tensor, valid: Tensor | None, real: bool) -> Tensor:
    """Sums over the (valid) scores, (3,) float64.

    How many are on the right side of 0, their sigmoids, and the scores themselves. scores, valid:
    as of `discriminator_sum`; real: whether the label maps were.
    """
    scores, weight = _weighted(scores.detach(), valid)
    # float64, as these are summed over all ranks: fp32 counts no further than 2^24
    scores = scores.double()
    sums = torch.stack([((scores > 0) == real).double(), scores.sigmoid(), scores])
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
