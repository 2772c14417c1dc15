"""What the sums over the global batch are divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distseg.distributed.ranks import all_reduce_sum
from distseg.losses.predicted import Kind, Targets
from distseg.losses.terms import Term, count_scores
from distseg.train.objective import Objective


def mean(local_sum: Tensor, count: Tensor) -> Tensor:
    """A mean whose gradient, averaged over the ranks, is that of (sum over ranks) / count.

    A count of 0 gives 0 with a live graph: a rank that skipped its backward would leave the others
    waiting. One that is none (NaN, infinite, below 0), of a term of the user's own, gives NaN: the
    step is skipped on all ranks, whose counts are one, and Trainer names the term.
    """
    # `where` and not an `if`, which would wait for the device
    divisor = count.where(count != 0, 1).where(count.isfinite(), torch.nan)
    # The learners average gradients over ranks, as DDP does. Times the world size that is the sum,
    # and over the global count it is the mean, whatever the share of void on each rank. A mean of
    # the ranks' own means is another number: pixels on a rank with much void would count more.
    return local_sum * (dist.get_world_size() / divisor).to(local_sum.dtype)


@dataclass(frozen=True)
class Counts:
    """Counts over all ranks and micro-batches of a step, the same on every rank."""

    # float64, as fp32 counts no further than 2^24 pixels: 64 images of 512 x 512 px
    sums: Mapping[str, Tensor]  # scalars, float64
    num_micro_batches: int

    @classmethod
    def over_ranks(
        cls, objective: Objective, targets: Mapping[Kind, Targets], num_micro_batches: int
    ) -> Counts:
        """Of this rank's whole share of a step, by kind of image; called on every rank.

        They follow from the labels alone, so one all-reduce before the first forward gives them
        all.
        """
        # Without them every loss would need a collective of its own, between the forwards that it
        # stops.
        judging, local = objective.judging, {}
        # all terms, active or not: what is sent must not depend on anything that ranks could see
        # differently
        for term in objective.terms:
            if term.images in targets and term.is_counted:
                local[f"term/{term.name}"] = _sound(term.count(targets[term.images]))
            if term.images in targets and term.share:
                local[f"candidates/{term.name}"] = term.candidates(targets[term.images])
        for kind, of_kind in targets.items():
            # two numbers: reductions divide the loss by images, but accuracy is always over scores
            local[f"divisor/{kind}"] = judging.divisor(of_kind)
            local[f"scores/{kind}"] = judging.num_scores(of_kind)
            local[f"images/{kind}"] = count_scores(of_kind, per_cell=False)
        # in one message, as its cost is the latency, not the bytes
        summed = all_reduce_sum(torch.stack(list(local.values())))
        return cls(dict(zip(local, summed, strict=True)), num_micro_batches)

    def of_term(self, term: Term) -> Tensor:
        """What a term's sum is divided by, as far as the labels tell."""
        return self.sums[f"term/{term.name}"]

    def candidates(self, term: Term) -> Tensor:
        """Among how many pixels a term chooses."""
        return self.sums[f"candidates/{term.name}"]

    def images(self, kind: Kind) -> Tensor:
        """How many images of a kind there are."""
        return self.sums[f"images/{kind}"]

    def chosen(self, local: Tensor) -> Tensor:
        """What a term that chooses divides by: how many all ranks have chosen in this micro-batch.

        Times the number of micro-batches, so that the means of all of them add up to their mean.
        """
        # cloned: the sum is taken in place, and the local count is a metric yet
        return all_reduce_sum(_sound(local).clone()) * self.num_micro_batches

    def judged(self, kinds: Sequence[Kind]) -> tuple[Tensor, Tensor]:
        """Of the discriminator's scores on one label map of each image of these kinds.

        What its loss is divided by, and how many (valid) scores there are.
        """
        divisors = torch.stack([self.sums[f"divisor/{kind}"] for kind in kinds])
        scores = torch.stack([self.sums[f"scores/{kind}"] for kind in kinds])
        return divisors.sum(), scores.sum()


def _sound(count: Tensor) -> Tensor:
    """A rank's count; NaN for one below 0, which another rank's would hide in the sum."""
    return count.where(count >= 0, torch.nan)
