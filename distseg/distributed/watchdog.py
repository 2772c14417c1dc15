"""A rank that dies or stalls ends the job on all ranks, by name, instead of leaving them in a
barrier.

What torch 2.13 has for this was looked at, and is not enough:

- The collectives' own timeout says that some peer is silent, not which (gloo), or aborts the
  process (NCCL's watchdog). It cannot tell a rank that hangs from one that downloads a shard.
- NCCL's heartbeat monitor looks after NCCL's threads in its own process, and only on GPUs.
- `monitored_barrier` names the missing ranks, but is a collective itself: gloo only, at one place
  of the loop, and blind to whatever happens between two of them.
- torchrun's agent restarts ranks that have exited, and sees no stall; its health check says that
  the agent lives. Its timers kill a process on their own machine, without a word to the others.
  Under srun there is no agent at all.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from distseg.distributed.compat import set_collective_timeout
from distseg.distributed.ranks import Ranks, is_shared, own_store

# sysexits.h: a temporary failure, so that a scheduler may start the same command again
LOST_RANK_EXIT_CODE = 75
# for a rank's next beat, however short the intervals: it may be busy
MIN_LISTENING_SECONDS = 2.0
# no limit of theirs comes before the watchdog, which knows who downloads
COLLECTIVE_SECONDS = 7 * 86400.0

# keys of the job's store
_DIAGNOSIS = "diagnosis"
_ACTIVE_INTERVALS = "active intervals"
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


@dataclass(frozen=True)
class Beat:
    """What a rank last published of itself."""

    number: int  # grows for as long as its process runs
    num_activities: int  # begun by its main thread so far
    activity: str  # the last of them
    host: str
    is_done: bool  # needs no other rank any more, and publishes nothing further


class Watchdog:
    """A thread that tells the others that this process lives, and looks after the rank before its
    own.

    Published in the job's store a few times per timeout: a beat of the thread, which ends when the
    process dies or is stopped, what the main thread reported last, and whether there was a sign of
    life since. A beat that is missing, or a time without signs of life of any rank (one that waits
    is waiting for one that gives none), is written into the store as the diagnosis; every rank
    reads it, prints it and leaves with LOST_RANK_EXIT_CODE. All of that takes `timeout_seconds` at
    most, so what is waited for is some intervals less. Cost: four small messages per rank and
    interval, none from the main thread.

    last_words: called with the diagnosis before this rank leaves.

    A context: what ends it with an error on this rank alone is told to the others, so that none
    waits for it.
    """

    def __init__(
        self, ranks: Ranks, timeout_seconds: float, leave: Callable[[int], Any] = os._exit
    ):
        # os._exit: sys.exit would end this thread alone, with the main one still in its collective
        self._ranks, self._leave = ranks, leave
        # seconds; a 32nd, so that nine intervals leave most of a short timeout for the waiting
        self._interval = min(5.0, timeout_seconds / 32)
        # up to: one interval until a beat is heard, three more for stalls, one until it is missed,
        # four until all left
        self._patience = timeout_seconds - 9 * self._interval
        self.last_words: Callable[[str], Any] = lambda diagnosis: None
        # set by the rank's other threads, and read by this one
        self._activity, self._num_activities, self._num_signs = "starting", 0, 0
        # the watching thread's own
        self._num_beats, self._num_signs_counted = 0, 0
        self._neighbour, self._job = _Unchanged(None), _Unchanged(0)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if ranks.world_size > 1:
            self._store = own_store(ranks)
            set_collective_timeout(COLLECTIVE_SECONDS)
            # a daemon: a main thread that ends by an error must not wait for it
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def report(self, activity: str) -> None:
        """Tell, from the main thread, what it does now ("step 120").

        Two reports may be as far apart as the timeout.
        """
        self._num_activities += 1
        self._num_signs += 1
        self._activity = activity

    def keep_alive(self) -> None:
        """Tell, from any thread, that what is waited for comes nearer, such as bytes of a long
        download.
        """
        # without a lock: of two at once one may be lost, and any change at all is a sign of life
        self._num_signs += 1

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            cause = error if error is None else self.explain(error)
            # noted by now, unless it looked like what follows from another rank's end
            if isinstance(cause, Exception):
                self.last_words((str(cause).splitlines() or [type(cause).__name__])[0])
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
            # after the thread has ended, or its next beat would unsay it
            self._publish_beat(is_done=True)

    def explain(self, error: BaseException) -> BaseException:
        """LostRankError, naming the silent ranks, for an error that a vanished peer caused; else
        the error itself.

        Of one that is this rank's alone, the others are told.
        """
        # of an error that every rank raises nobody has to be told, as nobody waits
        is_watching = self._thread is not None and not self._closed.is_set()
        if not is_watching or is_shared(error) or isinstance(error, SystemExit):
            return error
        if not is_of_lost_peer(error):
            self._tell_own_failure(error)
            return error
        silent = self._listen_for_silent_ranks()
        if silent is None:
            return LostRankError(
                "the job's store is gone, and with it the process that keeps it (rank 0 or "
                "torchrun)"
            )
        # all others live, so its words only looked like those of a lost peer
        if not silent:
            self._tell_own_failure(error)
            return error
        diagnosis = "; ".join(f"{_named(rank, beat)} is gone" for rank, beat in silent.items())
        self._publish_diagnosis(diagnosis)
        return LostRankError(diagnosis)

    def _watch(self) -> None:
        """The thread: publish, listen, and end the process on a diagnosis."""
        try:
            # often at first, so that a rank that is lost in the first seconds can be named too
            while not self._closed.wait(min(self._interval, 0.5 * self._num_beats)):
                self._num_beats += 1
                self._publish_beat()
                stalled_seconds = self._job.seconds(self._count_active_intervals())
                # before a diagnosis of its own: the first is the cause, others follow from it
                if self._store.check([_DIAGNOSIS]):
                    self._end(self._store.get(_DIAGNOSIS).decode())
                diagnosis = self._diagnose(stalled_seconds)
                if diagnosis:
                    # as all others, this rank reads it in its next interval
                    self._store.set(_DIAGNOSIS, diagnosis)
        except (RuntimeError, OSError) as error:  # the store went with its process
            if not self._closed.is_set():
                cause = str(error).splitlines()[0]
                self._end(f"the job's store is gone, and with it rank 0 or torchrun ({cause})")

    def _diagnose(self, stalled_seconds: float) -> str:
        """What is wrong with the rank before this one, or with the job; "" where nothing is."""
        # a ring: messages grow with the number of ranks, and not with its square
        rank = (self._ranks.rank - 1) % self._ranks.world_size
        beat = self._read_beat(rank)
        silent_seconds = self._neighbour.seconds(beat)
        is_done = beat is not None and beat.is_done
        if silent_seconds > self._patience and not is_done:
            return f"{_named(rank, beat)} has not answered for {self._patience:.0f} s"
        # later, so that a silent rank is named first
        if stalled_seconds > self._patience + 3 * self._interval:
            return self._diagnose_stall()
        return ""

    def _diagnose_stall(self) -> str:
        """Who holds the others up: who began the fewest activities, where the ranks differ."""
        beats = {rank: beat for rank, beat in self._read_beats().items() if not beat.is_done}
        most = max(beat.num_activities for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.num_activities < most]
        if not behind:
            return f"no rank has moved on for {self._patience:.0f} s; all are at {self._activity}"
        name = _named(behind[0], beats[behind[0]])
        return f"{name} has not moved on for {self._patience:.0f} s"

    def _count_active_intervals(self) -> int:
        """Of all ranks so far: intervals in which one gave a sign of life, this one included."""
        # one counter of the whole job: where it stands still, no rank has moved
        num_signs = self._num_signs
        total = self._store.add(_ACTIVE_INTERVALS, int(num_signs != self._num_signs_counted))
        self._num_signs_counted = num_signs
        return total

    def _listen_for_silent_ranks(self) -> dict[int, Beat | None] | None:
        """Other ranks without a new beat while this one listens; None where the store is gone."""
        before = self._read_beats()
        # two beats of a rank that lives, and half an interval for one that is late
        time.sleep(max(2.5 * self._interval, MIN_LISTENING_SECONDS))
        after = self._read_beats()
        if not after:
            return None
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        return {rank: after.get(rank) for rank in others if before.get(rank) == after.get(rank)}

    def _tell_own_failure(self, error: BaseException) -> None:
        """Tell the others what ended this rank.

        Its own thread, which would end it too, and say less, is stopped.
        """
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._interval)
        what = (str(error) or type(error).__name__).splitlines()[0]
        where = f"rank {self._ranks.rank} on {socket.gethostname()} (at {self._activity})"
        with suppress(RuntimeError, OSError):  # the store may be gone
            # what is there already came first: this rank's error may follow from it
            if not self._store.check([_DIAGNOSIS]):
                self._publish_diagnosis(f"{where} has failed: {what}")

    def _publish_diagnosis(self, diagnosis: str) -> None:
        """For all ranks.

        Rank 0, which may keep the store, stays until they have read it.
        """
        self._store.set(_DIAGNOSIS, diagnosis)
        self._wait_for_readers()

    def _publish_beat(self, is_done: bool = False) -> None:
        activity, host = self._activity, socket.gethostname()
        beat = Beat(self._num_beats, self._num_activities, activity, host, is_done)
        try:
            self._store.set(f"beat/{self._ranks.rank}", json.dumps(asdict(beat)))
        except (RuntimeError, OSError):
            if not self._closed.is_set():
                raise

    def _read_beat(self, rank: int) -> Beat | None:
        """The last one of a rank; None before its first."""
        key = f"beat/{rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _read_beats(self) -> dict[int, Beat]:
        """The last one of every rank that has published any; {} where the store is gone."""
        try:
            beats = {rank: self._read_beat(rank) for rank in range(self._ranks.world_size)}
        except (RuntimeError, OSError):
            return {}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _end(self, diagnosis: str) -> None:
        # first of all: what follows may hang as the training does
        print(f"error on rank {self._ranks.rank}: {diagnosis}", file=sys.stderr, flush=True)
        self.last_words(diagnosis)
        self._wait_for_readers()
        self._leave(LOST_RANK_EXIT_CODE)
        self._closed.set()

    def _wait_for_readers(self) -> None:
        """On rank 0, which may keep the store, until the others have read it once more."""
        if self._ranks.is_main:
            time.sleep(2 * self._interval)


class _Unchanged:
    """A value that is looked at again and again, and since when it has been the same."""

    def __init__(self, value: object):
        self._value, self._since = value, time.monotonic()

    def seconds(self, value: object) -> float:
        """How long it has been the same; 0 where it is another than the last time."""
        now = time.monotonic()
        if value != self._value:
            self._value, self._since = value, now
        return now - self._since


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether a collective's error says that another rank is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST_PEER)


def _named(rank: int, beat: Beat | None) -> str:
    """A rank for people; None: it was never heard of."""
    if beat is None:
        return f"rank {rank}"
    return f"rank {rank} on {beat.host} (last heard of at {beat.activity})"
