"""Shards from far away, kept on the disk of this machine and shared by all its processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.errors import InputError
from shards.files import disk_full, sync_folder
from shards.manifest import ShardInfo

DISK_SHARE = 0.8  # of what is free, where no bound is given
# polled, since a blocking flock could neither tell of a download's progress nor be left when the
# file is gone
POLL_SECONDS, MAX_POLL_SECONDS = 0.02, 0.2
LOCK_FILE = ".lock"
# what flock answers where the file system has no locks: ENOSYS of Lustre mounted without them,
# ENOLCK of NFS without a lock daemon
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def default_cache_dir() -> Path:
    """The node's own scratch folder where the job has one, else the user's cache directory."""
    # a home directory is often on the network, and its quota small: the job's own disk first
    for variable in ("SLURM_TMPDIR", "TMPDIR"):
        if os.environ.get(variable):
            # these folders may be everybody's
            return Path(os.environ[variable]) / f"distseg-{os.getuid()}"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distseg" / "shards"


class ShardCache:
    """A folder of whole shards, each under its sha256, and of partial ones that can be gone on
    with.

    The locks are flocks on the files themselves, so that they end with the process that holds them:
    whoever reads a shard shares it, whoever fetches or removes one has it alone. A fetched file
    gets its final name only when it is whole, verified and on the disk. max_bytes bounds all files
    together (partial ones count in full, by their name); 0: DISK_SHARE of what is free or already
    the cache's. Room is made by removing what was read longest ago and is not being read at this
    moment. Raises InputError for a folder that cannot be written or has no locks.
    """

    def __init__(self, directory: Path, max_bytes: int = 0):
        self.directory, self._max_bytes = directory, max_bytes
        try:
            # 0700: the data set may be one that other users of the node must not read
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            # a first lock, so that a folder without locks is refused before anything is fetched
            with self._alone():
                pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                needed = (
                    "a file system with file locks (flock), by which the processes of a machine "
                    "share the cache"
                )
                action = "write data.cache_dir=DIR with a folder on a local disk"
                raise InputError(f"{directory}: {error.strerror}", needed, action) from None
            action = "choose another with data.cache_dir=DIR"
            raise InputError(
                f"{directory}: {error.strerror}", "a cache folder that can be written", action
            ) from None

    @contextmanager
    def open(
        self,
        shard: ShardInfo,
        fetch: Callable[[int], None],
        moved: Callable[[], None] = lambda: None,
    ) -> Iterator[int]:
        """A descriptor of the whole shard, which stays in the cache until the block ends.

        fetch: called where the shard is not there, in one process at a time; appends to the file
        behind a descriptor, which may hold a first part already, until it is whole and verified.
        moved: called as a shard grows that another process fetches and this one waits for. Raises
        what `fetch` does, and InputError for a full disk or a bound below the size of the shard.
        """
        # needs no lock of the whole cache: readers of shards that are here never wait for each
        # other
        descriptor = self._whole(shard)
        if descriptor is None:
            descriptor = self._fetched(shard, fetch, moved)
        try:
            yield descriptor
        finally:
            _release(descriptor)

    def has(self, shard: ShardInfo) -> bool:
        """Whether the shard is there, whole, at this moment."""
        return self._path(shard).exists()

    def remove(self, shard: ShardInfo) -> None:
        """Take a shard out; those who have it open keep what they have."""
        # no lock: an open descriptor outlives the file's name
        self._path(shard).unlink(missing_ok=True)

    def small(self, sha256: str, fetch: Callable[[], bytes]) -> bytes:
        """A file small enough to be fetched without locks, perhaps by several processes.

        `fetch` verifies it.
        """
        path = self.directory / f"{_checked(sha256)}.small"
        with suppress(FileNotFoundError):
            content = path.read_bytes()
            # no lock guarded the read, and no fsync the write: the content speaks for itself
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
        content = fetch()
        # not `published`: that is for one writer at a time, and clears away what others have begun
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            partial.write_bytes(content)
            # of several writers the last one wins, with the same bytes
            os.replace(partial, path)
        except OSError as error:
            raise self._cannot_write(error) from None
        return content

    def limit(self) -> int:
        """Bytes that all files together may take."""
        if self._max_bytes:
            return self._max_bytes
        written = 0  # of partial files too, whose rest is among what is free
        # another process may remove a file between its being listed and looked at
        for entry in os.scandir(self.directory):
            with suppress(FileNotFoundError):
                written += entry.stat().st_size
        return int(DISK_SHARE * (shutil.disk_usage(self.directory).free + written))

    def _path(self, shard: ShardInfo) -> Path:
        # named by content: data sets that share a shard share its copy, and a shard that was packed
        # anew is another file, never a stale one
        return self.directory / f"{_checked(shard.sha256)}.tar"

    def _partial(self, shard: ShardInfo) -> Path:
        # the final size stands in the name, so that every process counts a download in full from
        # its first byte on: the room is reserved
        return self.directory / f"{_checked(shard.sha256)}.{shard.num_bytes}.partial"

    def _whole(self, shard: ShardInfo) -> int | None:
        """A descriptor of the shard, locked against removal; None where it is not there."""
        path = self._path(shard)
        descriptor = _locked(path, os.O_RDONLY, fcntl.LOCK_SH)
        if descriptor is None:
            return None
        # cut by something else: not ours to trust
        if os.fstat(descriptor).st_size != shard.num_bytes:
            path.unlink(missing_ok=True)
            _release(descriptor)
            return None
        with suppress(PermissionError):
            os.utime(descriptor)  # read now: what `_make_room` goes by
        return descriptor

    def _fetched(
        self, shard: ShardInfo, fetch: Callable[[int], None], moved: Callable[[], None]
    ) -> int:
        whole, partial = self._path(shard), self._partial(shard)
        while True:
            descriptor = self._reserve(shard)
            if descriptor is None:  # no room yet, or another process fetches it
                _wait_for(partial, moved)
            elif not whole.exists():  # else another process has finished it since the look
                break
            else:
                partial.unlink()
                _release(descriptor)
            found = self._whole(shard)
            if found is not None:
                return found
        try:
            fetch(descriptor)
            # the bytes before the name: a file that has its final name after a power cut is whole
            os.fsync(descriptor)
            os.replace(partial, whole)
            sync_folder(self.directory)
        except BaseException as error:  # what has arrived stays, to be gone on with
            _release(descriptor)
            # what fails in the network is an InputError by now: an OSError is this disk's
            if isinstance(error, OSError):
                raise self._cannot_write(error) from None
            raise
        # still locked: nobody can remove the shard before the caller has read from it
        return descriptor

    def _reserve(self, shard: ShardInfo) -> int | None:
        """The partial file of a shard, locked, once there is room for the whole; None: not now."""
        partial = self._partial(shard)
        # room and reservation under one lock: else two processes would both take the last free
        # bytes
        with self._alone():
            if not self._make_room(shard.num_bytes, keep=partial.name):
                return None
            # without waiting: the whole cache would stand still behind one download
            return _locked(partial, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _make_room(self, num_bytes: int, keep: str) -> bool:
        """Remove what was used longest ago and nobody uses now, until num_bytes more would fit."""
        limit = self.limit()
        if num_bytes > limit:
            got = f"room for {limit / 1e6:.1f} MB in the cache {self.directory}"
            action = "raise data.cache_bytes, or choose a larger disk with data.cache_dir"
            raise InputError(got, f"{num_bytes / 1e6:.1f} MB for one shard, better several", action)
        # what `keep` holds so far is a part of num_bytes, and must not count twice
        files = sorted(file for file in self._files() if file[2] != keep)
        excess = sum(size for _, size, _ in files) + num_bytes - limit
        for _, size, name in files:
            if excess <= 0:
                break
            # whoever reads the file or appends to it holds a lock, and keeps it
            descriptor = _locked(self.directory / name, os.O_RDWR, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if descriptor is not None:
                (self.directory / name).unlink(missing_ok=True)
                _release(descriptor)
                excess -= size
        return excess <= 0

    def _files(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, name) of every file."""
        files = []
        for entry in os.scandir(self.directory):
            with suppress(FileNotFoundError):
                reserved = re.fullmatch(r"\w+\.(\d+)\.partial", entry.name)
                status = entry.stat()
                # removed and made anew it would be two locks, held by two processes at once
                if entry.name != LOCK_FILE:
                    files.append(
                        (
                            status.st_mtime,
                            int(reserved[1]) if reserved else status.st_size,
                            entry.name,
                        )
                    )
        return files

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Among all processes, only this thread counts, reserves and removes."""
        # an flock belongs to the opened file, not to the process: opened anew each time, it keeps
        # the threads of one process apart as well
        descriptor = os.open(self.directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _release(descriptor)

    def _cannot_write(self, error: OSError) -> InputError:
        # EDQUOT: the disk has room, but this user's quota is used up
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(self.directory)
        action = "correct its permissions, or choose another with data.cache_dir=DIR"
        return InputError(
            f"{self.directory}: {error.strerror}", "a cache folder that can be written", action
        )


def _wait_for(partial: Path, moved: Callable[[], None]) -> None:
    """For a moment, and until no other process has this file locked; tells when it has grown."""
    size, pause = -1, POLL_SECONDS  # -1: that there is a file at all counts as growth
    while True:
        time.sleep(pause)
        descriptor = _locked(partial, os.O_RDWR, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is not None:
            # nobody fetches it (any more): the caller goes on where the last one stopped
            return _release(descriptor)
        try:
            before, size = size, partial.stat().st_size
        except FileNotFoundError:
            return None
        if size != before:
            moved()
        pause = min(2 * pause, MAX_POLL_SECONDS)


def _locked(path: Path, flags: int, operation: int) -> int | None:
    """A descriptor of the file at `path`, with a lock.

    None where there is no such file or the lock is taken.
    """
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, operation)
        # while this process waited, the file may have been removed, or got its final name
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    except (FileNotFoundError, BlockingIOError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    _release(descriptor)
    return None


def _release(descriptor: int) -> None:
    # unlocked by name: a child that was forked meanwhile holds the same lock, and may live for long
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _checked(sha256: str) -> str:
    """A sha256 that is one: it comes from a file of others, and becomes a name in our folder."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        action = "pack the data again"
        raise InputError(f"sha256 {sha256[:80]!r} in a manifest", "64 digits from 0 to f", action)
    return sha256
