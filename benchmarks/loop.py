"""What the training loop adds to the bare alternating step: data, logging, watchdog, agreed stop,
checkpoints.

Runs `distseg train` on generated scenes, and every few steps the bare step (gradients and updates,
on the batch at hand) as often; the ratio of the two is the loop's cost. A checkpoint is saved in
every interval, and its cost also given apart, as runs save far less often.
Run: python -m benchmarks.loop [--intervals 5] [--steps 8] [key=value ...]
Two to three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch

from benchmarks.conditions import conditions
from distseg.config.loading import load
from distseg.config.schema import TrackingConfig
from distseg.data.stream import Batch
from distseg.train import assembly
from distseg.train import run as training
from distseg.train.schedules import phase
from distseg.train.step import Metrics, training_step
from distseg.train.trainer import Trainer, to_device
from shards.files import say
from shards.pack import pack
from shards.prepare import prepare

SEMI_STEP = 1000  # by which every term is on
SETTINGS = [
    *(
        "preset=voc_hung_semi",
        "segmentor.init=random",
        "segmentor.batch_norm=per_rank",
        "data.num_classes=8",
    ),
    *(
        "data.crop_px=161",
        "batch_size=2",
        "semi.batch_size=2",
        "semi.start_step=0",
        "evaluate.num_pictures=0",
    ),
    *("tracking.wandb=offline", "evaluate.every_steps=0"),
]


class TimedTrainer(Trainer):
    """A Trainer that interrupts itself for bare steps."""

    every, intervals = 8, 6
    bare: ClassVar[list[float]] = []
    looped: ClassVar[list[float]] = []
    saving: ClassVar[list[float]] = []
    writing: ClassVar[list[float]] = []
    logging: ClassVar[list[float]] = []
    _count, _resumed = 0, 0.0

    def train_step(self, batch: Batch) -> Metrics:
        if self._count % self.every == 0:
            self._finish()  # or the interval's last steps would count as the bare ones'
            now = time.perf_counter()
            if self._count:
                self.checkpoints.wait()  # not at the bare steps' cost
                self.writing.append(time.perf_counter() - now)
                self.looped.append((now - self._resumed) / self.every)
                left = (
                    (self.intervals - len(self.looped))
                    * self.every
                    * (self.looped[-1] + self.bare[-1])
                )
                say(f"interval {len(self.looped)} of {self.intervals}, {left:.0f} s left")
            self.bare.append(self._bare(batch))
            self._resumed = time.perf_counter()
        self._count += 1
        return super().train_step(batch)

    def _bare(self, batch: Batch) -> float:
        """Seconds of a bare step, over as many as an interval has."""
        assert batch.unlabelled is not None and self.pair.discriminator is not None
        parts = [
            to_device(part, self.ranks.device, self.config) for part in (batch, batch.unlabelled)
        ]
        self._finish()
        before = time.perf_counter()
        for _ in range(self.every):
            training_step(self.pair, phase(SEMI_STEP, self.config), *parts)
            self.pair.segmentor.step(0.0)
            self.pair.discriminator.step(0.0)
        self._finish()
        return (time.perf_counter() - before) / self.every

    def _finish(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)


def timed(method: Any, seconds: list[float]) -> Any:
    """A method that notes how long it takes."""

    def call(*arguments: Any, **options: Any) -> Any:
        before = time.perf_counter()
        result = method(*arguments, **options)
        seconds.append(time.perf_counter() - before)
        return result

    return call


def measure(intervals: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds: "bare" steps, one value an interval; as many "ratios", of the loop's step without
    saving to it; "saving" and "writing" of a checkpoint, and "logging", which a logged step takes
    more. "waits" for data of a step, one value for each that is logged.
    """
    # the first interval warms up
    TimedTrainer.every, TimedTrainer.intervals = steps, intervals + 1
    with tempfile.TemporaryDirectory() as folder:
        prepare("toy", None, Path(folder) / "toy.h5", num_train="40", num_val="1")
        pack(Path(folder) / "toy.h5", Path(folder) / "shards")
        settings = [
            *SETTINGS,
            f"steps={TimedTrainer.intervals * steps + 1}",
            f"checkpoint.every_steps={steps}",
            *overrides,
        ]
        save = timed(assembly.Checkpointer.save, TimedTrainer.saving)
        TimedTrainer._log = timed(Trainer._log, TimedTrainer.logging)  # type: ignore[method-assign]
        with (
            patch.object(assembly, "Trainer", TimedTrainer),
            patch.object(assembly.Checkpointer, "save", save),
        ):
            words = [*settings, f"data.shards={folder}/shards", f"run_dir={folder}/run"]
            training.run(load(words))
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").open()]
    bare, looped = TimedTrainer.bare[1:-1], TimedTrainer.looped[1:]
    saving = statistics.median(TimedTrainer.saving[1:-1])
    return {
        "bare": bare,
        "ratios": [(loop - saving / steps) / step for loop, step in zip(looped, bare, strict=True)],
        "saving": saving,
        "writing": statistics.median(TimedTrainer.writing[1:-1]),
        "logging": statistics.median(TimedTrainer.logging),
        "waits": [row["data_wait_seconds"] for row in rows if "data_wait_seconds" in row],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--intervals", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of an interval")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="further key=value for the run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    say("drawing scenes, building networks, two intervals until the time left is known")
    found = measure(options.intervals, options.steps, options.overrides)
    ratios, step = found["ratios"], statistics.median(found["bare"])
    print(conditions(options.threads))
    each = ", ".join(f"{ratio - 1:+.1%}" for ratio in ratios)
    without = f"loop without saving {statistics.median(ratios) - 1:+.1%} ({each})"
    print(f"bare step {step * 1e3:.0f} ms; {without}")
    logging, every = found["logging"], TrackingConfig().log_every
    print(
        f"a logged step takes {logging * 1e3:.1f} ms more: every {every} steps "
        f"{logging / every / step:+.2%}"
    )
    saving, writing = found["saving"], found["writing"]
    most = (saving + writing) / 1000 / step
    kept = f"a checkpoint keeps the loop for {saving:.2f} s, and is then written beside it in"
    print(f"{kept} {writing:.2f} s: every 1000 steps at most {most:+.2%}")


if __name__ == "__main__":
    main()
