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
from pathlib import Path
from typing import Any

from distseg.distributed.beats import Beat, Beats, Unchanged, named
from distseg.distributed.bounded import LateError, in_time
from distseg.distributed.compat import set_collective_timeout
from distseg.distributed.hangs import Evidence, record
from distseg.distributed.launch import (
    end_stopped_torchrun,
    is_store_of_torchrun,
    store_keeper,
)
from distseg.distributed.ranks import Ranks, is_shared
from distseg.distributed.store import BoundedStore, SilentStoreError, own_store
from shards.errors import InputError, TemporaryError

LOST_RANK_EXIT_CODE = TemporaryError.exit_code
BAD_INPUT_EXIT_CODE = 2  # of the command, for an InputError
# for a call of the store, however short the intervals
_MIN_CALL_SECONDS = 2.0
# to write down where this rank is, and, of these, for the records of the others
_MIN_EVIDENCE_SECONDS, _SHARE_FOR_OTHERS = 2.0, 0.5
# no limit of theirs comes before the watchdog, which knows who downloads
COLLECTIVE_SECONDS = 7 * 86400.0

# keys of the job's store
_DIAGNOSIS = "diagnosis"
_NUM_DONE, _NUM_LEFT = "ranks that are done", "ranks that have left"
# Between two looks at whether all are done: a run's end should not take an interval longer. Of a
# long wait, in which rank 0 draws or uploads, this share: not many messages for nothing.
_FAREWELL_SECONDS, _FAREWELL_SHARE = 0.1, 0.1
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


class LostRankError(TemporaryError):
    """Another rank died or stalled; the text says which, and where it was last seen."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with the job, and the exit code with which its ranks leave."""

    text: str
    exit_code: int = LOST_RANK_EXIT_CODE
    is_failure: bool = False  # of one rank, which has said why: nothing hangs

    @staticmethod
    def of_failure(where: str, error: BaseException) -> Diagnosis:
        """Of a rank that ended by an error of its own."""
        what = (str(error) or type(error).__name__).splitlines()[0]
        # its own code, since a launcher goes by the rank that leaves first: of bad input no second
        # try must come
        code = BAD_INPUT_EXIT_CODE if isinstance(error, InputError) else LOST_RANK_EXIT_CODE
        # an error of a collective may come of ranks that are not at the same one
        return Diagnosis(f"{where} has failed: {what}", code, not is_of_lost_peer(error))


class Watchdog:
    """A thread that tells the others that this process lives, and looks after the rank before its
    own.

    Published in the job's store a few times per timeout: a beat of the thread, which ends when the
    process dies or is stopped, what the main thread reported last, and whether there was a sign of
    life since. A beat that is missing, or a time without signs of life of any rank (one that waits
    is waiting for one that gives none), is written into the store as the diagnosis; every rank
    reads it, prints it and leaves with LOST_RANK_EXIT_CODE. So does every rank for itself where the
    store does not answer, as whoever keeps it is stopped. All of that takes `timeout_seconds` at
    most, so what is waited for is some intervals less. Cost: seven small messages per rank and
    interval, none from the main thread; what all ranks have said is read by one rank alone.

    last_words: called with the diagnosis before this rank leaves. Where a folder was given
    (`leave_evidence_in`), a rank that is lost or stalls has every other one write down there where
    it is, and which collectives it has entered: distseg.distributed.hangs.

    A context: what ends it with an error on this rank alone is told to the others, so that none
    waits for it. One that ends well waits for the other ranks, so that the last of them is watched
    as well. Raises LostRankError where the ranks cannot begin.
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
        # of a rank that leaves: it waits for no keeper of the store that is stopped
        self._last_call_seconds = max(2 * self._interval, _MIN_CALL_SECONDS)
        self.last_words: Callable[[str], Any] = lambda diagnosis: None
        self._evidence: Evidence | None = None
        self._error: BaseException | None = None  # of a collective that did not end well
        # set by the rank's other threads, and read by this one
        self._activity, self._num_activities, self._num_signs = "starting", 0, 0
        # the watching thread's own
        self._num_beats, self._num_signs_counted = 0, 0
        self._beat_of_main: Beat | None = None
        # set by the main thread; is_counted by the watching one
        self._is_done, self._is_leaving, self._is_counted = False, False, False
        self._leaving_since = 0.0
        self._last_seen_leaving = Unchanged(-1)
        self._looked_at = time.monotonic()
        self._closed, self._woken = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if ranks.world_size > 1:
            self._store = self._opened_store(timeout_seconds)
            self._beats = Beats(ranks, self._store, self._interval, self._patience)
            self.lift_time_limits()
            # a daemon: a main thread that ends by an error must not wait for it
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def lift_time_limits(self) -> None:
        """Have collectives wait for as long as this watches; called again when groups of ranks were
        made, which begin with a limit of torch's.
        """
        if self._ranks.world_size > 1:
            set_collective_timeout(COLLECTIVE_SECONDS)

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

    def leave_evidence_in(self, folder: Path) -> None:
        """Where to write, should the job hang: a folder that is this attempt's alone, and that all
        ranks share. It is not made before.
        """
        self._evidence = Evidence(folder, self._ranks.world_size)

    def done(self) -> None:
        """Tell that this rank needs no other any more, and may take its time without reports.

        Whether it lives is still looked after.
        """
        self._is_done = True

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
            if error is None:
                self._wait_for_all()
        finally:
            self.close()
            end_stopped_torchrun()

    def close(self) -> None:
        """Stop watching and being watched, without a word to or from the others."""
        is_open = not self._closed.is_set()
        self._stop_thread()
        if self._thread is not None and is_open:
            # after the thread has ended, or its next beat would unsay it
            with suppress(RuntimeError, OSError):  # the store may have gone before
                in_time(self._last_call_seconds, self._publish_beat, True)

    def _wait_for_all(self) -> None:
        """Until all ranks are done; the thread ends this process where one of them is lost."""
        self._leaving_since = time.monotonic()
        self._is_done = self._is_leaving = True
        self._woken.set()
        if self._thread is not None:
            self._thread.join()

    def _stop_thread(self) -> None:
        self._closed.set()
        self._woken.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._interval)

    def _opened_store(self, timeout_seconds: float) -> BoundedStore:
        try:
            # a connection of its own, which would wait for ever for a keeper that is stopped
            return in_time(timeout_seconds, own_store, self._ranks, self._patience)
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            raise LostRankError(f"a rank was lost as the job began: {what}") from None

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
        self._error = error
        silent = self._beats.silent()
        if silent is None:
            diagnosis = f"the job's store is gone, and with it {self._keeper()}"
            self._leave_evidence(diagnosis)
            return LostRankError(diagnosis)
        # all others live, so its words only looked like those of a lost peer
        if not silent:
            self._tell_own_failure(error)
            self._leave_evidence(str(error).splitlines()[0])
            return error
        diagnosis = "; ".join(f"{named(rank, beat)} is gone" for rank, beat in silent.items())
        self._publish_diagnosis(Diagnosis(diagnosis))
        self._leave_evidence(diagnosis)
        return LostRankError(diagnosis)

    def _watch(self) -> None:
        """The thread: publish, listen, and end the process on a diagnosis."""
        try:
            while not self._closed.is_set() and not self._may_leave():
                self._woken.wait(self._pause())
                self._woken.clear()
                if not self._closed.is_set():
                    self._look()
        except (RuntimeError, OSError) as error:  # the store went with its process, or is stopped
            if not self._closed.is_set():
                self._end(Diagnosis(self._lost_store(error)))

    def _pause(self) -> float:
        """Seconds until the next look."""
        # often at first, so that a rank that is lost in the first seconds can be named too
        seconds = min(self._interval, 0.5 * self._num_beats)
        if not self._is_leaving:
            return seconds
        waited = time.monotonic() - self._leaving_since
        return min(seconds, max(_FAREWELL_SECONDS, _FAREWELL_SHARE * waited))

    def _look(self) -> None:
        """One beat of this rank, and one look at the others."""
        self._num_beats += 1
        self._publish_beat()
        self._beat_of_main = self._beats.of(0) or self._beat_of_main
        # read once: the main thread goes on
        num_signs = self._num_signs
        stalled_seconds = self._beats.count(num_signs != self._num_signs_counted)
        self._num_signs_counted = num_signs
        # before a diagnosis of its own: the first is the cause, others follow from it
        if self._store.check([_DIAGNOSIS]):
            self._end(Diagnosis(**json.loads(self._store.get(_DIAGNOSIS))))
            return
        diagnosis = self._beats.diagnosis(self._activity, stalled_seconds)
        if self._was_stopped():
            self._beats.listen_anew()
            self._last_seen_leaving = Unchanged(-1)
        elif diagnosis:
            # as all others, this rank reads it in its next interval
            self._store.set(_DIAGNOSIS, json.dumps(asdict(Diagnosis(diagnosis))))

    def _was_stopped(self) -> bool:
        """Whether this process stood still since its last look, with its whole job perhaps (Ctrl-Z,
        `scontrol suspend`): silence that it has slept through accuses nobody.
        """
        before, self._looked_at = self._looked_at, time.monotonic()
        # what is added to it until others are heard again stays below the patience
        return self._looked_at - before > self._patience - 3 * self._interval

    def _may_leave(self) -> bool:
        """Whether all ranks are done; where this one may keep the store, whether they know it."""
        if not self._is_leaving:
            return False
        if not self._is_counted:
            self._store.add(_NUM_DONE, 1)
            self._is_counted = True
        if self._store.add(_NUM_DONE, 0) < self._ranks.world_size:
            return False
        if not self._ranks.is_main:
            self._store.add(_NUM_LEFT, 1)
            return True
        # who has not looked yet would take it for lost
        num_left = self._store.add(_NUM_LEFT, 0)
        if self._last_seen_leaving.seconds(num_left) > self._patience:
            # done, but stopped: its launcher would wait for it, and nobody else is left to tell
            beats = self._beats.of_all()
            there = [rank for rank in beats if rank and not beats[rank].has_left]
            names = " and ".join(named(rank, beats[rank]) for rank in there)
            self._end(Diagnosis(f"{names}: not answered for {self._patience:.0f} s at the end"))
            return True
        return num_left >= self._ranks.world_size - 1

    def _lost_store(self, error: Exception) -> str:
        """What is said where the store does not answer, or is gone."""
        if isinstance(error, SilentStoreError):
            return (
                f"{self._keeper()}, which keeps the job's store, has not answered for "
                f"{self._patience:.0f} s"
            )
        cause = str(error).splitlines()[0]
        return f"the job's store is gone, and with it {self._keeper()} ({cause})"

    def _keeper(self) -> str:
        environment = dict(os.environ)
        if self._beat_of_main is None or is_store_of_torchrun(environment):
            return store_keeper(environment)
        return named(0, self._beat_of_main)

    def _tell_own_failure(self, error: BaseException) -> None:
        """Tell the others what ended this rank.

        Its own thread, which would end it too, and say less, is stopped.
        """
        self._stop_thread()
        where = f"rank {self._ranks.rank} on {socket.gethostname()} (at {self._activity})"
        with suppress(RuntimeError, OSError):  # the store may be gone
            # what is there already came first: this rank's error may follow from it
            if not in_time(self._last_call_seconds, self._store.check, [_DIAGNOSIS]):
                self._publish_diagnosis(Diagnosis.of_failure(where, error))

    def _publish_diagnosis(self, diagnosis: Diagnosis) -> None:
        """For all ranks.

        Rank 0, which may keep the store, stays until they have read it.
        """
        content = json.dumps(asdict(diagnosis))
        in_time(self._last_call_seconds, self._store.set, _DIAGNOSIS, content)
        self._wait_for_readers(time.monotonic())

    def _publish_beat(self, has_left: bool = False) -> None:
        beat = Beat(
            self._num_beats,
            self._num_activities,
            self._activity,
            socket.gethostname(),
            self._is_done or has_left,
            has_left,
        )
        try:
            self._beats.publish(beat)
        except (RuntimeError, OSError):
            if not self._closed.is_set():
                raise

    def _end(self, diagnosis: Diagnosis) -> None:
        began = time.monotonic()
        # first of all: what follows may hang as the training does
        print(f"error on rank {self._ranks.rank}: {diagnosis.text}", file=sys.stderr, flush=True)
        # they are written to a disk, which may be what everyone waits for
        with suppress(LateError):
            in_time(2 * self._interval, self.last_words, diagnosis.text)
        if not diagnosis.is_failure:
            self._leave_evidence(diagnosis.text)
        self._wait_for_readers(began)
        end_stopped_torchrun()
        self._leave(diagnosis.exit_code)
        self._closed.set()

    def _leave_evidence(self, diagnosis: str) -> None:
        """Write down where this rank is, as far as that can be done in a short time."""
        if self._evidence is None:
            return
        own = record(self._ranks.rank, self._activity, self._error)
        seconds = max(2 * self._interval, _MIN_EVIDENCE_SECONDS)

        def receive(rank: int) -> bytes | None:
            key = f"hang/{rank}"
            return self._store.get(key) if self._store.check([key]) else None

        def send(text: str) -> None:
            self._store.set(f"hang/{self._ranks.rank}", text)

        share = _SHARE_FOR_OTHERS * seconds
        try:
            in_time(seconds, self._evidence.leave, own, diagnosis, share, send, receive)
        except Exception as error:
            # the disk may be what everyone waits for: in the job's log it is seen all the same
            said = f"where it is could not be written ({error}): {' < '.join(own.places)}"
            print(f"rank {self._ranks.rank}: {said}", file=sys.stderr, flush=True)

    def _wait_for_readers(self, since: float) -> None:
        """On rank 0, which may keep the store, until the others have read it once more.

        since: as time.monotonic gave it when it was written.
        """
        if self._ranks.is_main:
            time.sleep(max(0.0, since + 2 * self._interval - time.monotonic()))


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether a collective's error says that another rank is gone."""
    # a TemporaryError knows its own cause, such as a disk's timeout
    if not isinstance(error, RuntimeError) or isinstance(error, TemporaryError):
        return False
    return any(word in str(error).lower() for word in _LOST_PEER)
