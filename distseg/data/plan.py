"""The order of samples: a pure function of the seed and the position, the same for every world size."""

from __future__ import annotations

import functools

import numpy as np

from shards.errors import InputError

MAX_POSITION = 2**64  # positions and seeds are the two 64-bit words of a Philox key


class Plan:
    """The endless sequence of samples that all ranks share, addressed by position 0, 1, 2, ...

    Position p lies in epoch p // num_samples and shows sample permutation(seed, epoch)[p % num_samples], so
    every sample comes exactly once per epoch. Nothing here depends on rank, world size or thread: the state
    of a stream is one integer. Safe to share between threads. Raises InputError for an empty split or a seed
    outside 0..2^64-1.
    """

    def __init__(self, num_samples: int, seed: int):
        if num_samples < 1:
            raise InputError(f"{num_samples} samples", "at least one sample", "choose a split that holds samples")
        if not 0 <= seed < MAX_POSITION:
            raise InputError(f"seed={seed}", "an integer from 0 to 2^64-1", "choose another seed")
        self.num_samples = num_samples
        self.seed = seed
        # Neighbouring batches reach over one boundary of epochs. (Over more only where the set is tiny, and
        # then drawing its order anew costs nothing.)
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

    def sample_index(self, position: int) -> int:
        """Index in 0..num_samples-1 of the sample at this position."""
        epoch, offset = divmod(position, self.num_samples)
        return int(self._permutation(epoch)[offset])

    def augmentation_rng(self, position: int) -> np.random.Generator:
        """A fresh generator for the augmentation at this position, independent of the order of samples."""
        # The same key as an epoch's order where position == epoch, but 2^192 draws further on: never the same
        # numbers.
        return np.random.Generator(np.random.Philox(key=self._key(position), counter=[0, 0, 0, 1]))

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=self._key(epoch))).permutation(self.num_samples)

    def _key(self, word: int) -> np.ndarray:
        return np.array([self.seed, word], dtype=np.uint64)  # a plain list with a large word turns into floats


def rank_positions(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """Positions that one rank takes of the global batch [step * batch_size, (step + 1) * batch_size).

    batch_size is global. The slices of all ranks, in order of rank, are the batch. Raises InputError when
    world_size does not divide batch_size, and for a rank outside 0..world_size-1.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} of {world_size}", "0 <= rank < world_size", "check how the ranks were started")
    if batch_size < 1 or batch_size % world_size:
        below = max(batch_size, 0) // world_size * world_size
        nearest = " or ".join(str(size) for size in (below, below + world_size) if size)
        got = f"batch_size={batch_size} on {world_size} ranks"
        raise InputError(got, f"a multiple of {world_size}, so that every rank gets as much", f"batch_size={nearest}")
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return range(first, first + share)
