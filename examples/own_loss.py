"""A loss term of your own, added to the segmentor's loss.

    distseg train preset=toy loss.terms.focal.use=examples/own_loss.py:focal \\
        loss.terms.focal.weight=0.5 loss.terms.focal.options.gamma=2

A function of logits (n, C, h, w) and label (n, H, W) uint8, 255 = void, and what the term's options
hold. It returns a SUM over the images at hand and the count to divide by: the mean is taken over
all ranks and micro-batches, so it does not depend on how a batch is split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

VOID = 255


def focal(logits: Tensor, label: Tensor, gamma: float = 2.0) -> tuple[Tensor, Tensor]:
    """Sum of -(1 - p)^gamma ln p over the valid pixels, p of the true class, and their number.

    Lin et al. 2017, equation 4.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = F.interpolate(scores, label.shape[-2:], mode="bilinear", align_corners=False)
    valid = label != VOID
    index = label.long().where(valid, torch.zeros((), dtype=torch.long, device=label.device))
    log_p = scores.log_softmax(1).gather(1, index[:, None])[:, 0]  # (n, H, W)
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    return (loss * valid).sum(), valid.sum()
