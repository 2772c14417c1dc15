"""A rank that dies or stalls ends the job on all ranks, by name, instead of leaving them in a
barrier.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distseg.distributed.ranks import Ranks, is_shared, own_store, wait_longer

# sysexits.h: a temporary failure, so that a scheduler may start the same command again
LOST_RANK_EXIT_CODE = 75
VERDICT, LIFE = "verdict", "life"
MIN_LISTENING_SECONDS = 2.0  # for a rank's next beat, however short the intervals: it may be busy
# no limit of theirs comes before the watchdog, which knows who downloads
COLLECTIVE_SECONDS = 7 * 86400.0
# what the backends say when a peer is gone; they have no type of their own for it
_LOST_PEER = (
    "gloo",
    "nccl",
    "connection",
    "broken pipe",
    "timed out",
    "timeout",
    "pair closure",
    "peer",
    "recvvalue",
)


class LostRankError(RuntimeError):
    """Another rank died or stalled; the text says which, and where it was last seen.

    exit_code: what the command that it ends returns; it does so without importing this module.
    """

    exit_code = LOST_RANK_EXIT_CODE


class Watchdog:
    """A thread that tells the others that this process lives, and looks after the rank before its
    own.

    Published in the job's store a few times per timeout: a beat of the thread, which ends when the
    process dies or is stopped, what the main thread marked last, and whether anything has moved
    since. A beat that is missing, or a time in which nothing moves on any rank (one that waits is
    waiting for one that does not), is written into the store as the verdict; every rank reads it,
    prints it and leaves with LOST_RANK_EXIT_CODE. All of that takes `timeout_seconds` at most, so
    what is waited for is some intervals less. Cost: four small messages per rank and interval, none
    from the main thread.

    last_words: called with the verdict before this rank leaves.

    A context: what ends it with an error on this rank alone is told to the others, so that none
    waits for it.
    """

    def __init__(
        self, ranks: Ranks, timeout_seconds: float, leave: Callable[[int], Any] = os._exit
    ):
        self._ranks, self._leave = ranks, leave
        self._interval = min(5.0, timeout_seconds / 32)
        # up to: one interval until a beat is heard, three more for stalls, one until it is missed,
        # four until all left
        self._patience = timeout_seconds - 9 * self._interval
        self.last_words: Callable[[str], Any] = lambda verdict: None
        self._marks, self._what = 0, "starting"
        self._moves, self._told_moves, self._life, self._life_at = 0, 0, 0, time.monotonic()
        self._beats, self._neighbour, self._heard_at = 0, b"", time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if ranks.world_size > 1:
            self._store = own_store(ranks)
            wait_longer(COLLECTIVE_SECONDS)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def mark(self, what: str) -> None:
        """Tell, from the main thread, what it does now ("step 120").

        Two marks may be as far apart as the timeout.
        """
        self._marks, self._moves, self._what = self._marks + 1, self._moves + 1, what

    def alive(self) -> None:
        """Tell, from any thread, that what is waited for comes nearer, such as bytes of a long
        download.
        """
        self._moves += 1

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            cause = error if error is None else self.explain(error)
            if cause is not error:
                raise cause from None  # type: ignore[misc]
        finally:
            self.close()

    def close(self) -> None:
        """Stop watching and being watched.

        Called by every rank when nothing is left that needs the others.
        """
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._interval)
            self._say(f"done {self._what}")

    def explain(self, error: BaseException) -> BaseException:
        """LostRankError, naming the silent ranks, for an error that a vanished peer caused; else
        the error itself.

        Of one that is this rank's alone, the others are told.
        """
        if (
            self._thread is None
            or self._closed.is_set()
            or is_shared(error)
            or isinstance(error, SystemExit)
        ):
            return error
        if not (
            isinstance(error, RuntimeError)
            and any(word in str(error).lower() for word in _LOST_PEER)
        ):
            self._tell_own(error)
            return error
        before = self._all_beats()
        time.sleep(max(2.5 * self._interval, MIN_LISTENING_SECONDS))
        after = self._all_beats()
        if not after:
            return LostRankError(
                "the job's store is gone, and with it the process that keeps it (rank 0 or torchrun)"
            )
        silent = [
            rank for rank in range(self._ranks.world_size) if before.get(rank) == after.get(rank)
        ]
        silent = [rank for rank in silent if rank != self._ranks.rank]
        if not silent:
            self._tell_own(error)
            return error
        verdict = "; ".join(f"{_named(rank, after.get(rank, ''))} is gone" for rank in silent)
        self._tell(verdict)
        return LostRankError(verdict)

    def _watch(self) -> None:
        try:
            # often at first, so that a rank that is lost in the first seconds can be named too
            while not self._closed.wait(min(self._interval, 0.5 * self._beats)):
                self._beats += 1
                self._say(self._what)
                self._live()
                if self._store.check([VERDICT]):
                    self._end(self._store.get(VERDICT).decode())
                problem = self._problem()
                if problem:
                    # as all others, this rank reads it in its next interval
                    self._store.set(VERDICT, problem)
        except (RuntimeError, OSError) as error:  # the store went with its process
            if not self._closed.is_set():
                self._end(
                    f"the job's store is gone, and with it rank 0 or torchrun ({str(error).splitlines()[0]})"
                )

    def _problem(self) -> str:
        now, rank = time.monotonic(), (self._ranks.rank - 1) % self._ranks.world_size
        key = f"beat/{rank}"
        said = self._store.get(key) if self._store.check([key]) else b""
        if said != self._neighbour or said.startswith(b"done"):
            self._neighbour, self._heard_at = said, now
        if now - self._heard_at > self._patience:
            return f"{_named(rank, said.decode())} has not answered for {self._patience:.0f} s"
        # later, so that a silent rank is named first
        if now - self._life_at > self._patience + 3 * self._interval:
            return self._stalled()
        return ""

    def _live(self) -> None:
        """Take part in the count of intervals in which a rank has moved, and note when it grows."""
        moves = self._moves
        life = self._store.add(LIFE, int(moves != self._told_moves))
        self._told_moves = moves
        if life != self._life:
            self._life, self._life_at = life, time.monotonic()

    def _stalled(self) -> str:
        """Who holds the others up: the ranks with the fewest marks, where they differ."""
        beats = self._all_beats()
        marks = {
            rank: int(text.split()[1])
            for rank, text in beats.items()
            if not text.startswith("done")
        }
        behind = [rank for rank, count in marks.items() if count < max(marks.values())]
        if not behind:
            return f"no rank has moved on for {self._patience:.0f} s; all are at {self._what}"
        return f"{_named(behind[0], beats[behind[0]])} has not moved on for {self._patience:.0f} s"

    def _tell_own(self, error: BaseException) -> None:
        """Tell the others what ended this rank.

        Its own thread, which would end it too, and say less, is stopped.
        """
        self._closed.set()
        assert self._thread is not None  # the caller has looked
        self._thread.join(self._interval)
        what = (str(error) or type(error).__name__).splitlines()[0]
        with suppress(RuntimeError, OSError):  # the store may be gone
            if not self._store.check([VERDICT]):
                self._tell(
                    f"rank {self._ranks.rank} on {socket.gethostname()} (at {self._what}) has failed: {what}"
                )

    def _tell(self, verdict: str) -> None:
        """Write the verdict for all ranks.

        Rank 0, which may keep the store, stays until they have read it.
        """
        self._store.set(VERDICT, verdict)
        if self._ranks.is_main:
            time.sleep(2 * self._interval)

    def _say(self, what: str) -> None:
        try:
            text = (
                what
                if what.startswith("done")
                else f"{self._beats} {self._marks} {socket.gethostname()} {what}"
            )
            self._store.set(f"beat/{self._ranks.rank}", text)
        except (RuntimeError, OSError):
            if not self._closed.is_set():
                raise

    def _all_beats(self) -> dict[int, str]:
        try:
            keys = {rank: f"beat/{rank}" for rank in range(self._ranks.world_size)}
            return {
                rank: self._store.get(key).decode()
                for rank, key in keys.items()
                if self._store.check([key])
            }
        except (RuntimeError, OSError):
            return {}

    def _end(self, verdict: str) -> None:
        print(f"error on rank {self._ranks.rank}: {verdict}", file=sys.stderr, flush=True)
        self.last_words(verdict)
        if self._ranks.is_main:  # which may keep the store, from which the others read it
            time.sleep(2 * self._interval)
        self._leave(LOST_RANK_EXIT_CODE)
        self._closed.set()


def _named(rank: int, said: str) -> str:
    words = said.split(maxsplit=3)
    return (
        f"rank {rank} on {words[2]} (last heard of at {words[3]})"
        if len(words) == 4
        else f"rank {rank}"
    )
