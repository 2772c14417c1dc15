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

from distseg.distributed.ranks import Ranks, all_reduce_sum, gathered_tensors
from distseg.losses.adversarial import Form, score_sums, self_information
from distseg.losses.predicted import GROUND_TRUTH, Kind, PseudoLabels, Targets
from distseg.losses.tensors import at_least_float32
from distseg.parallel import Learner
from distseg.parallel.stopwatch import SECTIONS
from distseg.tracking.catalogue import (
    AUXILIARY_ACCURACY,
    CLASS_SHARE,
    DISCRIMINATOR_ACCURACY,
    EXCESS,
    LABELLED_SHARE,
    MISMATCHED_ACCURACY,
    RATIO,
    SECTION,
    SOURCE_ENTROPY,
    TARGET_ENTROPY,
)
from distseg.train.batch import MicroBatch
from distseg.train.counts import Counts, mean
from distseg.train.objective import Scored
from shards.sample import IGNORE_INDEX

# squares, since sums of these over micro-batches and ranks are right, and those of norms are not
_SQUARES = ("gradient/adversarial_squared", "gradient/cross_entropy_squared")
SECTIONS_OF_A_RANK = ("data", *SECTIONS)
# what every rank tells of itself: seconds of a step and of its sections, bytes
OF_A_RANK = ("step", "memory", *SECTIONS_OF_A_RANK)
# of the table of ranks
COLUMNS = ("rank", "step, seconds", "memory, bytes", *(f"{one}, seconds" for one in OF_A_RANK[2:]))


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
    of its own; so is that of the discriminator of "auxiliary_real" and "auxiliary_fake".
    """
    sums = {
        kind: score_sums(one.scores, one.mask, kind.endswith("real"), form)
        for kind, one in scored.items()
    }
    # scaled as losses are, since `gather` divides every metric by the number of ranks
    on_real, on_fake = (mean(sums[kind], scored[kind].num_scores) for kind in ("real", "fake"))

    def accuracy(*kinds: str) -> Tensor:
        right = torch.stack([sums[kind][0] for kind in kinds]).sum()
        return mean(right, torch.stack([scored[kind].num_scores for kind in kinds]).sum())

    values = {
        DISCRIMINATOR_ACCURACY: accuracy("real", "fake"),
        "discriminator/logit_gap": on_real[1] - on_fake[1],
    }
    if form.has_probability:
        values |= {"discriminator/on_real": on_real[2], "discriminator/on_fake": on_fake[2]}
    if "mismatched" in scored:
        values[MISMATCHED_ACCURACY] = accuracy("mismatched")
    if "auxiliary_real" in scored:
        values[AUXILIARY_ACCURACY] = accuracy("auxiliary_real", "auxiliary_fake")
    return values


def entropies(
    probabilities: Tensor, targets: Targets, batch: MicroBatch, counts: Counts
) -> dict[str, Tensor]:
    """The entropy of predictions on each of two domains, as a share of its largest value: of the
    valid pixels of an image, the mean over the images. What is laid over the target counts in
    neither.

    probabilities: (n, C, h, w), of all images.
    """
    names: dict[Kind, str] = {"labelled": SOURCE_ENTROPY, "unlabelled": TARGET_ENTROPY}
    # no pass and no message of its own: the step has these, and sums over ranks come later
    entropy = self_information(probabilities.detach()).sum(1)  # (n, h, w)
    found = {}
    for kind, some in batch.slices().items():
        inside = targets.valid[some]
        if kind == "unlabelled":
            inside = inside & (targets.index[some] != GROUND_TRUTH)
        of_images = (entropy[some] * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        found[names[kind]] = mean(of_images.sum(), counts.images(kind))
    return found


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
    # 0 and not NaN, which would pass for a loss that is not finite
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


def means(metrics: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Metrics as means over the ranks, in one sum: the only wait for the device.

    Called on every rank, which all get the same values.
    """
    packed = [value.detach().double().to(ranks.device).reshape(1) for value in metrics.values()]
    # one copy to the host for all metrics; `.item()` of each would wait for the device as often
    sums = all_reduce_sum(torch.cat(packed)).tolist() if packed else []
    named = {name: total / ranks.world_size for name, total in zip(metrics, sums, strict=True)}
    return summary(named)


def told(own: dict[str, float], ranks: Ranks) -> list[list[float]]:
    """On the main rank what every rank tells of itself: rows of the values of OF_A_RANK; [] on the
    others. Called on every rank.
    """
    row = torch.tensor([own[name] for name in OF_A_RANK], dtype=torch.float64)
    # to the one rank that tells people: sent to all, the rows would be the square of the ranks
    return [each.tolist() for each in gathered_tensors(ranks, row)]


def summary(means: dict[str, float]) -> dict[str, float]:
    """The metrics with the squared gradients replaced by the ratio of their norms.

    Without it where one is 0 / 0.
    """
    values = {name: value for name, value in means.items() if name not in _SQUARES}
    # The ratio of sums, not the sum of ratios: it is the global batch's, whatever the
    # micro-batches.
    adversarial, own = (means.get(name, 0.0) for name in _SQUARES)
    return values | ({RATIO: (adversarial / own) ** 0.5} if own > 0 else {})


def sections(learners: Sequence[Learner]) -> dict[str, float]:
    """This rank's seconds of the sections of a step that was timed, of all networks together."""
    # both networks' together: a rank's pace is that of the step
    of_learners = [learner.stopwatch.seconds() for learner in learners]
    return {name: sum(of_one[name] for of_one in of_learners) for name in SECTIONS}


def pace(of_ranks: list[list[float]]) -> dict[str, float]:
    """The most that any rank waits for data and holds in memory; the sections of the median rank;
    and who keeps the others waiting, how much, and in which section. {} of no rank.

    of_ranks: rows of `told`. ranks/slowest_ratio: what the slowest rank computes and waits for
    data, over the same of the median rank. Under FSDP, ZeRO-3 and synchronised batch norm
    forward and backward wait for all ranks themselves, so that this stays near 1 whoever is slow.
    """
    if not of_ranks:
        return {}
    step, memory, *sections = zip(*of_ranks, strict=True)
    wait = max(sections[0])
    # the largest, as a step takes as long as its slowest rank, and fails as soon as one has no
    # memory
    values = {"data_wait_seconds": wait, "memory_bytes": max(memory)}
    # of the longest step: ranks wait for each other, so theirs are about equal
    values["data_wait_share"] = wait / max(step)
    for name, seconds in zip(SECTIONS_OF_A_RANK, sections, strict=True):
        values[SECTION + name] = statistics.median_low(seconds)
    # what a rank does by itself: in the exchange the quick ones wait for the slow one
    own = [sum(row[2:]) - row[OF_A_RANK.index("exchange")] for row in of_ranks]
    # the mean would hide a slow rank among few, as it is part of it
    others = statistics.median_low(own)  # of two ranks the quicker one
    if len(own) > 1 and others > 0:
        slowest = own.index(max(own))
        values |= {"ranks/slowest": float(slowest), "ranks/slowest_ratio": max(own) / others}
        for name, seconds in zip(SECTIONS_OF_A_RANK, sections, strict=True):
            values[EXCESS + name] = seconds[slowest] - values[SECTION + name]
    return values


def memory_bytes(device: torch.device) -> float:
    """The most that this process has held so far: of the GPU's memory, or resident on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in KiB
