"""Training, from configuration to evaluated run: the map of the system."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from distseg import attempts, configuration, environment, tensorboard
from distseg.checkpoint import Checkpoints, saved_precision
from distseg.config import Config
from distseg.data.samples import SampleSet, open_reader, plan_for, sha256_of_keys, split_labelled
from distseg.data.stream import PairedStream, TrainStream
from distseg.data.transforms import TrainView
from distseg.device import allow_tf32, resolve_precision, reuse_memory
from distseg.distributed import Ranks, StopRequest, is_shared, on_all, on_main, setup, teardown
from distseg.ema import MovingAverage
from distseg.engine import Pair
from distseg.evaluate import Evaluator, View
from distseg.launch import resolve_ranks
from distseg.models import build_discriminator, build_segmentor, set_batch_norm
from distseg.parallel import check_installed, check_shard_size, wrap
from distseg.parallel.slices import num_elements
from distseg.parallel.sync_batch_norm import SynchronisedBatchNorm2d, synchronise
from distseg.progress import Progress
from distseg.rundir import RunDirectory
from distseg.showcase import score_again, show
from distseg.tracking import open_tracker
from distseg.trainer import Trainer, TrainState, memory_of
from distseg.watchdog import Watchdog
from distseg.work import StepWork, convolution_peak
from shards.errors import InputError
from shards.files import published
from shards.verified import check_verified

LABELLED_FILE = "labelled.txt"
Networks = tuple[torch.nn.Module, torch.nn.Module | None]  # segmentor, discriminator


def run(overrides: list[str], dry_run: bool = False) -> int:
    """`distseg train`: train, evaluate, draw; the same command goes on with a run that was stopped.

    Returns the exit code. Raises InputError, before any network is trained, for input that cannot be used.
    """
    config = configuration.load(overrides)
    if dry_run:
        print(configuration.to_yaml(config), end="")
        return 0
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
    """Data and networks of a run on so many ranks; InputError for what could not be trained. Touches no GPU."""
    check_batch("batch_size", config.batch_size, world_size, config.accumulate_steps)
    check_shard_size(config.parallel.shard_size, world_size)
    check_installed(config.parallel.strategy)
    if config.tracking.tensorboard:
        tensorboard.check_installed()
    data = open_data(config, world_size)
    return data, build_networks(config, data.train.classes.num_classes)


def train_and_show(
    config: Config, ranks: Ranks, data: Data, networks: Networks, watchdog: Watchdog, stop: StopRequest
) -> None:
    """From the networks to the finished run, on every rank alike."""
    segmentor, discriminator = networks
    run_directory = RunDirectory(Path(config.run_dir), config, ranks)
    on_main(ranks, lambda: save_labelled(run_directory.path, config, data))
    kept = on_main(ranks, lambda: saved_precision(run_directory.path))  # "auto" may differ on another machine
    precision = kept if kept and config.precision == "auto" else resolve_precision(config.precision, ranks)
    config = replace(config, precision=precision)
    watchdog.mark("spreading the networks")
    pair = Pair(
        wrap(segmentor, config.segmentor_optimizer, config, ranks),
        None if discriminator is None else wrap(discriminator, config.discriminator_optimizer, config, ranks),
        config.loss,
        config.semi,
    )
    watchdog.mark("looking for checkpoints")
    trainer = build_trainer(config, ranks, pair, data, run_directory.path, watchdog)
    stream = open_streams(config, ranks, data, trainer.state.step)
    exit_code, hosts = 1, on_all(ranks, socket.gethostname())
    gc.collect()
    gc.freeze()  # what is here stays: looking through it again and again took 7 % of the time of decoding
    note = attempts.Note(run_directory.path if ranks.is_main else None, hosts, trainer.state.step)
    watchdog.last_words = lambda verdict: note.finish(trainer.state.step, "failed", verdict)
    try:
        done = trainer.fit(stream, stop)
        if done:
            score_again(trainer)
            network = trainer.evaluator.whole()
            watchdog.close()  # what is left is the main rank's alone
            show(trainer, network, data.val)
        note.finish(trainer.state.step, "done" if done else "stopped", "" if done else stop.reason())
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


def check_batch(key: str, batch_size: int, world_size: int, num_parts: int) -> None:
    """Raise InputError unless ranks and parts divide the images of a step evenly."""
    if batch_size % (world_size * num_parts):
        divisor = world_size * num_parts
        below, above = batch_size // divisor * divisor, -(-batch_size // divisor) * divisor
        got = f"{key}={batch_size} for {world_size} ranks" + (f" and {num_parts} parts" if num_parts > 1 else "")
        nearest = f"{below} or {above}" if below else str(above)
        raise InputError(got, f"a multiple of {divisor}", f"write {key}={nearest}, or start other ranks")


@dataclass(frozen=True)
class Data:
    """What a run reads: labelled training samples, unlabelled ones in semi-supervised mode, and validation samples."""

    train: SampleSet
    unlabelled: SampleSet | None
    val: SampleSet

    def tell(self, moved: Callable[[], None]) -> None:
        """Call `moved` whenever bytes of shards that are far away arrive."""
        for samples in (self.train, self.val):  # the unlabelled ones come from the reader of the labelled
            samples.reader.tell(moved)


def open_data(config: Config, world_size: int) -> Data:
    """The sample sets of a run; InputError when they are not there or do not fit the configuration."""
    options = config.data
    train, val = (open_reader(options, name) for name in (options.train_split, options.val_split))
    if not options.allow_unverified:
        check_verified(train)
    saved = Path(config.run_dir) / LABELLED_FILE  # of a run that goes on: its own list counts
    wanted = str(saved) if options.labelled != "all" and saved.is_file() else options.labelled
    labelled, rest = split_labelled(train, wanted, options.labelled_seed)
    room = options.keep_decoded_bytes
    train_set = SampleSet(train, labelled, keep=options.keep_classes, keep_decoded_bytes=room)
    there, asked = train_set.classes.num_classes, options.num_classes
    if asked not in (None, there):
        names = ", ".join(train_set.classes.names)
        got = f"data.num_classes={asked}, but {options.shards} has {there} classes ({names})"
        raise InputError(got, "the same number", f"write data.num_classes={there}, or choose other shards")
    unlabelled_set = None
    if config.mode == "semi_supervised":
        if not rest:
            got = f"mode=semi_supervised, but all {len(labelled)} samples of {train.split} are used with their labels"
            raise InputError(got, "unlabelled samples", "write for example data.labelled=1/8, or mode=adversarial")
        size = config.semi.batch_size or config.batch_size
        check_batch("semi.batch_size", size, world_size, config.accumulate_steps)
        room -= train_set.decoded_bytes(room)  # the labelled ones come first: being fewer, they come more often
        unlabelled_set = SampleSet(train, rest, labelled=False, keep=options.keep_classes, keep_decoded_bytes=room)
    return Data(train_set, unlabelled_set, SampleSet(val, keep=options.keep_classes))


def save_labelled(run_dir: Path, config: Config, data: Data) -> None:
    """Write which samples are labelled, where that is a choice; a list that is there stays."""
    path = run_dir / LABELLED_FILE
    if config.data.labelled != "all" and not path.is_file():
        with published(path) as partial:
            partial.write_text("\n".join(data.train.keys) + "\n", encoding="utf-8")


def build_networks(config: Config, num_classes: int) -> Networks:
    """The segmentor and, unless the mode is supervised, the discriminator, initialised from the seed."""
    torch.manual_seed(config.seed)
    options = config.segmentor.options
    segmentor = build_segmentor(config.segmentor.name, num_classes, init=config.segmentor.init, **options)
    if config.segmentor.batch_norm == "synchronised":
        synchronise(segmentor)
    else:
        set_batch_norm(segmentor, config.segmentor.batch_norm)
    if config.mode == "supervised":
        return segmentor, None
    discriminator = build_discriminator(config.discriminator.name, num_classes, **config.discriminator.options)
    stride, min_size_px = int(segmentor.output_stride), int(discriminator.min_size_px)  # type: ignore[arg-type]
    stride = 1 if config.loss.map_resolution == "image" else stride
    label_map_px = -(-config.data.crop_px // stride)
    if label_map_px < min_size_px:
        got = f"data.crop_px={config.data.crop_px}: label maps of {label_map_px} pixels at stride {stride}"
        needed = f"at least {min_size_px} pixels for the discriminator {config.discriminator.name}"
        action = f"write data.crop_px={min_size_px * stride} or more, or loss.map_resolution=image"
        raise InputError(got, needed, action)
    return segmentor, discriminator


def build_trainer(config: Config, ranks: Ranks, pair: Pair, data: Data, run_dir: Path, watchdog: Watchdog) -> Trainer:
    """Everything that the loop needs, set to the run's last checkpoint where there is one."""
    ema = MovingAverage(pair.segmentor, config.ema_decay) if config.ema_decay > 0 else None
    view = View.of(config.evaluate, config.precision, ranks.device)
    scored = pair.segmentor if ema is None else ema
    evaluator = Evaluator(scored.whole, data.val, ranks, view, config.data.num_threads, watchdog.mark)
    classes, manifest = data.train.classes, data.train.reader.manifest
    identity: dict[str, Any] = {"manifest_sha256": manifest.sha256, "classes": list(classes.names)}
    if config.data.labelled != "all":
        identity |= {"labelled_sha256": sha256_of_keys(data.train.keys)}
    identity |= {"palette": [list(color) for color in classes.palette]}
    identity |= {"batch_size": config.batch_size, "seed": config.seed, "precision": config.precision}
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
    content = configuration.to_dict(config) | {"environment": environment.facts(ranks)}
    tracker = open_tracker(run_dir, config.tracking, content, state.step if latest else None, ranks.is_main)
    progress = Progress(config.steps, state.step, ranks.is_main)
    progress.message(headline(config, ranks, pair, data, state.step))
    work = StepWork.of(config, data.train.classes.num_classes)
    peak = convolution_peak(ranks.device, config.precision)
    return Trainer(config, ranks, pair, ema, evaluator, checkpoints, tracker, progress, watchdog, work, peak, state)


def open_streams(config: Config, ranks: Ranks, data: Data, start_step: int) -> TrainStream | PairedStream:
    """This rank's part of the endless sequence of batches, from `start_step` on."""
    labelled = open_stream(config, ranks, data.train, start_step, config.batch_size, config.seed)
    if data.unlabelled is None:
        return labelled
    batch_size = config.semi.batch_size or config.batch_size
    seed = config.seed + 2**32  # beyond every seed that a user can choose: another order, other views
    return PairedStream(labelled, open_stream(config, ranks, data.unlabelled, start_step, batch_size, seed))


def open_stream(
    config: Config, ranks: Ranks, samples: SampleSet, start_step: int, batch_size: int, seed: int
) -> TrainStream:
    """One stream of training views."""
    data = config.data
    view = TrainView(**{field.name: getattr(data, field.name) for field in fields(TrainView)})
    return TrainStream(
        samples,
        plan_for(samples, data, seed),
        view,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_threads=data.num_threads,
        worker_type=data.worker_type,
        start_step=start_step,
        pin_memory=ranks.device.type == "cuda",
    )


def headline(config: Config, ranks: Ranks, pair: Pair, data: Data, step: int) -> str:
    """What is about to run, in a few lines: networks, ranks, losses with their reductions, where it goes."""
    networks = [f"segmentor {config.segmentor.name} {_millions(pair.segmentor.network)}"]
    if pair.discriminator is not None:
        networks += [f"discriminator {config.discriminator.name} {_millions(pair.discriminator.network)}"]
    images = f"{len(data.train)} labelled"
    batch = f"batch {config.batch_size} = {ranks.world_size} x {config.batch_size // ranks.world_size}"
    if data.unlabelled is not None:
        images += f" and {len(data.unlabelled)} unlabelled"
        batch += f", + {config.semi.batch_size or config.batch_size} unlabelled"
    lines = [" | ".join(networks), f"loss: {' + '.join(_terms(config))}"]
    num_layers = sum(isinstance(m, SynchronisedBatchNorm2d) for m in pair.segmentor.network.modules())
    if num_layers and ranks.world_size > 1:
        lines += [f"batch norm: synchronised, {num_layers} layers that wait for all ranks in forward and backward"]
    lines += [f"images: {images} for training, {len(data.val)} for validation"]
    where = f"{ranks.world_size} x {ranks.device.type} | {config.parallel.strategy}"
    lines += [f"{where} | {config.precision} | {batch} | {config.run_dir}"]
    if step:
        lines += [f"resumed at step {step} of {config.steps}"]
    return "\n".join(lines)


def _terms(config: Config) -> list[str]:
    """The segmentor's loss, each term with its weight and reduction: a weight means nothing without it."""
    loss, semi = config.loss, config.semi
    terms = [f"cross entropy ({loss.ce_reduction})"]
    if config.mode != "supervised":
        late = f", from step {loss.adv_start_step}" if loss.adv_start_step else ""
        how = f"{loss.adv_form}, {loss.adv_reduction}, {config.alternation.name}{late}"
        terms += [f"{loss.adv_weight} x adversarial ({how})"]
    if config.mode == "semi_supervised":
        terms += [f"{semi.adv_weight} x adversarial on unlabelled ({loss.adv_reduction})"]
        where = f"{loss.ce_reduction} where D > {semi.threshold}, from step {semi.start_step}"
        terms += [f"{semi.weight} x semi-supervised cross entropy ({where})"]
    return terms


def _millions(network: torch.nn.Module) -> str:
    return f"({sum(num_elements(parameter) for parameter in network.parameters()) / 1e6:.2f} M)"


if __name__ == "__main__":
    from distseg.cli import main

    exit_code = main(["train", *sys.argv[1:]])
    StopRequest.ignore()
    sys.exit(exit_code)
