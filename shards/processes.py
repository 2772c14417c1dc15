"""One function over many tasks, in this process or in several, with results in the order of the
tasks.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from shards.errors import InputError
from shards.user_code import ImportedFiles

Task = TypeVar("Task")
Result = TypeVar("Result")


def check_workers(num_workers: int) -> None:
    """Raise InputError for a negative number of worker processes."""
    if num_workers < 0:
        raise InputError(f"{num_workers} workers", "0 (this process) or more", "correct --workers")


def mapped(
    function: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int
) -> Iterator[Result]:
    """function(task) for each task, in order; num_workers: processes, 0 for this one.

    function must be importable by name, tasks and results picklable. The first error ends all of
    them; a worker that was killed is an InputError. Workers end when this process does, however it
    ends.
    """
    # without a pool at all, so that a debugger, a profiler and a notebook see plain calls
    if num_workers == 0 or not tasks:
        yield from map(function, tasks)
        return
    spawn = multiprocessing.get_context("spawn")  # HDF5 handles and threads do not survive a fork
    # tasks may hold functions of the user's own files, which the workers have to import first
    start = (spawn, _begin, (ImportedFiles(),))
    # a pool of concurrent.futures, since multiprocessing.Pool waits for ever for a task whose
    # worker was killed
    with ProcessPoolExecutor(min(num_workers, len(tasks)), *start) as pool:
        try:
            # in the order of the tasks, whoever is first: the caller's file has one order of
            # samples
            yield from pool.map(function, tasks)
        except BrokenProcessPool:
            action = "use fewer --workers; the same command goes on"
            raise InputError(
                "a worker process was killed", "memory for all workers", action
            ) from None
        finally:
            # else leaving the block would first do all that waits, after the first error or Ctrl-C
            pool.shutdown(cancel_futures=True)


def _begin(_: ImportedFiles) -> None:
    """A pool's workers outlive a parent that is killed with -9.

    They would wait, and write, for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in workers only

    def watch() -> None:
        # ready once the parent has ended, by whatever signal
        wait([parent.sentinel])
        # sys.exit would end this thread only
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
