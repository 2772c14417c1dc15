"""`distseg estimate`: its arguments, read without torch."""

from __future__ import annotations

import argparse
import math
from typing import Any

from distseg.config.arguments import configured_command
from shards.command_line import Commands, add_overrides
from shards.errors import InputError

TEXT = """\
Tell before a job is started what a rank of it would hold, send and compute: without a GPU, and
without data where the number of classes is known.

  distseg estimate preset=voc_hung_semi nodes=8 gpus_per_node=8 batch_size=640 strategy=fsdp

nodes, gpus_per_node    the job's shape (1 and 8)
strategy, zero_stage, shard_size    short for parallel.strategy and so on; strategy=all compares all

Bytes, collectives and operations are counted: the step of training is taken on one rank of the
job, on tensors without values. Seconds are modelled, from the hardware's data sheet."""

SHAPE = {"nodes": 1, "gpus_per_node": 8}
SHORT = ("strategy", "zero_stage", "shard_size")
CHIPS = ("l4", "a100-40", "a100", "h100", "h200")
OTHER_CHIP = "or another chip's data sheet: --tflops X --memory-bandwidth X (TB/s) --link-gbs X"


def add_estimate(commands: Commands) -> None:
    """Add `estimate` to the commands."""
    parser = configured_command(
        commands, "estimate", "tell what a job would hold, send and cost", TEXT
    )
    parser.add_argument("--classes", type=int, metavar="N", help="where neither keys nor data say")
    parser.add_argument("--chip", default="h100", choices=CHIPS, help="whose data sheet (h100)")
    parser.besides = {"--chip": OTHER_CHIP}
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    parser.add_argument("--tflops", help="of products, in place of the chip's", **number)
    parser.add_argument("--memory-bandwidth", help="TB/s, in place of the chip's", **number)
    parser.add_argument("--link-gbs", help="GB/s a GPU sends within its node", **number)
    node = "GB/s a node sends (50: one link of 400 Gb/s)"
    parser.add_argument("--node-link-gbs", default=50.0, help=node, **number)
    share = "share of the data sheet that kernels reach (0.6, assumed)"
    parser.add_argument("--efficiency", default=0.6, help=share, **number)
    kept = "GB of the GPU that tensors do not get (2, assumed: context, NCCL, workspace)"
    parser.add_argument("--reserve-gb", default=2.0, help=kept, **number)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_overrides(parser, "preset=stanford nodes=2 ..., or FILE.yaml with keys of training")
    parser.set_defaults(handler=_estimate)


def _estimate(options: argparse.Namespace) -> int:
    from distseg.config import loading

    shape, overrides, every = read(options.overrides)
    _check_numbers(options)
    # before torch, whose import takes seconds: a misspelt key is told at once
    config, waiting = loading.outline(overrides)
    from distseg.estimate.run import run

    return run(config, shape, every, waiting, options)


def _check_numbers(options: argparse.Namespace) -> None:
    """Raise InputError for hardware that there is not."""
    # a share above 1 would be a per cent, and seconds too few by a hundred
    above = dict.fromkeys(("tflops", "memory_bandwidth", "link_gbs", "node_link_gbs"), math.inf)
    for name, most in (above | {"efficiency": 1.0}).items():
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:
            word = f"--{name.replace('_', '-')}"
            needed = "a number above 0" + (f", and at most {most:g}" if most < math.inf else "")
            raise InputError(f"{word} {value:g}", needed, f"correct {word}")
    if not 0 <= options.reserve_gb < math.inf:
        got = f"--reserve-gb {options.reserve_gb:g}"
        raise InputError(got, "GB from 0", "correct --reserve-gb")


def read(words: list[str]) -> tuple[dict[str, int], list[str], bool]:
    """The job's shape, the keys of the configuration, and whether all strategies are compared.

    Raises InputError for a shape that is none.
    """
    shape, overrides, every = dict(SHAPE), [], False
    for word in words:
        key, equals, value = word.partition("=")
        if key in SHAPE and equals:
            if not value.isdecimal() or int(value) < 1:
                raise InputError(word, "a whole number from 1", f"write {key}={SHAPE[key]}")
            shape[key] = int(value)
        elif key in ("strategy", "parallel.strategy") and value == "all":
            every = True
        # later words win, as everywhere
        elif key in SHORT and equals:
            overrides.append(f"parallel.{key}={value}")
        else:
            overrides.append(word)
    return shape, overrides, every
