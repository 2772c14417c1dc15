"""What background threads of all ranks tell the main rank's, without a collective that could meet
one of training.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from distseg.distributed.ranks import Ranks
from distseg.distributed.store import own_store
from shards.errors import InputError, TemporaryError

POLL_SECONDS = 0.02  # asked again and again: a wait inside of the store could not be given up


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank, in words that can be sent: an exception need not be."""

    got: str
    needed: str = ""  # with `action`: of an InputError; "" for any other error
    action: str = ""
    is_temporary: bool = False  # of a TemporaryError

    @staticmethod
    def of(error: InputError) -> Failure:
        return Failure(error.got, error.needed, error.action)

    def to_error(self) -> Exception:
        """The exception to raise for it."""
        if not self.needed:
            return TemporaryError(self.got) if self.is_temporary else RuntimeError(self.got)
        return InputError(self.got, self.needed, self.action)


Letter = Failure | dict[str, str]


class Mailbox:
    """Rounds in which every other rank tells the main one how its part went: a few words for good,
    or a Failure.

    Made on every rank at once. The letters travel through the job's key-value store; when that is
    gone, so is its process, and the watchdog says so. timeout_seconds: for one call of the store,
    whose keeper may be stopped; no shorter than the watchdog's, which knows who that is.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float):
        self._ranks = ranks
        self._store: Any = None if ranks.world_size == 1 else own_store(ranks, timeout_seconds)
        self._given_up = threading.Event()

    def send(self, round_number: int, letter: Letter) -> None:
        """Tell the main rank; on every other one."""
        # without the store nobody is left to read it; the watchdog tells the user why
        if isinstance(letter, Failure):
            content: dict[str, Any] = {"failure": asdict(letter)}
        else:
            content = {"done": letter}
        with suppress(RuntimeError):
            self._store.set(f"{round_number}/{self._ranks.rank}", json.dumps(content))

    def collect(self, round_number: int, timeout_seconds: float) -> list[Letter]:
        """What all other ranks have sent, waiting for each. On the main rank.

        A rank that says nothing in time has failed.
        """
        # one deadline for all ranks, since they write at the same time
        deadline = time.monotonic() + timeout_seconds
        others = range(1, self._ranks.world_size)
        return [self._receive(f"{round_number}/{rank}", rank, deadline) for rank in others]

    def give_up(self) -> None:
        """Wait for no rank any more: those who are to send may be gone."""
        self._given_up.set()

    def _receive(self, key: str, rank: int, deadline: float) -> Letter:
        try:
            while not self._store.check([key]):
                if time.monotonic() > deadline or self._given_up.wait(POLL_SECONDS):
                    return Failure(
                        f"rank {rank} has not written its part of the checkpoint in time"
                    )
            content = json.loads(self._store.get(key))
            self._store.delete_key(key)  # or the store would grow with every round
        except RuntimeError as error:
            # no word on the rank, which may well have written
            what = (str(error).splitlines() or [""])[0]
            return Failure(
                f"the job's store is gone or does not answer ({what})", is_temporary=True
            )
        return Failure(**content["failure"]) if "failure" in content else content["done"]
