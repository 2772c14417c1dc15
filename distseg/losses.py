"""The losses, as sums and counts over this process's pixels, and the label maps the discriminator sees.

Means are taken elsewhere, over all ranks: a mean over one rank's own valid pixels is not the mean over the
batch. Plain PyTorch; nothing here knows of ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.sample import IGNORE_INDEX


def cross_entropy_sum(logits: Tensor, label: Tensor) -> Tensor:
    """Sum over valid pixels of -ln softmax(logits)[label], the logits brought to the label's size first.

    logits: (N, C, h, w) float at any resolution; label: (N, H, W) uint8, 255 = void. Returns a scalar (nats),
    0 with a live graph when no pixel is valid. Luc et al. 2016, l_mce.
    """
    scores = upsample(at_least_float32(logits), label.shape[-2:])  # (N, C, H, W)
    return F.cross_entropy(scores, label.long(), ignore_index=IGNORE_INDEX, reduction="sum")


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, half-pixel centres; the identity when the size is already right. (N, C, h, w) -> (N, C, *size)."""
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def real_label_map(label: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The ground truth as the discriminator sees it, at the segmentor's resolution, and where it is valid.

    label: (N, H, W) uint8, 255 = void; probabilities: (N, C, h, w), each pixel summing to 1.
    Returns the label map (N, C, h, w), one-hot at valid pixels and equal to `probabilities` (detached) at void
    ones, so that void is no tell between real and fake; and the valid mask (N, h, w) bool.
    """
    small = F.interpolate(label[:, None].float(), size=probabilities.shape[-2:], mode="nearest-exact")
    index = small[:, 0].long()  # (N, h, w)
    valid = index != IGNORE_INDEX
    one_hot = torch.zeros_like(probabilities.detach())
    one_hot.scatter_(1, index.where(valid, 0)[:, None], 1.0)
    return torch.where(valid[:, None], one_hot, probabilities.detach()), valid


def adversarial_sum(logits: Tensor, valid: Tensor | None, real: bool) -> Tensor:
    """Sum of the binary cross entropy of the discriminator's outputs against "real" or "fake".

    valid None: one score per image, logits (N, 1, 1, 1), summed over the images. Otherwise logits (N, 1, h', w') are
    upsampled to the valid mask (N, h, w) and summed over valid pixels (Hung et al. 2018, eq. 1).
    """
    scores, weight = _scores(logits, valid)
    target = torch.ones_like(scores) if real else torch.zeros_like(scores)
    return F.binary_cross_entropy_with_logits(scores, target, weight=weight, reduction="sum")


def adversarial_count(logits: Tensor, valid: Tensor | None) -> Tensor:
    """How many outputs `adversarial_sum` sums over: a float64 scalar."""
    scores, weight = _scores(logits.detach(), valid)
    return (
        torch.tensor(scores.numel(), dtype=torch.float64, device=scores.device)
        if weight is None
        else weight.double().sum()
    )


def correct_sum(logits: Tensor, valid: Tensor | None, real: bool) -> Tensor:
    """How many of the (valid) outputs are on the right side of 0: a float64 scalar."""
    scores, weight = _scores(logits.detach(), valid)
    correct = (scores > 0) == real
    return (correct if weight is None else correct & (weight > 0)).double().sum()


def _scores(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores in at least fp32, and their weights: 1 at valid pixels, None when there is one score per image."""
    logits = at_least_float32(logits)
    if valid is None:
        return logits, None
    return upsample(logits, valid.shape[-2:]), valid[:, None].to(logits.dtype)
