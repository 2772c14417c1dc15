"""The alternating step of a segmentor and a discriminator, and the loop that repeats it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distseg import losses
from distseg.checkpoint import Checkpoints
from distseg.config import Config
from distseg.data.stream import Batch, TrainStream
from distseg.distributed import Ranks, StopRequest, all_reduce_sum, on_main
from distseg.ema import MovingAverage
from distseg.evaluate import Evaluator
from distseg.parallel import Learner, backward
from distseg.progress import Progress
from distseg.schedules import Phase, lr_factor, phase
from distseg.tracking import Tracker
from shards.errors import InputError
from shards.sample import IGNORE_INDEX

Metrics = dict[str, Tensor]


@dataclass
class Pair:
    """The two networks of a run; the discriminator is None in supervised mode."""

    segmentor: Learner
    discriminator: Learner | None
    adv_weight: float


def memory_of(pair: Pair, ema: MovingAverage | None) -> dict[str, Any]:
    """Everything with a state_dict, by its name in a checkpoint."""
    named = {"segmentor": pair.segmentor, "discriminator": pair.discriminator, "ema": ema}
    return {name: learner for name, learner in named.items() if learner is not None}


def adversarial_step(pair: Pair, image: Tensor, label: Tensor, now: Phase) -> Metrics:
    """Gradients of one alternating step: predict; discriminator on real and fake; segmentor. No update yet.

    image: (n, 3, H, W) float in [0, 1]; label: (n, H, W) uint8, 255 = void; this rank's part of the batch.
    Luc et al. 2016 with the non-saturating term: the segmentor minimises CE + adv_weight * BCE(D(s(x)), real),
    the discriminator BCE(D(y), real) + BCE(D(s(x)), fake). Every loss is a mean over the GLOBAL batch.

    The adversary's gradient enters the segmentor through a proxy, the gradient at its probabilities. So one
    D(fake) forward serves both losses, the discriminator's parameters see nothing of the segmentor's loss, and
    no network needs to be frozen, under any parallel strategy.
    """
    segmentor, discriminator = pair.segmentor, pair.discriminator
    assert discriminator is not None  # the caller chose adversarial mode
    with torch.set_grad_enabled(now.segmentor):
        logits = segmentor(image)  # (n, C, h, w)
        probabilities = losses.at_least_float32(logits).softmax(dim=1)
    real, pixels = losses.real_label_map(label, probabilities)
    valid = pixels if discriminator.network.head == "patch" else None  # one score per image has no void
    fake = probabilities.detach().requires_grad_(now.segmentor)
    if now.discriminator:
        on_real, on_fake = discriminator(image, real, fake)
    else:
        (on_fake,) = discriminator.frozen(image, fake)
    num_pixels, num_scores = _global_counts(label, on_fake, valid)

    roots: list[tuple[Tensor, Tensor | None]] = []
    metrics: Metrics = {}
    if now.segmentor:
        adversarial = _global_mean(losses.adversarial_sum(on_fake, valid, real=True), num_scores)
        (proxy,) = torch.autograd.grad(pair.adv_weight * adversarial, fake, retain_graph=now.discriminator)
        cross_entropy = _global_mean(losses.cross_entropy_sum(logits, label), num_pixels)
        roots += [(cross_entropy, None), (probabilities, proxy)]
        metrics |= _segmentor_metrics(cross_entropy, adversarial, pair.adv_weight)
    if now.discriminator:
        loss_real = _global_mean(losses.adversarial_sum(on_real, valid, real=True), num_scores)
        loss_fake = _global_mean(losses.adversarial_sum(on_fake, valid, real=False), num_scores)
        roots += [(loss_real + loss_fake, None)]
        correct = losses.correct_sum(on_real, valid, real=True) + losses.correct_sum(on_fake, valid, real=False)
        metrics |= {"loss/discriminator_real": loss_real, "loss/discriminator_fake": loss_fake}
        metrics["discriminator/accuracy"] = _global_mean(correct, 2 * num_scores)
    updated = [learner for learner, on in ((segmentor, now.segmentor), (discriminator, now.discriminator)) if on]
    backward(roots, updated)
    return {name: value.detach() for name, value in metrics.items()}


def supervised_step(pair: Pair, image: Tensor, label: Tensor) -> Metrics:
    """Gradients of one plain step: cross entropy alone. Arguments as `adversarial_step`."""
    logits = pair.segmentor(image)
    num_pixels = all_reduce_sum((label != IGNORE_INDEX).sum().double())
    cross_entropy = _global_mean(losses.cross_entropy_sum(logits, label), num_pixels)
    backward([(cross_entropy, None)], [pair.segmentor])
    return {"loss/segmentor": cross_entropy.detach(), "loss/cross_entropy": cross_entropy.detach()}


def _segmentor_metrics(cross_entropy: Tensor, adversarial: Tensor, adv_weight: float) -> Metrics:
    total = cross_entropy + adv_weight * adversarial
    return {"loss/segmentor": total, "loss/cross_entropy": cross_entropy, "loss/adversarial": adversarial}


def _global_counts(label: Tensor, scores: Tensor, valid: Tensor | None) -> Tensor:
    """Valid pixels and valid discriminator outputs of the batch on all ranks: (2,) float64, one all-reduce."""
    pixels = (label != IGNORE_INDEX).sum().double()
    return all_reduce_sum(torch.stack([pixels, losses.adversarial_count(scores, valid)]))


def _global_mean(local_sum: Tensor, global_count: Tensor) -> Tensor:
    """A loss whose gradient, averaged over the ranks, is that of (sum over ranks) / count.

    A count of 0 gives 0 with a live graph: a rank that skipped its backward would leave the others waiting.
    """
    return local_sum * (dist.get_world_size() / global_count.clamp(min=1)).to(local_sum.dtype)


@dataclass
class TrainState:
    """What survives a restart besides the learners. Progress is counted in steps; all ranks hold the same."""

    step: int = 0  # steps done, so also the position in the order of samples / batch_size


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
    state: TrainState = field(default_factory=TrainState)

    def fit(self, stream: TrainStream, stop: StopRequest) -> bool:
        """Train from state.step to config.steps; True when done, False when stopped by a signal before."""
        if self._owes_evaluation():
            self.evaluate()
        if self.state.step >= self.config.steps:
            return True
        clock = _Clock(self.config.batch_size, self.state.step)
        for batch in stream:
            stop.begin()
            metrics = self.train_step(batch)
            if logged(self.state.step, self.config):
                self._log(self.state.step + 1, metrics, clock.lap(self.state.step + 1, stream.wait_seconds))
            self.state.step += 1
            done, stopping = self.state.step == self.config.steps, stop.agreed()
            if done or stopping or self._evaluation_due() or _due(self.state.step, self.config.checkpoint.every_steps):
                self.checkpoints.save(memory_of(self.pair, self.ema), asdict(self.state))
            if done:
                stop.release()  # nothing is left that a signal could lose
            elif stopping:  # within the time that a signal leaves; an evaluation due now is made up on resuming
                self.progress.message(
                    f"stopped at step {self.state.step} of {self.config.steps} ({stop.reason()}), checkpoint saved"
                )
                return False
            if self._evaluation_due():  # after saving, so that nothing that goes wrong here costs a step
                self.evaluate()
            if done:
                return True
        raise AssertionError("the stream is endless")

    def evaluate(self) -> None:
        """Score the segmentor on the validation split; note the score, and whether it is the best."""
        self.checkpoints.mark_best(self.state.step, self.evaluator().mean_iou)
        self.tracker.log(self.state.step, self.evaluator.named())
        self.progress.evaluation(self.state.step, self.evaluator.named())

    def _evaluation_due(self) -> bool:
        return self.state.step == self.config.steps or _due(self.state.step, self.config.evaluate.every_steps)

    def _owes_evaluation(self) -> bool:
        """Whether the run was stopped between a checkpoint and the evaluation that belongs to it."""
        due = self.state.step > 0 and self._evaluation_due()
        return due and not on_main(self.ranks, lambda: self.tracker.has(self.state.step, "val/mean_iou"))

    def train_step(self, batch: Batch) -> Metrics:
        """One step on this rank's part of a batch: gradients, then the updates that the phase asks for."""
        config, step = self.config, self.state.step
        # A pure function of the step, so that there is no random state to save
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, self.ranks.rank]).generate_state(1)[0]))
        image, label = to_device(batch, self.ranks.device, config)
        now = phase(step, config.alternation)
        if self.pair.discriminator is None:
            now = Phase(segmentor=True, discriminator=False)
            metrics = supervised_step(self.pair, image, label)
        else:
            metrics = adversarial_step(self.pair, image, label, now)
        factor = lr_factor(step, config.steps, config.schedule)
        for name, learner, on in self._phases(now):
            if on:
                metrics |= {f"{key}/{name}": value for key, value in learner.step(factor).items()}
                metrics[f"lr/{name}"] = torch.tensor(factor * getattr(config, f"{name}_optimizer").lr)
        if self.ema is not None and now.segmentor:
            self.ema.update()
        return metrics

    def _phases(self, now: Phase) -> list[tuple[str, Any, bool]]:
        both = [("segmentor", self.pair.segmentor, now.segmentor)]
        return [*both, ("discriminator", self.pair.discriminator, now.discriminator)]

    def _log(self, step: int, metrics: Metrics, speed: dict[str, float]) -> None:
        """The only wait for the device: all scalars at once, averaged over the ranks."""
        packed = torch.stack([value.double().to(self.ranks.device) for value in metrics.values()])
        means = (all_reduce_sum(packed) / self.ranks.world_size).tolist()
        values = dict(zip(metrics, means, strict=True)) | speed
        self.tracker.log(step, values)
        self.progress.update(step, values)
        for name in ("segmentor", "discriminator"):
            in_a_row = values.get(f"skips_in_a_row/{name}", 0)
            if in_a_row >= self.config.max_skips:
                got = f"{name}: {in_a_row:.0f} non-finite gradients in a row at step {step}"
                action = f"start again in another run_dir with a lower {name}_optimizer.lr, or with precision=fp32"
                raise InputError(got, f"fewer than max_skips={self.config.max_skips}", action)


def logged(step: int, config: Config) -> bool:
    """Whether step `step` (from 0) is the last of its phase in an interval of `tracking.log_every` steps.

    So under `blocks` the curves of both networks go on, whichever of them the interval ends with.
    """
    every = config.tracking.log_every
    end = min((step // every + 1) * every, config.steps)
    now = phase(step, config.alternation)
    return all(phase(later, config.alternation) != now for later in range(step + 1, end))


class _Clock:
    """Speed between two laps."""

    def __init__(self, batch_size: int, start_step: int):
        self._batch_size, self._step = batch_size, start_step
        self._time, self._wait = time.perf_counter(), 0.0

    def lap(self, step: int, wait_seconds: float) -> dict[str, float]:
        now = time.perf_counter()
        steps = step - self._step
        seconds = max(now - self._time, 1e-9) / steps
        values = {"step_seconds": seconds, "images_per_second": self._batch_size / seconds}
        values |= {"data_wait_seconds": (wait_seconds - self._wait) / steps, "images": float(step * self._batch_size)}
        self._time, self._wait, self._step = now, wait_seconds, step
        return values


def to_device(batch: Batch, device: torch.device, config: Config) -> tuple[Tensor, Tensor]:
    """(image in [0, 1], in the run's precision and memory format; label uint8), on the device."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    image = batch.image.to(device, non_blocking=True).to(dtype).div_(255)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return image.contiguous(memory_format=layout), batch.label.to(device, non_blocking=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
