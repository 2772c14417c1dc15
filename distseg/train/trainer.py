"""The training loop: steps, logging, evaluation, checkpoints, and the agreed stop."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from distseg.config.schema import Config
from distseg.data.stream import Batch, PairedStream, TrainStream
from distseg.distributed.ranks import Ranks, on_main, shared_error
from distseg.distributed.stop import StopRequest
from distseg.distributed.watchdog import Watchdog
from distseg.evaluate.evaluator import Evaluator
from distseg.runs.checkpoint import Checkpoints
from distseg.tracking.progress import Progress
from distseg.tracking.tracker import Tracker
from distseg.train import diagnostics
from distseg.train.clock import StepClock
from distseg.train.ema import MovingAverage
from distseg.train.flops import StepWork
from distseg.train.replicas import check_equal
from distseg.train.schedules import Phase, lr_factor, num_plateaus, phase, stops_early
from distseg.train.step import Images, Metrics, Pair, adversarial_step, supervised_step
from shards.errors import InputError


@dataclass
class TrainState:
    """What survives a restart besides the learners.

    Progress is counted in steps; all ranks hold the same.
    """

    step: int = 0  # steps done, so also the position in the order of samples / batch_size


def memory_of(pair: Pair, ema: MovingAverage | None) -> dict[str, Any]:
    """Everything with a state_dict, by its name in a checkpoint."""
    named = {"segmentor": pair.segmentor, "discriminator": pair.discriminator, "ema": ema}
    return {name: learner for name, learner in named.items() if learner is not None}


@dataclass
class Trainer:
    """The loop: steps, logging, evaluation, checkpoints, and the agreed stop."""

    config: Config
    ranks: Ranks
    pair: Pair
    ema: MovingAverage | None
    evaluator: Evaluator
    checkpoints: Checkpoints
    tracker: Tracker
    progress: Progress
    watchdog: Watchdog
    work: StepWork
    peak: float  # operations per second of convolutions on this rank
    state: TrainState = field(default_factory=TrainState)
    # (step, val/loss) of every evaluation so far, from metrics.jsonl: what plateaus and early
    # stopping go by
    _val_losses: list[tuple[int, float]] = field(default_factory=list)

    def fit(self, stream: TrainStream | PairedStream, stop: StopRequest) -> bool:
        """Train from state.step to config.steps.

        True when done, False when stopped by a signal before.
        """
        self._val_losses = on_main(self.ranks, lambda: self.tracker.history("val/loss"))
        if self._is_done():
            stop.release()
        if self._owes_evaluation():
            self.evaluate()
        clock = StepClock(self.config.batch_size, self.peak, self.state.step)
        while not self._is_done():
            self.watchdog.mark(f"step {self.state.step + 1}, waiting for data")
            batch = next(stream)
            self.watchdog.mark(f"step {self.state.step + 1}")
            stop.begin(self.checkpoints.failed)
            metrics = self.train_step(batch)
            clock.count(self._operations(self.state.step))
            if logged(self.state.step, self.config):
                self._log(
                    self.state.step + 1,
                    metrics,
                    clock.lap(self.state.step + 1, stream.wait_seconds),
                )
            self.state.step += 1
            if _due(self.state.step, self.config.parallel.check_every):
                check_equal(self.ranks, self.pair, self.state.step)
            stopping = stop.agreed() and not self._is_done()
            if (
                stopping
                or self._evaluation_due()
                or _due(self.state.step, self.config.checkpoint.every_steps)
            ):
                self.watchdog.mark(f"step {self.state.step}, saving")
                self.checkpoints.save(memory_of(self.pair, self.ema), asdict(self.state))
            # within the time that a signal leaves; an evaluation due now is made up on resuming
            if stopping:
                self.checkpoints.wait()
                where = f"step {self.state.step} of {self.config.steps}"
                self.progress.message(f"stopped at {where} ({stop.reason()}), checkpoint saved")
                return False
            if self._is_done():
                self.checkpoints.wait()
                stop.release()  # nothing is left that a signal could lose
            # after saving, so that nothing that goes wrong here costs a step
            if self._evaluation_due():
                self.evaluate()
                clock.restart(self.state.step, stream.wait_seconds)
        stop.release()
        return True

    def evaluate(self) -> None:
        """Score the segmentor on the validation split; note the score, and whether it is the best."""
        self.checkpoints.mark_best(self.state.step, self.evaluator().mean_iou)
        named = self.evaluator.named()
        self.tracker.log(self.state.step, named)
        prefix = "val/iou/"
        rows = [
            (name.removeprefix(prefix), iou)
            for name, iou in named.items()
            if name.startswith(prefix)
        ]
        self.tracker.table(self.state.step, "classes", ("class", "IoU"), rows)
        self.progress.evaluation(self.state.step, named)
        before = stops_early(self._losses(), self.config.schedule), self._num_plateaus()
        self._val_losses.append((self.state.step, named["val/loss"]))
        if self._num_plateaus() > before[1]:
            factor = self.config.schedule.plateau_factor
            self.progress.message(
                f"val/loss on a plateau at step {self.state.step}: learning rates times {factor}"
            )
        if stops_early(self._losses(), self.config.schedule) and not before[0]:
            self.progress.message(
                f"val/loss no longer falls: training ends at step {self.state.step}"
            )

    def _is_done(self) -> bool:
        """Whether the last step is behind, or validation has stopped improving.

        The same on every rank.
        """
        return self.state.step >= self.config.steps or stops_early(
            self._losses(), self.config.schedule
        )

    def _losses(self) -> list[float]:
        return [loss for _, loss in self._val_losses]

    def _num_plateaus(self) -> int:
        schedule = self.config.schedule
        return (
            num_plateaus(self._losses(), schedule.plateau_patience)
            if schedule.name == "plateau"
            else 0
        )

    def _evaluation_due(self) -> bool:
        return self.state.step == self.config.steps or _due(
            self.state.step, self.config.evaluate.every_steps
        )

    def _owes_evaluation(self) -> bool:
        """Whether the run was stopped between a checkpoint and the evaluation that belongs to it."""
        return (
            self.state.step > 0
            and self._evaluation_due()
            and self.state.step not in dict(self._val_losses)
        )

    def train_step(self, batch: Batch) -> Metrics:
        """One step on this rank's part of a batch: gradients, then the updates that the phase asks
        for.

        Of a batch with `unlabelled` images, those are left out where no term of the phase looks at
        them.
        """
        config, step = self.config, self.state.step
        # A pure function of the step, so that there is no random state to save
        torch.manual_seed(
            int(np.random.SeedSequence([config.seed, step, self.ranks.rank]).generate_state(1)[0])
        )
        now = replace(phase(step, config), watched=logged(step, config))
        labelled, unlabelled = to_device(batch, self.ranks.device, config), None
        if batch.unlabelled is not None and self._looks_at_unlabelled(now):
            unlabelled = to_device(batch.unlabelled, self.ranks.device, config)
        if now.is_supervised:
            metrics = supervised_step(self.pair, labelled, config.gradient_accumulation_steps)
        else:
            metrics = adversarial_step(
                self.pair, now, labelled, unlabelled, config.gradient_accumulation_steps
            )
        factor = lr_factor(step, config.steps, config.schedule, self._losses())
        for name, learner, on in self._phases(now):
            if on:
                metrics |= {f"{key}/{name}": value for key, value in learner.step(factor).items()}
                metrics[f"lr/{name}"] = torch.tensor(
                    factor * getattr(config, f"{name}_optimizer").lr
                )
        if self.ema is not None and now.segmentor:
            self.ema.update()
        return metrics

    def _looks_at_unlabelled(self, now: Phase) -> bool:
        return now.has_unlabelled_terms or (now.discriminator and self.config.semi.discriminate)

    def _operations(self, step: int) -> float:
        """Of step `step` (from 0), on one of the ranks."""
        now, num_unlabelled = phase(step, self.config), 0
        if self.config.mode == "semi_supervised" and self._looks_at_unlabelled(now):
            num_unlabelled = self.config.semi.batch_size or self.config.batch_size
        return (
            self.work.of_step(now, self.config.batch_size, num_unlabelled) / self.ranks.world_size
        )

    def _phases(self, now: Phase) -> list[tuple[str, Any, bool]]:
        both = [("segmentor", self.pair.segmentor, now.segmentor)]
        return [*both, ("discriminator", self.pair.discriminator, now.discriminator)]

    def _log(self, step: int, metrics: Metrics, speed: dict[str, float]) -> None:
        """All scalars at once: the means over the ranks, what each tells of itself, the weights of
        the terms.
        """
        own = {
            "forward_seconds": self.pair.segmentor.stopwatch.seconds(),
            "data_wait_seconds": speed.pop("data_wait_seconds"),
            "memory_bytes": diagnostics.memory_bytes(self.ranks.device),
        }
        values = diagnostics.gather(metrics, own, self.ranks) | speed
        # of the rank that waits most
        values["data_wait_share"] = values["data_wait_seconds"] / values["step_seconds"]
        values |= diagnostics.weights_of(
            phase(step - 1, self.config), self.config.mode == "semi_supervised"
        )
        for event in self.tracker.log(step, values):
            self.progress.warning(event.text())
        self.progress.update(step, values)
        for name in ("segmentor", "discriminator"):
            in_a_row = values.get(f"skips_in_a_row/{name}", 0)
            if in_a_row >= self.config.max_skips:
                got = f"{name}: {in_a_row:.0f} non-finite gradients in a row at step {step}"
                action = f"start again in another run_dir with a lower {name}_optimizer.lr, or with precision=fp32"
                raise shared_error(
                    InputError(got, f"fewer than max_skips={self.config.max_skips}", action)
                )


def logged(step: int, config: Config) -> bool:
    """Whether step `step` (from 0) is the last of its phase in an interval of `tracking.log_every`
    steps.

    So under `blocks` the curves of both networks go on, whichever of them the interval ends with.
    """
    every = config.tracking.log_every
    end = min((step // every + 1) * every, config.steps)
    updated = _updated(phase(step, config))
    return all(_updated(phase(later, config)) != updated for later in range(step + 1, end))


def _updated(now: Phase) -> tuple[bool, bool]:
    return now.segmentor, now.discriminator


def to_device(batch: Batch, device: torch.device, config: Config) -> Images:
    """A batch on the device, the pixels in [0, 1], in the run's precision and memory format."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    image = batch.image.to(device, non_blocking=True).to(dtype).div_(255)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return Images(image.contiguous(memory_format=layout), batch.label.to(device, non_blocking=True))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
