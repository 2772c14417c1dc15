"""What `distseg estimate` says of a rank's memory, beside what a rank holds.

Measured: real ranks of one thread with gloo, processes of their own, take the same steps on noise;
the most bytes at a time are those that torch's CPU allocator has given out, as torch.profiler
records them (profile_memory), temporary ones inside of kernels and gloo's copies of what it sends
among them. What oneDNN takes for itself is no tensor's, and not in it.
Run: python -m benchmarks.memory [--ranks 2]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile

from benchmarks.comm import STRATEGIES
from benchmarks.conditions import conditions
from distseg.config import loading
from distseg.distributed.ranks import Ranks, joined
from distseg.estimate.job import (
    build_job,
    filled,
    fullest_step,
    made_up,
    prepared,
    take_step,
    without_memory,
)
from distseg.estimate.simulated import NUM_STEPS, pretended, simulate
from shards.files import say

NETWORKS = {
    "deeplabv3_efficientnet_lite0": ["preset=stanford_semi", "data.crop_px=96"],
    "deeplabv2_resnet101": ["preset=voc_hung_semi", "data.crop_px=65"],
    "fcn8s_vgg16": ["preset=road_fcn8s", "data.crop_px=64"],
    "dpt_vitb14": ["preset=ade20k_dpt", "data.crop_px=252"],
}
# with blocks whose activations may be computed again
TRANSFORMERS = ("dpt_vitb14",)
RELEASE_SECONDS = 0.02  # that gloo's thread gets, on a busy machine too, to let go of its tensors


def cases(network: str, num_ranks: int, batch: int) -> dict[str, list[str]]:
    """What a network is trained with: under every strategy, accumulated, in bf16, and with
    activations that are computed again.
    """
    chosen = dict(STRATEGIES)
    if importlib.util.find_spec("deepspeed") is None:
        say("deepspeed is left out, as there is no package of that name")
        chosen = {name: it for name, it in chosen.items() if not name.startswith("deepspeed")}
    if batch > 1:
        chosen["ddp, accumulated"] = ["gradient_accumulation_steps=2"]
    chosen["ddp, bf16"] = ["precision=bf16"]
    if network in TRANSFORMERS:
        for kind in ("selective", "blocks"):
            again = f"segmentor.activation_checkpointing={kind}"
            chosen[f"fsdp, {kind}"] = ["parallel.strategy=fsdp", again]
        in_bf16 = ["parallel.strategy=fsdp", "precision=bf16"]
        chosen["fsdp, bf16"] = in_bf16
        chosen["fsdp, gathered bf16"] = [*in_bf16, "parallel.gather_dtype=bf16"]
    size = num_ranks * batch
    words = [*NETWORKS[network], f"segmentor={network}", f"batch_size={size}", "precision=fp32"]
    words.append(f"semi.batch_size={size}")
    return {name: [*words, *more] for name, more in chosen.items()}


def start(network: str, num_ranks: int, further: list[str]) -> Iterator[tuple[str, int]]:
    """The cases of a network and their peaks on rank 0, on so many ranks of new processes.

    further: arguments of this command, which say what is measured.
    """
    launcher = [f"--nproc_per_node={num_ranks}", "--standalone", "-m", "benchmarks.memory"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, f"--measured={network}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *further],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the profiler tells of every start
        text=True,
    ) as ran:
        for line in ran.stdout or ():
            if line.startswith('{"peak"'):
                told = json.loads(line)
                yield told["name"], told["peak"]
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {ran.returncode}")


def measure(network: str, batch: int, only: list[str] | None) -> None:
    """The cases of a network on this rank, a line of JSON each; only: some of them."""
    with joined("cpu") as ranks:
        for name, overrides in cases(network, ranks.world_size, batch).items():
            if name not in (only or [name]):
                continue
            peak = measured(overrides, ranks)
            if ranks.is_main:
                print(json.dumps({"peak": peak, "name": name}), flush=True)
        os._exit(0)  # a thread of the profiler now and then aborts an ordinary exit


def measured(overrides: list[str], ranks: Ranks) -> int:
    """The most bytes at a time on this rank, from its networks' first tensor on."""
    torch.manual_seed(0)
    gc.collect()  # of the case before, or what it gives back would count here
    config = prepared(loading.outline(overrides)[0])
    networks = without_memory(config, config.data.num_classes, ranks.world_size)
    with (
        released_before_it_goes_on(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        networks = filled(networks)
        for network in networks:
            for tensor in () if network is None else network.state_dict().values():
                tensor.zero_()
        trainer = build_job(config, networks, ranks)
        for _ in range(NUM_STEPS):
            take_step(trainer, made_up(config, fullest_step(config), ranks.world_size))
    return most_bytes(recorded)


@contextmanager
def released_before_it_goes_on() -> Iterator[None]:
    """Within it, whoever has waited for a collective goes on when gloo's thread has let go of it.

    The profiler sees the threads of the program alone: what gloo's thread gives back, as the last
    that has it, would be taken for held until the end.
    """
    wait = Work.wait

    def wait_longer(work: Work, *arguments: Any) -> bool:
        result = wait(work, *arguments)
        time.sleep(RELEASE_SECONDS)
        return result

    Work.wait = wait_longer  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Work.wait = wait  # type: ignore[method-assign]


def most_bytes(recorded: profile) -> int:
    """The most bytes at a time. Raises SystemExit where blocks were given back unseen."""
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    changes = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            changes.append(event)
    held: dict[int, int] = {}
    most = total = unseen = 0
    for event in sorted(changes, key=lambda it: it.start_time_ns):
        change, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        if change > 0:
            # what is given out was free
            unseen += held.pop(address, 0)
            held[address] = change
        else:
            held.pop(address, None)
        total += change
        most = max(most, total)
    if unseen:
        raise SystemExit(f"{unseen / 1e6:.1f} MB were given back by a thread that nobody looked at")
    return most


def estimated(overrides: list[str], ranks: Ranks) -> int:
    """The same as `distseg estimate` has it, of a pretended job."""
    config = prepared(loading.outline(overrides)[0])
    networks = without_memory(config, config.data.num_classes, ranks.world_size)
    return simulate(config, networks, ranks).peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="labelled images a rank")
    parser.add_argument("--measured", choices=NETWORKS, help="on this rank of a job")
    parser.add_argument("--case", action="append", help='one of them, for example "fsdp, blocks"')
    parser.add_argument("networks", nargs="*", help=f"none: {', '.join(NETWORKS)}")
    options = parser.parse_args()
    if options.measured:
        measure(options.measured, options.batch, options.case)
    print(conditions(threads=1))
    print(f"{options.ranks} ranks, {options.batch} labelled images each; the most MB at a time")
    print(f"{'network':30}{'strategy':22}{'measured':>9}{'estimated':>10}{'':>7}", flush=True)
    arguments = [f"--batch={options.batch}", *(f"--case={name}" for name in options.case or ())]
    # one for all: DeepSpeed keeps the first group that it sees
    with pretended(options.ranks) as ranks:
        for network in options.networks or NETWORKS:
            under = cases(network, options.ranks, options.batch)
            for name, real in start(network, options.ranks, arguments):
                told = estimated(under[name], ranks)
                row = f"{network:30}{name:22}{real / 1e6:9.0f}{told / 1e6:10.0f}"
                print(f"{row}{told / real - 1:+7.1%}", flush=True)


if __name__ == "__main__":
    main()
