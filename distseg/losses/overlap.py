"""Losses on the overlap of regions, of each image by itself: soft Dice and Lovasz-softmax.

Both are no means over pixels, so a batch's value would depend on all pixels of all ranks at once.
Taken image by image and averaged over images, they are exact for any number of ranks and of
micro-batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.losses.tensors import at_least_float32, upsample
from shards.sample import IGNORE_INDEX


def dice_sum(logits: Tensor, label: Tensor, smooth: float = 1.0) -> Tensor:
    """Sum over images of 1 - the mean soft Dice of the classes that are in the image.

    Of a class c: (2 sum(p_c y_c) + smooth) / (sum(p_c) + sum(y_c) + smooth), over valid pixels
    (Milletari et al. 2016, with probabilities instead of squares in the denominator; Sudre et al.
    2017). logits: (N, C, h, w), upsampled to the label; label: (N, H, W) uint8, 255 = void. An
    image without a valid pixel gives 0.
    """
    chances, truth = _flat(logits, label)
    both = (chances * truth).sum(2)  # (N, C)
    score = (2 * both + smooth) / (chances.sum(2) + truth.sum(2) + smooth)
    return _mean_of_present(1 - score, truth).sum()


def lovasz_softmax_sum(logits: Tensor, label: Tensor) -> Tensor:
    """Sum over images of the Lovasz-softmax loss, the mean over classes that are in the image.

    The convex extension of 1 - IoU at the errors |y_c - p_c| (Berman et al. 2018, eq. 9 to 11 and
    algorithm 1). Arguments as of `dice_sum`.
    """
    chances, truth = _flat(logits, label)
    inside = (label != IGNORE_INDEX).flatten(1)[:, None]
    errors = (truth - chances).abs() * inside  # void pixels have no error, so they come last
    errors, order = errors.sort(2, descending=True)
    losses = (errors * _jaccard_gradient(truth.gather(2, order))).sum(2)  # (N, C)
    return _mean_of_present(losses, truth).sum()


def valid_images(label: Tensor) -> Tensor:
    """How many of the images (N, H, W) have a valid pixel: a scalar, float64."""
    return (label != IGNORE_INDEX).flatten(1).any(1).sum().double()


def _flat(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and one-hot truth, both (N, C, H * W), both 0 at void pixels."""
    scores = upsample(at_least_float32(logits), label.shape[-2:])
    valid = label != IGNORE_INDEX
    index = label.long().where(valid, 0)
    truth = F.one_hot(index, scores.shape[1]).permute(0, 3, 1, 2) * valid[:, None]
    chances = scores.softmax(1) * valid[:, None]
    return chances.flatten(2), truth.to(scores.dtype).flatten(2)


def _mean_of_present(losses: Tensor, truth: Tensor) -> Tensor:
    """(N,): the mean of losses (N, C) over the classes whose truth (N, C, P) is not empty."""
    present = (truth.sum(2) > 0).to(losses.dtype)
    return (losses * present).sum(1) / present.sum(1).clamp(min=1)


def _jaccard_gradient(truth: Tensor) -> Tensor:
    """What each error adds to 1 - IoU as pixels are taken as wrong one after the other.

    truth: (N, C, P) 0 or 1, sorted by falling error. Berman et al. 2018, algorithm 1.
    """
    total = truth.sum(2, keepdim=True)
    intersection = total - truth.cumsum(2)
    union = total + (1 - truth).cumsum(2)
    jaccard = 1 - intersection / union
    return torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], 2)
