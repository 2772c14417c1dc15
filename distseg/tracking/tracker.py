"""What a run measures, written down: always to metrics.jsonl, and to W&B and TensorBoard where they
are wanted.

metrics.jsonl holds one strict JSON object a line: {"step": int, "time": Unix seconds, "<name>":
float, ...}. JSON has no word for non-finite floats, so they are written as the strings "NaN",
"Infinity" and "-Infinity"; `read_metrics` turns them back. Every line of training goes through
`distseg.tracking.health`, whose verdicts are written beside. Rank 0 writes; every other rank gets a
tracker
that does nothing.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distseg.config.loading import runs_inside
from distseg.config.names import flattened
from distseg.config.schema import TrackingConfig
from distseg.tracking.catalogue import LOSS
from distseg.tracking.health import HEALTH_FILE, Event, Health
from distseg.tracking.tensorboard import TensorBoard
from distseg.tracking.verdicts import NAMED
from distseg.tracking.wandb_run import Names, WandbRun, choose_mode, naming
from shards.errors import InputError
from shards.files import LineFile, published, write_text
from shards.storage import is_file, read_bytes

METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"  # of the last attempt
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What the training loop reports to; each call returns without waiting for a network."""

    def log(self, step: int, metrics: dict[str, float]) -> list[Event]:
        """Write one line; values are anything `float()` takes, on the host.

        Returns the verdicts that it changed.
        """

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every line with the value `name`, now or before a restart, in order."""

    def image(self, step: int, name: str, picture: Path | np.ndarray, caption: str = "") -> None:
        """Show a PNG or JPEG file, or a uint8 (H, W, 3) RGB array, at `step` (W&B and
        TensorBoard).
        """

    def masks(
        self, step: int, name: str, picture: np.ndarray, masks: dict[str, np.ndarray], names: Names
    ) -> None:
        """Show masks, (H, W) uint8 indices of the classes `names`, over a uint8 (H, W, 3) picture
        (W&B only).
        """

    def table(self, step: int, name: str, columns: Names, rows: list[tuple[Any, ...]]) -> None:
        """Write a table: tables/<name>-step-<step>.csv, and W&B's tables/<name>."""

    def summary(self, values: dict[str, float]) -> None:
        """Show values of the whole run, beside its last ones (W&B only)."""

    def finish(self, exit_code: int = 0) -> None:
        """Close the files and wait, for a bounded time, until W&B has what it was given."""


class NullTracker:
    """The tracker of every rank but 0: nothing is written."""

    def log(self, step: int, metrics: dict[str, float]) -> list[Event]:
        return []

    def history(self, name: str) -> list[tuple[int, float]]:
        return []

    def image(self, step: int, name: str, picture: Path | np.ndarray, caption: str = "") -> None:
        pass

    def masks(
        self, step: int, name: str, picture: np.ndarray, masks: dict[str, np.ndarray], names: Names
    ) -> None:
        pass

    def table(self, step: int, name: str, columns: Names, rows: list[tuple[Any, ...]]) -> None:
        pass

    def summary(self, values: dict[str, float]) -> None:
        pass

    def finish(self, exit_code: int = 0) -> None:
        pass


class RunTracker:
    """metrics.jsonl, flushed line by line so that a killed process loses nothing; others beside
    it.
    """

    def __init__(
        self,
        run_dir: Path,
        wandb_run: WandbRun | None,
        tensorboard: TensorBoard | None,
        config: dict[str, Any],
    ):
        self._run_dir, self._path = run_dir, run_dir / METRICS_FILE
        # replayed before the file is opened for more: a resumed run stands where the stopped one
        # stood
        rows = read_metrics(self._path) if is_file(self._path) else ()
        self._health = Health(rows, config)
        self._file = LineFile(self._path)
        self._wandb, self._tensorboard = wandb_run, tensorboard

    def log(self, step: int, metrics: dict[str, float]) -> list[Event]:
        # plain floats: scalars of NumPy and torch are no JSON
        values = {name: float(value) for name, value in metrics.items()}
        events = self._health.update({"step": step, **values})
        if any(name.startswith(LOSS) for name in values):  # no scores of an evaluation
            values |= self._health.flags()
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        line.update((name, _json_value(value)) for name, value in values.items())
        try:
            # allow_nan=False: a bare NaN would make the whole file unreadable to strict parsers
            self._file.write(json.dumps(line, allow_nan=False))
            if events:
                self._health.save(self._run_dir / HEALTH_FILE)
        except OSError as error:
            action = (
                "free some space, then run the same command again: it goes on from the last "
                "checkpoint"
            )
            raise InputError(
                f"{self._path}: {error.strerror}", "a disk that can be written", action
            ) from None
        # after the file, which is the record: whatever they do, the line is written
        for writer in self._writers():
            writer.log(step, values)
        for event in events:
            # by mail only what is bad: nobody wants to be woken by good news
            if event.raised and self._wandb is not None:
                self._wandb.alert(
                    NAMED[event.name].title, event.text(), is_error=event.name == "not_finite"
                )
        return events

    def history(self, name: str) -> list[tuple[int, float]]:
        # read again, not kept: it is asked for once, when a run goes on
        return [(row["step"], row[name]) for row in read_metrics(self._path) if name in row]

    def image(self, step: int, name: str, picture: Path | np.ndarray, caption: str = "") -> None:
        for writer in self._writers():
            writer.image(step, name, picture, caption)

    def masks(
        self, step: int, name: str, picture: np.ndarray, masks: dict[str, np.ndarray], names: Names
    ) -> None:
        if self._wandb is not None:
            self._wandb.masks(step, name, picture, masks, names)

    def table(self, step: int, name: str, columns: Names, rows: list[tuple[Any, ...]]) -> None:
        path = self._run_dir / "tables" / f"{name}-step-{step:08d}.csv"
        # newline="": the csv module writes its own, and Windows would add another
        with published(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        if self._wandb is not None:
            self._wandb.table(step, f"tables/{name}", columns, rows)

    def summary(self, values: dict[str, float]) -> None:
        if self._wandb is not None:
            self._wandb.summary(values)

    def finish(self, exit_code: int = 0) -> None:
        self._file.close()
        if exit_code == 0:
            # a run without verdicts has the file too, and it says that nothing was found
            self._health.save(self._run_dir / HEALTH_FILE)
        for writer in self._writers():
            writer.finish(exit_code)

    def _writers(self) -> list[WandbRun | TensorBoard]:
        return [writer for writer in (self._wandb, self._tensorboard) if writer is not None]


def open_tracker(
    run_dir: Path,
    settings: TrackingConfig,
    config: dict[str, Any],
    resume_step: int | None,
    enabled: bool,
) -> Tracker:
    """Open the tracker of one process.

    settings: where W&B files the run, under the directory's name. config: the resolved
    configuration, shown in W&B; its "environment", if any, is written to environment.json too.
    resume_step: the step of the checkpoint that training goes on from; later lines are taken away,
    because those steps will be done again. None: training starts anew, so all lines are. enabled:
    False on every rank but 0.
    """
    if not enabled:
        return NullTracker()
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics_path = run_dir / METRICS_FILE
    # Steps after the checkpoint will be done again, and a curve with two values of one step is
    # none.
    _rewind(metrics_path, resume_step)
    if "environment" in config:
        content = json.dumps(config["environment"], indent=2) + "\n"
        write_text(run_dir / ENVIRONMENT_FILE, content)
    tensorboard = (
        TensorBoard(run_dir / "tensorboard", resume_step) if settings.tensorboard else None
    )
    mode = choose_mode(settings.wandb)
    wandb_run = None
    if mode != "disabled":
        wandb_run = WandbRun(run_dir, mode, naming(settings, run_dir), config)
    return RunTracker(run_dir, wandb_run, tensorboard, flattened(config))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl in the order it was written, without a last line torn by a kill.

    Returns one dict a line: "step" an int, everything else floats, non-finite ones included.
    Raises InputError when the file is missing or a line before the last is unreadable.
    """
    if not is_file(path):
        raise InputError(
            f"{path} does not exist",
            "the metrics.jsonl of a run",
            runs_inside(path.parent) or "name the directory of a run that has started",
        )
    rows = []
    for number, _, row, is_last in _lines(path):
        if row is not None:
            rows.append(
                {
                    name: _NON_FINITE.get(v, v) if isinstance(v, str) else v
                    for name, v in row.items()
                }
            )
        # the last line alone can be torn by a kill; an earlier one was damaged by something else
        elif not is_last:
            raise InputError(
                f"line {number} of {path} is not a JSON object with a step",
                "one JSON object a line",
                "delete that line; the others are not affected",
            )
    return rows


def _json_value(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any] | None, bool]]:
    """Yield (line number from 1, text, row or None where unreadable, whether it is the last
    line).
    """
    # errors="replace": a torn line may end within a character
    texts = read_bytes(path).decode("utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        readable = isinstance(row, dict) and isinstance(row.get("step"), int)
        yield number, text, row if readable else None, number == len(texts)


def _rewind(path: Path, resume_step: int | None) -> None:
    """Leave the whole lines up to `resume_step`; the file is replaced at once or not at all."""
    if not is_file(path):
        return
    kept = []
    for number, text, row, is_last in _lines(path):
        if row is None and not is_last:
            _log.warning("%s: line %d was unreadable and is removed", path, number)
        if row is not None and resume_step is not None and row["step"] <= resume_step:
            kept.append(text + "\n")
    write_text(path, "".join(kept))
