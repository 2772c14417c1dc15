"""Training, from configuration to evaluated run: the map of the system."""

from __future__ import annotations

import gc
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distseg.config import code, loading
from distseg.config.schema import Config
from distseg.data.samples import sha256_of_keys
from distseg.distributed.device import allow_tf32, resolve_precision, reuse_memory
from distseg.distributed.launch import resolve_ranks
from distseg.distributed.ranks import Ranks, is_shared, on_all, on_main, setup, teardown
from distseg.distributed.stop import StopRequest
from distseg.distributed.watchdog import Watchdog
from distseg.evaluate.evaluator import Evaluator, View
from distseg.models import build_discriminator, build_segmentor, check_training, set_batch_norm
from distseg.parallel import check_installed, check_settings, check_shard_size, wrap
from distseg.parallel.sync_batch_norm import synchronise
from distseg.runs import attempts, environment
from distseg.runs.checkpoint import Checkpoints, saved_precision
from distseg.runs.rundir import RunDirectory
from distseg.tracking import tensorboard
from distseg.tracking.progress import Progress
from distseg.tracking.tracker import open_tracker
from distseg.train.ema import MovingAverage
from distseg.train.flops import StepWork, convolution_peak
from distseg.train.headline import headline
from distseg.train.inputs import Data, check_batch, open_data, open_streams, save_labelled
from distseg.train.showcase import score_again, show
from distseg.train.step import Pair
from distseg.train.trainer import Trainer, TrainState, memory_of
from shards.errors import InputError

Networks = tuple[torch.nn.Module, torch.nn.Module | None]  # segmentor, discriminator


def run(overrides: list[str], dry_run: bool = False) -> int:
    """`distseg train`: train, evaluate, draw; the same command goes on with a run that was stopped.

    Returns the exit code. Raises InputError, before any network is trained, for input that cannot
    be used.
    """
    config = loading.load(overrides)
    check_settings(config)
    if dry_run:
        print(loading.to_yaml(config), end="")
        return 0
    config = code.recorded(config)
    loading.check_same(Path(config.run_dir), config)  # again when the directory is this job's
    _, world_size, _ = resolve_ranks(dict(os.environ))
    data, networks = check(config, world_size)

    ranks = setup(config.device, config.parallel.timeout_seconds)
    if ranks.device.type == "cpu":
        reuse_memory()
    allow_tf32(config.tf32)
    with Watchdog(ranks, config.parallel.timeout_seconds) as watchdog:
        data.tell(watchdog.alive)
        train_and_show(config, ranks, data, networks, watchdog, StopRequest())
    teardown()
    return 0


def check(config: Config, world_size: int) -> tuple[Data, Networks]:
    """Data and networks of a run on so many ranks.

    InputError for what could not be trained. Touches no GPU.
    """
    check_batch("batch_size", config.batch_size, world_size, config.accumulate_steps)
    check_shard_size(config.parallel.shard_size, world_size)
    check_installed(config.parallel.strategy)
    check_settings(config)
    if config.tracking.tensorboard:
        tensorboard.check_installed()
    data = open_data(config, world_size)
    return data, build_networks(config, data.train.classes.num_classes)


def train_and_show(
    config: Config,
    ranks: Ranks,
    data: Data,
    networks: Networks,
    watchdog: Watchdog,
    stop: StopRequest,
) -> None:
    """From the networks to the finished run, on every rank alike."""
    segmentor, discriminator = networks
    run_directory = RunDirectory(Path(config.run_dir), config, ranks)
    on_main(ranks, lambda: save_labelled(run_directory.path, config, data))
    # "auto" may differ on another machine
    kept = on_main(ranks, lambda: saved_precision(run_directory.path))
    precision = (
        kept if kept and config.precision == "auto" else resolve_precision(config.precision, ranks)
    )
    config = replace(config, precision=precision)
    work = StepWork.of(config, segmentor, discriminator)
    watchdog.mark("spreading the networks")
    pair = Pair(
        wrap(segmentor, config.segmentor_optimizer, config, ranks),
        None
        if discriminator is None
        else wrap(discriminator, config.discriminator_optimizer, config, ranks),
        config.loss,
        config.semi,
    )
    watchdog.mark("looking for checkpoints")
    trainer = build_trainer(config, ranks, pair, data, watchdog, work)
    stream = open_streams(config, ranks, data, trainer.state.step)
    exit_code, hosts = 1, on_all(ranks, socket.gethostname())
    gc.collect()
    # what is here stays: looking through it again and again took 7 % of the time of decoding
    gc.freeze()
    note = attempts.Note(run_directory.path if ranks.is_main else None, hosts, trainer.state.step)
    watchdog.last_words = lambda verdict: note.finish(trainer.state.step, "failed", verdict)
    try:
        done = trainer.fit(stream, stop)
        if done:
            score_again(trainer)
            network = trainer.evaluator.whole()
            watchdog.close()  # what is left is the main rank's alone
            show(trainer, network, data.val)
        note.finish(
            trainer.state.step, "done" if done else "stopped", "" if done else stop.reason()
        )
        exit_code = 0
    except BaseException as error:
        if not is_shared(error):
            trainer.checkpoints.give_up()
        if isinstance(error, Exception):
            note.fail(trainer.state.step, error)
        raise
    finally:
        trainer.checkpoints.close()
        stream.close()
        trainer.progress.close()
        trainer.tracker.finish(exit_code)


def build_networks(config: Config, num_classes: int) -> Networks:
    """The segmentor and, unless the mode is supervised, the discriminator, initialised from the
    seed.
    """
    torch.manual_seed(config.seed)
    options = config.segmentor.options
    segmentor = build_segmentor(
        config.segmentor.name, num_classes, init=config.segmentor.init, **options
    )
    check_training(config.segmentor.name, segmentor)
    if config.segmentor.batch_norm == "synchronised":
        synchronise(segmentor)
    else:
        set_batch_norm(segmentor, config.segmentor.batch_norm)
    if config.mode == "supervised":
        return segmentor, None
    discriminator = build_discriminator(
        config.discriminator.name, num_classes, **config.discriminator.options
    )
    check_training(config.discriminator.name, discriminator)
    stride, min_size_px = int(segmentor.output_stride), int(discriminator.min_size_px)  # type: ignore[arg-type]
    stride = 1 if config.loss.map_resolution == "image" else stride
    label_map_px = -(-config.data.crop_px // stride)
    if label_map_px < min_size_px:
        got = f"data.crop_px={config.data.crop_px}: label maps of {label_map_px} pixels at stride {stride}"
        needed = f"at least {min_size_px} pixels for the discriminator {config.discriminator.name}"
        action = f"write data.crop_px={min_size_px * stride} or more, or loss.map_resolution=image"
        raise InputError(got, needed, action)
    return segmentor, discriminator


def build_trainer(
    config: Config, ranks: Ranks, pair: Pair, data: Data, watchdog: Watchdog, work: StepWork
) -> Trainer:
    """Everything that the loop needs, set to the run's last checkpoint where there is one."""
    run_dir = Path(config.run_dir)
    ema = MovingAverage(pair.segmentor, config.ema_decay) if config.ema_decay > 0 else None
    view = View.of(config.evaluate, config.precision, ranks.device)
    scored = pair.segmentor if ema is None else ema
    evaluator = Evaluator(
        scored.whole, data.val, ranks, view, config.data.num_threads, watchdog.mark
    )
    classes, manifest = data.train.classes, data.train.reader.manifest
    identity: dict[str, Any] = {"manifest_sha256": manifest.sha256, "classes": list(classes.names)}
    if config.data.labelled != "all":
        identity |= {"labelled_sha256": sha256_of_keys(data.train.keys)}
    identity |= {"palette": [list(color) for color in classes.palette]}
    identity |= {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "precision": config.precision,
    }
    checkpoints = Checkpoints(
        run_dir,
        config.checkpoint.keep_last,
        identity,
        ranks,
        async_save=config.checkpoint.async_save,
        timeout_seconds=config.parallel.timeout_seconds,
    )

    state, learners = TrainState(), memory_of(pair, ema)
    checkpoints.check_space(learners)
    latest = checkpoints.latest()
    if latest is not None:
        state = TrainState(**checkpoints.load(latest, learners))
    content = loading.to_dict(config) | {"environment": environment.facts(ranks)}
    tracker = open_tracker(
        run_dir, config.tracking, content, state.step if latest else None, ranks.is_main
    )
    progress = Progress(config.steps, state.step, ranks.is_main)
    progress.message(headline(config, ranks, pair, data, state.step))
    if work.uncounted:
        progress.message(f"operations not counted, so no share of peak: {work.uncounted}")
    peak = convolution_peak(ranks.device, config.precision)
    return Trainer(
        config,
        ranks,
        pair,
        ema,
        evaluator,
        checkpoints,
        tracker,
        progress,
        watchdog,
        work,
        peak,
        state,
    )
