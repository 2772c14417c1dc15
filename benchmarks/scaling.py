"""How much speed a second rank brings, measured; and what a model of the network says about more.

Measured: the step on 2 ranks of 1 thread against 1 rank of 1 thread, images a rank unchanged, step
by step in turn. Modelled: t(N) = t_c (1 + j sqrt(2 ln N)) + max(0, t_S + t_D - h t_c) + t_last,
with t_c the computation, j its spread over ranks (the slowest of N is waited for), t_S and t_D the
all-reduces of the two networks' gradients, of which those that end within the share h of t_c, the
backward, are hidden, and t_last that of the last bucket, which never is. An all-reduce of M bytes
over n nodes of g GPUs is a ring inside and a ring between the nodes: 2 (g-1)/g M/B_g + 2 (g-1) a_g
+ 2 (n-1)/n M/B_n + 2 ceil(log2 n) a_n. Run: python -m benchmarks.scaling [--repetitions 15]
[--compute-ms 20] [--gradient-bytes 4]
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.connection import Connection

import torch
from torch.distributed import barrier

from benchmarks.conditions import conditions
from benchmarks.worker import build, size_of, stepper
from distseg.config import loading
from distseg.distributed.device import reuse_memory
from distseg.distributed.ranks import setup
from shards.files import tracked

GPUS = (1, 8, 16, 64, 256, 1024)
GPUS_PER_NODE = 8
BYTES_PER_SECOND_IN_NODE, LATENCY_IN_NODE = 400e9, 3e-6  # NVLink
BYTES_PER_SECOND_OF_NODE, LATENCY_OF_NODE = 50e9, 8e-6  # one link of 400 Gb/s a node
# standard deviation of a rank's computation; the backward's share of it
JITTER, HIDING = 0.01, 0.59
LAST_BUCKET = 1e6  # bytes: DDP's first bucket, which is full last


def all_reduce_seconds(size: float, gpus: int) -> float:
    """An all-reduce of `size` bytes over `gpus` GPUs."""
    inside, nodes = min(gpus, GPUS_PER_NODE), math.ceil(gpus / GPUS_PER_NODE)
    seconds = (
        2 * (inside - 1) / inside * size / BYTES_PER_SECOND_IN_NODE
        + 2 * (inside - 1) * LATENCY_IN_NODE
    )
    between = 2 * (nodes - 1) / nodes * size / BYTES_PER_SECOND_OF_NODE
    return seconds + between + 2 * math.ceil(math.log2(nodes)) * LATENCY_OF_NODE


def efficiency(gpus: int, compute: float, segmentor: float, discriminator: float) -> float:
    """t_c / t(N); sizes in bytes of gradients."""
    slowest = compute * (1 + JITTER * math.sqrt(2 * math.log(gpus)))
    sent = all_reduce_seconds(segmentor, gpus) + all_reduce_seconds(discriminator, gpus)
    return compute / (
        slowest + max(0.0, sent - HIDING * compute) + all_reduce_seconds(LAST_BUCKET, gpus)
    )


class Crew:
    """The ranks of one job, processes of one thread each, which wait while another crew takes its
    step.
    """

    def __init__(self, num_ranks: int, size: int, batch: int):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(num_ranks):
            pipe, theirs = context.Pipe()
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": num_ranks,
                "LOCAL_WORLD_SIZE": num_ranks,
            }
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = theirs, {name: str(value) for name, value in variables.items()}, size, batch
            self._processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()  # so that a rank that dies is an EOFError here
            del arguments
            self._pipes.append(pipe)
        self.sizes: dict[str, int] = [pipe.recv() for pipe in self._pipes].pop()

    def ask(self, name: str) -> float:
        """Seconds of one step, of the slowest rank.

        "step", or "alone", in which no gradient is exchanged.
        """
        for pipe in self._pipes:
            pipe.send(name)
        return max(pipe.recv() for pipe in self._pipes)

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send("")
        for process in self._processes:
            process.join()


def _serve(pipe: Connection, variables: dict[str, str], size: int, batch: int) -> None:
    os.environ.update(variables)
    ranks = setup("cpu", 300)
    torch.set_num_threads(1)
    reuse_memory()  # as distseg.train does
    config = loading.load(["preset=voc_hung_semi", "data.shards=unused"])
    pair, parts = build(config, ranks, size, batch)
    pipe.send(
        {
            "segmentor": size_of(pair.segmentor.network),
            "discriminator": size_of(pair.discriminator.network),
        }
    )
    steps = {
        "step": stepper(config, pair, parts),
        "alone": stepper(config, pair, parts, exchange=False),
    }
    while name := pipe.recv():
        barrier()
        start = time.perf_counter()
        steps[name]()
        pipe.send(time.perf_counter() - start)
    os._exit(0)


def _spread(values: list[float]) -> str:
    """The median, and between which the middle half lies."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=161, help="side of the images, pixels")
    parser.add_argument(
        "--batch", type=int, default=2, help="labelled images a rank, and as many unlabelled ones"
    )
    parser.add_argument("--repetitions", type=int, default=15, help="at least 2")
    parser.add_argument(
        "--compute-ms", type=float, default=20.0, help="the model's step on one GPU"
    )
    parser.add_argument("--gradient-bytes", type=int, default=4, help="4: fp32, as DDP sends them")
    options = parser.parse_args()
    if options.repetitions < 2:
        parser.error(f"--repetitions {options.repetitions}: at least 2 are needed for a spread")
    one, two = (Crew(ranks, options.size, options.batch) for ranks in (1, 2))
    turns: list[tuple[float, float, float]] = []
    for _ in tracked(range(options.repetitions + 1), options.repetitions + 1, "turns"):
        turns.append((one.ask("step"), two.ask("step"), two.ask("alone")))
    one.end()
    two.end()
    del turns[0]  # it warms up
    print(conditions(threads=1))
    print(
        "measured, 2 ranks of 1 thread against 1 of 1: "
        f"{_spread([one / two for one, two, _ in turns])}"
    )
    machine = _spread([one / alone for one, _, alone in turns])
    print(f"  where the 2 exchange nothing: {machine}, what the machine itself allows")
    print(
        f"  with the exchange against without: {_spread([alone / two for _, two, alone in turns])}"
    )
    print(f"  a step of 1 rank: {statistics.median(turn[0] for turn in turns):.2f} s\n")
    print(f"modelled: {options.compute_ms:g} ms a step, {options.gradient_bytes} bytes a gradient,")
    within = f"{BYTES_PER_SECOND_IN_NODE / 1e9:.0f} GB/s and {LATENCY_IN_NODE * 1e6:.0f} us"
    print(f"{GPUS_PER_NODE} GPUs a node, within {within},")
    between = f"{BYTES_PER_SECOND_OF_NODE / 1e9:.0f} GB/s and {LATENCY_OF_NODE * 1e6:.0f} us"
    print(f"between nodes {between},")
    print(
        f"spread {JITTER:.0%}, {HIDING:.0%} of the step hides communication, "
        f"last bucket {LAST_BUCKET / 1e6:g} MB"
    )
    payload = [two.sizes[name] * options.gradient_bytes for name in ("segmentor", "discriminator")]
    for gpus in GPUS:
        print(f"{gpus:6} GPUs  {efficiency(gpus, options.compute_ms / 1e3, *payload):.3f}")


if __name__ == "__main__":
    main()
