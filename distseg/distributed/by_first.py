"""What one rank finds out for all others that ask the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

# few messages, and soon enough
_SHARE_BETWEEN_LOOKS = 0.1


class Asked(Protocol):
    """What `by_first` needs of a store."""

    def set(self, key: str, value: str) -> Any: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...


def by_first(store: Asked, name: str, look: Callable[[], str], seconds: float) -> str:
    """What `look` finds on the first rank that asks, for all that ask after it. So one rank looks
    at all the others, where each by itself would make messages by the square of the ranks.

    name: of the question, which has one answer. seconds: what a look takes at most; after each such
    time without an answer the next that has asked looks, as the one before may be lost.
    """
    # the store counts for all: of ranks that ask at once one gets the 1
    answer, number = f"{name}/answer", store.add(f"{name}/number asking", 1)
    own_turn = time.monotonic() + (number - 1) * seconds
    while time.monotonic() < own_turn:
        if store.check([answer]):
            return store.get(answer).decode()
        # asked again, not waited for inside of the store: a rank may have to take over
        time.sleep(seconds * _SHARE_BETWEEN_LOOKS)
    found = look()
    store.set(answer, found)
    return found
