"""Who holds an HDF5 file open, for those who cannot open it."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

import h5py

from shards.errors import InputError

# what a lock's refusal is called: taken by another process, or unknown to the file system
_TAKEN = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
UNLOCKED = "HDF5_USE_FILE_LOCKING=FALSE"
MAX_SHOWN = 3  # of the processes that have it open


def open_to_read(path: Path) -> h5py.File:
    """The HDF5 file, opened to be read.

    Raises InputError, with what to wait for, where another process writes to it or has not closed
    it, and for a file system without locks; OSError, as HDF5 does, for all else.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        refusal = _refusal(path, str(error))
        if refusal is None:
            raise
        raise refusal from None


def _refusal(path: Path, said: str) -> InputError | None:
    """What a failure to open means; None where it is about the file itself."""
    # by HDF5's words: the number of the first failed call is lost in some of its errors
    lock = re.search(r"unable to lock file, errno = (\d+)", said)
    number = int(lock[1]) if lock else 0
    if number in _NO_LOCKS:
        got = f"{path}: its file system has no locks ({os.strerror(number)})"
        action = (
            f"set {UNLOCKED}, as long as nothing writes to the file, or copy it to a local disk"
        )
        return InputError(got, "a file that HDF5 can lock", action)
    is_flagged = "already open for" in said  # a mark in the file, which its writer takes away
    if not is_flagged and number not in _TAKEN:
        return None
    holders = processes_with(path)
    needed = "a file that nothing writes to: what it holds may change under the reader"
    if holders:
        got = f"{path} is open for writing in {', '.join(holders)}"
        return InputError(got, needed, "close it there, or wait until that has ended; then again")
    if is_flagged:
        got = f"{path} is marked as open for writing, and no process here that we may see has it"
        action = (
            "wait, if its writer runs elsewhere; if that was killed the file may be cut short: "
            "make it again with `distseg prepare`, or try `h5clear -s` on a copy"
        )
        return InputError(got, needed, action)
    got = f"{path} is locked by a process of another user or machine"
    action = (
        "wait until it has ended or closed the file; a lock that a dead machine left is passed by "
        f"with {UNLOCKED}"
    )
    return InputError(got, needed, action)


def processes_with(path: Path) -> list[str]:
    """Processes that have a file open, as "process 123 (python train.py)", of those we may see.

    Nothing where the system has no /proc.
    """
    found = []
    wanted = path.stat()
    for folder in sorted(Path("/proc").glob("[0-9]*")):
        # processes end while they are looked at, and those of others are not ours to see
        with suppress(OSError):
            if any(_is_file(descriptor, wanted) for descriptor in os.scandir(folder / "fd")):
                words = os.fsdecode((folder / "cmdline").read_bytes()).split("\0")
                found.append(f"process {folder.name} ({' '.join(words).strip()[:60]!a})")
    rest = len(found) - MAX_SHOWN
    return found[:MAX_SHOWN] + ([f"{rest} more"] if rest > 0 else [])


def _is_file(descriptor: os.DirEntry[str], wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(descriptor.stat(), wanted)
    except OSError:  # closed meanwhile
        return False
