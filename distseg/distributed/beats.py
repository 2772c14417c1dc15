"""What the ranks publish of themselves in the job's store, and what a rank makes of it: who is
silent, and who holds the others up.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from distseg.distributed.by_first import by_first
from distseg.distributed.ranks import Ranks
from distseg.distributed.store import BoundedStore

# for a rank's next beat, however short the intervals: it may be busy
MIN_LISTENING_SECONDS = 2.0
_ACTIVE_INTERVALS = "active intervals"  # key of the job's store


@dataclass(frozen=True)
class Beat:
    """What a rank last published of itself."""

    number: int  # grows for as long as its process runs
    num_activities: int  # begun by its main thread so far
    activity: str  # the last of them
    host: str
    is_done: bool  # needs no other rank any more
    has_left: bool  # and publishes nothing further


class Beats:
    """The beats of all ranks of a job, and what this rank makes of them.

    interval: seconds between two of a rank. patience: seconds of silence after which a rank is
    lost, and without a sign of life of any rank after which the job stalls.

    Its calls raise as those of the store do, where they do not say otherwise.
    """

    def __init__(self, ranks: Ranks, store: BoundedStore, interval: float, patience: float):
        self._ranks, self._store = ranks, store
        self._interval, self._patience = interval, patience
        self._heard: dict[int, Unchanged] = {}  # of the ranks before this one that it looks after
        self._job = Unchanged(0)
        self._num_active, self._reads_at = 0, -1  # intervals; at which of them it reads all beats

    def publish(self, beat: Beat) -> None:
        """This rank's."""
        self._store.set(f"beat/{self._ranks.rank}", json.dumps(asdict(beat)))

    def of(self, rank: int) -> Beat | None:
        """The last one of a rank; None before its first."""
        key = f"beat/{rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def of_all(self) -> dict[int, Beat]:
        """The last one of every rank that has published any; {} where the store is gone."""
        ranks = range(self._ranks.world_size)
        keys = [f"beat/{rank}" for rank in ranks]
        try:
            # as a rule all are there, and come in one message; of a key that is not one would wait
            if self._store.check(keys):
                texts = self._store.multi_get(keys)
                return {rank: Beat(**json.loads(text)) for rank, text in enumerate(texts)}
            beats = {rank: self.of(rank) for rank in ranks}
        except (RuntimeError, OSError):
            return {}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def count(self, is_active: bool) -> float:
        """Seconds for which no rank has given a sign of life; `is_active`: this one has, since it
        was last asked.
        """
        # one counter of the whole job: where it stands still, no rank has moved
        self._num_active = self._store.add(_ACTIVE_INTERVALS, int(is_active))
        return self._job.seconds(self._num_active)

    def listen_anew(self) -> None:
        """Forget for how long others have been silent."""
        self._heard.clear()
        self._job = Unchanged(-1)

    def diagnosis(self, activity: str, stalled_seconds: float) -> str:
        """What is wrong with the ranks before this one, or with the job; "" where nothing is.

        activity: this rank's. stalled_seconds: as `count` says.
        """
        silent = self._silent_before()
        if silent:
            verb = "has" if len(silent) == 1 else "have"
            return f"{' and '.join(silent)} {verb} not answered for {self._patience:.0f} s"
        # later, so that a silent rank is named first
        if stalled_seconds > self._patience + 3 * self._interval:
            return self.stall(activity)
        return ""

    def _silent_before(self) -> list[str]:
        """The names of the ranks right before this one that are silent, once their time is up."""
        # A ring: messages grow with the number of ranks, and not with its square. Who looks after a
        # rank may have stopped with it, so behind one that is quiet the one before it is heard too.
        quiet = []
        for distance in range(1, self._ranks.world_size):
            rank = (self._ranks.rank - distance) % self._ranks.world_size
            beat = self.of(rank)
            seconds = self._heard.setdefault(rank, Unchanged(beat)).seconds(beat)
            if seconds <= 2 * self._interval or (beat is not None and beat.has_left):
                break
            quiet.append((seconds, named(rank, beat)))
        if not quiet or quiet[0][0] <= self._patience:
            return []
        # those further back have been listened to for less
        return [name for seconds, name in quiet if seconds > self._patience / 2]

    def stall(self, activity: str) -> str:
        """Who holds the others up: who began the fewest activities, where the ranks differ. On the
        rank that finds it out first: the others would ask the same of every rank.
        """
        if self._reads_at != self._num_active:
            # the number is that of this stall alone: it stands still for as long as the job does
            if self._store.add(f"readers at {self._num_active}", 1) > 1:
                return ""
            self._reads_at = self._num_active
        of_all = self.of_all()
        beats = {rank: beat for rank, beat in of_all.items() if not beat.is_done}
        # those that are done wait for nobody's steps
        if not beats:
            return ""
        most = max(beat.num_activities for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat.num_activities < most]
        if len(beats) < len(of_all):  # but for the end of the others
            behind = behind or list(beats)
        if not behind:
            return f"no rank has moved on for {self._patience:.0f} s; all are at {activity}"
        name = named(behind[0], beats[behind[0]])
        return f"{name} has not moved on for {self._patience:.0f} s"

    def silent(self) -> dict[int, Beat | None] | None:
        """Other ranks without a new beat while the first that asks listens; None where the store is
        gone.
        """
        # two beats of a rank that lives, and half an interval for one that is late
        seconds = max(2.5 * self._interval, MIN_LISTENING_SECONDS)
        try:
            said = by_first(self._store, "silent ranks", lambda: self._listen(seconds), 2 * seconds)
        except (RuntimeError, OSError):
            return None
        silent = json.loads(said)
        if silent is None:
            return None
        return {int(rank): beat and Beat(**beat) for rank, beat in silent.items()}

    def _listen(self, seconds: float) -> str:
        """As JSON the last beats, or null, of the other ranks without a new one in so many seconds;
        null where the store is gone.
        """
        before = self.of_all()
        time.sleep(seconds)
        after = self.of_all()
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        silent: dict[int, Any] = {}
        for rank in others:
            if before.get(rank) == after.get(rank):
                silent[rank] = asdict(after[rank]) if rank in after else None
        return json.dumps(silent if after else None)


class Unchanged:
    """A value that is looked at again and again, and since when it has been the same."""

    def __init__(self, value: object):
        self._value, self._since = value, time.monotonic()

    def seconds(self, value: object) -> float:
        """How long it has been the same; 0 where it is another than the last time."""
        now = time.monotonic()
        if value != self._value:
            self._value, self._since = value, now
        return now - self._since


def named(rank: int, beat: Beat | None) -> str:
    """A rank for people; None: it was never heard of."""
    if beat is None:
        return f"rank {rank}"
    return f"rank {rank} on {beat.host} (last heard of at {beat.activity})"
