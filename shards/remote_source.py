"""A packed folder behind a URL: shards are verified, kept in the machine's cache, and fetched ahead
of their reader.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from shards.cache import ShardCache, default_cache_dir
from shards.errors import DamageError, InputError
from shards.manifest import FILE_NAME, Manifest, ShardInfo
from shards.remote import Remote

SHARDS_AHEAD = 8  # fetched and not read yet; also never more than a quarter of the cache
# several at a time, since a single connection seldom fills the line to an object store
FETCHERS = 4
# indices are small: there the time to the first byte counts, and many can wait for theirs at once
INDEX_FETCHERS = 16


class RemoteSource:
    """As Source, behind a URL; shards come when they are opened or expected, into the cache of this
    machine.

    cache_dir, cache_bytes: as in ShardCache; "" for its default folder. A shard that is removed
    while it is expected comes again when it is opened.
    """

    _prefetching: Prefetch | None
    _moved: Callable[[], None]
    _owner: int

    def __init__(self, url: str, cache_dir: str = "", cache_bytes: float = 0):
        # the URL before the cache: a mistyped one leaves no folder behind
        self._remote = Remote(url)
        self._cache = ShardCache(
            Path(cache_dir).expanduser() if cache_dir else default_cache_dir(), int(cache_bytes)
        )
        self._forget()

    def manifest(self) -> Manifest:
        """As Source."""
        action = "copy the packed folder there again, manifest.json last"
        return Manifest.parse(self._remote.read(FILE_NAME), self.place(FILE_NAME), action)

    def find(self, file: str) -> bytes | None:
        """As Source."""
        return self._remote.find(file)

    def indices(self, shards: Sequence[ShardInfo], verify: bool = True) -> Iterator[bytes]:
        """As Source, many at a time; always verified, as each process has fetched its own."""
        # map keeps the order of the shards, which numbers the samples
        with ThreadPoolExecutor(INDEX_FETCHERS) as pool:
            yield from pool.map(self._index, shards)

    @contextmanager
    def open(self, shard: ShardInfo) -> Iterator[int]:
        """As Source; waits until the shard is here.

        Not kept open, so that the cache can tell what is being read.
        """
        self._prefetch().used(shard)
        with self._opened(shard) as descriptor:
            try:
                yield descriptor
            # this disk's doing, since it was sound when it came: the next to open it gets another
            except DamageError:
                self._cache.remove(shard)
                raise

    def expect(self, shards: Sequence[ShardInfo]) -> None:
        """As Source: some of those that are not here are fetched now, in threads."""
        # those that are here would take places among the few that may be ahead
        self._prefetch().expect([shard for shard in shards if not self._cache.has(shard)])

    def tell(self, moved: Callable[[], None]) -> None:
        """As Source."""
        self._moved = moved

    def used(self, shards: Sequence[ShardInfo]) -> None:
        """As Source."""
        for shard in shards:
            self._prefetch().used(shard)

    def place(self, file: str) -> str:
        """As Source."""
        return self._remote.url(file)

    def _index(self, shard: ShardInfo) -> bytes:
        return self._cache.small(shard.index_sha256, lambda: self._fetch_index(shard))

    def _fetch_index(self, shard: ShardInfo) -> bytes:
        content = self._remote.read(shard.index_file)
        # not tried again: other bytes without an error are most often another pack's, under one
        # manifest
        if hashlib.sha256(content).hexdigest() != shard.index_sha256:
            got = f"{self.place(shard.index_file)}: its sha256 is not the manifest's"
            raise InputError(
                got, "the index of the shard", "copy it there again, and manifest.json last"
            )
        return content

    def _opened(self, shard: ShardInfo) -> AbstractContextManager[int]:
        # of this moment: `tell` may be called by another thread while the download runs
        moved = self._moved
        return self._cache.open(
            shard, lambda descriptor: self._remote.download(shard, descriptor, moved), moved
        )

    def _bring(self, shard: ShardInfo) -> None:
        self._index(shard)  # of a large set it was not read at the start
        # opened and let go: it is in the cache, and may make room for others again
        with self._opened(shard):
            pass

    def _prefetch(self) -> Prefetch:
        with self._lock:
            # threads do not survive a fork
            if self._prefetching is None or self._owner != os.getpid():
                self._owner, self._prefetching = (
                    os.getpid(),
                    Prefetch(self._bring, self._cache.limit() // 4),
                )
            return self._prefetching

    def _forget(self) -> None:
        # a callback belongs to the process that gave it
        self._prefetching, self._moved = None, _nothing
        self._owner, self._lock = os.getpid(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # threads and callbacks stay here; the cache is a folder with flocks, which all processes
        # share
        return {"_remote": self._remote, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class Prefetch:
    """Brings expected shards in their order, in threads, a few ahead of what is read.

    bring: fetches one; its errors are left to the reader that needs the shard. At most SHARDS_AHEAD
    shards and max_bytes (but always one) are ahead, so that they do not push each other out of the
    cache.
    """

    def __init__(self, bring: Callable[[ShardInfo], None], max_bytes: int):
        self._bring, self._max_bytes = bring, max_bytes
        self._wanted: OrderedDict[str, ShardInfo] = OrderedDict()  # in the order of need, by sha256
        # bytes of shards that are under way, or here and not read yet
        self._ahead: dict[str, int] = {}
        # a queue without a bound: _begin keeps it short
        self._lock, self._queue, self._threads = threading.Lock(), SimpleQueue[ShardInfo](), 0

    def expect(self, shards: Sequence[ShardInfo]) -> None:
        """These are needed soon, after those that are expected already."""
        with self._lock:
            for shard in shards:
                # twice in the plan, as at the seam of two epochs: once is enough
                if shard.sha256 not in self._ahead:
                    self._wanted.setdefault(shard.sha256, shard)
            self._begin()

    def used(self, shard: ShardInfo) -> None:
        """This one is being read."""
        with self._lock:
            self._ahead.pop(shard.sha256, None)
            self._wanted.pop(shard.sha256, None)  # overtaken: the reader fetches it itself
            # a place among those ahead is free again
            self._begin()

    def _begin(self) -> None:
        while self._wanted and len(self._ahead) < SHARDS_AHEAD:
            shard = next(iter(self._wanted.values()))
            # one at least: a shard above the bound would never come, and the reader wait for it
            # without a head start
            if self._ahead and sum(self._ahead.values()) + shard.num_bytes > self._max_bytes:
                break
            del self._wanted[shard.sha256]
            self._ahead[shard.sha256] = shard.num_bytes
            self._queue.put(shard)
            # daemons: a partial shard keeps, so none has to be waited for at the end
            if self._threads < FETCHERS:
                self._threads += 1
                threading.Thread(target=self._work, name="distseg-prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            shard = self._queue.get()
            with self._lock:
                # read meanwhile, by a reader that was faster: to bring it now would push out of the
                # cache what is needed next
                if shard.sha256 not in self._ahead:
                    continue
            # the reader that needs the shard fetches it itself, and gets the error in its own
            # thread, where it can be raised
            with suppress(InputError, OSError):
                self._bring(shard)


def _nothing() -> None:
    """Nobody wants to know."""
