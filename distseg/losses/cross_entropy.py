"""Cross entropy of pixels: plain, weighted by class, smoothed, focal, and of hard pixels only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.losses.tensors import at_least_float32, upsample
from shards.sample import IGNORE_INDEX


@dataclass(frozen=True)
class PixelOptions:
    """How a pixel's cross entropy is weighted.

    class_weights: (C,) factors of the pixels of each class; None: 1 for all.
    label_smoothing: share of the target that is spread evenly over all classes, [0, 1) (Szegedy et
    al. 2016, section 7; with class weights as torch's cross_entropy has it).
    focal_gamma: a pixel counts (1 - p)^gamma times its cross entropy, p its probability of the true
    class (Lin et al. 2017, eq. 4); 0: plain.
    ohem_threshold: only pixels whose p is below it take part (Shrivastava et al. 2016's hard
    examples, as segmentation has them); 0: all do. ohem_min_share: of each image at least this
    share of its valid pixels does, the hardest ones.
    prior: (C,) added to the logits before all of that, in training alone; None: nothing (Menon et
    al. 2021, eq. 10: t times the log of each class's share).
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    ohem_threshold: float = 0.0
    ohem_min_share: float = 0.0
    prior: Tensor | None = None


PLAIN = PixelOptions()


def cross_entropy_sum(logits: Tensor, label: Tensor, options: PixelOptions = PLAIN) -> Tensor:
    """Sum over valid pixels of -ln softmax(logits)[label], the logits upsampled to the label first.

    logits: (N, C, h, w) float at any resolution; label: (N, H, W) uint8, 255 = void. Returns a
    scalar (nats), 0 with a live graph when no pixel is valid. Luc et al. 2016, l_mce. options: see
    PixelOptions; hard pixels are chosen by `hard_pixels`, before.
    """
    scores = _scores(logits, label, options)
    target, weights = label.long(), options.class_weights
    # torch takes weights only in the scores' own type, and on their device
    if weights is not None:
        weights = weights.to(scores)
    if not options.focal_gamma:
        # a sum: what it is divided by is the count of all ranks, which this one does not know
        return F.cross_entropy(
            scores,
            target,
            weight=weights,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=options.label_smoothing,
        )
    # ln p of the true class, (N, H, W); 0 at void
    chance = -F.cross_entropy(scores, target, ignore_index=IGNORE_INDEX, reduction="none")
    # 1 - p from ln p, which is exact where p is near 1
    tiny = torch.finfo(scores.dtype).tiny  # at 0 a power below 1 has no finite gradient
    focus = (-torch.expm1(chance)).clamp(min=tiny) ** options.focal_gamma
    return -(focus * chance * pixel_weights(label, weights, scores.dtype)).sum()


def _scores(logits: Tensor, label: Tensor, options: PixelOptions) -> Tensor:
    """At the label's size, (N, C, H, W), with the classes' prior."""
    scores = at_least_float32(logits)
    if options.prior is not None:
        scores = scores + options.prior.to(scores)[:, None, None]
    return upsample(scores, label.shape[-2:])


def pixel_weights(label: Tensor, class_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each pixel counts, (N, H, W): its class's weight, 0 at void."""
    valid = label != IGNORE_INDEX
    if class_weights is None:
        return valid.to(dtype)
    index = label.long().where(valid, 0)
    # (N, H, W); indexing with 255 would be out of range, so void is 0 first and masked after it
    return class_weights.to(label.device, dtype)[index].where(valid, 0)


@torch.no_grad()
def hard_pixels(logits: Tensor, label: Tensor, options: PixelOptions) -> Tensor:
    """The label with its easy pixels void: (N, H, W) uint8.

    Hard is a pixel whose probability of the true class is below options.ohem_threshold, and at
    least the hardest options.ohem_min_share of each image's valid pixels, rounded up. That is for
    each image alone, so it does not depend on how a batch is split.
    """
    scores = _scores(logits, label, options)
    valid = label != IGNORE_INDEX
    chance = scores.softmax(1).gather(1, label.long().where(valid, 0)[:, None])[:, 0]  # (N, H, W)
    chance = chance.where(valid, torch.inf).flatten(1)  # (N, H * W), void last
    at_least = (valid.flatten(1).sum(1) * options.ohem_min_share).ceil().long()
    # the at_least-th smallest; of a list that is empty, nothing is below it
    ranked = torch.cat([torch.full_like(chance[:, :1], -torch.inf), chance.sort(1).values], 1)
    bound = ranked.gather(1, at_least[:, None])  # (N, 1)
    hard = (chance < options.ohem_threshold) | (chance <= bound)
    return label.where((hard.view_as(valid)) & valid, IGNORE_INDEX)
