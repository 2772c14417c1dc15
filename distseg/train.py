"""Training, from configuration to evaluated run: the map of the system."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distseg import configuration
from distseg.checkpoint import Checkpoints, saved_precision
from distseg.config import Config
from distseg.data.plan import rank_positions
from distseg.data.stream import TrainStream
from distseg.data.transforms import TrainView
from distseg.device import resolve_precision, reuse_memory
from distseg.distributed import Ranks, StopRequest, on_main, resolve_ranks, setup, teardown
from distseg.ema import MovingAverage
from distseg.engine import Pair, Trainer, TrainState, memory_of
from distseg.evaluate import Evaluator, View
from distseg.models import build_discriminator, build_segmentor, set_batch_norm
from distseg.parallel import wrap
from distseg.progress import Progress
from distseg.rundir import RunDirectory
from distseg.showcase import show
from distseg.tracking import open_tracker
from shards.errors import InputError
from shards.reader import ShardReader


def run(overrides: list[str], dry_run: bool = False) -> int:
    """`distseg train`: train, evaluate, draw; the same command goes on with a run that was stopped.

    Returns the exit code. Raises InputError, before any network is trained, for input that cannot be used.
    """
    config = configuration.load(overrides)
    if dry_run:
        print(configuration.to_yaml(config), end="")
        return 0
    rank, world_size, _ = resolve_ranks(dict(os.environ))
    rank_positions(0, config.batch_size, rank, world_size)  # raises when the ranks do not divide the batch
    train_set, val_set = open_shards(config)
    segmentor, discriminator = build_networks(config, train_set.classes.num_classes)

    ranks = setup(config.device, config.parallel.timeout_seconds)
    if ranks.device.type == "cpu":
        reuse_memory()
    stop = StopRequest()
    run_directory = RunDirectory(Path(config.run_dir), config, ranks)
    kept = on_main(ranks, lambda: saved_precision(run_directory.path))  # "auto" may differ on another machine
    precision = kept if kept and config.precision == "auto" else resolve_precision(config.precision, ranks)
    config = replace(config, precision=precision)
    pair = Pair(
        wrap(segmentor, config.segmentor_optimizer, config, ranks),
        None if discriminator is None else wrap(discriminator, config.discriminator_optimizer, config, ranks),
        config.loss.adv_weight,
    )
    trainer = build_trainer(config, ranks, pair, (train_set, val_set), run_directory.path)
    stream = open_stream(config, ranks, train_set, trainer.state.step)
    exit_code = 1
    try:
        done = trainer.fit(stream, stop)
        if done:
            show(trainer, val_set)
        exit_code = 0
    finally:
        stream.close()
        trainer.progress.close()
        trainer.tracker.finish(exit_code)
    teardown()
    return exit_code


def open_shards(config: Config) -> tuple[ShardReader, ShardReader]:
    """The training and validation splits; InputError when they are not there or have other classes."""
    splits = [ShardReader(Path(config.data.shards), name) for name in (config.data.train_split, config.data.val_split)]
    for split in splits:
        if split.unlabelled:
            some = f"{len(split.unlabelled)} samples, {split.unlabelled[0]} for one,"
            got = f"{some} have no label in the split {split.split}"
            raise InputError(got, "a label for every sample", "prepare and pack the data with labels")
    there, asked = splits[0].classes.num_classes, config.data.num_classes
    if asked not in (None, there):
        names = ", ".join(splits[0].classes.names)
        got = f"data.num_classes={asked}, but {config.data.shards} has {there} classes ({names})"
        raise InputError(got, "the same number", f"write data.num_classes={there}, or choose other shards")
    return splits[0], splits[1]


def build_networks(config: Config, num_classes: int) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The segmentor and, unless the mode is supervised, the discriminator, initialised from the seed."""
    torch.manual_seed(config.seed)
    options = config.segmentor.options
    segmentor = build_segmentor(config.segmentor.name, num_classes, init=config.segmentor.init, **options)
    set_batch_norm(segmentor, config.segmentor.batch_norm)
    if config.mode == "supervised":
        return segmentor, None
    discriminator = build_discriminator(config.discriminator.name, num_classes, **config.discriminator.options)
    stride, min_size_px = int(segmentor.output_stride), int(discriminator.min_size_px)  # type: ignore[arg-type]
    label_map_px = -(-config.data.crop_px // stride)
    if label_map_px < min_size_px:
        got = f"data.crop_px={config.data.crop_px}: label maps of {label_map_px} pixels at stride {stride}"
        needed = f"at least {min_size_px} pixels for the discriminator {config.discriminator.name}"
        raise InputError(got, needed, f"write data.crop_px={min_size_px * stride} or more")
    return segmentor, discriminator


def build_trainer(
    config: Config, ranks: Ranks, pair: Pair, splits: tuple[ShardReader, ShardReader], run_dir: Path
) -> Trainer:
    """Everything that the loop needs, set to the run's last checkpoint where there is one."""
    train_set, val_set = splits
    ema = MovingAverage(pair.segmentor.network, config.ema_decay) if config.ema_decay > 0 else None
    view = View(tuple(config.evaluate.scales), config.evaluate.mirror, config.precision, ranks.device)
    network = pair.segmentor.network if ema is None else ema.network
    evaluator = Evaluator(network, val_set, ranks, view, config.data.num_threads)
    classes = train_set.classes
    identity: dict[str, Any] = {"manifest_sha256": train_set.manifest.sha256, "classes": list(classes.names)}
    identity |= {"palette": [list(color) for color in classes.palette]}
    identity |= {"batch_size": config.batch_size, "seed": config.seed, "precision": config.precision}
    checkpoints = Checkpoints(run_dir, config.checkpoint.keep_last, identity, ranks)

    state, learners = TrainState(), memory_of(pair, ema)
    checkpoints.check_space(learners)
    latest = checkpoints.latest()
    if latest is not None:
        state = TrainState(**checkpoints.load(latest, learners))
    content = configuration.to_dict(config)
    tracker = open_tracker(run_dir, config.tracking, content, state.step if latest else None, ranks.is_main)
    progress = Progress(config.steps, state.step, ranks.is_main)
    progress.message(headline(config, ranks, pair, state.step))
    return Trainer(config, ranks, pair, ema, evaluator, checkpoints, tracker, progress, state)


def open_stream(config: Config, ranks: Ranks, train_set: ShardReader, start_step: int) -> TrainStream:
    """This rank's part of the endless sequence of batches, from `start_step` on."""
    data = config.data
    view = TrainView(data.crop_px, data.scale_min, data.scale_max, data.mirror, data.color_jitter)
    return TrainStream(
        train_set,
        view,
        seed=config.seed,
        batch_size=config.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_threads=data.num_threads,
        start_step=start_step,
        pin_memory=ranks.device.type == "cuda",
    )


def headline(config: Config, ranks: Ranks, pair: Pair, step: int) -> str:
    """What is about to run, in a few lines: networks, ranks, losses with their reductions, where it goes."""
    networks = [f"segmentor {config.segmentor.name} {_millions(pair.segmentor.network)}"]
    if pair.discriminator is not None:
        networks += [f"discriminator {config.discriminator.name} {_millions(pair.discriminator.network)}"]
    terms = f"cross entropy ({config.loss.ce_reduction})"
    if pair.discriminator is not None:
        terms += f" + {config.loss.adv_weight} x adversarial ({config.loss.adv_reduction}), {config.alternation.name}"
    lines = [" | ".join(networks)]
    lines += [f"loss: {terms}"]
    batch = f"batch {config.batch_size} = {ranks.world_size} x {config.batch_size // ranks.world_size}"
    lines += [f"{ranks.world_size} x {ranks.device.type} | {config.precision} | {batch} | {config.run_dir}"]
    if step:
        lines += [f"resumed at step {step} of {config.steps}"]
    return "\n".join(lines)


def _millions(network: torch.nn.Module) -> str:
    return f"({sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f} M)"


if __name__ == "__main__":
    from distseg.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
