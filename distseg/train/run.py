"""Training, from configuration to evaluated run: the map of the system."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distseg.config import code, loading
from distseg.config.schema import Config
from distseg.config.world_size import check_world_size
from distseg.data.stream import PairedStream, TrainStream
from distseg.distributed.device import allow_tf32, reuse_memory
from distseg.distributed.hangs import evidence_of, tell_crashes
from distseg.distributed.launch import resolve_ranks
from distseg.distributed.ranks import (
    Ranks,
    check_alone,
    joined,
    on_each,
    on_main,
)
from distseg.distributed.stop import StopRequest
from distseg.distributed.watchdog import Watchdog
from distseg.parallel import check_installed, check_settings
from distseg.runs import goodput
from distseg.runs.checkpointer import newest, set_aside
from distseg.runs.ledger import Ledger, process_began
from distseg.runs.rundir import RunDirectory
from distseg.tracking import tensorboard
from distseg.train.adversary import image_tells
from distseg.train.assembly import build_trainer, learned, spread, with_precision
from distseg.train.attempt import noted
from distseg.train.away import look_away
from distseg.train.flops import StepWork
from distseg.train.headline import about_checkpoints, about_scores, extension
from distseg.train.inputs import Data, open_data, open_streams, save_labelled
from distseg.train.networks import Networks, build_networks
from distseg.train.objective import Objective, build_objective
from distseg.train.profiling import check_ranks
from distseg.train.replicas import check_same_code, share_first_weights
from distseg.train.restored import restored_process
from distseg.train.trainer import Trainer
from shards import remote


def run(config: Config) -> int:
    """`distseg train`: train, evaluate, draw; the same command goes on with a run that was stopped.

    Returns the exit code. Raises InputError, before any network is trained, for input that cannot
    be used.
    """
    ledger = Ledger(process_began())
    tell_crashes()
    config = _with_code(config)
    _, world_size, _ = resolve_ranks(dict(os.environ))
    # Before the ranks join. Bad input is then met by all of them alike, by each on its own; once in
    # the process group, a rank that leaves alone would be waited for.
    prepared = check(config, world_size)

    with joined(config.device, config.parallel.timeout_seconds) as ranks:
        if ranks.device.type == "cpu":
            reuse_memory()  # here alone: a process that lives on could not take it back
        _train_on(ranks, config, prepared, ledger)
    return 0


def _with_code(config: Config) -> Config:
    """With the sha256 of code of the user's own; InputError where it is not the run's."""
    config = code.recorded(config)
    loading.check_same(Path(config.run_dir), config)  # again when the directory is this job's
    return config


@dataclass(frozen=True)
class TrainResult:
    """What a training has come to. scores: as in evaluation.json; {} where it was stopped before
    its last step, and the same call goes on.
    """

    run_dir: Path
    step: int
    finished: bool
    scores: dict[str, Any]


def fit(overrides: Sequence[str] = (), /, *, preset: str | None = None, **keys: Any) -> TrainResult:
    """`distseg train` from Python: train, evaluate and draw, or go on with a run that was stopped.

    overrides: arguments of the command line, ["data.crop_px=96", ...]. keys: the same as values,
    steps=500 or data={"crop_px": 96}; these count last. Started by torchrun or srun, it is called
    on every rank. The first Ctrl-C (in the main thread) saves a checkpoint and returns. However
    this ends, the process is afterwards as it was before, and in no process group. Raises
    InputError for input that cannot be used, and where the caller has a process group of its own.
    On several ranks, one that is lost ends all processes, as the command does.
    """
    ledger = Ledger()  # the process may have begun long ago, as a notebook's has
    named = {} if preset is None else {"preset": preset}
    config = loading.load([*loading.words(overrides), *loading.arguments(named | keys)])
    # again in `joined`; here before shards are opened and networks are built for nothing
    check_alone()
    config = _with_code(config)
    _, world_size, _ = resolve_ranks(dict(os.environ))
    # around the check as well, which seeds torch's generator to build the networks
    with restored_process():
        prepared = check(config, world_size)
        with joined(config.device, config.parallel.timeout_seconds) as ranks:
            return _train_on(ranks, config, prepared, ledger)


def _train_on(ranks: Ranks, config: Config, prepared: Prepared, ledger: Ledger) -> TrainResult:
    """From checked input to the finished run, on every rank of a job that is joined."""
    allow_tf32(config.tf32)
    with Watchdog(ranks, config.parallel.timeout_seconds) as watchdog:
        # A shard from far away may take longer than the time limit. Its bytes count as signs of
        # life, or the watchdog would end a job that merely waits for the network.
        prepared.data.tell(watchdog.keep_alive)
        prepared.data.verify(ranks)
        check_same_code(ranks, config)
        # From here on a signal asks for a stop at a step boundary; until now it ended the process,
        # which had nothing to lose.
        stop = StopRequest(answers=ranks.is_main)
        with RunDirectory(Path(config.run_dir), config, ranks) as run_directory:
            watchdog.leave_evidence_in(on_main(ranks, lambda: evidence_of(run_directory.path)))
            if look_away(config, run_directory, watchdog):
                # again: the lists that came say which samples are the run's
                prepared = on_each(ranks, lambda: check(config, ranks.world_size))
                prepared.data.tell(watchdog.keep_alive)
                prepared.data.verify(ranks)
            return train_and_show(config, run_directory, prepared, watchdog, stop, ledger=ledger)


@dataclass(frozen=True)
class Prepared:
    """What a run is made of: checked, and not yet on any device."""

    data: Data
    networks: Networks
    objective: Objective


def check(config: Config, world_size: int) -> Prepared:
    """What a run on so many ranks is made of.

    InputError for what could not be trained. Touches no GPU.
    """
    # cheapest first: arithmetic, installed packages, then manifests, and weights of networks last
    check_world_size(config, world_size)
    check_ranks(config.profile, world_size)
    check_installed(config.parallel.strategy)
    check_settings(config)
    if config.checkpoint.copy_to:
        remote.check_installed(config.checkpoint.copy_to)
    if config.tracking.tensorboard:
        tensorboard.check_installed()
    # the shards alone know how many classes there are, so data come before networks
    data = open_data(config, world_size)
    networks = build_networks(config, data.train.classes.num_classes, world_size)
    return Prepared(data, networks, build_objective(config, *networks, data.train))


def train_and_show(
    config: Config,
    run_directory: RunDirectory,
    prepared: Prepared,
    watchdog: Watchdog,
    stop: StopRequest,
    *,
    ledger: Ledger,
) -> TrainResult:
    """From the networks to the finished run, on every rank alike."""
    ranks, data, networks = run_directory.ranks, prepared.data, prepared.networks
    # not earlier: it asks the run directory, which is this job's alone only since it is locked
    watchdog.report("verifying checkpoints")
    last = newest(run_directory.path, ranks, watchdog.keep_alive)
    config = with_precision(config, last.sound, ranks)
    watchdog.report("counting operations")
    # of networks that are no parameter shards yet; once, as it takes longer than to send it
    work = on_main(ranks, lambda: StepWork.of(config, *networks))
    watchdog.report("spreading the networks")
    # those of a run that goes on are its checkpoint's
    sent = None if last.sound else share_first_weights(ranks, networks, watchdog.keep_alive)
    pair = spread(config, networks, prepared.objective, ranks)
    watchdog.report("loading a checkpoint")
    found = learned(config, ranks, pair, data, last.sound, moved=watchdog.keep_alive)
    with closing(open_streams(config, ranks, data, found.state.step)) as stream:
        # Not earlier: until here other data, networks or settings than the run's are refused, and a
        # directory that says otherwise than its checkpoints would be scored as another run.
        run_directory.accept()
        set_aside(last.damaged, ranks)
        # Before the first checkpoint: a run that goes on reads this list instead of drawing again,
        # so that it stays with its samples whatever the rule for drawing becomes.
        on_main(ranks, lambda: save_labelled(run_directory.path, config, data))
        trainer = build_trainer(config, ranks, found, data, watchdog=watchdog, work=work)
        trainer.ledger = ledger
        tell = image_tells(config, networks.discriminator), sent
        for line in (*about_checkpoints(last), *about_scores(config, data), *filter(None, tell)):
            trainer.progress.warning(line)
        _attach(trainer, run_directory)
        return _fit_and_show(trainer, stream, data, stop)


def _attach(trainer: Trainer, run_directory: RunDirectory) -> None:
    """Have the run directory looked after, its checkpoints copied, and its ranks watched alone."""
    # of the groups, too, that parameters and optimizer states have been spread over
    trainer.watchdog.lift_time_limits()
    trainer.check_folder = trainer.checkpoints.check_folder = run_directory.check
    for line in run_directory.fetched.lines:
        trainer.progress.message(line)
    trainer.copies = run_directory.copies
    trainer.checkpoints.on_published = trainer.copies.ask
    # at once: the configuration, and a checkpoint that is newer here than there
    trainer.copies.ask()
    if run_directory.steps_before is not None:
        trainer.progress.message(extension(trainer.config, run_directory.steps_before))


def _fit_and_show(
    trainer: Trainer, stream: TrainStream | PairedStream, data: Data, stop: StopRequest
) -> TrainResult:
    """The loop, and what a finished run leaves to look at, on every rank alike."""
    # first, or what waits to be collected would be frozen with the rest and never be freed
    gc.collect()
    # what is here stays: looking through it again and again took 7 % of the time of decoding
    gc.freeze()
    with noted(trainer, stream) as note:
        done = trainer.fit(stream, stop)
        trainer.ledger.enter("other")
        if done:
            # evaluation and the gathering of shards are collectives: every rank takes part in both
            # of a run that had been complete before this process began: evaluation.json and the
            # pictures may be what the earlier process was stopped in
            for evaluator in (trainer.evaluator, trainer.source):
                if evaluator is not None and evaluator.result is None:
                    with trainer.ledger.within("evaluation"):
                        evaluator()
            network = trainer.evaluator.gather_network()
            views = trainer.next_views(data)
            # The main rank's alone. The others wait at the end of their watchdogs, and see it stop.
            if trainer.ranks.is_main:
                from distseg.train.showcase import show  # others need not load matplotlib

                show(trainer, network, data.val, views)
        trainer.watchdog.done()  # uploads to W&B may last, and are no stall
        # within the block: an error in drawing is noted as this attempt's end, not after a "done"
        scores = trainer.evaluator.report(trainer.state.step) if done else {}
        outcome = ("done", "") if done else ("stopped", stop.reason())
        note.finish(trainer.state.step, *outcome)
        _tell_goodput(trainer)
        wait_seconds = trainer.config.checkpoint.copy_wait_seconds
        trainer.copies.finish(wait_seconds, trainer.progress.message)
    if not done and trainer.ranks.is_main:
        # when all else has been told, so that it is the last line
        where = f"step {trainer.state.step} of {trainer.config.steps}"
        how = "the same command goes on from there"
        print(f"stopped at {where} ({stop.reason()}), checkpoint saved: {how}", flush=True)
    return TrainResult(Path(trainer.config.run_dir), trainer.state.step, done, scores)


def _tell_goodput(trainer: Trainer) -> None:
    """Where the run's time has gone, in all of its attempts up to now."""
    found = None
    # who may not write has told nobody anything, and reads nothing
    if trainer.ranks.is_main:
        found = goodput.of_run(Path(trainer.config.run_dir))
    if found is not None:
        trainer.progress.message(found.text())
        trainer.tracker.summary(found.named())
