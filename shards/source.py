"""Where a data set's shards lie: in a folder, or behind a URL. The reader sees no difference."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shards.errors import InputError
from shards.manifest import Manifest, ShardInfo
from shards.storage import is_file, read_bytes, retried

# shards kept open: opening costs milliseconds on a network file system, and descriptors are few
MAX_OPEN = 128


# a Protocol of what the reader calls: a further kind of store needs no base class and no registry
class Source(Protocol):
    """A place that shards are read from; threads may share it; it may be forked and pickled."""

    def manifest(self) -> Manifest:
        """What is there. Raises InputError when there is none, or a damaged one."""

    def find(self, file: str) -> bytes | None:
        """All of a small file, where there is one."""

    def indices(self, shards: Sequence[ShardInfo], verify: bool = True) -> Iterator[bytes]:
        """The shards' member indices, in order. Raises InputError for one that is not as packed;
        with verify=False of a folder nothing is compared, as another process of this machine does.
        """

    def open(self, shard: ShardInfo) -> AbstractContextManager[int]:
        """A descriptor to pread from, good until the block ends, which raises DamageError for what
        it does not like.
        """

    # expect and used are apart from open, since the process that plans the order and those that
    # read samples need not be the same
    def expect(self, shards: Sequence[ShardInfo]) -> None:
        """These will be opened soon, in this order: what takes time may begin."""

    def tell(self, moved: Callable[[], None]) -> None:
        """Call `moved`, from any thread of this process, whenever more of a shard that is far away
        has come.
        """

    def used(self, shards: Sequence[ShardInfo]) -> None:
        """These were opened, by another process."""

    def place(self, file: str) -> str:
        """Path or URL of a file, for messages."""


def open_source(location: str | Path, cache_dir: str = "", cache_bytes: float = 0) -> Source:
    """The source for a folder or an http(s)://, s3:// or gs:// URL.

    Cache_*: as in shards.cache.ShardCache.
    """
    if "://" not in str(location):
        return LocalSource(Path(location))
    # its packages are extras, and asyncio takes a moment to import
    from shards.remote_source import RemoteSource

    return RemoteSource(str(location), cache_dir, cache_bytes)


@dataclass
class _Opened:
    # users: reads under way in other threads, during which it must stay open
    descriptor: int
    users: int = 0


class LocalSource:
    """A folder of shards, of which the max_open used last stay open (more only while more are being
    read).
    """

    def __init__(self, directory: Path, max_open: int = MAX_OPEN):
        self._directory, self._max_open = directory, max_open
        self._forget()

    def manifest(self) -> Manifest:
        """As Source."""
        return Manifest.load(self._directory)

    def find(self, file: str) -> bytes | None:
        """As Source."""
        path = self._directory / file
        return read_bytes(path) if is_file(path) else None

    def indices(self, shards: Sequence[ShardInfo], verify: bool = True) -> Iterator[bytes]:
        """As Source; a shard that is missing or of another length is found here too, before time is
        spent.
        """
        for shard in shards:
            path, index = self._directory / shard.file, self._directory / shard.index_file
            if not verify:
                yield read_bytes(index) if is_file(index) else b""
                continue
            # the length only: to hash a large set takes minutes, and each member's crc32 is checked
            # at its read
            num_bytes = retried(path, path.stat).st_size if is_file(path) else -1
            if num_bytes != shard.num_bytes:
                found = f"{num_bytes} bytes" if num_bytes >= 0 else "missing"
                raise InputError(
                    f"{path}: {found}",
                    f"{shard.num_bytes} bytes, as packed",
                    "copy or pack it again",
                )
            # an index is small, and wrong offsets would make every sample of the shard look damaged
            content = read_bytes(index) if is_file(index) else b""
            if hashlib.sha256(content).hexdigest() != shard.index_sha256:
                action = "copy or pack it again"
                raise InputError(
                    f"{index}: missing or not as packed", "the index of the shard", action
                )
            yield content

    @contextmanager
    def open(self, shard: ShardInfo) -> Iterator[int]:
        """As Source. Raises OSError when the file cannot be opened, or not be read in the block:
        then the next call opens it anew.
        """
        # counted under the lock: a descriptor closed too early would be given to the next file
        # opened, and another shard's bytes be read
        with self._lock:
            if shard.file not in self._opened:
                self._opened[shard.file] = _Opened(
                    os.open(self._directory / shard.file, os.O_RDONLY)
                )
            opened = self._opened[shard.file]
            opened.users += 1
            self._opened.move_to_end(shard.file)
            self._close_surplus()
        try:
            yield opened.descriptor
        except OSError:
            # a descriptor that has become stale stays so, when the file can be opened again
            with self._lock:
                if self._opened.get(shard.file) is opened:
                    self._stale.append(self._opened.pop(shard.file))
            raise
        finally:
            with self._lock:
                # not closed: the next sample is likely to be of the same shard
                opened.users -= 1
                self._close_stale()

    def expect(self, shards: Sequence[ShardInfo]) -> None:
        """Nothing to do: the shards are here."""

    def tell(self, moved: Callable[[], None]) -> None:
        """Nothing to tell."""

    def used(self, shards: Sequence[ShardInfo]) -> None:
        """As Source."""

    def place(self, file: str) -> str:
        """As Source."""
        return str(self._directory / file)

    def _close_stale(self) -> None:
        # other threads may be reading from them
        for opened in [opened for opened in self._stale if not opened.users]:
            self._stale.remove(opened)
            os.close(opened.descriptor)

    def _close_surplus(self) -> None:
        surplus = len(self._opened) - self._max_open
        if surplus <= 0:
            return
        # the least recently used come first
        idle = [file for file, opened in self._opened.items() if not opened.users]
        for file in idle[:surplus]:
            os.close(self._opened.pop(file).descriptor)

    def _forget(self) -> None:
        self._opened: OrderedDict[str, _Opened] = OrderedDict()  # least recently used first
        self._stale: list[_Opened] = []
        self._owner, self._lock = os.getpid(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # descriptors and locks mean nothing in another process: it opens its own
        return {"_directory": self._directory, "_max_open": self._max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __del__(self) -> None:
        # a forked child's are the parent's to close
        if getattr(self, "_owner", None) == os.getpid():
            for opened in (*self._opened.values(), *self._stale):
                os.close(opened.descriptor)
