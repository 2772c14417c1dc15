"""One strategy's alternating step on every rank; rank 0 prints its seconds, bytes and memory as a
line of JSON.

The step is that of preset=voc_hung_semi with every term on (DeepLabV2-ResNet-101 and the fully
convolutional discriminator), from random weights, on noise. comm.py and scaling.py start it with
torchrun. So can you, on GPUs too:
    torchrun --nproc_per_node=8 -m benchmarks.worker --size 321 --batch 10 parallel.strategy=fsdp
    precision=bf16
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.step import NUM_CLASSES, SEMI_STEP, images, networks
from distseg.config import loading
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks, setup, teardown
from distseg.parallel import wrap
from distseg.train.batch import Images
from distseg.train.schedules import phase
from distseg.train.step import Pair, training_step


def start(num_ranks: int, arguments: list[str], threads: int = 1) -> dict[str, Any]:
    """Run this file under torchrun on `num_ranks` ranks; what rank 0 printed."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_ranks}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [*torchrun, "-m", "benchmarks.worker", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
    # the profiler prints too
    return json.loads(done.stdout[done.stdout.rindex('{"result"') :])["result"]


def build(config: Config, ranks: Ranks, size: int, batch: int) -> tuple[Pair, list[Images]]:
    """Learners, and this rank's `batch` labelled and `batch` unlabelled images."""
    options = {"width": 64} | config.segmentor.options
    wrapped = zip(
        networks(config.segmentor.batch_norm, options["width"]),
        (config.segmentor_optimizer, config.discriminator_optimizer),
        strict=True,
    )
    pair = Pair.of(
        config,
        *(wrap(network, optimizer, config, ranks) for network, optimizer in wrapped),
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def on_device(part: Images) -> Images:
        return Images(
            part.pixels.to(ranks.device).contiguous(memory_format=layout),
            part.label.to(ranks.device),
        )

    return pair, [on_device(images(size, labelled, batch)) for labelled in (True, False)]


def stepper(
    config: Config, pair: Pair, parts: list[Images], exchange: bool = True
) -> Callable[[], None]:
    """One step, updates included; with exchange=False gradients stay on their rank."""
    learners = [pair.segmentor, pair.discriminator]

    def step() -> None:
        with ExitStack() as stack:
            for learner in learners:
                if not exchange and learner is not None:
                    stack.enter_context(learner.no_sync())
            training_step(pair, phase(SEMI_STEP, config), *parts)
        for learner in learners:
            if learner is not None:
                # the rates stay near 0, so that every repetition does the same work
                learner.step(1e-6)

    return step


def seconds_of(
    steps: dict[str, Callable[[], None]], repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each, repeated in turn, after one of each to warm up."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            _wait(device)
            before = time.perf_counter()
            step()
            _wait(device)
            if repetition:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def elements_sent(step: Callable[[], None]) -> dict[str, int]:
    """Tensor elements that a step gives to each kind of collective, from the profiler."""
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    found: dict[str, int] = defaultdict(int)
    for event in recorded.events() or []:
        backend, _, name = event.name.partition(":")
        shapes = [math.prod(shape) for shape in event.input_shapes or [] if shape]
        if backend in ("gloo", "nccl") and name.lstrip("_").startswith(("all_reduce", "broadcast")):
            found[name] += sum(shapes)
        elif event.name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            kind = "all_gather" if "gather" in event.name else "reduce_scatter"
            found[kind] += max(shapes)
    # gloo reduces and scatters by an all-reduce of the same size
    if found["reduce_scatter"] and found["all_reduce"] >= found["reduce_scatter"]:
        found["all_reduce"] -= found["reduce_scatter"]
    return dict(found)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this rank has held: on the GPU, or in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size_of(network: nn.Module) -> int:
    """Elements of all parameters that are trained."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    torch.distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=97, help="side of the images, pixels")
    parser.add_argument(
        "--batch", type=int, default=1, help="labelled images a rank, and as many unlabelled ones"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("overrides", nargs="*", help="such as parallel.strategy=fsdp")
    options = parser.parse_args()
    config = loading.load(["preset=voc_hung_semi", *options.overrides])
    ranks = setup(options.device, 300)
    before = peak_memory(ranks.device)
    segmentor, judge = networks(config.segmentor.batch_norm)
    sizes = {
        "segmentor": size_of(segmentor),
        "discriminator": size_of(judge),
        "classes": NUM_CLASSES,
    }
    del segmentor, judge
    pair, parts = build(config, ranks, options.size, options.batch)
    steps = {"step": stepper(config, pair, parts)}
    if config.parallel.strategy == "ddp":
        steps["alone"] = stepper(config, pair, parts, exchange=False)
    seconds = seconds_of(steps, options.repetitions, ranks.device)
    peak = torch.tensor(float(peak_memory(ranks.device) - before))
    found: dict[str, Any] = {
        f"{name}_seconds": statistics.median(values) for name, values in seconds.items()
    }
    found |= {
        "elements": elements_sent(steps["step"]),
        "sizes": sizes,
        "peak_bytes": _largest(peak, ranks),
    }
    if ranks.is_main:
        print(
            json.dumps(
                {"result": found | {"device": str(ranks.device), "world_size": ranks.world_size}}
            ),
            flush=True,
        )
    teardown()
    os._exit(0)  # a thread of the profiler, which no run has, now and then aborts an ordinary exit


def _largest(value: Tensor, ranks: Ranks) -> float:
    value = value.to(ranks.device)
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return float(value)


if __name__ == "__main__":
    main()
