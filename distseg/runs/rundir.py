"""The run directory: one run, one configuration, one job at a time."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from distseg.config import loading
from distseg.config.loading import CONFIG_FILE
from distseg.config.schema import Config
from distseg.distributed.ranks import Ranks, on_all, on_main, shared_error
from distseg.runs.copies import Copies, Fetched, write_records
from distseg.runs.lock import LOCK_FILE, DirectoryLock
from shards.errors import InputError
from shards.files import write_text
from shards.storage import is_passing, retried

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
        self._lock: DirectoryLock | None = None
        self._is_accepted = False
        # its copies elsewhere, and what came from there for this start; on the main rank
        self.copies, self.fetched = Copies(path), Fetched()
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

    def check(self) -> None:
        """Raise InputError where this path is not the directory any more that the run began in.

        On the main rank; without effect on others.
        """
        if self._lock is not None:
            self._lock.check()

    def accept(self) -> None:
        """Save the configuration: nothing is left that could refuse the run. On every rank."""
        on_main(self.ranks, self._save)

    def _save(self) -> None:
        # with the lock held: of two jobs one could save its own over the other's
        write_text(self.path / CONFIG_FILE, loading.to_yaml(self._config))
        write_records(self.path, self.fetched.records)
        self._is_accepted = True

    def _release(self) -> None:
        self.copies.close()
        if not self._is_accepted:
            self.fetched.remove()
        if self._lock is not None:
            self._lock.release(self._is_accepted)
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
        self._lock = retried(self.path, self._locked)
        try:
            # again: until the lock was this job's, another one could begin a run here
            steps_before = loading.check_same(self.path, self._config)
        except BaseException:
            self._release()
            raise
        return self._lock.owner, steps_before

    def _locked(self) -> DirectoryLock:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return DirectoryLock(self.path)
        except OSError as error:
            if is_passing(error, self.path):
                raise
            got = f"{self.path}: {error.strerror}"
            raise InputError(got, "a directory that can be written", "write run_dir=DIR") from None
