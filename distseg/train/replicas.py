"""Whether all ranks hold the same networks, and code of the user's own."""

from __future__ import annotations

import functools
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distseg.config.code import references
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks, of_all
from distseg.parallel.parameter_shards import shard_of
from distseg.train.step import Pair
from shards.errors import InputError


@dataclass(frozen=True)
class Fingerprint:
    """What a rank holds of a network, as sums over bits.

    shard: which parameter shards it has (0 where parameters are full), and the sum over them;
    full: the sum over parameters and buffers that every rank has in full.
    """

    shard: int
    of_shard: int
    full: int


def check_equal(ranks: Ranks, pair: Pair, step: int) -> None:
    """Raise RuntimeError, on every rank, unless all ranks hold the same networks, bit by bit.

    Compared is what more than one rank holds: everything under DDP and ZeRO stages 0 to 2; under
    FSDP the shards of ranks with the same ones (`shard_size`) and whatever is full, such as
    buffers; at ZeRO stage 3, which has a part on one rank only, what is full: buffers, the
    discriminator, parameters below DeepSpeed's threshold.
    """
    # a few numbers a rank: sending weights to compare them would cost as much as a step
    own = {"segmentor": _fingerprint(pair.segmentor.network)}
    if pair.discriminator is not None:
        own["discriminator"] = _fingerprint(pair.discriminator.network)
    of_all(ranks, own, functools.partial(_check_fingerprints, step))


def _check_fingerprints(step: int, of_ranks: list[dict[str, Fingerprint]]) -> None:
    for name in of_ranks[0]:
        others = different([of_rank[name] for of_rank in of_ranks])
        if others:
            which = f"the {name} of rank {', '.join(map(str, others))} differs from rank 0's"
            text = f"step {step}: {which}, perhaps in the last checkpoint too"
            cause = "A faulty device, or a network that draws random numbers per rank?"
            raise RuntimeError(f"{text}. {cause}")


def check_same_code(ranks: Ranks, config: Config) -> None:
    """Raise InputError, on every rank, unless all have read the same files of the user's own."""
    # of files on a disk of each machine; without any there is nothing to send
    if not references(config):
        return
    compare = functools.partial(_check_code, config)
    of_all(ranks, (socket.gethostname(), config.code), compare)


def _check_code(config: Config, of_ranks: list[tuple[str, dict[str, str]]]) -> None:
    first_host, first = of_ranks[0]
    for rank, (host, own) in enumerate(of_ranks):
        other = [part for part in first | own if first.get(part) != own.get(part)]
        if other:
            part, _, file = other[0].partition(":")
            what = f"{part}={references(config)[part]}" + (
                f" imports {file}, which" if file else ""
            )
            got = f"{what} differs on rank {rank} ({host}) from rank 0's ({first_host})"
            action = "copy it to that machine, or name it on a file system that all of them share"
            raise InputError(got, "the same file on all ranks", action)


def different(of_ranks: Sequence[Fingerprint]) -> list[int]:
    """The ranks whose part is not that of the first rank which should hold the same."""
    # by shard: ranks of different shards hold different rows, and only those of one can be compared
    first: dict[int, int] = {}
    others = []
    for rank, own in enumerate(of_ranks):
        expected = first.setdefault(own.shard, own.of_shard)
        if own.of_shard != expected or own.full != of_ranks[0].full:
            others.append(rank)
    return others


@torch.no_grad()
def _fingerprint(network: torch.nn.Module) -> Fingerprint:
    # buffers too: running statistics that drift apart are scored, and no gradient would ever show
    # it
    held = [shard_of(tensor) for tensor in network.state_dict().values()]
    sharded = [part.rows for part in held if part.count > 1]
    full = [part.rows for part in held if part.count == 1]
    return Fingerprint(max(part.index for part in held), _bit_sum(sharded), _bit_sum(full))


def _bit_sum(tensors: list[torch.Tensor]) -> int:
    """A sum over the bits of tensors, each with a weight of its own."""
    # Bits, not values: 0.0 == -0.0 and NaN != NaN, and a float sum depends on its order.
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    # integers wrap around without an error, and to the same sum in any order
    sums = [tensor.contiguous().view(integers[tensor.element_size()]).sum() for tensor in tensors]
    # odd weights, which are invertible modulo 2^64: two tensors that were swapped give another sum
    weighted = [(2 * place + 1) * value for place, value in enumerate(sums)]
    # one copy to the host for all tensors
    return int(torch.stack(weighted).sum()) if weighted else 0
