"""Batches of training views, decoded and warped by workers; full-resolution samples for evaluation.

A few calls of the standard library's pools do what a loader would. webdataset's own DataPipeline is
left out: its shard splitting gives ranks unequal numbers of samples and has no state to resume
from, both of which the plan settles, and around a map over positions it would only add a layer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch

from distseg.data.mixture import Mixture
from distseg.data.plan import MixedPlan, Plan, rank_positions
from distseg.data.samples import SampleSet
from distseg.data.transforms import TrainView
from distseg.data.workers import Caller, Processes, SampleWriter, Threads, Workers
from shards.errors import InputError

# so many steps ahead the reader hears what will be read, for shards that are far away
STEPS_EXPECTED = 64
# besides the one waited for, and more where a batch has fewer samples than there are threads
BATCHES_AHEAD = 2


@dataclass
class Batch:
    """One rank's slice of a global batch, on the CPU (pinned where the stream was told so).

    image: (n, 3, crop_px, crop_px) uint8 RGB, strides of torch.channels_last; label: (n, crop_px,
    crop_px) uint8, class indices and 255 for void; step: the step of training that it belongs to;
    unlabelled: in semi-supervised training, the images without labels of the same step, whose label
    is 0 inside the image.
    """

    image: torch.Tensor
    label: torch.Tensor
    step: int
    unlabelled: Batch | None = None


@dataclass
class _Pending:
    """A batch whose samples are still being written; finish waits for them."""

    batch: Batch
    finish: Callable[[], None]


class TrainStream:
    """An endless iterator of Batch from start_step on, the same pixels for any number of workers
    and ranks.

    plan: the order of the samples. batch_size is global; rank r gets its slice of each batch.
    num_threads workers, threads or processes, decode, warp and stay a few batches ahead; 0 does the
    work in the caller. A sample that cannot be used raises InputError, naming sample and shard, at
    the step that needs it, after the sound batches before it. After that, or a KeyboardInterrupt,
    the stream is closed.

    wait_seconds: time that the caller has spent in next() so far.
    Raises InputError at construction for a batch size that world_size does not divide.
    """

    def __init__(
        self,
        samples: SampleSet | Mixture,
        plan: Plan,
        view: TrainView,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        num_threads: int,
        worker_type: str = "thread",
        start_step: int = 0,
        pin_memory: bool = False,
    ):
        # first of all, as it refuses a batch size before there are workers to end
        share = len(rank_positions(start_step, batch_size, rank, world_size))
        _check_threads(num_threads)
        cv2.setNumThreads(0)  # OpenCV's own threads would fight with ours over the cores
        self.wait_seconds = 0.0
        self._samples = samples
        self._view = view
        self._plan = plan
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._next_step = start_step  # the first that has not been handed to the workers
        self._next_expected = start_step  # the first that the samples have not heard of
        self._pending: deque[_Pending] = deque()
        self._num_pending = 1 + BATCHES_AHEAD + num_threads // share if num_threads else 1
        write = SampleWriter(samples, view, plan.seed)
        self._workers: Workers = Caller(write)
        if num_threads and worker_type == "process":
            self._workers = Processes(write, num_threads, share, self._num_pending)
        elif num_threads:
            self._workers = Threads(write, num_threads)
        self._pin_memory = pin_memory  # for a copy to a GPU that goes on beside its work
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("the stream is closed")
        start = time.perf_counter()
        try:
            # before the wait, so that the workers have work meanwhile
            while len(self._pending) < self._num_pending:
                self._pending.append(self._begin(self._next_step))
                self._next_step += 1
            pending = self._pending.popleft()
            pending.finish()
        except BaseException:  # KeyboardInterrupt too: no worker may outlive it
            self.close()
            raise
        # not in a finally: time that ended in an error is nobody's wait for data
        self.wait_seconds += time.perf_counter() - start
        return pending.batch

    def told(self, num_steps: int) -> dict[str, float]:
        """Of several data sets the share that each has had in the images of the first num_steps
        steps over all ranks, and how often it has been gone through; of one nothing.
        """
        if not isinstance(self._samples, Mixture) or not isinstance(self._plan, MixedPlan):
            return {}
        # from the plan, not counted: after a stop the numbers go on
        num_images, found = num_steps * self._batch_size, {}
        sets = zip(
            self._samples.names, self._samples.sets, self._plan.taken(num_images), strict=True
        )
        kind = "" if self._samples.labelled else "unlabelled_"
        for name, samples, taken in sets if len(self._samples.sets) > 1 else ():
            found[f"data/{kind}share/{name}"] = taken / num_images
            found[f"data/{kind}epochs/{name}"] = taken / len(samples)
        return found

    def close(self) -> None:
        """Stop the workers, and drop what they have not finished."""
        self._closed = True
        # their buffers go at once; workers that still write hold on to their own
        self._pending.clear()
        self._workers.close()

    def _begin(self, step: int) -> _Pending:
        """Allocate the batch of a step and hand its samples to the workers."""
        # each step once, over the ends of epochs too, as positions never end
        while self._next_expected <= step + STEPS_EXPECTED:
            self._samples.expect(
                [self._plan.sample_index(p) for p in self._positions(self._next_expected)]
            )
            self._next_expected += 1
        places = [
            (self._plan.sample_index(position), position) for position in self._positions(step)
        ]
        shape = (len(places), self._view.crop_px, self._view.crop_px)
        # torch keeps and reuses freed pinned blocks
        image = torch.empty((*shape, 3), dtype=torch.uint8, pin_memory=self._pin_memory)
        label = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        # a view: colours stay innermost, as decoded, and convolutions are given channels_last
        batch = Batch(image.permute(0, 3, 1, 2), label, step)
        return _Pending(batch, self._workers.begin(places, image.numpy(), label.numpy()))

    def _positions(self, step: int) -> range:
        return rank_positions(step, self._batch_size, self._rank, self._world_size)


class PairedStream:
    """Two streams in step: labelled batches, each with its batch of unlabelled images."""

    def __init__(self, labelled: TrainStream, unlabelled: TrainStream):
        self._labelled, self._unlabelled = labelled, unlabelled

    @property
    def wait_seconds(self) -> float:
        """Time that the caller has spent in next() so far."""
        return self._labelled.wait_seconds + self._unlabelled.wait_seconds

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        # both have one step per batch, so the same step starts both again after a stop
        return replace(next(self._labelled), unlabelled=next(self._unlabelled))

    def told(self, num_steps: int) -> dict[str, float]:
        """Of the data sets of both, as TrainStream."""
        return self._labelled.told(num_steps) | self._unlabelled.told(num_steps)

    def close(self) -> None:
        """Close both."""
        self._labelled.close()
        self._unlabelled.close()


def evaluation_samples(
    samples: SampleSet, rank: int, world_size: int, num_threads: int
) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """Samples rank, rank + world_size, ... at full resolution, in order: over all ranks each comes
    once.

    Yields (index, key, image (H, W, 3) uint8 RGB, label (H, W) uint8). Read and decoded in
    num_threads threads a few samples ahead; 0: in the caller. Raises InputError, naming sample and
    shard, for a sample that cannot be used.
    """
    if not 0 <= rank < world_size:
        raise InputError(
            f"rank {rank} of {world_size}",
            "0 <= rank < world_size",
            "check how the ranks were started",
        )
    _check_threads(num_threads)
    cv2.setNumThreads(0)
    # checked here: within the generator the errors would wait for its first next()
    return _in_order(samples, range(rank, len(samples), world_size), num_threads)


def _in_order(
    samples: SampleSet, indices: range, num_threads: int
) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    samples.expect(indices)
    if num_threads == 0:
        yield from ((index, *samples.load(index)) for index in indices)
        return
    # whole pictures of any size, so no batch to write into, and no processes to copy them from
    threads = ThreadPoolExecutor(num_threads, "distseg-data")
    pending: deque[tuple[int, Future[tuple[str, np.ndarray, np.ndarray]]]] = deque()
    try:
        for index in indices:
            pending.append((index, threads.submit(samples.load, index)))
            # enough to keep all busy; each holds a decoded picture
            if len(pending) > 2 * num_threads:
                first, task = pending.popleft()
                yield first, *task.result()
        for first, task in pending:
            yield first, *task.result()
    finally:  # also where the consumer stops early
        threads.shutdown(wait=True, cancel_futures=True)


def _check_threads(num_threads: int) -> None:
    if num_threads < 0:
        raise InputError(
            f"num_threads={num_threads}", "0 (in the caller) or more", "correct data.num_threads"
        )
