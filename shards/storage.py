"""Storage that fails for a while: a network file system whose server restarts, moves or is slow.

What its errors have in common is that the same call may succeed a little later. So it is tried
again, after pauses that grow, until RETRY_SECONDS have gone by; then a TemporaryError is raised,
which the supervisor takes for "start again later", where a bad path or a full disk is for the user
to mend. What may be repeated must do no harm when done twice: reading, or writing a whole file.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shards.errors import InputError, TemporaryError

Result = TypeVar("Result")
Expected = bool | Callable[[], bool]

SECONDS_VARIABLE = "DISTSEG_STORAGE_SECONDS"
RETRY_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _GROWTH = 0.1, 5.0, 1.6

# EIO is a broken disk's error too: tried again in vain, it ends the run with the right words
_PASSING = {
    errno.EIO,  # NFS mounted soft, FUSE, Lustre
    errno.ESTALE,  # NFS: the server has restarted, or the file was replaced on another machine
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
    errno.ENOTCONN,  # FUSE: its process has ended, and may be started again
    errno.ESHUTDOWN,  # Lustre: this client was evicted, and reconnects
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EBUSY,
    errno.EINTR,
}

_log = logging.getLogger(__name__)


class StorageError(TemporaryError):
    """Storage has failed for longer than is waited for."""


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error, also of a library that gives it as text; None: it has none.

    safetensors writes "... (os error 116)".
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found:
        return int(found[1])
    return errno.ENOENT if isinstance(error, FileNotFoundError) else None


def is_passing(error: BaseException, path: Path, expected: Expected = False) -> bool:
    """Whether the same call on `path` may succeed a little later.

    expected: the file is known to be there, or to have a folder to be written in, so that "no such
    file" is passing as well. Else it is where the folder lists the name: a client of NFS may
    remember for a minute that a file was not there.
    """
    if isinstance(error, InputError | TemporaryError):
        return False  # understood already
    number = errno_of(error)
    if number != errno.ENOENT:
        return number in _PASSING
    named = getattr(error, "filename", None)
    try:
        known = expected if isinstance(expected, bool) else expected()
    except OSError as unknown:  # which is no answer either
        return unknown.errno in _PASSING
    return known or _is_listed(Path(named) if isinstance(named, str) else path)


def _is_listed(path: Path) -> bool:
    try:
        # a link whose target is gone for good is listed all the same
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        # reading a folder makes NFS ask the server whether it has changed
        return path.name in os.listdir(path.parent)
    except OSError as error:
        return error.errno in _PASSING


def retried(path: Path, call: Callable[[], Result], expected: Expected = False) -> Result:
    """What `call` returns, tried again for as long as its error may pass; `path`: what it is about.

    expected: as in `is_passing`. Raises StorageError after RETRY_SECONDS, and at once whatever else
    the call raises.
    """
    limit = float(os.environ.get(SECONDS_VARIABLE) or RETRY_SECONDS)
    start, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    while True:
        try:
            result = call()
        except Exception as error:
            if not is_passing(error, path, expected):
                raise
            waited = time.monotonic() - start
            if waited >= limit:
                raise StorageError(_given_up(path, error, waited)) from error
            if pause == _FIRST_PAUSE_SECONDS:
                _log.warning("%s: %s; tried again for %.0f s", path, _reason(error), limit)
        else:
            if pause > _FIRST_PAUSE_SECONDS:
                _log.warning("%s: is back after %.1f s", path, time.monotonic() - start)
            return result
        # the last try is at the limit, not before it
        time.sleep(max(0.0, min(pause, limit - (time.monotonic() - start))))
        pause = min(pause * _GROWTH, _LONGEST_PAUSE_SECONDS)


def _reason(error: BaseException) -> str:
    number = errno_of(error)
    return os.strerror(number) if number is not None else str(error)


def _given_up(path: Path, error: BaseException, seconds: float) -> str:
    return (
        f"{path}: {_reason(error)}, for {seconds:.0f} s: its storage does not answer as it should; "
        "the same command goes on once it does"
    )


def read_bytes(path: Path, expected: bool = False) -> bytes:
    """A file's bytes; errors as in `retried`."""
    return retried(path, path.read_bytes, expected)


def read_text(path: Path, expected: bool = False) -> str:
    """A file's text, UTF-8; errors as in `retried`."""
    return read_bytes(path, expected).decode()


def listed(folder: Path) -> list[str]:
    """The names in a folder; [] where there is none. Errors as in `retried`."""
    return retried(folder, lambda: os.listdir(folder)) if exists(folder) else []


def is_file(path: Path) -> bool:
    """Whether a file is there; as `exists`."""
    return exists(path) and retried(path, path.is_file)


def exists(path: Path) -> bool:
    """Whether a path is there, also where a client of NFS remembers that it was not."""

    def look() -> bool:
        try:
            # not Path.exists, which takes some errors of a server for "no"
            path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            if is_passing(error, path):
                raise
            return False
        return True

    return retried(path, look)
