"""What a logged step is looked at for, beyond its losses: gradients at the segmentor's output, and
every rank's pace.

Nothing here costs a pass through a network, a wait for the device, or a message, but in steps that
are logged.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distseg.distributed.ranks import Ranks, all_reduce_sum
from distseg.losses.adversarial import Form, score_sums
from distseg.losses.tensors import at_least_float32
from distseg.losses.terms import PseudoLabels
from distseg.tracking.catalogue import (
    CLASS_SHARE,
    LABELLED_SHARE,
    MISMATCHED_ACCURACY,
    RATIO,
)
from distseg.train.counts import mean
from distseg.train.objective import Scored
from shards.sample import IGNORE_INDEX

# squares, since sums of these over micro-batches and ranks are right, and those of norms are not
_SQUARES = ("gradient/adversarial_squared", "gradient/cross_entropy_squared")
# what every rank tells of itself
_OF_A_RANK = ("forward_seconds", "data_wait_seconds", "memory_bytes")


def gradients_at_output(
    cross_entropy: Tensor, logits: Tensor, proxy: Tensor, probabilities: Tensor
) -> dict[str, Tensor]:
    """Squared sizes of the gradients of both kinds of terms at the logits, as the segmentor
    receives them.

    cross_entropy: the weighted term on labelled images, a scalar with its graph, which is kept;
    logits, probabilities: (n, C, h, w); proxy: the weighted adversarial terms' gradient at the
    probabilities, of the same shape, on the same loss scale. Summed over micro-batches and ranks
    they give the ratio of the norms over the global batch, see `summary`.
    """
    # To the logits alone, which is no pass through the network. The graph stays for the one
    # backward.
    (own,) = torch.autograd.grad(cross_entropy, logits, retain_graph=True)
    # detached: this product is looked at, and nothing of it may reach the parameters
    chances = probabilities.detach()
    # (n, C, h, w): the softmax's Jacobian times the proxy, by hand. autograd.grad would say the
    # same, but through a graph that the backward has yet to use.
    through_softmax = chances * (proxy - (chances * proxy).sum(1, keepdim=True))
    # at least fp32: below 6e-8 an fp16 is 0, and squares of gradients are smaller
    squares = [at_least_float32(gradient).square().sum() for gradient in (through_softmax, own)]
    return dict(zip(_SQUARES, squares, strict=True))


def of_scores(scored: Mapping[str, Scored], form: Form) -> dict[str, Tensor]:
    """The discriminator's accuracy, the gap between its logits, and its mean probabilities where a
    score is one.

    scored: "real", "fake", and "mismatched" where there are such pairs, whose accuracy is a number
    of its own.
    """
    real, fake = scored["real"], scored["fake"]
    of_real = score_sums(real.scores, real.mask, True, form)
    of_fake = score_sums(fake.scores, fake.mask, False, form)
    # scaled as losses are, since `gather` divides every metric by the number of ranks
    on_real, on_fake = mean(of_real, real.num_scores), mean(of_fake, fake.num_scores)
    right, all_scores = of_real[0] + of_fake[0], real.num_scores + fake.num_scores
    values = {
        "discriminator/accuracy": mean(right, all_scores),
        "discriminator/logit_gap": on_real[1] - on_fake[1],
    }
    if form.has_probability:
        values |= {"discriminator/on_real": on_real[2], "discriminator/on_fake": on_fake[2]}
    if "mismatched" in scored:
        wrong = scored["mismatched"]
        sums = score_sums(wrong.scores, wrong.mask, False, form)
        values[MISMATCHED_ACCURACY] = mean(sums[0], wrong.num_scores)
    return values


def class_shares(
    label: Tensor, pseudo: PseudoLabels, threshold: float, names: Sequence[str]
) -> dict[str, Tensor]:
    """The share of each class among the labelled pixels of the global batch, and among those that a
    teacher is confident of; all 0 where there is none.

    label: (n, H, W) uint8, 255 = void. Called on every rank, which all get the same scalars.
    """
    confident = pseudo.label.where(pseudo.confidence >= threshold, IGNORE_INDEX)
    counts = torch.stack([_histogram(label), _histogram(confident)])
    # sent with void's and all other values: a part of it is no tensor in one piece
    sums = all_reduce_sum(counts)[:, : len(names)]
    shares = sums / sums.sum(1, keepdim=True).clamp(min=1)
    named: dict[str, Tensor] = {}
    for prefix, of_classes in zip((LABELLED_SHARE, CLASS_SHARE), shares, strict=True):
        named |= {prefix + name: share for name, share in zip(names, of_classes, strict=True)}
    return named


def _histogram(label: Tensor) -> Tensor:
    """How many pixels have each value of a byte: (256,) float64."""
    counts = torch.zeros(256, dtype=torch.float64, device=label.device)
    # not bincount, which waits for the device
    return counts.scatter_add_(0, label.flatten().long(), counts.new_ones(label.numel()))


def gather(metrics: dict[str, Tensor], own: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Metrics as means over the ranks, and what every rank told of itself, in one sum: the only
    wait for the device.

    own: this rank's values for all names in `_OF_A_RANK`. Called on every rank, which all get the
    same values.
    """
    # Every rank adds its row to zeros, so that one sum is a gather too and no second message is
    # needed.
    told = torch.zeros(ranks.world_size, len(_OF_A_RANK), dtype=torch.float64)
    told[ranks.rank] = torch.tensor([own[name] for name in _OF_A_RANK], dtype=torch.float64)
    # in float64: the ranks' rows hold bytes of memory, which fp32 would round
    packed = [value.detach().double().to(ranks.device).reshape(1) for value in metrics.values()]
    packed.append(told.flatten().to(ranks.device))
    # one copy to the host for all metrics; `.item()` of each would wait for the device as often
    sums = all_reduce_sum(torch.cat(packed)).tolist()
    means = {name: total / ranks.world_size for name, total in zip(metrics, sums, strict=False)}
    width = len(_OF_A_RANK)
    of_ranks = [
        sums[len(metrics) + width * r : len(metrics) + width * (r + 1)]
        for r in range(ranks.world_size)
    ]
    return summary(means) | pace(of_ranks)


def summary(means: dict[str, float]) -> dict[str, float]:
    """The metrics with the squared gradients replaced by the ratio of their norms.

    Without it where one is 0 / 0.
    """
    values = {name: value for name, value in means.items() if name not in _SQUARES}
    # The ratio of sums, not the sum of ratios: it is the global batch's, whatever the
    # micro-batches.
    adversarial, own = (means.get(name, 0.0) for name in _SQUARES)
    return values | ({RATIO: (adversarial / own) ** 0.5} if own > 0 else {})


def pace(of_ranks: list[list[float]]) -> dict[str, float]:
    """The most that any rank waits for data and holds in memory; and who keeps the others waiting,
    and how much.

    of_ranks: rows of (seconds of a forward, seconds of a step's wait for data, bytes).
    ranks/slowest_ratio: the slowest rank's forward and wait for data over the median rank's. Under
    FSDP, ZeRO-3 and synchronised batch norm a forward waits for all ranks itself, so that this
    stays near 1 whoever is slow.
    """
    # the largest, as a step takes as long as its slowest rank, and fails as soon as one has no
    # memory
    forward, wait, memory = zip(*of_ranks, strict=True)
    values = {"data_wait_seconds": max(wait), "memory_bytes": max(memory)}
    own = [sum(pair) for pair in zip(forward, wait, strict=True)]
    # the mean would hide a slow rank among few, as it is part of it
    others = statistics.median_low(own)  # of two ranks the quicker one
    if len(own) > 1 and others > 0:
        values |= {
            "ranks/slowest": float(own.index(max(own))),
            "ranks/slowest_ratio": max(own) / others,
        }
    return values


def memory_bytes(device: torch.device) -> float:
    """The most that this process has held so far: of the GPU's memory, or resident on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in KiB
