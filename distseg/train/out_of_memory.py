"""What a run says and leaves when a GPU's memory has not been enough."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from distseg.config.names import KEYS
from distseg.config.schema import WITH_UNLABELLED, Config
from distseg.distributed.compat import memory_snapshot
from distseg.distributed.ranks import Ranks
from distseg.train.profiling import FOLDER
from shards.errors import InputError, TemporaryError
from shards.files import published


def explain(config: Config, ranks: Ranks, where: str, part: str) -> None:
    """Say on stderr which keys would need less, and leave a snapshot of what the memory held.

    where: "step 12"; part: of distseg.runs.ledger. On the rank that it happened to.
    """
    # beside torch's own words, which name bytes but no key
    lines = [f"rank {ranks.rank} on {socket.gethostname()} is out of memory at {where} ({part})"]
    lines += [f"  to need less: {line}" for line in advice(config, ranks.world_size, part)]
    path = _snapshot(Path(config.run_dir) / FOLDER / f"out-of-memory-rank-{ranks.rank}.pickle")
    if path is not None:
        lines.append(f"  what held it: {path}, to be opened at https://pytorch.org/memory_viz")
        if not config.profile.memory:
            lines.append("  profile.memory=true adds the lines of code that asked for it")
    print("\n".join(lines), file=sys.stderr, flush=True)


def advice(config: Config, world_size: int, part: str) -> Iterator[str]:
    """Keys with values that need less memory, those first that change the least of what is learned;
    each with what it does, and whether the same run may go on with it.
    """
    found = _in_evaluation(config) if part == "evaluation" else _in_steps(config, world_size)
    for key, value, what in found:
        # most keys shape what is learned, so that half a run with each would be neither
        goes_on = "the same run goes on with it" if KEYS[key].on_resume else "in a new run_dir"
        yield f"{key}={value} ({what}; {goes_on})"


Change = tuple[str, object, str]  # a key, a value, what it does


def _in_evaluation(config: Config) -> Iterator[Change]:
    chosen = config.evaluate
    # images of any size come here whole: the largest one of the split decides
    if chosen.window_px == 0 or chosen.window_px > 512:
        yield "evaluate.window_px", 512, "images are scored by a sliding window"
    if max(chosen.scales) > 1:
        smaller = [scale for scale in chosen.scales if scale <= 1] or [1.0]
        yield "evaluate.scales", smaller, "no image is enlarged"


def _in_steps(config: Config, world_size: int) -> Iterator[Change]:
    # first what gives the same numbers, then what gives nearly the same, and smaller images last
    factor = _split(config, world_size)
    if factor > 1:
        parts = config.gradient_accumulation_steps * factor
        yield "gradient_accumulation_steps", parts, "the same batch in smaller parts"
    if config.precision in ("fp32", "fp64"):
        yield "precision", "bf16", "half of the activations' bytes"
    parallel = config.parallel
    if world_size > 1 and parallel.strategy == "ddp":
        yield "parallel.strategy", "fsdp", "each rank holds a share of parameters and optimizer"
    if world_size > 1 and parallel.strategy == "deepspeed" and parallel.zero_stage < 3:
        yield "parallel.zero_stage", parallel.zero_stage + 1, "each rank holds less"
    if world_size > 1 and parallel.strategy == "fsdp" and parallel.shard_size:
        yield "parallel.shard_size", 0, "all ranks share one copy"
    chosen = config.consistency
    may_be_one = chosen.num_views > 1 and chosen.feature_perturbation != "complementary"
    if may_be_one and config.mode == "consistency":
        yield "consistency.num_views", 1, "fewer strong views"
    if config.data.crop_px > 64:
        # a multiple of 32, about three quarters: half of the pixels
        smaller = max(64, config.data.crop_px * 3 // 4 // 32 * 32)
        yield "data.crop_px", smaller, "smaller images, which teach less"


def _split(config: Config, world_size: int) -> int:
    """The smallest number of parts that the images of a rank's micro-batch divide into; 1: none."""
    num_images = [config.batch_size]
    if config.mode in WITH_UNLABELLED:
        num_images.append(config.semi.batch_size or config.batch_size)
    shares = [num // (world_size * config.gradient_accumulation_steps) for num in num_images]
    # labelled and unlabelled images are divided alike
    divisors = range(2, min(shares) + 1)
    return next((d for d in divisors if all(share % d == 0 for share in shares)), 1)


def _snapshot(path: Path) -> Path | None:
    """The path, where torch has a snapshot and the disk has taken it."""
    write = memory_snapshot()
    # a disk that is full as well must not hide what has happened
    with suppress(OSError, InputError, TemporaryError, RuntimeError):
        if write is not None:
            with published(path) as partial:
                write(str(partial))
            return path
    return None
