"""What background threads of all ranks tell the main rank's, without a collective that could meet
one of training.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from typing import Any

from distseg.distributed.ranks import Ranks, own_store

Problem = dict[str, str]  # the parts of an InputError, or one "text"
POLL_SECONDS = 0.02


class Reports:
    """Rounds in which every other rank tells the main one how its part went: None for good, or a
    Problem.

    Made on every rank at once. They travel through the job's key-value store; when that is gone, so
    is its process, and the watchdog says so.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._store: Any = None if ranks.world_size == 1 else own_store(ranks)
        self._given_up = threading.Event()

    def send(self, round_number: int, problem: Problem | None) -> None:
        """Tell the main rank; on every other one."""
        with suppress(RuntimeError):
            self._store.set(f"{round_number}/{self._ranks.rank}", json.dumps(problem))

    def of_others(self, round_number: int, timeout_seconds: float) -> list[Problem | None]:
        """All other ranks' reports, as they come.

        A rank that says nothing in time has a problem. On the main rank.
        """
        deadline = time.monotonic() + timeout_seconds
        return [self._of(rank, round_number, deadline) for rank in range(1, self._ranks.world_size)]

    def give_up(self) -> None:
        """Wait for no report any more: those who are to send them may be gone."""
        self._given_up.set()

    def _of(self, rank: int, round_number: int, deadline: float) -> Problem | None:
        key = f"{round_number}/{rank}"
        with suppress(RuntimeError):
            while not self._store.check([key]):
                if time.monotonic() > deadline or self._given_up.wait(POLL_SECONDS):
                    break
            else:
                report = json.loads(self._store.get(key))
                self._store.delete_key(key)
                return report
        return {"text": f"rank {rank} has not written its part of the checkpoint in time"}
