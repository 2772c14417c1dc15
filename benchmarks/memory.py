"""What `distseg estimate` says of a rank's memory, beside what a rank holds.

Measured: real ranks of one thread with gloo, processes of their own, take the same steps on noise;
the most bytes at a time are those that torch's CPU allocator has given out, as torch.profiler
records them (profile_memory), temporary ones inside of kernels among them. What oneDNN and gloo
take for themselves is no tensor's, and not in it. Run: python -m benchmarks.memory [--ranks 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import torch
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
from shards.files import say, tracked

NETWORKS = {
    "deeplabv3_efficientnet_lite0": ["preset=stanford_semi", "data.crop_px=160"],
    "deeplabv2_resnet101": ["preset=voc_hung_semi", "data.crop_px=97"],
    "fcn8s_vgg16": ["preset=road_fcn8s", "data.crop_px=128"],
}
COMMON = ["precision=fp32"]


@dataclass(frozen=True)
class Case:
    """A network under a strategy."""

    network: str
    strategy: str
    overrides: tuple[str, ...]


def cases(num_ranks: int, batch: int) -> list[Case]:
    """Every network under every strategy, and with accumulation."""
    chosen = dict(STRATEGIES)
    if importlib.util.find_spec("deepspeed") is None:
        say("deepspeed is left out, as there is no package of that name")
        chosen = {name: it for name, it in chosen.items() if not name.startswith("deepspeed")}
    if num_ranks > 1:
        chosen["fsdp, shards of 1"] = ["parallel.strategy=fsdp", "parallel.shard_size=1"]
    chosen["ddp, accumulated"] = ["gradient_accumulation_steps=2"]
    chosen["ddp, bf16"] = ["precision=bf16"]
    found = []
    for network, of_network in NETWORKS.items():
        size = num_ranks * batch
        words = [*of_network, f"segmentor={network}", f"batch_size={size}", *COMMON]
        words.append(f"semi.batch_size={size}")
        found += [Case(network, name, (*words, *more)) for name, more in chosen.items()]
    return found


def start(num_ranks: int, overrides: tuple[str, ...]) -> int:
    """`measured` on so many ranks; what rank 0 printed."""
    launcher = [f"--nproc_per_node={num_ranks}", "--standalone", "-m", "benchmarks.memory"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "--measured", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout[done.stdout.rindex('{"peak"') :])["peak"]


def measured(overrides: list[str]) -> int:
    """The most bytes at a time on this rank, from its networks' first tensor on."""
    torch.manual_seed(0)
    config = prepared(loading.outline(overrides)[0])
    with joined("cpu") as ranks:
        networks = without_memory(config, config.data.num_classes, ranks.world_size)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            networks = filled(networks)
            for network in networks:
                for tensor in () if network is None else network.state_dict().values():
                    tensor.zero_()
            trainer = build_job(config, networks, ranks)
            for _ in range(NUM_STEPS):
                take_step(trainer, made_up(config, fullest_step(config), ranks.world_size))
        events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(it.start_ns(), it.nbytes()) for it in events if it.name() == "[memory]"]
    most = total = 0
    for _, change in sorted(changes, key=lambda it: it[0]):
        total += change
        most = max(most, total)
    return most


def estimated(overrides: tuple[str, ...], ranks: Ranks) -> int:
    """The same as `distseg estimate` has it, of a pretended job."""
    config = prepared(loading.outline([*overrides])[0])
    networks = without_memory(config, config.data.num_classes, ranks.world_size)
    return simulate(config, networks, ranks).peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="labelled images a rank")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name has it")
    parser.add_argument("--measured", action="store_true", help="one case, on this rank")
    parser.add_argument("overrides", nargs="*", help="of one case")
    options = parser.parse_args()
    if options.measured:
        peak = measured(options.overrides)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps({"peak": peak}), flush=True)
        os._exit(0)  # a thread of the profiler now and then aborts an ordinary exit
    print(conditions(threads=1))
    print(f"{options.ranks} ranks, {options.batch} labelled images each; the most MB at a time")
    print(f"{'network':30}{'strategy':22}{'measured':>9}{'estimated':>10}{'':>7}", flush=True)
    chosen = cases(options.ranks, options.batch)
    chosen = [it for it in chosen if options.only in f"{it.network} {it.strategy}"]
    # one for all: DeepSpeed keeps the first group that it sees
    with pretended(options.ranks) as ranks:
        for case in tracked(chosen, len(chosen), "cases"):
            real, told = start(options.ranks, case.overrides), estimated(case.overrides, ranks)
            row = f"{case.network:30}{case.strategy:22}{real / 1e6:9.0f}{told / 1e6:10.0f}"
            print(f"{row}{told / real - 1:+7.1%}", flush=True)


if __name__ == "__main__":
    main()
