"""How long a forward takes on this rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """How long the last forward took on this rank, by the device's own clock.

    Reading it is what waits.
    """

    def __init__(self, device: torch.device):
        # a GPU's forward returns long before it is done; events are stamped when it gets there
        self._events = (
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if device.type == "cuda"
            else []
        )
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around one forward."""
        began = time.perf_counter()
        if self._events:
            self._events[0].record()
        yield
        if self._events:
            self._events[1].record()
        # of the GPU only whether there was a forward at all
        self._seconds = time.perf_counter() - began

    def seconds(self) -> float:
        """Of the last forward, 0 before the first; on a GPU this waits until it is done."""
        if not self._events or not self._seconds:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3
