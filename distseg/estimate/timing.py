"""How long a step would take on given hardware: a model of counted work, and nothing measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from distseg.estimate.hollow import Collective, Work

# the share of a step, its backward, that an exchange can hide behind (docs: benchmarks/RESULTS.md)
HIDING = 0.59
LATENCY_IN_NODE, LATENCY_OF_NODE = 3e-6, 8e-6  # seconds a message, as of benchmarks/scaling.py
# of a ring: what each rank sends, in units of the payload times (n - 1) / n
_TURNS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Chip:
    """A GPU by its maker's data sheet, dense arithmetic.

    tflops: by type, 10^12 operations a second. memory_bandwidth: TB/s. link_gbs: GB/s that it sends
    to the other GPUs of its node, half of what data sheets give for both directions.
    """

    tflops: dict[str, float]
    memory_bandwidth: float
    link_gbs: float
    source: str


def _tflops(bf16: float, tf32: float, fp32: float, fp64: float) -> dict[str, float]:
    return {"bf16": bf16, "tf32": tf32, "fp32": fp32, "fp64": fp64}


CHIPS = {
    "l4": Chip(_tflops(121, 60, 30.3, 0.49), 0.3, 32, "NVIDIA L4 data sheet"),
    "a100-40": Chip(_tflops(312, 156, 19.5, 19.5), 1.555, 300, "NVIDIA A100 data sheet"),
    "a100": Chip(_tflops(312, 156, 19.5, 19.5), 2.039, 300, "NVIDIA A100 data sheet"),
    "h100": Chip(_tflops(989, 494, 67, 67), 3.35, 450, "NVIDIA H100 SXM data sheet"),
    "h200": Chip(_tflops(989, 494, 67, 67), 4.8, 450, "NVIDIA H200 SXM data sheet"),
}


@dataclass(frozen=True)
class Hardware:
    """What the model counts with, in operations and bytes a second.

    efficiency: the share of both that kernels reach. gpus_per_node: ranks of a node, in a row.
    """

    tflops: dict[str, float]
    memory_bandwidth: float
    link: float
    node_link: float
    efficiency: float
    gpus_per_node: int


@dataclass(frozen=True)
class Seconds:
    """Of a step: computation, exchange, what of the exchange nothing hides, and both together."""

    compute: float
    exchange: float
    exposed: float
    step: float


def seconds_of(
    work: Iterable[Work], collectives: Iterable[Collective], hardware: Hardware, tf32: bool
) -> Seconds:
    """Kernel by kernel the longer of its arithmetic and its traffic, one after the other; of the
    exchange what does not fit behind the backward comes on top.
    """
    compute = sum(_kernel(it, hardware, tf32) for it in work)
    exchange = sum(exchange_seconds(it, hardware) for it in collectives)
    # as of benchmarks/scaling.py
    exposed = max(0.0, exchange - HIDING * compute)
    return Seconds(compute, exchange, exposed, compute + exposed)


def exchange_seconds(collective: Collective, hardware: Hardware) -> float:
    """A ring within the nodes, and one between them."""
    turns = _TURNS.get(word_of(collective.name), 1)
    # ranks of a group need not lie next to each other: replicas are a node apart
    nodes = len({rank // hardware.gpus_per_node for rank in collective.ranks})
    inside = math.ceil(len(collective.ranks) / nodes)
    size = turns * collective.num_bytes
    within = (inside - 1) / inside * size / hardware.link + turns * (inside - 1) * LATENCY_IN_NODE
    between = (nodes - 1) / nodes * size / hardware.node_link
    return within + between + turns * math.ceil(math.log2(nodes)) * LATENCY_OF_NODE


def sent_bytes(collective: Collective) -> float:
    """What each rank sends in a ring."""
    count = len(collective.ranks)
    return _TURNS.get(word_of(collective.name), 1) * (count - 1) / count * collective.num_bytes


def word_of(name: str) -> str:
    """The field's word for a collective of c10d: all_reduce for allreduce_."""
    plain = name.strip("_").replace("allreduce", "all_reduce").replace("allgather", "all_gather")
    return next((word for word in _TURNS if plain.startswith(word)), plain)


def _kernel(work: Work, hardware: Hardware, tf32: bool) -> float:
    kinds = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float64: "fp64"}
    kind = kinds.get(work.dtype, "tf32" if tf32 else "fp32")
    # a kernel reads and writes while it computes, so the longer of the two counts
    arithmetic = work.operations / (hardware.tflops[kind] * hardware.efficiency)
    return max(arithmetic, work.bytes_moved / (hardware.memory_bandwidth * hardware.efficiency))
