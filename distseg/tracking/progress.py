"""How far a training run is: one line that renews itself on a terminal, plain lines in a log
file.
"""

from __future__ import annotations

import math
import time
from collections import deque
from datetime import datetime, timedelta
from typing import TextIO, cast

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from distseg.tracking import catalogue
from distseg.tracking.catalogue import CLASS_IOU, MEAN_IOU, SCORES, VALIDATION
from shards.terminal import Forgiving

_PLAIN_SECONDS = 10.0  # between lines in a log file
_SPEED_SECONDS = 60.0  # the time left follows from the speed over this window
_BAR_CELLS = 16
_WIDE_CELLS = 80  # a terminal of so many columns has room for the bar too
_SPEED = 1  # the place of the speed in a line, where it has one


class Progress:
    """Shows how far training is, its speed and losses, and when it will end; or an evaluation.

    total_steps: the step at which training ends; start_step: the step it goes on from (0 for a new
    run). enabled: False on every rank but 0, and then nothing is shown. noun: what is counted.
    brief: leave nothing behind, and nothing in a log that is over within seconds.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        enabled: bool,
        console: Console | None = None,
        *,
        noun: str = "step",
        brief: bool = False,
    ):
        self._noun, self._brief = noun, brief
        self._total_steps, self._step = total_steps, start_step
        self._metrics: dict[str, float] = {}
        self._mean_iou = math.nan
        # (seconds, step), oldest first. Not rich's own estimate: that forgets all that is older
        # than its window, and so has nothing to go by where rows come more than a minute apart.
        self._recent = deque([(time.monotonic(), start_step)])
        self._next_plain = time.monotonic() + _PLAIN_SECONDS if brief else 0.0
        # a class name that a terminal cannot show must not end a training
        self._console = console or Console(highlight=False, file=cast(TextIO, Forgiving()))
        self._enabled = enabled
        # a narrow terminal has room for one of them, and the bar says least
        self._bar_cells = _BAR_CELLS if self._console.width >= _WIDE_CELLS else 0
        bar = [rich_progress.BarColumn(self._bar_cells)] if self._bar_cells else []
        self._bar = rich_progress.Progress(
            *bar,
            _LineColumn(self),
            console=self._console,
            # often enough to look alive; each redraw takes time from the interpreter that trains
            refresh_per_second=4,
            transient=True,
            disable=not self._console.is_terminal,  # a log file gets plain lines instead
        )
        # from start_step: a resumed run's bar begins where it was stopped
        self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Tell the step just done and the newest metrics (names as in metrics.jsonl; host
        floats).
        """
        if not self._enabled:
            return
        now = time.monotonic()
        self._step = step
        # updated, not replaced: in blocks the two networks' losses come in turn
        self._metrics.update(metrics)
        self._recent.append((now, step))
        # two at least, or a step longer than the window would leave nothing to go by
        while len(self._recent) > 2 and now - self._recent[0][0] > _SPEED_SECONDS:
            self._recent.popleft()
        if self._console.is_terminal:
            self._bar.start()  # only now, so that a mere table of scores needs no close()
            self._bar.update(self._task, completed=step)
        elif now >= self._next_plain:
            self._next_plain = now + _PLAIN_SECONDS
            self._print_line()

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Print the scores of an evaluation, all in [0, 1] under their names in metrics.jsonl
        (val/...).
        """
        self._mean_iou = scores.get(MEAN_IOU, math.nan)
        if self._enabled:
            shown = [score for score in SCORES if score.short and score.name in scores]
            named = [f"{score.short} {score.text(scores[score.name])}" for score in shown]
            self._console.print("  ".join([f"step {step:,}", *named]), style="bold")
            self._console.print(_class_table(scores))

    def message(self, text: str) -> None:
        """Print a line of text above the live line."""
        if self._enabled:
            # markup off: a path or a class name with [brackets] is text
            self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

    def warning(self, text: str) -> None:
        """Print a line of text above the live line that should not be overlooked."""
        if self._enabled:
            soft_wrap = not self._console.is_terminal
            self._console.print(text, style="yellow", markup=False, soft_wrap=soft_wrap)

    def close(self) -> None:
        """Take the live line away and leave the last state as a plain line."""
        if not self._enabled:
            return
        self._enabled = False
        self._bar.stop()
        # the live line is transient: without this nothing of the last state stays on the screen
        if len(self._recent) > 1 and not self._brief:
            self._print_line()

    def seconds_left(self) -> float:
        """Time until the last step at the recent speed, NaN before any step was timed."""
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_step <= first_step or last_time <= first_time:
            return math.nan
        seconds_per_step = (last_time - first_time) / (last_step - first_step)
        return (self._total_steps - self._step) * seconds_per_step

    def line(self, cells: int | None = None) -> Text:
        """The present state: one line; cells: of as many columns at most, by leaving parts out."""
        parts = self._parts()
        # its end is what people look for, then its losses from the first to the last
        while cells is not None and len("  ".join(parts)) > cells and len(parts) > 1:
            parts.pop(_SPEED if len(parts) > _SPEED + 1 and "img/s" in parts[_SPEED] else -1)
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")

    def live_line(self) -> Text:
        """The line that fits beside the bar into the terminal as wide as it is now."""
        return self.line(self._console.width - (self._bar_cells + 1 if self._bar_cells else 0))

    def _parts(self) -> list[str]:
        share = self._step / self._total_steps if self._total_steps else 1.0
        parts = [f"{self._noun} {self._step:,}/{self._total_steps:,}  {share:6.1%}"]
        if "images_per_second" in self._metrics:
            parts.append(f"{self._metrics['images_per_second']:.1f} img/s")
        left = self.seconds_left()
        if math.isfinite(left) and self._step < self._total_steps:
            # the clock and not the duration alone: people ask whether to wait for it
            end = datetime.now() + timedelta(seconds=left)
            parts.append(f"left {_duration(left)} (ends {end:%H:%M}{_days_ahead(end)})")
        # before the losses, whose last ones a narrow terminal cuts off
        if not math.isnan(self._mean_iou):
            parts.append(f"mIoU {self._mean_iou:.1%}")
        for metric in catalogue.ordered(self._metrics):
            if metric.short and not metric.name.startswith(VALIDATION):
                parts.append(f"{metric.short} {metric.text(self._metrics[metric.name])}")
        return parts

    def _print_line(self) -> None:
        # A log line is never cut at the width of a terminal that is not there.
        self._console.print(self.line(), soft_wrap=True)


class _LineColumn(rich_progress.ProgressColumn):
    """The text beside rich's bar."""

    def __init__(self, progress: Progress):
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._progress = progress

    def render(self, task: rich_progress.Task) -> Text:
        return self._progress.live_line()


def _duration(seconds: float) -> str:
    minutes, seconds_part = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds_part:02}"


def _days_ahead(end: datetime) -> str:
    days = (end.date() - datetime.now().date()).days
    return f" +{days}d" if days else ""


def _class_table(scores: dict[str, float]) -> Table:
    """One row a class; three classes a row where there are many, so that a table stays on one
    screen.
    """
    classes = {
        name.removeprefix(CLASS_IOU): iou
        for name, iou in scores.items()
        if name.startswith(CLASS_IOU)
    }
    # 150 classes of ADE20K in one column are three screens
    num_columns = 1 if len(classes) <= 10 else 3
    table = Table()
    for _ in range(num_columns):
        table.add_column("class")
        table.add_column("IoU", justify="right")
    num_rows = math.ceil(len(classes) / num_columns)
    for row in range(num_rows):
        cells: list[Text] = []  # Text, because a plain string's [brackets] would be read as markup
        # down the columns, in the order of the class indices
        for name, iou in list(classes.items())[row::num_rows]:
            cells += [Text(name), Text("absent" if math.isnan(iou) else f"{iou:.1%}")]
        table.add_row(*cells)
    return table
