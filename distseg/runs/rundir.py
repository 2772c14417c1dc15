"""The run directory: one run, one configuration, one job at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from distseg.config import loading
from distseg.config.loading import CONFIG_FILE
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks, on_all, on_main, shared_error
from shards.errors import InputError
from shards.files import published

LOCK_FILE = "lock"
POLL_SECONDS = 0.2  # between two looks at a file system that may be shared


class RunDirectory:
    """A run directory that this job has to itself; `accept` saves the configuration in it.

    Until then nothing in it changes, so that a start that is refused leaves a run as it was.

    The lock is the main rank's and ends with its process, however that ends. Raises InputError, on
    every rank, when another job trains there, when the directory holds a run of another
    configuration, when it cannot be written, or when a rank does not see it: every rank writes its
    part of a checkpoint there. visible_seconds: how long another machine may need to see what was
    written; NFS keeps what it knows of a folder for up to 60 s.

    A context, which gives the lock back. steps_before: what the run's steps were until now, where
    `extend=true` has made them more.
    """

    def __init__(self, path: Path, config: Config, ranks: Ranks, visible_seconds: float = 60.0):
        self.path, self.ranks = path, ranks
        self._config = config
        self._lock: TextIO | None = None
        self._owner_before, self._is_accepted = "", False
        # one rank locks for all: a lock for each would keep the job's own ranks out
        owner, self.steps_before = on_main(ranks, self._claim)
        # the main rank waits in a collective
        patience = min(visible_seconds, config.parallel.timeout_seconds / 2)
        sees = on_all(ranks, self._is_owned_by(owner, patience))
        if not all(sees):
            self._release()
            # every rank knows of all answers, so every one raises: none waits for the others
            raise shared_error(
                InputError(
                    f"rank {sees.index(False)} does not see {path.absolute()} as rank 0 has "
                    f"written it, for {patience:.0f} s",
                    "a directory that all machines share",
                    "write run_dir=DIR on a shared file system",
                )
            )

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()

    def accept(self) -> None:
        """Save the configuration: nothing is left that could refuse the run. On every rank."""
        on_main(self.ranks, self._save)

    def _save(self) -> None:
        # with the lock held: of two jobs one could save its own over the other's
        with published(self.path / CONFIG_FILE) as partial:
            partial.write_text(loading.to_yaml(self._config))
        self._is_accepted = True

    def _release(self) -> None:
        if self._lock is None:
            return
        # it names the last job that trained here, which a refused one has not
        if not self._is_accepted:
            with suppress(OSError):  # a full disk, which has been told
                self._write_owner(self._lock, self._owner_before)
        # the file stays: removing it could take away the one that the next job has just locked
        self._lock.close()
        self._lock = None

    def _is_owned_by(self, owner: str, patience_seconds: float) -> bool:
        """Whether this rank comes to see the lock file of the main one.

        A file of that name could be any machine's.
        """
        deadline = time.monotonic() + patience_seconds
        while True:
            with suppress(OSError):
                if (self.path / LOCK_FILE).read_text() == owner:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
            # opening a folder makes NFS ask whether it has changed
            for folder in (self.path.parent, self.path):
                with suppress(OSError):
                    os.listdir(folder)

    def _claim(self) -> tuple[str, int | None]:
        """Lock. Returns what the lock file holds, unlike any other, and `steps_before`."""
        # before anything is written
        loading.check_same(self.path, self._config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK_FILE).open("a")  # not emptied: it may be another job's
            # the kernel's lock, which ends with the process; a file that stands for one outlives a
            # kill
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # again: until the lock was this job's, another one could begin a run here
            steps_before = loading.check_same(self.path, self._config)
            self._owner_before = (self.path / LOCK_FILE).read_text()
            owner = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}"
            self._write_owner(self._lock, owner)
        except BlockingIOError:
            # "process N on HOST": without the random word behind it
            other = " ".join((self.path / LOCK_FILE).read_text().split()[:4])
            got = f"another job is training in {self.path} ({other})"
            raise InputError(
                got, "one job per run directory", "wait for it, or write run_dir=DIR"
            ) from None
        except OSError as error:
            got = f"{self.path}: {error.strerror}"
            raise InputError(got, "a directory that can be written", "write run_dir=DIR") from None
        return owner, steps_before

    @staticmethod
    def _write_owner(lock: TextIO, owner: str) -> None:
        lock.truncate(0)
        lock.write(owner)
        lock.flush()
        # on the server, where the other machines look for it
        os.fsync(lock.fileno())
