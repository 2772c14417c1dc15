"""Where the time of a process goes: every moment is booked under one part."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# what one process can be at; what is lost between processes is in goodput.py
OWN_PARTS = ("steps", "start", "data", "evaluation", "checkpoints", "other")


class Ledger:
    """How many seconds a process has spent on each of OWN_PARTS since it began; on "start" at
    first. May be read from any thread.

    began: Unix seconds; None: now.
    """

    def __init__(self, began: float | None = None):
        now = time.time()
        self.began = now if began is None else began
        self._seconds = dict.fromkeys(OWN_PARTS, 0.0)
        self._seconds["start"] = max(0.0, now - self.began)
        # monotonic: a clock that is set back would book negative seconds
        self._part, self._since = "start", time.monotonic()
        # the watchdog reads it while the main thread may be anywhere
        self._lock = threading.Lock()

    # read without the lock: a word is replaced at once
    @property
    def part(self) -> str:
        """What the process is at."""
        return self._part

    def enter(self, part: str) -> None:
        """From now on time is booked under this part."""
        with self._lock:
            self._settle()
            self._part = part

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """As `enter`, and back to the part before at the block's end."""
        before = self._part
        self.enter(part)
        yield
        # not in a finally: what an error ends is told by the part that it came in
        self.enter(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Book seconds, at most those that there are, under another part."""
        with self._lock:
            # first: what the present part has had since it began may be moved too
            self._settle()
            # what is measured otherwise, and of another rank, may be more than was booked
            moved = min(max(0.0, seconds), self._seconds[source])
            self._seconds[source] -= moved
            self._seconds[target] += moved

    def seconds(self) -> dict[str, float]:
        """By part, to the millisecond."""
        with self._lock:
            self._settle()
            return {part: round(seconds, 3) for part, seconds in self._seconds.items()}

    def _settle(self) -> None:
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._since = now


def process_began() -> float:
    """When this process began, in Unix seconds, to a hundredth; now where the system does not say.

    Imports come before the first line that could look at a clock, and take seconds.
    """
    try:
        # the 22nd field, in ticks since the boot, and not the time of day, which may have been set
        # behind the name, which may have blanks and brackets of its own
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - max(0.0, since_boot - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
