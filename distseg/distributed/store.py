"""The job's key-value store, with a limit on every wait for it."""

from __future__ import annotations

import uuid
from typing import Any

import torch.distributed as dist

from distseg.distributed.bounded import LateError, in_time
from distseg.distributed.compat import job_store
from distseg.distributed.ranks import Ranks, on_main


class SilentStoreError(LateError):
    """The process that keeps the store has not answered in time; it may be stopped."""


class BoundedStore:
    """A store whose calls all end: a TCPStore waits for its answer without a limit.

    Where its keeper is stopped (SIGSTOP) or its machine is lost, no error ever comes. After
    `seconds` a call raises SilentStoreError. From then on every call does so at once, and where the
    keeper has gone every call raises dist.DistNetworkError as the first did.
    """

    def __init__(self, store: dist.Store, seconds: float):
        self._store, self._seconds = store, seconds
        self._lost: type[Exception] | None = None  # as which it was lost
        self._said = ""

    def set(self, key: str, value: str) -> None:
        """As dist.Store."""
        self._call(self._store.set, key, value)

    def get(self, key: str) -> bytes:
        """As dist.Store: of a key that is there."""
        return self._call(self._store.get, key)

    def add(self, key: str, amount: int) -> int:
        """As dist.Store."""
        return self._call(self._store.add, key, amount)

    def check(self, keys: list[str]) -> bool:
        """As dist.Store."""
        return self._call(self._store.check, keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """As dist.Store: of keys that are all there, in one message."""
        return self._call(self._store.multi_get, keys)

    def delete_key(self, key: str) -> bool:
        """As dist.Store."""
        return self._call(self._store.delete_key, key)

    def _call(self, method: Any, *arguments: Any) -> Any:
        # of one that is silent the connection is still held by the call that has not come back; of
        # one that is gone torch writes a trace into the log at every call
        if self._lost is not None:
            raise self._lost(self._said)
        try:
            return in_time(self._seconds, method, *arguments)
        except LateError as error:
            self._lost, self._said = SilentStoreError, str(error)
            raise SilentStoreError(self._said) from None
        except dist.DistNetworkError as error:
            self._lost, self._said = dist.DistNetworkError, str(error)
            raise


def own_store(ranks: Ranks, seconds: float) -> BoundedStore:
    """A part of the job's store, over a connection of its own: a call that waits holds up no other.

    Called on every rank at once; every call gives another part, so that what ranks wrote that
    torchrun has started again since is not read. seconds: how long one call may take.
    """
    name = on_main(ranks, lambda: uuid.uuid4().hex)
    return BoundedStore(dist.PrefixStore(name, job_store()), seconds)
