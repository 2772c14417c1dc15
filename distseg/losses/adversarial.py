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
    predicted = probabilities.detach()
    one_hot = torch.zeros_like(predicted).scatter_(1, index[:, None], 1.0)
    if tau is None:
        return torch.where(valid[:, None], one_hot, predicted)
    on_truth = (predicted * one_hot).sum(1, keepdim=True)
    others = predicted * (1 - one_hot)
    rest = others.sum(1, keepdim=True)  # 1 - on_truth, without its rounding
    even = (1 - one_hot) / max(1, predicted.shape[1] - 1)
    shares = torch.where(rest > 1e-6, others / rest.clamp(min=1e-6), even)
    mass = on_truth.clamp(min=tau, max=1.0)
    return torch.where(valid[:, None], one_hot * mass + shares * (1 - mass), predicted)


def pseudo_label(probabilities: Tensor, scores: Tensor, inside: Tensor, threshold: float) -> Tensor:
    """Hung et al. 2018, eq. 5: the predicted class under the confidence mask, else 255.

    probabilities: (N, C, h, w); scores: the discriminator's logits on them, (N, 1, h', w'), brought
    to (h, w); inside: (N, h, w) bool, pixels of the image proper. The mask is where the sigmoid of
    the scores is above `threshold`. All are constants here. Returns (N, h, w) uint8.
    """
    confidence = upsample(at_least_float32(scores.detach()), inside.shape[-2:]).sigmoid()[:, 0]
    confident = inside & (confidence > threshold)  # (N, h, w)
    return probabilities.detach().argmax(1).where(confident, IGNORE_INDEX).to(torch.uint8)


def adversarial_sum(scores: Tensor, valid: Tensor | None, target: float) -> Tensor:
    """Sum of the binary cross entropy of the discriminator's scores against a target.

    target: 1 is real, 0 is fake; between is one-sided label smoothing (Salimans et al. 2016,
    section 3.4). valid None: one score per image, scores (N, 1, 1, 1), summed over the images.
    Otherwise scores (N, 1, h', w') are upsampled to the valid mask (N, h, w) and summed over valid
    pixels (Hung et al. 2018, eq. 1). Returns a scalar, nats.
    """
    scores, weight = _weighted(scores, valid)
    targets = torch.full_like(scores, target)
    return F.binary_cross_entropy_with_logits(scores, targets, weight=weight, reduction="sum")


def score_sums(scores: Tensor, valid: Tensor | None, real: bool) -> Tensor:
    """Sums over the (valid) scores, (3,) float64.

    How many are on the right side of 0, their sigmoids, and the scores themselves. scores, valid:
    as of `adversarial_sum`; real: whether the label maps were.
    """
    scores, weight = _weighted(scores.detach(), valid)
    scores = scores.double()
    sums = torch.stack([((scores > 0) == real).double(), scores.sigmoid(), scores])
    return (sums if weight is None else sums * weight).flatten(1).sum(1)


def _weighted(scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores in at least fp32, and their weights.

    1 at valid pixels, None when there is one score per image.
    """
    scores = at_least_float32(scores)
    if valid is None:
        return scores, None
    return upsample(scores, valid.shape[-2:]), valid[:, None].to(scores.dtype)
