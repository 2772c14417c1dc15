"""What each strategy sends, waits and holds: two ranks of one thread, or two GPUs, and the same
networks for all.

Exposed communication is a step's time less that of DDP's step without any exchange, measured in the
same minutes. Run: python -m benchmarks.comm [--ranks 2] [--size 97] [--batch 1] [--repetitions 5]
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from benchmarks.conditions import conditions
from benchmarks.worker import start
from shards.files import say, tracked

STRATEGIES = {
    "ddp": [],
    "fsdp": ["parallel.strategy=fsdp"],
    **{
        f"deepspeed, stage {n}": ["parallel.strategy=deepspeed", f"parallel.zero_stage={n}"]
        for n in range(4)
    },
}
KINDS = ("all_reduce", "reduce_scatter", "all_gather")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", type=int, default=97, help="side of the images, pixels")
    parser.add_argument(
        "--batch", type=int, default=1, help="labelled images a rank, and as many unlabelled ones"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    common = [f"--{name}={getattr(options, name)}" for name in ("size", "batch", "repetitions")]
    found: dict[str, dict[str, Any]] = {}
    chosen = dict(STRATEGIES)
    if importlib.util.find_spec("deepspeed") is None:
        say("deepspeed is left out, as there is no package of that name")
        chosen = {
            name: overrides
            for name, overrides in chosen.items()
            if not name.startswith("deepspeed")
        }
    for name, overrides in tracked(chosen.items(), len(chosen), "strategies"):
        found[name] = start(options.ranks, [*common, "precision=fp32", *overrides])
    sizes, alone = found["ddp"]["sizes"], found["ddp"]["alone_seconds"]
    ideal = sizes["segmentor"] + sizes["discriminator"]
    print(conditions(threads=1))
    images = f"{options.batch} + {options.batch} images of {options.size} px a rank"
    print(f"{options.ranks} x {found['ddp']['device']}, fp32, {images}")
    trained = f"|S| + |D| = {sizes['segmentor']:,} + {sizes['discriminator']:,} = {ideal:,}"
    print(f"{trained} parameters that are trained")
    heads = f"{'':20}{'all-reduced':>14}{'reduced and cut':>17}{'gathered':>14}"
    print(f"{heads}{'exposed':>9}{'peak memory':>13}")
    for name, of_it in found.items():
        sent = [f"{of_it['elements'].get(kind, 0) / ideal:.4f}" for kind in KINDS]
        exposed = f"{of_it['step_seconds'] / alone - 1:+.0%}"
        memory = f"{of_it['peak_bytes'] / 1e6:>10.0f} MB"
        print(f"{name:20}{sent[0]:>14}{sent[1]:>17}{sent[2]:>14}{exposed:>9}{memory}")
    print(
        "Elements as multiples of |S| + |D|; exposed: of DDP's step without exchange; "
        "memory: above the libraries' own."
    )


if __name__ == "__main__":
    main()
