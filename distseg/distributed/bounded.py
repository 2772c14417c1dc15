"""Waits with an end: of calls that know no limit of their own, and whose other side may be stopped.

Python cannot interrupt a call that waits inside of the system or of a library. It can wait for it
in another thread, which is left behind where the call does not come back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


class LateError(RuntimeError):
    """A call has not come back in time."""


def in_time(seconds: float, call: Callable[..., Result], *arguments: Any) -> Result:
    """What the call returns, or its error. Raises LateError after so many seconds."""
    thread, outcome = _bounded(call, arguments)
    thread.start()
    try:
        return outcome.result(seconds)
    except FutureTimeoutError as error:
        # in Python 3.11 also the type of a time limit of the call's own, which is its outcome
        if outcome.done():
            raise
        raise LateError(f"no answer for {seconds:.0f} s") from error


def while_it_moves(
    seconds: float, progress: Callable[[], object], call: Callable[..., Result], *arguments: Any
) -> Result:
    """As `in_time`, of a call that may take any time for as long as `progress` gives new values, at
    least one in so many seconds.
    """
    thread, outcome = _bounded(call, arguments)
    # before it begins, or a call that moves once and then hangs would be given two turns
    before = progress()
    thread.start()
    while not wait([outcome], seconds).done:
        # asked once a turn: it may ask a disk
        now = progress()
        if now == before:
            raise LateError(f"no progress for {seconds:.0f} s")
        before = now
    return outcome.result()


def _bounded(
    call: Callable[..., Result], arguments: tuple[Any, ...]
) -> tuple[threading.Thread, Future[Result]]:
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(call(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    # a daemon, and of no pool: the interpreter would wait at its end for one that never comes back
    return threading.Thread(target=work, name="bounded call", daemon=True), outcome


@contextmanager
def ends_within(seconds: float, too_late: Callable[[], None]) -> Iterator[None]:
    """Call `too_late`, from another thread, when the block has not ended after so many seconds."""
    timer = threading.Timer(seconds, too_late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
