"""Everything that the training loop needs, set to a run's last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from distseg.config import loading
from distseg.config.schema import Config
from distseg.config.world_size import has_teacher, unlabelled_as_labelled
from distseg.data.mixture import names_of
from distseg.data.samples import sha256_of_keys
from distseg.distributed.device import resolve_precision
from distseg.distributed.ranks import Ranks
from distseg.distributed.watchdog import Watchdog
from distseg.evaluate.evaluator import Evaluator
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.evaluate.subsets import subsets_of
from distseg.parallel import wrap
from distseg.runs import environment
from distseg.runs.checkpoint import Checkpoint
from distseg.runs.checkpointer import Checkpointer
from distseg.tracking.catalogue import SOURCE
from distseg.tracking.progress import Progress
from distseg.tracking.tracker import Tracker, open_tracker
from distseg.train.ema import MovingAverage
from distseg.train.flops import StepWork, convolution_peak
from distseg.train.headline import headline
from distseg.train.held_out import HeldOut
from distseg.train.inputs import Data
from distseg.train.networks import Networks
from distseg.train.objective import Objective
from distseg.train.step import Pair
from distseg.train.strong_views import StrongViews
from distseg.train.teacher import Alignment, WeakToStrong, logit_adjustment
from distseg.train.trainer import Trainer, TrainState, saved_parts
from shards.errors import InputError


def with_precision(config: Config, saved: Checkpoint | None, ranks: Ranks) -> Config:
    """The configuration with "auto" resolved.

    A run goes on in the precision that it began in: "auto" may differ on another machine.
    """
    kept = None if saved is None else saved.identity.get("precision")
    if kept is None or config.precision != "auto":
        kept = resolve_precision(config.precision, ranks)
    return replace(config, precision=kept)


def spread(config: Config, networks: Networks, objective: Objective, ranks: Ranks) -> Pair:
    """Both networks with their optimizers, spread over the ranks."""
    segmentor = wrap(networks.segmentor, config.segmentor_optimizer, config, ranks)
    discriminator = None
    if networks.discriminator is not None:
        optimizer = config.discriminator_optimizer
        # Two learners, not one module of both: DDP waits for a gradient of every parameter it
        # wraps, and in steps of one network the other has none ("Expected to have finished
        # reduction").
        discriminator = wrap(networks.discriminator, optimizer, config, ranks)
    return Pair(segmentor, discriminator, objective)


@dataclass(frozen=True)
class Learned:
    """What a run has learned so far: of a new one nothing. Its learners hold it."""

    pair: Pair
    ema: MovingAverage | None
    checkpoints: Checkpointer
    state: TrainState
    is_resumed: bool


def learned(
    config: Config,
    ranks: Ranks,
    pair: Pair,
    data: Data,
    saved: Checkpoint | None,
    *,
    moved: Callable[[], None] = lambda: None,
) -> Learned:
    """The learners as a checkpoint has them, where there is one. Writes nothing. moved: called as
    its tensors arrive, and later as those of others are written.

    Raises InputError, on every rank, for a checkpoint that is another run's, and where the disk
    cannot hold what the run will keep.
    """
    # Before the checkpoint is loaded: loading copies into the tensors that are there, of the
    # average and of the networks, so nothing that has been looked up goes stale.
    pair, ema = with_views(config, ranks, pair)
    if pair.weak_to_strong is not None:
        corrected = _corrected(config, pair.weak_to_strong, ranks, data)
        pair = replace(pair, weak_to_strong=corrected)
    checkpoints = _checkpoints(config, ranks, data)
    checkpoints.moved = moved
    state, learners = TrainState(), saved_parts(pair, ema)
    # a disk that is too small is said now, not by the first save some hours from here
    checkpoints.check_space(learners)
    if saved is not None:
        # The step, the learners' tensors and the validation losses are all that a run needs to go
        # on: the order of samples, the phases and random numbers follow from the step and the seed.
        state = TrainState.of(checkpoints.load(saved, learners))
    else:
        _check_initialised(config, pair.segmentor.network)
    return Learned(pair, ema, checkpoints, state, saved is not None)


def with_views(config: Config, ranks: Ranks, pair: Pair) -> tuple[Pair, MovingAverage | None]:
    """The learners with what makes the strong views that the configuration asks for, and the
    segmentor's average, where it keeps one.
    """
    is_teacher, ema = has_teacher(config) and config.consistency.teacher == "ema", None
    if config.ema_decay > 0:
        ema = MovingAverage(pair.segmentor, config.ema_decay, as_network=is_teacher)
    if has_teacher(config):
        teacher = WeakToStrong.of(config, pair.segmentor, ema, ranks, pair.discriminator)
        pair = replace(pair, weak_to_strong=teacher)
    if config.strong.labelled:
        num_classes = int(pair.segmentor.network.num_classes)  # type: ignore[arg-type]
        strong = StrongViews.of_labelled(config, num_classes, ranks)
        pair = replace(pair, strong_labelled=strong)
        if unlabelled_as_labelled(config):
            strong = StrongViews.of_untaught(config, num_classes, ranks)
            pair = replace(pair, strong_unlabelled=strong)
    return pair, ema


def _corrected(config: Config, teacher: WeakToStrong, ranks: Ranks, data: Data) -> WeakToStrong:
    """What labels unlabelled images, with what it corrects by the labels that are trained on."""
    chosen = config.consistency
    if chosen.logit_adjustment:
        # of the labels that are trained on: of the others nothing is known
        pixels = data.train.class_pixels(config.data.weights)
        adjustment = logit_adjustment(chosen.logit_adjustment, pixels)
        teacher = replace(teacher, adjustment=adjustment.to(ranks.device))
    if chosen.alignment:
        pixels = data.train.class_pixels(config.data.weights)
        teacher = replace(teacher, alignment=Alignment(chosen.alignment, pixels, ranks))
    return teacher


def build_trainer(
    config: Config, ranks: Ranks, found: Learned, data: Data, *, watchdog: Watchdog, work: StepWork
) -> Trainer:
    """The loop's parts. From here on the run directory is written to."""
    pair, ema, state = found.pair, found.ema, found.state
    scored = pair.segmentor if ema is None else ema
    evaluator = _evaluator(config, ranks, scored.full_network, data, watchdog)
    # of two domains they tell whether the target loses a class that the source keeps
    evaluator.predicted_shares = data.source is not None
    progress = Progress(config.steps, state.step, ranks.is_main)
    # after loading, as it tells at which step the run goes on
    progress.message(headline(config, ranks, pair, data, state.step))
    if work.uncounted:
        progress.message(f"operations not counted, so no share of peak: {work.uncounted}")
    return Trainer(
        config=config,
        ranks=ranks,
        pair=pair,
        ema=ema,
        evaluator=evaluator,
        chosen_by=data.chosen_by,
        source=_source(evaluator, data),
        held_out=_held_out(config, found, data, evaluator),
        checkpoints=found.checkpoints,
        # None, not 0, of a run without a checkpoint: its metrics.jsonl is then begun anew, and what
        # an attempt wrote that never reached a checkpoint goes
        tracker=_tracker(config, ranks, state.step if found.is_resumed else None),
        progress=progress,
        watchdog=watchdog,
        work=work,
        peak=convolution_peak(ranks.device, config.precision),
        state=state,
    )


def _check_initialised(config: Config, segmentor: nn.Module) -> None:
    """Raise InputError for a network whose first weights were left to a checkpoint."""
    # there was one when the networks were built
    if getattr(segmentor, "awaits_checkpoint", False):
        got = f"{config.run_dir}: its checkpoints have gone, or are damaged"
        raise InputError(got, "one to go on from", "run the same command again, to start anew")


def _evaluator(
    config: Config,
    ranks: Ranks,
    gather_network: Callable[[], nn.Module],
    data: Data,
    watchdog: Watchdog,
) -> Evaluator:
    # a function, not a network: under FSDP it is joined from all ranks anew for each evaluation
    return Evaluator(
        gather_network,
        data.val,
        ranks,
        TestTimeAugmentation.of(config.evaluate, config.precision, ranks.device),
        num_threads=config.data.num_threads,
        # an evaluation takes longer than the time limit; each image is a sign of life
        mark=watchdog.report,
        subsets=subsets_of(config.evaluate.subsets, data.val.classes.names),
    )


def _source(evaluator: Evaluator, data: Data) -> Evaluator | None:
    """As the evaluation, on the domain that has the labels."""
    if data.source is None:
        return None
    # the same network and view, or the two scores would not compare
    return replace(evaluator, samples=data.source, prefix=SOURCE)


def _held_out(config: Config, found: Learned, data: Data, evaluator: Evaluator) -> HeldOut | None:
    """What judges the teacher's pseudo-labels, as the evaluation looks at images."""
    pseudo_labels = found.pair.weak_to_strong
    if data.held_out is None or pseudo_labels is None:
        return None
    is_average = config.consistency.teacher == "ema"
    teacher = found.ema if is_average and found.ema is not None else found.pair.segmentor
    return HeldOut(
        teacher.full_network,
        # as training corrects them: what runs away by that shows in these labels too
        pseudo_labels.corrected,
        data.held_out,
        evaluator.ranks,
        # once: in training it sees no other scales
        replace(evaluator.augmentation, scales=(1.0,), horizontal_flip=False),
        config.consistency.threshold,
        config.data.num_threads,
        evaluator.mark,
    )


def _checkpoints(config: Config, ranks: Ranks, data: Data) -> Checkpointer:
    """With what a checkpoint must agree on with the run that loads it."""
    classes, readers = data.train.classes, data.readers
    if not config.data.unlabelled_shards:
        # the source adds no manifest: older runs did not list it here, and are to go on
        readers = replace(data, source=None).readers
    # Another split, another order of classes or other samples would make the numbers of one run two
    # runs'. (That the configuration is the same does not say that the shards at its path are.)
    sums = [reader.manifest.sha256 for reader in readers]
    identity: dict[str, Any] = {"manifest_sha256": sums[0], "classes": list(classes.names)}
    # of one data set the splits have one
    if {*sums} != {sums[0]}:
        identity["manifests_sha256"] = sums
    # by what data.class_map calls them: two may have one name, and who scores one of them
    # afterwards has that one alone
    names = {
        reader.manifest.sha256: name
        for name, reader in zip(data.train.names, data.train.readers, strict=True)
        if config.data.class_map and name != names_of([reader])[0]
    }
    if names:
        identity["data_names"] = names
    # left out of runs with all labels, whose samples the manifest names already
    if config.data.labelled != "all":
        identity["labelled_sha256"] = sha256_of_keys(data.train.keys)
    identity["palette"] = [list(color) for color in classes.palette]
    # position in the order of samples = step x batch_size, so neither may change on the way
    identity["batch_size"], identity["seed"] = config.batch_size, config.seed
    identity["precision"] = config.precision
    return Checkpointer(
        Path(config.run_dir),
        config.checkpoint.keep_last,
        identity,
        ranks,
        async_save=config.checkpoint.async_save,
        # one that is being copied stays until that is done
        num_leased=int(bool(config.checkpoint.copy_to)),
        timeout_seconds=config.parallel.timeout_seconds,
    )


def _tracker(config: Config, ranks: Ranks, resumed_at: int | None) -> Tracker:
    content = loading.to_dict(config) | {"environment": environment.facts(ranks)}
    run_dir = Path(config.run_dir)
    return open_tracker(run_dir, config.tracking, content, resumed_at, ranks.is_main)
