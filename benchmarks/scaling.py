"""How much speed a second rank brings, measured; and what a model of the network says about more.

Measured: the step on 2 ranks of 1 thread against 1 rank of 1 thread, images a rank unchanged, in alternating runs.
Modelled: t(N) = t_c (1 + j sqrt(2 ln N)) + max(0, t_S + t_D - h t_c) + t_last, with t_c the computation, j its spread
over ranks (the slowest of N is waited for), t_S and t_D the all-reduces of the two networks' gradients, of which those
that end within the share h of t_c, the backward, are hidden, and t_last that of the last bucket, which never is. An
all-reduce of M bytes over n nodes of g GPUs is a ring inside and a ring between the nodes:
2 (g-1)/g M/B_g + 2 (g-1) a_g + 2 (n-1)/n M/B_n + 2 ceil(log2 n) a_n.
Run: python -m benchmarks.scaling [--rounds 3] [--compute-ms 20] [--gradient-bytes 4]
"""

from __future__ import annotations

import argparse
import math
import statistics

from benchmarks.conditions import conditions
from benchmarks.worker import start
from shards.files import tracked

GPUS = (1, 8, 16, 64, 256, 1024)
GPUS_PER_NODE = 8
BYTES_PER_SECOND_IN_NODE, LATENCY_IN_NODE = 400e9, 3e-6  # NVLink
BYTES_PER_SECOND_OF_NODE, LATENCY_OF_NODE = 50e9, 8e-6  # one link of 400 Gb/s a node
JITTER, HIDING = 0.01, 0.59  # standard deviation of a rank's computation; the backward's share of it
LAST_BUCKET = 1e6  # bytes: DDP's first bucket, which is full last


def all_reduce_seconds(size: float, gpus: int) -> float:
    """An all-reduce of `size` bytes over `gpus` GPUs."""
    inside, nodes = min(gpus, GPUS_PER_NODE), math.ceil(gpus / GPUS_PER_NODE)
    seconds = 2 * (inside - 1) / inside * size / BYTES_PER_SECOND_IN_NODE + 2 * (inside - 1) * LATENCY_IN_NODE
    between = 2 * (nodes - 1) / nodes * size / BYTES_PER_SECOND_OF_NODE
    return seconds + between + 2 * math.ceil(math.log2(nodes)) * LATENCY_OF_NODE


def efficiency(gpus: int, compute: float, segmentor: float, discriminator: float) -> float:
    """t_c / t(N); sizes in bytes of gradients."""
    slowest = compute * (1 + JITTER * math.sqrt(2 * math.log(gpus)))
    sent = all_reduce_seconds(segmentor, gpus) + all_reduce_seconds(discriminator, gpus)
    return compute / (slowest + max(0.0, sent - HIDING * compute) + all_reduce_seconds(LAST_BUCKET, gpus))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=161, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=2, help="labelled images a rank, and as many unlabelled ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--compute-ms", type=float, default=20.0, help="the model's step on one GPU")
    parser.add_argument("--gradient-bytes", type=int, default=4, help="4: fp32, as DDP sends them")
    options = parser.parse_args()
    arguments = [f"--{name}={getattr(options, name)}" for name in ("size", "batch", "repetitions")] + ["--device=cpu"]
    ratios, of_machine, sizes = [], [], {}
    for number in tracked(range(options.rounds), options.rounds, "rounds"):
        one, two = (start(ranks, arguments) for ranks in (1, 2))
        ratios.append(one["step_seconds"] / two["step_seconds"])
        of_machine.append(one["step_seconds"] / two["alone_seconds"])
        sizes = one["sizes"]
        print(f"round {number + 1} of {options.rounds}: efficiency of 2 ranks {ratios[-1]:.3f}", flush=True)
    print(conditions(threads=1))
    print(f"measured, 2 ranks of 1 thread against 1 of 1: {statistics.median(ratios):.3f}", end=" ")
    print(f"({statistics.median(of_machine):.3f} where the 2 exchange nothing: what the machine itself allows)\n")
    print(f"modelled: {options.compute_ms:g} ms a step, {options.gradient_bytes} bytes a gradient,")
    within = f"{BYTES_PER_SECOND_IN_NODE / 1e9:.0f} GB/s and {LATENCY_IN_NODE * 1e6:.0f} us"
    print(f"{GPUS_PER_NODE} GPUs a node, within {within},")
    print(f"between nodes {BYTES_PER_SECOND_OF_NODE / 1e9:.0f} GB/s and {LATENCY_OF_NODE * 1e6:.0f} us,")
    print(f"spread {JITTER:.0%}, {HIDING:.0%} of the step hides communication, last bucket {LAST_BUCKET / 1e6:g} MB")
    payload = [sizes[name] * options.gradient_bytes for name in ("segmentor", "discriminator")]
    for gpus in GPUS:
        print(f"{gpus:6} GPUs  {efficiency(gpus, options.compute_ms / 1e3, *payload):.3f}")


if __name__ == "__main__":
    main()
