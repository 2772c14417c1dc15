"""That all ranks hold the same networks, from the first weights on, and the same code."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from distseg.config.code import references
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks, of_all
from distseg.parallel.parameter_shards import shard_of
from distseg.train.networks import Networks
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


@dataclass(frozen=True)
class FirstWeights:
    """What a rank has built, before anything is spread: its host, each network's fingerprint, and
    what was read from files.
    """

    host: str
    of_networks: list[Fingerprint]
    reports: list[str]


def share_first_weights(ranks: Ranks, networks: Networks, moved: Callable[[], None]) -> str | None:
    """Give every rank rank 0's networks, bit by bit, where any has built others. Returns what is to
    be told of that; None: all have built the same. moved: called at each tensor that is sent.
    """
    # Not refused: kinds of CPUs may draw other last bits from one seed. DDP sends rank 0's
    # parameters in any case; FSDP would join rows of several networks.
    built = [network for network in networks if network is not None]
    reports = [str(getattr(network, "init_report", None) or "") for network in built]
    own = FirstWeights(socket.gethostname(), list(map(_fingerprint, built)), reports)
    told = of_all(ranks, own, _other_first_weights)
    if told is not None:
        for network in built:
            _take_from_main(network, moved)
    return told


def _other_first_weights(of_ranks: list[FirstWeights]) -> str | None:
    first = of_ranks[0]
    others = [rank for rank, own in enumerate(of_ranks) if own.of_networks != first.of_networks]
    if not others:
        return None
    other = of_ranks[others[0]]
    text = f"first weights: rank {', '.join(map(str, others))} had built other ones than rank 0; "
    text += "all have those of rank 0 now"
    # only the first: who mends its file looks at the next start again
    if other.reports != first.reports:
        for rank, own in ((0, first), (others[0], other)):
            text += f"; rank {rank} on {own.host}: {', '.join(filter(None, own.reports)) or 'none'}"
        return text
    return f"{text}; from another file on {other.host} than on {first.host}, or another kind of CPU"


@torch.no_grad()
def _take_from_main(network: nn.Module, moved: Callable[[], None]) -> None:
    # buffers too, as they are in state_dict
    for tensor in network.state_dict().values():
        # as bytes, which every backend sends, in one layout, which it asks for
        sent = tensor.contiguous().flatten().view(torch.uint8)
        dist.broadcast(sent, 0)
        tensor.copy_(sent.view(tensor.dtype).view(tensor.shape))
        moved()


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
