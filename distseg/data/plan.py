"""The order of samples.

A pure function of the seed and the position, the same for every world size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from shards.errors import InputError
from shards.words import counted

MAX_POSITION = 2**64  # positions and seeds are the two 64-bit words of a Philox key
# Where on the sequence of a key each use of it begins, in units of 2^192 draws: never the same
# numbers twice
ORDER, AUGMENTATION, SHARD_ORDER, BLOCK, CHOICE, MIX = range(6)


class Plan:
    """The endless sequence of samples that all ranks share, addressed by position 0, 1, 2, ...

    Position p lies in epoch p // num_samples and shows sample permutation(seed, epoch)[p %
    num_samples], so every sample comes exactly once per epoch. Nothing here depends on rank, world
    size or thread: the state of a stream is one integer. Safe to share between threads. Raises
    InputError for an empty split or a seed outside 0..2^64-1.
    """

    def __init__(self, num_samples: int, seed: int):
        if num_samples < 1:
            raise InputError(
                f"{num_samples} samples",
                "at least one sample",
                "choose a split that holds samples",
            )
        if not 0 <= seed < MAX_POSITION:
            raise InputError(f"seed={seed}", "an integer from 0 to 2^64-1", "choose another seed")
        self.num_samples = num_samples
        self.seed = seed
        # Neighbouring batches reach over one boundary of epochs. (Over more only where the set is
        # tiny, and then drawing its order anew costs nothing.)
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

    def sample_index(self, position: int) -> int:
        """Index in 0..num_samples-1 of the sample at this position."""
        epoch, offset = divmod(position, self.num_samples)
        return int(self._permutation(epoch)[offset])

    def augmentation_rng(self, position: int) -> np.random.Generator:
        """A fresh generator for the augmentation at this position, independent of the order of
        samples.
        """
        return augmentation_rng(self.seed, position)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return _generator(self.seed, epoch, ORDER).permutation(self.num_samples)


class BlockPlan(Plan):
    """As Plan, with few shards in use at a time: for sets behind a URL that a cache does not hold,
    or very large ones.

    An epoch takes the shards in the order of a permutation, shards_per_block at a time, and
    shuffles the samples of those together. So a batch reads from one block, seldom two, and memory
    and start-up do not grow with the number of samples. shard_sizes: how many consecutive samples
    lie in each shard.
    """

    def __init__(self, shard_sizes: Sequence[int], shards_per_block: int, seed: int):
        super().__init__(sum(shard_sizes), seed)
        if shards_per_block < 1:
            raise InputError(
                f"{shards_per_block} shards a block", "at least one", "correct data.shuffle_block"
            )
        # (shards + 1,): where each shard's samples begin, and the end
        self._starts = np.cumsum([0, *shard_sizes])
        self._per_block = shards_per_block
        self._shard_order = functools.lru_cache(maxsize=2)(self._draw_shard_order)
        # drawn anew costs a millisecond
        self._block = functools.lru_cache(maxsize=8)(self._draw_block)

    def sample_index(self, position: int) -> int:
        """As Plan."""
        epoch, offset = divmod(position, self.num_samples)
        _, block_starts = self._shard_order(epoch)
        block = int(np.searchsorted(block_starts, offset, side="right")) - 1
        return int(self._block(epoch, block)[offset - block_starts[block]])

    def _draw_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's permutation of the shards, and the offset at which each block begins."""
        order = _generator(self.seed, epoch, SHARD_ORDER).permutation(len(self._starts) - 1)
        # in the order drawn: where each shard ends, and so after every shards_per_block-th a block
        ends = np.cumsum(np.diff(self._starts)[order])
        return order, np.concatenate([[0], ends[self._per_block - 1 : -1 : self._per_block]])

    def _draw_block(self, epoch: int, block: int) -> np.ndarray:
        shards = self._shard_order(epoch)[0][block * self._per_block :][: self._per_block]
        # few enough to be listed: of all samples of a large set that would be memory on every rank
        samples = np.concatenate([np.arange(*self._starts[shard : shard + 2]) for shard in shards])
        return _generator(self.seed, epoch, BLOCK, block).permutation(samples)


class BalancedPlan(Plan):
    """Each position draws a class, then one of the samples that show it: no epochs, samples of rare
    classes more often.

    class_pixels: (samples, classes) pixel counts. temperature: None, every class is as likely as
    the others; else class c has probability softmax((1 - f_c) / temperature) with its share of
    pixels f_c (Hoyer et al. 2022, DAFormer, section 3.2, "rare class sampling", there 0.01).
    Classes that no sample shows are left out.
    """

    def __init__(self, class_pixels: np.ndarray, seed: int, temperature: float | None = None):
        super().__init__(len(class_pixels), seed)
        # a class that is nowhere could be drawn, and would have no sample to give
        shown = np.flatnonzero(class_pixels.any(axis=0))
        if not len(shown):
            got = f"{counted(len(class_pixels), 'sample')} without a pixel of any class"
            raise InputError(got, "labels, to balance the classes", "write data.sampling=each_once")
        self._samples = [np.flatnonzero(class_pixels[:, index]) for index in shown]
        share = class_pixels.sum(axis=0)[shown] / class_pixels.sum()
        # relative to the rarest class: the same probabilities, and no exponent above 0
        weights = (
            np.ones(len(shown))
            if temperature is None
            else np.exp((share.min() - share) / temperature)
        )
        self._ends = np.cumsum(weights / weights.sum())
        self._ends[-1] = 1.0  # whatever the sum was rounded to: a draw is below it

    def sample_index(self, position: int) -> int:
        """As Plan."""
        # both from the position, so that this plan too has no state
        draw = _generator(self.seed, position, CHOICE).random(2)
        samples = self._samples[int(np.searchsorted(self._ends, draw[0], side="right"))]
        return int(samples[int(draw[1] * len(samples))])


class MixedPlan(Plan):
    """Several plans in one sequence, each of them with its share of every block of positions.

    A position belongs to one of the plans, and is one of that plan's own positions 0, 1, 2, ...,
    of which none is left out: so each goes through its own epochs. Of any n positions from 0 on, a
    plan of two has its share to within one, of more to within their number: no share drifts. Where
    in a block each comes is random. The samples of all plans are numbered one after the other.
    weights: shares as exact ratios, of any sum; block: positions, a batch for example.
    """

    def __init__(self, plans: Sequence[Plan], weights: Sequence[Fraction], block: int, seed: int):
        super().__init__(sum(plan.num_samples for plan in plans), seed)
        self.plans = tuple(plans)
        # of each plan and the end: the number of its first sample among those of all
        self.starts = np.cumsum([0, *(plan.num_samples for plan in plans)]).tolist()
        # of what those before it leave, so that all together are everything. Fractions: a float
        # would drift after enough positions
        left = [sum(weights[index:], Fraction()) for index in range(len(weights))]
        self._shares = [
            weight / rest if rest else Fraction()
            for weight, rest in zip(weights, left, strict=True)
        ]
        self._block_size = block
        self._block = functools.lru_cache(maxsize=8)(self._draw_block)

    def sample_index(self, position: int) -> int:
        """As Plan."""
        number, own = self.place(position)
        return self.starts[number] + self.plans[number].sample_index(own)

    def place(self, position: int) -> tuple[int, int]:
        """The number of the plan that a position belongs to, and its position in that plan."""
        block, offset = divmod(position, self._block_size)
        numbers, own = self._block(block)
        return int(numbers[offset]), int(own[offset])

    def taken(self, position: int) -> list[int]:
        """How many of the positions before this one belong to each plan; at the ends of blocks."""
        counts = []
        for share in self._shares:
            counts.append(position * share.numerator // share.denominator)
            position -= counts[-1]
        return counts

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(block,) numbers of plans in the order of a block, and their own positions."""
        first, end = (self.taken((block + more) * self._block_size) for more in (0, 1))
        numbers = np.repeat(np.arange(len(first)), np.subtract(end, first))
        numbers = _generator(self.seed, block, MIX).permutation(numbers)
        own = np.empty(len(numbers), np.int64)
        for number in range(len(first)):
            own[numbers == number] = np.arange(first[number], end[number])
        return numbers, own


def augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """As Plan.augmentation_rng, for those that have no plan."""
    return _generator(seed, position, AUGMENTATION)


def _generator(seed: int, word: int, use: int, part: int = 0) -> np.random.Generator:
    # a plain list with a large word turns into floats
    key = np.array([seed, word], dtype=np.uint64)
    # Philox, as it counts: every position's numbers are there at once, without those before it.
    # The counter's lowest word runs with the draws; part and use lie above, out of its reach.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, part, 0, use]))


def rank_positions(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """Positions that one rank takes of the global batch [step * batch_size, (step + 1) *
    batch_size).

    batch_size is global. The slices of all ranks, in order of rank, are the batch. Raises
    InputError when world_size does not divide batch_size, and for a rank outside 0..world_size-1.
    """
    if not 0 <= rank < world_size:
        raise InputError(
            f"rank {rank} of {world_size}",
            "0 <= rank < world_size",
            "check how the ranks were started",
        )
    if batch_size < 1 or batch_size % world_size:
        below = max(batch_size, 0) // world_size * world_size
        nearest = " or ".join(str(size) for size in (below, below + world_size) if size)
        got = f"batch_size={batch_size} on {world_size} ranks"
        raise InputError(
            got,
            f"a multiple of {world_size}, so that every rank gets as much",
            f"batch_size={nearest}",
        )
    # neighbours: then the slices of any number of ranks, joined in order, are the same batch
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return range(first, first + share)
