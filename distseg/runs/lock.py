"""One job at a time in a run directory, and always in the same one.

By the kernel's lock, which ends with its process, however that ends. Some network file systems have
none (Lustre mounted without `flock`, NFS without its lock daemon). There a file stands for it,
which its holder changes every few seconds: one that no longer changes is of a job that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from shards.errors import InputError
from shards.storage import read_bytes

LOCK_FILE = "lock"
HELD_FILE = "lock.held"  # the file that stands for the kernel's lock

# a holder that is busy, or its file system, may miss some renewals
RENEWED_SECONDS = 3.0
EXPIRES_SECONDS = 30.0
_POLL_SECONDS = 0.5

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

_log = logging.getLogger(__name__)


class DirectoryLock:
    """A folder's lock, taken; `owner` is what its file then holds, unlike any other.

    Raises InputError where another job has it, and OSError where the folder cannot be written. A
    lock that a killed job's file stands for is taken after EXPIRES_SECONDS, or at once where that
    job was on this machine.
    """

    def __init__(self, folder: Path):
        self._path, self._held = folder / LOCK_FILE, folder / HELD_FILE
        self.owner = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}"
        self._released = threading.Event()
        self._renewal: threading.Thread | None = None
        self._file = self._path.open("a")  # not emptied: it may be another job's
        try:
            self._take()
            self._before = _read(self._path)
            self._write(self.owner)
        except BaseException:
            # the file that stands for the lock too, or the next try would be refused for this one
            self._give_back()
            raise

    def check(self) -> None:
        """Raise InputError where the folder is not the one that was locked.

        It was moved, and perhaps another put in its place; or another job has taken it, since this
        one was stopped for so long that its lock expired.
        """
        try:
            found = _read(self._path)
        except FileNotFoundError:
            found = ""
        if found == self.owner:
            return
        folder = self._path.parent.absolute()
        what = f"is another job's now ({_job(found)})" if found else "is not there any more"
        raise InputError(
            f"{folder} {what}: the run directory was moved, removed or taken while training in it",
            "the directory that the run began in, to its end",
            f"move it back to {folder}, then run the same command again",
        )

    def release(self, is_accepted: bool) -> None:
        """Give it back. is_accepted: the run of this job is now the one that the folder holds."""
        # it names the last job that trained here, which a refused one has not
        if not is_accepted:
            with suppress(OSError):  # a full disk, which has been told
                self._write(self._before)
        self._give_back()

    def _give_back(self) -> None:
        self._released.set()
        if self._renewal is not None:
            self._renewal.join()
            with suppress(OSError):
                if self._held.read_text() == self.owner:
                    self._held.unlink()
        # the file stays: removing it could take away the one that the next job has just locked
        self._file.close()

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken(_read(self._path)) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _log.warning(
                "%s: no locks on this file system (%s); %s stands for one",
                self._path.parent,
                error.strerror,
                HELD_FILE,
            )
            self._take_by_file()

    def _take_by_file(self) -> None:
        while not self._made():
            seen = self._look()
            if seen is None:
                continue  # given back since
            if not self._has_expired(seen[0]):
                raise self._taken(seen[0])
            self._set_aside(seen[0])
        self._renewal = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._renewal.start()

    def _made(self) -> bool:
        """Whether the file was not there, and is this job's now."""
        mine = self._held.with_name(f".{HELD_FILE}-{uuid.uuid4().hex}")
        try:
            mine.write_text(self.owner)
            # a link appears with its content, and of two jobs for one alone, on NFS too
            os.link(mine, self._held)
        except FileExistsError:
            return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _has_expired(self, owner: str) -> bool:
        """Whether the job that holds the lock is gone: looked at until it changes, or long enough
        that it should have.
        """
        if _is_dead(owner):
            return True
        # not by the clock of either machine: only changes are looked for
        first, deadline = self._look(), time.monotonic() + EXPIRES_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if self._look() != first:
                return False
        return True

    def _set_aside(self, owner: str) -> None:
        """Take an expired file away."""
        mine = self._held.with_name(f".{HELD_FILE}-{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):  # another job was quicker
            os.rename(self._held, mine)
            # or quicker still, and has a file of its own there: it gets it back
            if mine.read_text() != owner:
                with suppress(FileExistsError):
                    os.link(mine, self._held)
            mine.unlink()

    def _look(self) -> tuple[str, int] | None:
        """Who holds the lock by its file, and when that was changed last; None: nobody."""
        try:
            # opened, not only looked up: NFS then asks the server
            with self._held.open() as file:
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_SECONDS):
            with suppress(OSError):  # `check` tells of what has become of the folder
                if self._held.read_text() == self.owner:
                    os.utime(self._held)

    def _write(self, owner: str) -> None:
        self._file.truncate(0)
        self._file.write(owner)
        self._file.flush()
        # on the server, where the other machines look for it
        os.fsync(self._file.fileno())

    def _taken(self, owner: str) -> InputError:
        got = f"another job is training in {self._path.parent} ({_job(owner)})"
        return InputError(got, "one job per run directory", "wait for it, or write run_dir=DIR")


def holder(folder: Path) -> str:
    """Who trains in a run directory, "process N on HOST"; "" when nobody does."""
    path, held = folder / LOCK_FILE, folder / HELD_FILE
    if not path.is_file():
        return ""
    with path.open() as file:
        try:
            # for a moment; asked only of runs that have no job
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _job(file.read())
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    # another machine may find no locks where this one has them
    owner = _read(held) if held.is_file() else ""
    return "" if _is_dead(owner) or _is_old(held) else _job(owner)


def _read(path: Path) -> str:
    # a disk's garbage is nobody's name, and no reason to end in a traceback
    return read_bytes(path).decode(errors="replace")


def _is_old(held: Path) -> bool:
    """Whether a file that stands for a lock has not been changed for far longer than it may."""
    # by the file system's own clock, as machines' differ
    probe = held.with_name(f".{HELD_FILE}-{uuid.uuid4().hex}")
    try:
        probe.touch()
        # ten times: NFS shows another machine's change up to a minute late
        return probe.stat().st_mtime - held.stat().st_mtime > 10 * EXPIRES_SECONDS
    except OSError:  # given back meanwhile, or a folder that only others may write to
        return False
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _job(owner: str) -> str:
    """ "process N on HOST": without the random word behind it."""
    return " ".join(owner.split()[:4])


def _is_dead(owner: str) -> bool:
    """Whether an owner was a process of this machine that is no more."""
    words = owner.split()
    if len(words) < 4 or words[3] != socket.gethostname() or not words[1].isdecimal():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
