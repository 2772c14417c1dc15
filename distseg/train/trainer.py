"""The training loop: steps, logging, evaluation, checkpoints, and the agreed stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distseg.config.schema import WITH_UNLABELLED, Config
from distseg.config.world_size import num_views_of
from distseg.data.stream import Batch, PairedStream, TrainStream
from distseg.distributed.ranks import Ranks, on_main, shared_error
from distseg.distributed.stop import StopRequest
from distseg.distributed.watchdog import Watchdog
from distseg.evaluate.evaluator import Evaluator
from distseg.parallel import Learner
from distseg.runs.attempts import Note
from distseg.runs.checkpointer import Checkpointer
from distseg.runs.copies import Copies
from distseg.runs.ledger import Ledger
from distseg.tracking.catalogue import COPY_FAILURES
from distseg.tracking.progress import Progress
from distseg.tracking.tracker import Tracker
from distseg.train import diagnostics
from distseg.train.batch import Images, tracked_by
from distseg.train.clock import StepClock
from distseg.train.ema import MovingAverage
from distseg.train.finite import not_finite
from distseg.train.flops import StepWork
from distseg.train.held_out import HeldOut
from distseg.train.inputs import Data, open_streams
from distseg.train.profiling import StepProfiler
from distseg.train.replicas import check_equal
from distseg.train.schedules import Phase, lr_factor, phase
from distseg.train.step import Metrics, Pair, training_step
from distseg.train.strong_views import StrongViews
from distseg.train.validation import Evaluation, ValidationHistory

# what becomes of scores that do not compare
_ANEW = "the next score counts as the best, plateaus and early stopping wait from there on"


@dataclass
class TrainState:
    """What survives a restart besides the learners.

    Progress is counted in steps; all ranks hold the same.
    """

    step: int = 0  # steps done, so also the position in the order of samples / batch_size
    # of all evaluations before the step's own, which comes after its checkpoint
    evaluations: list[Evaluation] = field(default_factory=list)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> TrainState:
        """What a checkpoint says; one of an earlier version holds no evaluations."""
        evaluations = [Evaluation(*each) for each in saved.get("evaluations", [])]
        return cls(saved["step"], evaluations)


def saved_parts(pair: Pair, ema: MovingAverage | None) -> dict[str, Any]:
    """Everything with a state_dict, by its name in a checkpoint."""
    teacher = pair.weak_to_strong
    # these names are file names in checkpoints: renaming one makes old checkpoints unreadable
    named = {
        "segmentor": pair.segmentor,
        "discriminator": pair.discriminator,
        "ema": ema,
        "alignment": None if teacher is None else teacher.alignment,
    }
    return {name: learner for name, learner in named.items() if learner is not None}


@dataclass(kw_only=True)
class Trainer:
    """The loop: steps, logging, evaluation, checkpoints, and the agreed stop."""

    config: Config
    ranks: Ranks
    pair: Pair
    ema: MovingAverage | None
    evaluator: Evaluator
    checkpoints: Checkpointer
    tracker: Tracker
    progress: Progress
    watchdog: Watchdog
    work: StepWork
    peak: float  # operations per second of convolutions on this rank
    source: Evaluator | None = None  # on the domain that has the labels, where that is another
    # whose labels the evaluator's are, as `checkpoint.read_best` has it
    chosen_by: dict[str, str] = field(default_factory=dict)
    held_out: HeldOut | None = None  # of a run with a teacher
    state: TrainState = field(default_factory=TrainState)
    # where this process's time goes, and the attempt's note of it, which the main rank alone writes
    ledger: Ledger = field(default_factory=Ledger)
    note: Note | None = None
    # raises InputError where the run directory is another than the run began in; on the main rank
    check_folder: Callable[[], None] = lambda: None
    profiler: StepProfiler = field(init=False)
    copies: Copies = field(default_factory=lambda: Copies(Path()))  # of checkpoints, elsewhere
    _validation: ValidationHistory = field(init=False)
    # of the last logged step, on the main rank; see diagnostics.told
    _of_ranks: list[list[float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._validation = ValidationHistory(self.config.schedule, self.state.evaluations)
        run_dir = Path(self.config.run_dir)
        self.profiler = StepProfiler(self.config.profile, self.ranks, run_dir)

    def fit(self, stream: TrainStream | PairedStream, stop: StopRequest) -> bool:
        """Train from state.step to config.steps.

        True when done, False when stopped by a signal before.
        """
        self._recall_evaluations()
        # a run that was complete is only evaluated and drawn again, which a signal may end at once
        if self._is_done():
            stop.release()
        # made up before the next step, or plateau schedules of the resumed run would know one loss
        # less
        if self._owes_evaluation():
            self.evaluate()
        # after that evaluation, which is no part of a step's time
        clock = StepClock(self.config.batch_size, self.peak, self.state.step)
        self.ledger.enter("steps")
        while not self._is_done():
            self._advance(stream, stop, clock)
            # of the flags that `begin` sent before the step
            is_stopping = stop.agreed() and not self._is_done()
            # Save, then stop or evaluate. A stop without a checkpoint loses steps, and an
            # evaluation can fail or be killed.
            self._save_if_due(is_stopping)
            if is_stopping:
                return False  # an evaluation due now is made up on resuming
            if self._is_done():
                stop.release()  # nothing is left that a signal could lose
            # after saving, so that nothing that goes wrong here costs a step
            if self._evaluation_due():
                self.evaluate()
                # or the evaluation would count as a slow step
                clock.restart(self.state.step, stream.wait_seconds)
        stop.release()
        return True

    def _recall_evaluations(self) -> None:
        """Of a run that goes on, those that its checkpoint does not hold: its own, which came after
        it; all of a checkpoint of an earlier version.
        """
        # from metrics.jsonl, which is no more than a hint, as the disk may have lost its last lines
        # the main rank's file, sent to all: every rank must come to the same learning rate and the
        # same end
        lines = on_main(self.ranks, lambda: self.tracker.history("val/loss"))
        kept, now = self.state.evaluations, self.evaluator.augmentation.to_dict()
        view = kept[-1].view if kept else now
        if view != now:
            self.progress.message(f"evaluation changed from {view} to {now}: {_ANEW}")
        known = {step: Evaluation(step, loss, view) for step, loss in lines}
        known |= {each.step: each for each in kept}
        # in place: the history is of this list
        kept[:] = [known[step] for step in sorted(known)]

    def _advance(
        self, stream: TrainStream | PairedStream, stop: StopRequest, clock: StepClock
    ) -> None:
        """One step, logged and checked where that is due."""
        # reported before `next`, so that a rank without data is told from one in a collective
        step = self.state.step
        self.profiler.before(step + 1)
        self.watchdog.report(f"step {step + 1}, waiting for data")
        with self.ledger.within("data"):
            batch = next(stream)
        self.watchdog.report(f"step {step + 1}")
        # A failed save is asked for like a stop: one rank's disk alone may be full, and raising
        # here would leave the others waiting. At the agreed stop `save` raises it on all.
        stop.begin(self.checkpoints.failed)
        # between `begin` and `agreed`, so that the flags travel while the device works
        metrics = self.train_step(batch)
        clock.count(self._operations(step))
        # nothing is read from the device in other steps: the host stays ahead of it
        if logged(step, self.config):
            num_steps = step + 1 - clock.step
            speed = clock.lap(step + 1, stream.wait_seconds)
            longer = self._log(step + 1, metrics, speed | stream.told(step + 1))
            # until that rank had its data all others waited for it, within the step
            self.ledger.move(longer * num_steps, "steps", "data")
        self.state.step += 1
        self._mark()
        self._write_profile()
        if _due(self.state.step, self.config.parallel.check_every):
            check_equal(self.ranks, self.pair, self.state.step)

    def _save_if_due(self, is_stopping: bool) -> None:
        """A checkpoint before every evaluation and stop, and every so many steps; the last one is
        on the disk when this returns.
        """
        # an evaluation needs its checkpoint: `mark_best` names the step just saved
        is_due = _due(self.state.step, self.config.checkpoint.every_steps)
        if is_due or is_stopping or self._evaluation_due():
            self.watchdog.report(f"step {self.state.step}, saving")
            # collective: every rank comes here at the same step, as all of the conditions are
            # agreed on
            with self.ledger.within("checkpoints"):
                self.checkpoints.save(saved_parts(self.pair, self.ema), asdict(self.state))
            self._mark(is_saved=True)
        if is_stopping or self._is_done():
            with self.ledger.within("checkpoints"):
                self.checkpoints.wait()

    def _write_profile(self) -> None:
        """Where this was the last step that is to be profiled."""
        if self.profiler.is_running:
            self.watchdog.report(f"step {self.state.step}, profiled")
            with self.ledger.within("other"):
                path = self.profiler.after(self.state.step)
            if path is not None:
                self.progress.message(f"profile: {path}, to be opened at https://ui.perfetto.dev")

    def _mark(self, *, is_saved: bool = False) -> None:
        if self.note is not None:
            self.note.mark(self.state.step, is_saved=is_saved)

    def evaluate(self) -> None:
        """Score the segmentor on the validation split; note the score, and if it is the best."""
        with self.ledger.within("evaluation"):
            self._evaluate()
        # what comes after its checkpoint is not done again where the run goes on from there
        self._mark(is_saved=True)

    def _evaluate(self) -> None:
        view, score = self.evaluator.augmentation.to_dict(), self.evaluator().mean_iou
        self.checkpoints.mark_best(self.state.step, score, self.chosen_by, view)
        values = self.evaluator.named() | ({} if self.held_out is None else self.held_out())
        if self.source is not None:
            self.source()
            values |= self.source.named()
        self.check_folder()
        events = self.tracker.log(self.state.step, values)
        classes = self.evaluator.samples.classes.names
        rows = [(name, values[f"val/iou/{name}"]) for name in classes]
        self.tracker.table(self.state.step, "classes", ("class", "IoU"), rows)
        if self.ranks.world_size > 1:
            of_ranks = [(rank, *of_rank) for rank, of_rank in enumerate(self._of_ranks)]
            self.tracker.table(self.state.step, "ranks", diagnostics.COLUMNS, of_ranks)
        self.progress.evaluation(self.state.step, values)
        for event in events:
            self.progress.warning(event.text())
        # on every rank, from values that all share: the schedule and the end follow from them
        evaluation = Evaluation(self.state.step, values["val/loss"], view)
        for news in self._validation.add(evaluation):
            self.progress.message(news)

    def _is_done(self) -> bool:
        """Whether the last step is behind, or validation has stopped improving.

        The same on every rank.
        """
        return self.state.step >= self.config.steps or self._validation.stops_early

    def _evaluation_due(self) -> bool:
        is_last = self.state.step == self.config.steps
        return is_last or _due(self.state.step, self.config.evaluate.every_steps)

    def _owes_evaluation(self) -> bool:
        """Whether the run was stopped between a checkpoint and its evaluation."""
        step = self.state.step
        is_done = any(each.step == step for each in self.state.evaluations)
        return step > 0 and self._evaluation_due() and not is_done

    def train_step(self, batch: Batch) -> Metrics:
        """One step on this rank's part of a batch: gradients, then the updates that the phase asks
        for.
        """
        config, step = self.config, self.state.step
        # A pure function of the step, so that there is no random state to save
        # The rank is part of it: dropout with equal masks on all ranks would be less random than on
        # one.
        seed = np.random.SeedSequence([config.seed, step, self.ranks.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        current = replace(phase(step, config), watched=logged(step, config))
        for learner in self.pair.learners:
            learner.stopwatch.begin(current.watched or self.profiler.is_running)
        labelled, unlabelled, taught = self._images(batch, current)
        num_micro_batches = config.gradient_accumulation_steps
        metrics = training_step(self.pair, current, labelled, unlabelled, num_micro_batches)
        if current.watched and taught is not None and taught.pseudo is not None:
            names, threshold = self.evaluator.samples.classes.names, config.consistency.threshold
            # not of strong views, which labels may be laid over
            seen = labelled.label, taught.pseudo
            metrics |= diagnostics.class_shares(*seen, threshold, names)
        # one factor for both networks: their base rates stand in the configuration, the course is
        # one
        factor = lr_factor(step, config.steps, config.schedule, self._validation.num_plateaus)
        # Both updates come after all gradients: a discriminator that has moved is not the one whose
        # gradient the segmentor was given.
        if current.segmentor:
            metrics |= _update("segmentor", self.pair.segmentor, factor)
            metrics["lr/segmentor"] = torch.tensor(factor * config.segmentor_optimizer.lr)
        if current.discriminator and self.pair.discriminator is not None:
            metrics |= _update("discriminator", self.pair.discriminator, factor)
            metrics["lr/discriminator"] = torch.tensor(factor * config.discriminator_optimizer.lr)
        # only where the segmentor may have moved, or a block of the discriminator would age the
        # average
        if self.ema is not None and current.segmentor:
            self.ema.update()
        return metrics

    def _images(self, batch: Batch, current: Phase) -> tuple[Images, Images | None, Images | None]:
        """What the networks get of a batch: strong views where they are asked for, and unlabelled
        images where a term of the phase looks at them; and what a teacher was shown of these.
        """
        labelled, unlabelled = self._alone(batch, self.pair.strong_labelled), None
        labelled = tracked_by(self.config, labelled)
        # read and decoded all the same, so that the order of the stream does not depend on the
        # schedule
        if batch.unlabelled is not None and self.pair.objective.uses_unlabelled(current):
            if self.pair.weak_to_strong is not None and current.taught:
                taught, strong = self.views(batch.unlabelled, labelled)
                return labelled, strong, taught
            unlabelled = self._alone(batch.unlabelled, self.pair.strong_unlabelled)
        return labelled, unlabelled, None

    def _alone(self, batch: Batch, strong: StrongViews | None) -> Images:
        """The images of a batch, without a teacher, as the segmentor sees them."""
        images = to_device(batch, self.ranks.device, self.config)
        return images if strong is None else strong.alone(images, self.state.step)

    def views(
        self, unlabelled: Batch, labelled: Images, learn: bool = True
    ) -> tuple[Images, Images]:
        """The weak views of a step's unlabelled images, labelled by the teacher, and the strong
        ones, of a run that has a teacher; called on every rank. learn: as of WeakToStrong.taught.
        """
        teacher, step = self.pair.weak_to_strong, self.state.step
        # phases ask for a teacher only where there is one, and so do pictures
        assert teacher is not None
        weak = to_device(unlabelled, self.ranks.device, self.config)
        weak = teacher.taught(weak, self.config.gradient_accumulation_steps, learn)
        return weak, teacher.strong(weak, labelled, step)

    def next_views(self, data: Data) -> tuple[Images, Images] | None:
        """The weak and the strong views of the unlabelled images of the step that would come next,
        as training makes them; None where no teacher labels any, or no pictures are asked for.

        Called on every rank. The run's own stream, weights and step stay as they are.
        """
        if self.pair.weak_to_strong is None or not self.config.evaluate.num_pictures:
            return None
        self.watchdog.report("pictures of pseudo-labels")
        # a stream of its own, from the same seed: what the run has read ahead is left to it
        with closing(open_streams(self.config, self.ranks, data, self.state.step)) as stream:
            batch = next(stream)
        assert batch.unlabelled is not None
        labelled = self._alone(batch, self.pair.strong_labelled)
        return self.views(batch.unlabelled, labelled, learn=False)

    def _operations(self, step: int) -> float:
        """Of step `step` (from 0), on one of the ranks."""
        config, current, num_unlabelled = self.config, phase(step, self.config), 0
        if config.mode in WITH_UNLABELLED and self.pair.objective.uses_unlabelled(current):
            num_unlabelled = config.semi.batch_size or config.batch_size
        num_views = num_views_of(config)
        total = self.work.of_step(current, config.batch_size, num_unlabelled, num_views)
        # ranks have equal shares, so no rank needs to be asked
        return total / self.ranks.world_size

    def _log(self, step: int, metrics: Metrics, speed: dict[str, float]) -> float:
        """All scalars at once: the means over the ranks, what each tells of itself, the weights of
        the terms. Returns, on the main rank, how much longer than itself some rank has waited for
        data, in seconds a step.
        """
        # the wait for the device, where the host is about to wait anyway
        values = diagnostics.means(metrics, self.ranks) | speed
        waited = speed["data_wait_seconds"]
        own = {
            "step": speed["step_seconds"],
            "memory": diagnostics.memory_bytes(self.ranks.device),
            "data": waited,
            **diagnostics.sections(self.pair.learners),
        }
        self._of_ranks = diagnostics.told(own, self.ranks)
        values |= diagnostics.pace(self._of_ranks)
        values |= self.pair.objective.weights(phase(step - 1, self.config))
        self.check_folder()
        # verdicts are told by whoever keeps the rows: the null tracker of other ranks has none
        num_failures = self.copies.num_failures
        own = {} if num_failures is None else {COPY_FAILURES: float(num_failures)}
        for event in self.tracker.log(step, values | own):
            self.progress.warning(event.text())
        for line in self.copies.told():
            self.progress.warning(line)
        self.progress.update(step, values)
        # from values that all ranks share, so that all raise at the same step
        error = not_finite(self.config, step, values)
        if error is not None:
            raise shared_error(error)
        return values["data_wait_seconds"] - waited


def _update(name: str, learner: Learner, lr_factor: float) -> Metrics:
    """A network's update, and what it tells, under the network's name."""
    return {f"{key}/{name}": value for key, value in learner.step(lr_factor).items()}


def logged(step: int, config: Config) -> bool:
    """Whether step `step` (from 0) is the last of its phase in an interval of `tracking.log_every`
    steps.

    So under `blocks` the curves of both networks go on, whichever of them the interval ends with.
    """
    every = config.tracking.log_every
    # the run's last step ends an interval too, whatever `log_every` is
    end = min((step // every + 1) * every, config.steps)
    own = _updated(phase(step, config))
    return all(_updated(phase(later, config)) != own for later in range(step + 1, end))


def _updated(current: Phase) -> tuple[bool, bool]:
    return current.segmentor, current.discriminator


def to_device(batch: Batch, device: torch.device, config: Config) -> Images:
    """A batch on the device, the pixels in [0, 1], in the run's precision and memory format."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    # Bytes travel, a quarter of fp32's; the division is done where the pixels are used.
    image = batch.image.to(device, non_blocking=True).to(dtype).div_(255)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return Images(image.contiguous(memory_format=layout), batch.label.to(device, non_blocking=True))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
