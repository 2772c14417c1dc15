"""Who decodes and warps the samples of a batch: the caller, threads, or processes that share memory
with it.

Threads suffice as a rule, because the codecs and the warp release the interpreter's lock, and they
write straight into the batch. Processes are for hosts where a rank needs more of them than one
interpreter's lock can serve: they copy each batch once more, and each takes the memory of a Python
of its own. torch is not imported here: they need none.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any, Protocol

import cv2
import numpy as np

from distseg.data.mixture import Mixture
from distseg.data.plan import augmentation_rng
from distseg.data.samples import SampleSet
from distseg.data.transforms import TrainView
from shards.errors import InputError

# what a scheduler sends to all processes of a job
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class SampleWriter:
    """Writes the view of one sample at one position; the same pixels wherever it runs."""

    samples: SampleSet | Mixture
    view: TrainView
    seed: int

    def __call__(self, index: int, position: int, image: np.ndarray, label: np.ndarray) -> None:
        """Read and decode sample `index`, and fill image (crop_px, crop_px, 3) and label (crop_px,
        crop_px), uint8.
        """
        _, pixels, classes = self.samples.peek(index)
        self.view(pixels, classes, augmentation_rng(self.seed, position), image, label)


class Workers(Protocol):
    """Fills batches, several at a time."""

    def begin(
        self, places: Sequence[tuple[int, int]], image: np.ndarray, label: np.ndarray
    ) -> Callable[[], None]:
        """Start to fill image (n, crop_px, crop_px, 3) and label (n, crop_px, crop_px), uint8.

        places: (sample index, position) of each of the n samples. Returns a function that waits
        until all are there; it raises what went wrong with the first bad one.
        """

    def close(self) -> None:
        """Drop what is not done, and return when no worker is left. May be called again."""


class Caller:
    """As Workers, without any: `begin` does the work."""

    def __init__(self, write: SampleWriter):
        self._write = write

    def begin(
        self, places: Sequence[tuple[int, int]], image: np.ndarray, label: np.ndarray
    ) -> Callable[[], None]:
        """As Workers."""
        for place, *out in zip(places, image, label, strict=True):
            self._write(*place, *out)
        return lambda: None

    def close(self) -> None:
        """As Workers."""


class Threads:
    """As Workers, in threads that write straight into the batch."""

    def __init__(self, write: SampleWriter, count: int):
        self._write, self._pool = write, ThreadPoolExecutor(count, "distseg-data")

    def begin(
        self, places: Sequence[tuple[int, int]], image: np.ndarray, label: np.ndarray
    ) -> Callable[[], None]:
        """As Workers."""
        # each task has its own rows of the batch, so they need no lock
        outs = zip(places, image, label, strict=True)
        tasks = [self._pool.submit(self._write, *place, *out) for place, *out in outs]
        return lambda: _wait(tasks)

    def close(self) -> None:
        """As Workers; waits for the samples at hand."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Processes:
    """As Workers, in processes that write into memory which they share with this one.

    The memory has no name, so none can be left behind, and its pages are touched once, not for each
    batch. It has num_batches blocks of batch_size samples. The processes end with this one, however
    it ends, and only then: signals that a scheduler sends to all processes of a job are this one's
    to answer. One that is killed is an InputError.
    """

    def __init__(self, write: SampleWriter, count: int, batch_size: int, num_batches: int):
        self._write, self._batch_size = write, batch_size
        self._memory = _Memory(batch_size * num_batches, write.view.crop_px)
        self._free = list(range(num_batches))
        alive, self._lifeline = os.pipe()
        self._alive = _PassedDescriptor(alive)
        # threads and locks of this process do not survive a fork
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, spawn, _start, (write, self._memory, self._alive))
        self._closed = False

    def begin(
        self, places: Sequence[tuple[int, int]], image: np.ndarray, label: np.ndarray
    ) -> Callable[[], None]:
        """As Workers; at most num_batches may be under way."""
        # there always is one: the stream begins no more batches than it was made for
        block = self._free.pop()
        first = block * self._batch_size
        with _deaf(), _killed_is_said():  # the pool starts its processes here
            tasks = [
                self._pool.submit(_write, *place, slot)
                for slot, place in enumerate(places, start=first)
            ]

        def finish() -> None:
            with _killed_is_said():
                _wait(tasks)
            part = slice(first, first + len(places))
            # the copy that threads do not need: the batch itself is no shared memory
            np.copyto(image, self._memory.images[part])
            np.copyto(label, self._memory.labels[part])
            # not before it was copied: the next batch may write there at once
            self._free.append(block)
            # the workers' readers are their own: this process's has not seen that they were read
            self._write.samples.used([index for index, _ in places])

        return finish

    def close(self) -> None:
        """As Workers; what they are doing is not waited for."""
        if self._closed:
            return
        self._closed = True
        # first: a pool that broke waits, its lock held, for workers that it could not terminate
        os.close(self._lifeline)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._alive.close()
        self._memory.close()


class _PassedDescriptor:
    """A file descriptor that goes with its object to a process that is being spawned."""

    def __init__(self, number: int):
        self.number = number

    def close(self) -> None:
        os.close(self.number)

    def __getstate__(self) -> Any:
        # handed over by multiprocessing: in another process the number means another file
        return reduction.DupFd(self.number)

    def __setstate__(self, passed: Any) -> None:
        self.number = passed.detach()


class _Memory:
    """Memory for views, shared with the processes that its object is sent to.

    Images and labels as in a batch.
    """

    def __init__(self, num_slots: int, crop_px: int):
        self._file = _PassedDescriptor(os.memfd_create("distseg-data"))
        self._num_slots, self._crop_px = num_slots, crop_px
        # bytes: three of colour and one of label for each pixel
        os.ftruncate(self._file.number, num_slots * crop_px**2 * 4)
        self._map()

    def close(self) -> None:
        del self.images, self.labels  # with them the mapping goes
        self._file.close()

    def _map(self) -> None:
        flat = np.frombuffer(mmap.mmap(self._file.number, 0), np.uint8)
        shape, num_pixels = (
            (self._num_slots, self._crop_px, self._crop_px),
            self._num_slots * self._crop_px**2,
        )
        self.images, self.labels = (
            flat[: 3 * num_pixels].reshape(*shape, 3),
            flat[3 * num_pixels :].reshape(shape),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_file", "_num_slots", "_crop_px")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


@contextmanager
def _deaf() -> Iterator[None]:
    """What is started within inherits that these signals are blocked, from its first moment on.

    Here they wait.
    """
    # per thread, and inherited: the process is deaf before its first line of Python runs
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _killed_is_said() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        got = "a data worker process was killed"
        action = (
            "write a smaller data.num_threads, or data.worker_type=thread; the same command goes on"
        )
        raise InputError(got, "memory for all of them, if it was not you", action) from None


def _wait(tasks: Sequence[Future[None]]) -> None:
    for task in tasks:
        # in order, so that the first bad sample is told of, whichever was met first
        task.result()


_own: tuple[SampleWriter, _Memory]  # of a worker process


def _start(write: SampleWriter, memory: _Memory, alive: _PassedDescriptor) -> None:
    """In a worker process, before its first task."""
    global _own
    # there are as many processes as cores wanted
    cv2.setNumThreads(0)
    _own = write, memory
    gc.freeze()  # see distseg.train

    def watch() -> None:
        # returns when the other end is closed: by `close`, or because the process is gone
        os.read(alive.number, 1)
        # at once, in the middle of a sample: nothing of it could still be wanted
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _write(index: int, position: int, slot: int) -> None:
    write, memory = _own
    write(index, position, memory.images[slot], memory.labels[slot])
