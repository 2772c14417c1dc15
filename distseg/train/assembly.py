"""Everything that the training loop needs, set to a run's last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from distseg.config import loading
from distseg.config.schema import Config
from distseg.data.samples import sha256_of_keys
from distseg.distributed.device import resolve_precision
from distseg.distributed.ranks import Ranks, on_main
from distseg.distributed.watchdog import Watchdog
from distseg.evaluate.evaluator import Evaluator
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.parallel import wrap
from distseg.runs import environment
from distseg.runs.checkpoint import saved_precision
from distseg.runs.checkpointer import Checkpointer
from distseg.tracking.progress import Progress
from distseg.tracking.tracker import Tracker, open_tracker
from distseg.train.ema import MovingAverage
from distseg.train.flops import StepWork, convolution_peak
from distseg.train.headline import headline
from distseg.train.inputs import Data
from distseg.train.networks import Networks
from distseg.train.objective import Objective
from distseg.train.step import Pair
from distseg.train.trainer import Trainer, TrainState, saved_parts


def with_precision(config: Config, ranks: Ranks) -> Config:
    """The configuration with "auto" resolved.

    A run goes on in the precision that it began in: "auto" may differ on another machine.
    """
    kept = on_main(ranks, lambda: saved_precision(Path(config.run_dir)))
    if kept is None or config.precision != "auto":
        kept = resolve_precision(config.precision, ranks)
    return replace(config, precision=kept)


def spread(config: Config, networks: Networks, objective: Objective, ranks: Ranks) -> Pair:
    """Both networks with their optimizers, spread over the ranks."""
    segmentor = wrap(networks.segmentor, config.segmentor_optimizer, config, ranks)
    discriminator = None
    if networks.discriminator is not None:
        optimizer = config.discriminator_optimizer
        discriminator = wrap(networks.discriminator, optimizer, config, ranks)
    return Pair(segmentor, discriminator, objective)


def build_trainer(
    config: Config, ranks: Ranks, pair: Pair, data: Data, *, watchdog: Watchdog, work: StepWork
) -> Trainer:
    """The loop's parts; the learners hold what the last checkpoint does, where there is one."""
    ema = MovingAverage(pair.segmentor, config.ema_decay) if config.ema_decay > 0 else None
    scored = pair.segmentor if ema is None else ema
    checkpoints = _checkpoints(config, ranks, data)
    state, learners = TrainState(), saved_parts(pair, ema)
    checkpoints.check_space(learners)
    latest = checkpoints.latest()
    if latest is not None:
        state = TrainState(**checkpoints.load(latest, learners))
    progress = Progress(config.steps, state.step, ranks.is_main)
    progress.message(headline(config, ranks, pair, data, state.step))
    if work.uncounted:
        progress.message(f"operations not counted, so no share of peak: {work.uncounted}")
    return Trainer(
        config=config,
        ranks=ranks,
        pair=pair,
        ema=ema,
        evaluator=_evaluator(config, ranks, scored.full_network, data, watchdog),
        checkpoints=checkpoints,
        tracker=_tracker(config, ranks, state.step if latest else None),
        progress=progress,
        watchdog=watchdog,
        work=work,
        peak=convolution_peak(ranks.device, config.precision),
        state=state,
    )


def _evaluator(
    config: Config,
    ranks: Ranks,
    gather_network: Callable[[], nn.Module],
    data: Data,
    watchdog: Watchdog,
) -> Evaluator:
    return Evaluator(
        gather_network,
        data.val,
        ranks,
        TestTimeAugmentation.of(config.evaluate, config.precision, ranks.device),
        num_threads=config.data.num_threads,
        mark=watchdog.report,
    )


def _checkpoints(config: Config, ranks: Ranks, data: Data) -> Checkpointer:
    """With what a checkpoint must agree on with the run that loads it."""
    classes, manifest = data.train.classes, data.train.reader.manifest
    identity: dict[str, Any] = {"manifest_sha256": manifest.sha256, "classes": list(classes.names)}
    if config.data.labelled != "all":
        identity["labelled_sha256"] = sha256_of_keys(data.train.keys)
    identity["palette"] = [list(color) for color in classes.palette]
    identity["batch_size"], identity["seed"] = config.batch_size, config.seed
    identity["precision"] = config.precision
    return Checkpointer(
        Path(config.run_dir),
        config.checkpoint.keep_last,
        identity,
        ranks,
        async_save=config.checkpoint.async_save,
        timeout_seconds=config.parallel.timeout_seconds,
    )


def _tracker(config: Config, ranks: Ranks, resumed_at: int | None) -> Tracker:
    content = loading.to_dict(config) | {"environment": environment.facts(ranks)}
    run_dir = Path(config.run_dir)
    return open_tracker(run_dir, config.tracking, content, resumed_at, ranks.is_main)
