"""What the sums over the global batch are divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distseg.distributed.ranks import all_reduce_sum
from distseg.losses.terms import Kind, Targets, Term
from distseg.train.objective import Objective


def mean(local_sum: Tensor, count: Tensor) -> Tensor:
    """A mean whose gradient, averaged over the ranks, is that of (sum over ranks) / count.

    A count of 0 gives 0 with a live graph: a rank that skipped its backward would leave the others
    waiting.
    """
    divisor = count.where(count > 0, 1)
    return local_sum * (dist.get_world_size() / divisor).to(local_sum.dtype)


@dataclass(frozen=True)
class Counts:
    """Counts over all ranks and micro-batches of a step, the same on every rank."""

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
        judging, local = objective.judging, {}
        for term in objective.terms:
            if term.images in targets and term.is_counted:
                local[f"term/{term.name}"] = term.count(targets[term.images])
            if term.images in targets and term.share:
                local[f"candidates/{term.name}"] = term.candidates(targets[term.images])
        for kind, of_kind in targets.items():
            local[f"divisor/{kind}"] = judging.divisor(of_kind)
            local[f"scores/{kind}"] = judging.num_scores(of_kind)
        summed = all_reduce_sum(torch.stack(list(local.values())))
        return cls(dict(zip(local, summed, strict=True)), num_micro_batches)

    def of_term(self, term: Term) -> Tensor:
        """What a term's sum is divided by, as far as the labels tell."""
        return self.sums[f"term/{term.name}"]

    def candidates(self, term: Term) -> Tensor:
        """Among how many pixels a term chooses."""
        return self.sums[f"candidates/{term.name}"]

    def chosen(self, local: Tensor) -> Tensor:
        """What a term that chooses divides by: how many all ranks have chosen in this micro-batch.

        Times the number of micro-batches, so that the means of all of them add up to their mean.
        """
        return all_reduce_sum(local.clone()) * self.num_micro_batches

    def judged(self, kinds: Sequence[Kind]) -> tuple[Tensor, Tensor]:
        """Of the discriminator's scores on one label map of each image of these kinds.

        What its loss is divided by, and how many (valid) scores there are.
        """
        divisors = torch.stack([self.sums[f"divisor/{kind}"] for kind in kinds])
        scores = torch.stack([self.sums[f"scores/{kind}"] for kind in kinds])
        return divisors.sum(), scores.sum()
