"""How long the sections of a step take on this rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distseg.distributed.compat import at_end_of_backward

# of a step, in its order; `exchange` is what is left to wait for when a rank's own backward is over
SECTIONS = ("forward", "backward", "exchange", "optimizer")


class Stopwatch:
    """The seconds of each section of a step, by the device's own clock; of a step that is not to be
    timed nothing, at no cost. Reading it is what waits.
    """

    def __init__(self, device: torch.device):
        # a GPU's section returns long before it is done; events are stamped when it gets there
        self._on_gpu = device.type == "cuda"
        self._is_timed = False
        self._spans: list[tuple[str, Any, Any]] = []
        self._computed: Any = None  # when the last backward had no more to compute

    def begin(self, is_timed: bool) -> None:
        """A step begins, of which the one before is forgotten."""
        self._is_timed = is_timed
        self._spans.clear()

    @contextmanager
    def running(self, section: str) -> Iterator[None]:
        """Around a part of a section; the parts of a step add up."""
        if not self._is_timed:
            yield
            return
        start = self._now()
        # a trace (profile.steps) has the sections by these names
        with torch.profiler.record_function(f"distseg/{section}"):
            yield
        self._spans.append((section, start, self._now()))

    @contextmanager
    def running_backward(self, root: Tensor) -> Iterator[None]:
        """Around a backward that begins at `root`: what it waits for when all gradients of this
        rank are there is the exchange.
        """
        if not self._is_timed:
            yield
            return
        # of the backward before, which had other waits
        self._computed = None
        handle = root.register_hook(self._on_first_gradient) if root.requires_grad else None
        start = self._now()
        with torch.profiler.record_function("distseg/backward"):
            yield
        end = self._now()
        if handle is not None:
            handle.remove()
        computed = end if self._computed is None else self._computed
        self._spans += [("backward", start, computed), ("exchange", computed, end)]

    def seconds(self) -> dict[str, float]:
        """Of all SECTIONS of the last step that was timed; on a GPU this waits until they are
        done.
        """
        found = dict.fromkeys(SECTIONS, 0.0)
        if self._on_gpu and self._spans:
            self._spans[-1][2].synchronize()
        for section, start, end in self._spans:
            seconds = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            found[section] += seconds
        return found

    def _on_first_gradient(self, gradient: Tensor) -> None:
        # before whatever exchanges gradients asks for the same: these are called in their order, so
        # this one comes when nothing but waits is left
        at_end_of_backward(self._note_computed)

    def _note_computed(self) -> None:
        self._computed = self._now()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        # on the stream that computes, so that nothing is waited for until somebody reads it
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
