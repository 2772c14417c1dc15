"""The speed of training between two logged steps."""

from __future__ import annotations

import time


class StepClock:
    """Speed between two laps."""

    def __init__(self, batch_size: int, peak: float, start_step: int):
        """peak: operations per second that this rank's device is capable of."""
        self._batch_size, self._peak = batch_size, peak
        self.restart(start_step, 0.0)

    def restart(self, step: int, wait_seconds: float) -> None:
        """Begin a lap now: what came before, such as an evaluation, is no part of a step's time."""
        # perf_counter: the wall clock of a node can be set back by NTP in the middle of a lap
        self._time, self._wait = time.perf_counter(), wait_seconds
        self.step, self._operations = step, 0.0

    def count(self, operations: float) -> None:
        """A step of so many operations on this rank is done."""
        # summed, not multiplied by steps: phases of one network do less than those of both
        self._operations += operations

    def lap(self, step: int, wait_seconds: float) -> dict[str, float]:
        """The speed since the last lap, and begin another.

        step: steps done by now; wait_seconds: waited for data, since the stream was opened.
        """
        steps = step - self.step
        # Nothing waits for the device here. Logging does, once in every lap, so laps are right on
        # the whole although each of their ends is a little early.
        seconds = max(time.perf_counter() - self._time, 1e-9) / steps
        values = {
            "step_seconds": seconds,
            "images_per_second": self._batch_size / seconds,
            # the stream counts since it was opened, and the reader wants it for one step
            "data_wait_seconds": (wait_seconds - self._wait) / steps,
            "images": float(step * self._batch_size),
        }
        if self._operations:  # counted at all
            values["peak_share"] = self._operations / (steps * seconds * self._peak)
        self.restart(step, wait_seconds)
        return values
