"""Leases: who reads a checkpoint has it kept, for as long as that process lives.

A lease is a hidden file in the checkpoint's folder, whose time of change its holder renews. No lock
of the kernel's: those are missing on some network file systems. A holder that is killed renews
nothing, and its lease runs out.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RENEWED_SECONDS = 20.0
# many times the above: NFS shows another machine's change up to a minute late
EXPIRES_SECONDS = 300.0
_PREFIX = ".lease-"


@contextmanager
def leased(folder: Path) -> Iterator[None]:
    """Within it, a training that prunes its checkpoints leaves this one alone.

    Without effect in a folder that cannot be written to.
    """
    name = f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    file, ended = folder / name, threading.Event()
    # reading another user's run is no error; what is pruned meanwhile is then met as missing
    with suppress(OSError):
        file.touch(exist_ok=False)
    # a daemon: the lease must not outlive what it stands for
    thread = threading.Thread(target=_renew, args=(file, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _renew(file: Path, ended: threading.Event) -> None:
    while not ended.wait(RENEWED_SECONDS):
        # it stays gone where somebody has removed it: utime makes no file
        with suppress(OSError):
            os.utime(file)


def is_leased(folder: Path) -> bool:
    """Whether somebody reads a checkpoint, as far as can be seen from here."""
    # By the file system's own clock, as machines' differ: whoever asks has just changed the folder
    # above, and a time from before that makes a lease only younger.
    now = folder.parent.stat().st_mtime
    for file in folder.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # given back meanwhile
            if now - file.stat().st_mtime < EXPIRES_SECONDS:
                return True
    return False
