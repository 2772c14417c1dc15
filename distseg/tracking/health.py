"""Verdicts on a run while it trains: what goes wrong silently in adversarial training.

A pure function of the rows of metrics.jsonl, in their order: a run that goes on replays its own
file and stands where it stood, and any run's file can be judged afterwards. A verdict is raised by
the mean of a signal over several logged rows, since one row is one batch, and cleared when several
in a row are clearly better, so that it does not flicker. What is looked for, with its thresholds,
is in distseg.tracking.verdicts.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distseg.tracking.catalogue import AGREEMENT, HEALTH, LOSS, MEAN_IOU
from distseg.tracking.signs import (
    BEST_AGREEMENT,
    LEVEL,
    LEVEL_ROWS,
    LEVELLED,
    LOST,
    UNKEPT,
    UNPREDICTED,
    MetricsRow,
    levels_of,
    lost,
    teaches,
    unkept,
    unpredicted,
)
from distseg.tracking.verdicts import CHECKS, NAMED, Check
from shards.files import write_text

HEALTH_FILE = "health.json"


class Window:
    """The last rows that a check goes by, as (step, value)."""

    def __init__(self, check: Check):
        self._check = check
        # two memories: the long one raises a verdict, the short one clears it
        self._rows: deque[tuple[int, float]] = deque()
        self._recent: deque[float] = deque(maxlen=check.clear_rows)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, step: int, value: float) -> None:
        """Take in a row, and leave out those that are no longer needed."""
        self._rows.append((step, value))
        self._recent.append(value)
        # Only as many as needed both by number and by steps: `log_every` may be 1 or 1,000.
        while (
            len(self._rows) > self._check.num_rows
            and self._rows[1][0] <= step - self._check.num_steps
        ):
            self._rows.popleft()

    @property
    def since(self) -> int:
        return self._rows[0][0]

    def mean(self) -> float:
        """Over all of them."""
        # fsum: a replay of the file must come to the same side of a threshold as the run did
        return math.fsum(value for _, value in self._rows) / len(self._rows)

    def is_full(self) -> bool:
        """Whether they are as many as the check needs to judge; once so, always so."""
        return (
            len(self._rows) >= self._check.num_rows
            and self._rows[-1][0] - self.since >= self._check.num_steps
        )

    def is_bad(self) -> bool:
        return self.is_full() and self._check.beyond(self.mean(), self._check.raise_at)

    def is_good(self) -> bool:
        check = self._check
        # each of them, not their mean: one good batch must not clear what a mean has raised
        better = (not check.beyond(value, check.clear_at) for value in self._recent)
        return len(self._recent) == check.clear_rows and all(better)


@dataclass(frozen=True)
class Event:
    """A verdict raised or cleared by the row of `step`.

    `since`: the first step of the rows that it goes by.
    """

    step: int
    name: str
    raised: bool
    since: int
    value: float  # of the signal: its mean over those rows, or what it is again
    detail: str = ""

    def text(self) -> str:
        """For the terminal and for alerts."""
        check = NAMED[self.name]
        if not self.raised:
            return f"health: no longer at step {self.step}: {check.title}"
        where = f" ({self.detail})" if self.detail else ""
        return (
            f"health: {check.title}{where}, since step {self.since}. {check.meaning} {check.advice}"
        )


class Health:
    """The verdicts on one run; `update` takes its rows in order.

    config: the run's, by dotted names, which says how large losses are; without it, of sums.
    """

    def __init__(self, rows: Iterable[MetricsRow] = (), config: Mapping[str, Any] | None = None):
        self.events: list[Event] = []
        self.on: dict[str, Event] = {}
        self.judged_from: dict[str, int] = {}  # the first step at which a check had rows enough
        self.step = 0
        self._first: dict[str, list[float]] = {name: [] for name in LEVELLED}
        self._start = levels_of(config or {})
        self._before: MetricsRow = dict(self._start)
        self._remembered: MetricsRow = {}  # from rows before, by names of distseg.tracking.verdicts
        # every check from the start: a signal that never comes leaves its window empty, which
        # `flags` omits
        self._windows = {check.name: Window(check) for check in CHECKS}
        # a run that goes on replays its file here, so that no state of this is in checkpoints
        for row in rows:
            self.update(row)

    def update(self, row: MetricsRow) -> list[Event]:
        """Take in a row; what it changed."""
        self.step = row["step"]
        # classes that this row lacks count in it, and the best agreement is of those before
        self._remember_classes(row)
        # each row is judged whatever became of the others: checks do not know of one another
        before = self._before | self._remembered
        judged = (self._judge(check, row, before) for check in CHECKS)
        found = [event for event in judged if event is not None]
        # rows of evaluations have no counts of skips, from which the next difference is taken
        if any(name.startswith(LOSS) for name in row):
            self._before = row | self._levels(row)
        # after judging, or a row would be compared with itself
        best = max(row.get(AGREEMENT, 0.0), self._remembered.get(BEST_AGREEMENT, 0.0))
        self._remembered[BEST_AGREEMENT] = best
        self.events += found
        return found

    def _remember_classes(self, row: MetricsRow) -> None:
        remembered = self._remembered
        if MEAN_IOU in row:
            remembered[UNPREDICTED] = unpredicted(row, remembered.get(UNPREDICTED, {}))
            remembered[LOST] = lost(row, remembered.get(LOST, {}))
        # in other rows classes are missing for want of confident pixels
        if teaches(row):
            remembered[UNKEPT] = unkept(row, remembered.get(UNKEPT, {}))

    def _levels(self, row: MetricsRow) -> dict[str, float]:
        """At which level losses began, up to this row, and how high that may be."""
        levels = dict(self._start)
        for name, first in self._first.items():
            if len(first) < LEVEL_ROWS and math.isfinite(row.get(name, math.nan)):
                first.append(row[name])
            if first:
                levels[LEVEL + name] = statistics.median_low(first)
        return levels

    def _judge(self, check: Check, row: MetricsRow, before: MetricsRow) -> Event | None:
        # None: the row says nothing, which is neither good nor bad
        value = check.measure(row, before)
        if value is None or not math.isfinite(value):
            return None
        window, name = self._windows[check.name], check.name
        window.add(row["step"], value)
        # from here on "nothing found" means something; before, reports call it too early
        if window.is_full():
            self.judged_from.setdefault(name, row["step"])
        # raised once, and told again only after it was cleared
        if name not in self.on and window.is_bad():
            detail, first = check.about(row, before)
            since = window.since if first is None else first
            self.on[name] = Event(row["step"], name, True, since, window.mean(), detail)
            return self.on[name]
        if name in self.on and window.is_good():
            return Event(row["step"], name, False, self.on.pop(name).since, value)
        return None

    def flags(self) -> dict[str, float]:
        """1 or 0 for every verdict that the rows so far could tell, as in metrics.jsonl."""
        return {
            f"{HEALTH}{name}": float(name in self.on)
            for name, window in self._windows.items()
            if window
        }

    def save(self, path: Path) -> None:
        """Write what holds now, with its meaning and advice, and all that was raised and cleared
        before.
        """
        now = [asdict(event) | _words(NAMED[name]) for name, event in self.on.items()]
        # whole or not at all, since people and schedulers read it while the run writes
        document = {
            "step": self.step,
            "now": now,
            "events": [asdict(event) for event in self.events],
        }
        write_text(path, json.dumps(document, indent=2) + "\n")


def _words(check: Check) -> dict[str, str]:
    return {"title": check.title, "meaning": check.meaning, "advice": check.advice}
