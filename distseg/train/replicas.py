"""Whether all ranks hold the same networks."""

from __future__ import annotations

import torch

from distseg.distributed.ranks import Ranks, on_all, shared_error
from distseg.parallel.parameter_shards import shard_of
from distseg.train.step import Pair


def check_equal(ranks: Ranks, pair: Pair, step: int) -> None:
    """Raise RuntimeError, on every rank, unless all ranks hold the same networks, bit by bit.

    Compared is what more than one rank holds: everything under DDP and ZeRO stages 0 to 2; under
    FSDP the slices of ranks with the same ones (`shard_size`) and whatever is whole, such as
    buffers; at ZeRO stage 3, which has a part on one rank only, what is whole: buffers, the
    discriminator, parameters below DeepSpeed's threshold.
    """
    named = {"segmentor": pair.segmentor, "discriminator": pair.discriminator}
    sums = on_all(
        ranks, {name: _fingerprint(it.network) for name, it in named.items() if it is not None}
    )
    for name in sums[0]:
        of_ranks = [of_rank[name] for of_rank in sums]
        # a rank's slices are compared with those of the first rank that holds the same ones
        first = {which: of_slices for (which, of_slices), _ in reversed(of_ranks)}
        expected = [(first[which], of_ranks[0][1]) for (which, _), _ in of_ranks]
        found = [(of_slices, of_whole) for (_, of_slices), of_whole in of_ranks]
        others = ", ".join(str(rank) for rank in range(len(found)) if found[rank] != expected[rank])
        if others:
            text = f"step {step}: the {name} of rank {others} differs from rank 0's, perhaps in the last checkpoint too"
            error = RuntimeError(
                f"{text}. A faulty device, or a network that draws random numbers per rank?"
            )
            raise shared_error(error)


@torch.no_grad()
def _fingerprint(network: torch.nn.Module) -> tuple[tuple[int, int], int]:
    """((which slices, a sum over their bits), the same sum over parameters and buffers that are
    whole).
    """
    held = [shard_of(tensor) for tensor in network.state_dict().values()]
    slices = [part.rows for part in held if part.count > 1]
    which = max(part.index for part in held)
    return (which, _bit_sum(slices)), _bit_sum([part.rows for part in held if part.count == 1])


def _bit_sum(tensors: list[torch.Tensor]) -> int:
    """A sum over the bits of tensors, each with a weight of its own."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    sums = [tensor.contiguous().view(integers[tensor.element_size()]).sum() for tensor in tensors]
    weighted = [(2 * place + 1) * value for place, value in enumerate(sums)]
    return int(torch.stack(weighted).sum()) if weighted else 0
