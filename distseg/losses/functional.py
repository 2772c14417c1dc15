"""The losses, as sums and counts over this process's pixels, and the label maps the discriminator
sees.

Means are taken elsewhere, over all ranks: a mean over one rank's own valid pixels is not the mean
over the batch. Plain PyTorch; nothing here knows of ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.sample import IGNORE_INDEX


def cross_entropy_sum(logits: Tensor, label: Tensor) -> Tensor:
    """Sum over valid pixels of -ln softmax(logits)[label], the logits brought to the label's size
    first.

    logits: (N, C, h, w) float at any resolution; label: (N, H, W) uint8, 255 = void. Returns a
    scalar (nats), 0 with a live graph when no pixel is valid. Luc et al. 2016, l_mce.
    """
    scores = upsample(at_least_float32(logits), label.shape[-2:])  # (N, C, H, W)
    return F.cross_entropy(scores, label.long(), ignore_index=IGNORE_INDEX, reduction="sum")


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, half-pixel centres.

    The identity when the size is already right. (N, C, h, w) -> (N, C, *size).
    """
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def label_at(label: Tensor, size: tuple[int, int] | torch.Size) -> tuple[Tensor, Tensor]:
    """The label at another resolution, nearest pixel: index map (N, h, w) int64 with 0 at void,
    valid mask bool.

    label: (N, H, W) uint8, 255 = void.
    """
    small = F.interpolate(label[:, None].float(), size=tuple(size), mode="nearest-exact")
    index = small[:, 0].long()
    valid = index != IGNORE_INDEX
    return index.where(valid, 0), valid


def real_label_map(
    index: Tensor, valid: Tensor, probabilities: Tensor, tau: float | None = None
) -> Tensor:
    """The ground truth as the discriminator sees it, (N, C, h, w); equal to the prediction where it
    is void.

    index, valid: from `label_at`; probabilities: (N, C, h, w), each pixel summing to 1, taken as
    constants. So void is no tell between real and fake. tau None: one-hot. A number: "Scaling" of
    Luc et al. 2016, the distribution nearest to the prediction with at least that mass on the true
    class: max(tau, s_l) there, and the other classes share the rest in the prediction's proportions
    (evenly where it leaves them nothing).
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


def pseudo_label(
    probabilities: Tensor, on_fake: Tensor, inside: Tensor, threshold: float
) -> Tensor:
    """Hung et al. 2018, eq. 5: the predicted class where the discriminator believes it, (N, h, w)
    uint8, else 255.

    probabilities: (N, C, h, w); on_fake: the discriminator's logits on them, (N, 1, h', w'),
    brought to (h, w); inside: (N, h, w) bool, pixels of the image proper. Believed: sigmoid above
    `threshold`. All are constants here.
    """
    # (N, h, w)
    confidence = upsample(at_least_float32(on_fake.detach()), inside.shape[-2:]).sigmoid()[:, 0]
    believed = inside & (confidence > threshold)
    return probabilities.detach().argmax(1).where(believed, IGNORE_INDEX).to(torch.uint8)


def adversarial_sum(logits: Tensor, valid: Tensor | None, target: float) -> Tensor:
    """Sum of the binary cross entropy of the discriminator's outputs against a target: 1 is real, 0
    is fake.

    valid None: one score per image, logits (N, 1, 1, 1), summed over the images. Otherwise logits
    (N, 1, h', w') are upsampled to the valid mask (N, h, w) and summed over valid pixels (Hung et
    al. 2018, eq. 1). A target between is one-sided label smoothing (Salimans et al. 2016, section
    3.4).
    """
    scores, weight = _scores(logits, valid)
    return F.binary_cross_entropy_with_logits(
        scores, torch.full_like(scores, target), weight=weight, reduction="sum"
    )


def verdict_sums(logits: Tensor, valid: Tensor | None, real: bool) -> Tensor:
    """Sums over the (valid) outputs, (3,) float64: how many are on the right side of 0, their
    sigmoids, their logits.

    logits, valid: as of `adversarial_sum`; real: whether the label maps were.
    """
    scores, weight = _scores(logits.detach(), valid)
    scores = scores.double()
    sums = torch.stack([((scores > 0) == real).double(), scores.sigmoid(), scores])
    return (sums if weight is None else sums * weight).flatten(1).sum(1)


def _scores(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores in at least fp32, and their weights.

    1 at valid pixels, None when there is one score per image.
    """
    logits = at_least_float32(logits)
    if valid is None:
        return logits, None
    return upsample(logits, valid.shape[-2:]), valid[:, None].to(logits.dtype)
