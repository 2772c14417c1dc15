"""The run directory: one run, one configuration, one job at a time."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO

from distseg import configuration
from distseg.config import Config
from distseg.distributed import Ranks, on_all, on_main
from shards.errors import InputError
from shards.files import published

CONFIG_FILE = "config.yaml"
LOCK_FILE = "lock"


class RunDirectory:
    """A run directory that this job has to itself, with the configuration saved in it.

    The lock is the main rank's and ends with its process, however that ends. Raises InputError, on every rank, when
    another job trains there, when the directory holds a run of another configuration, when it cannot be written, or
    when a rank does not see it: every rank writes its part of a checkpoint there.
    """

    def __init__(self, path: Path, config: Config, ranks: Ranks):
        self.path = path
        self._lock: TextIO | None = None
        on_main(ranks, lambda: self._claim(config))
        blind = [rank for rank, sees in enumerate(on_all(ranks, (path / CONFIG_FILE).is_file())) if not sees]
        if blind:
            got = f"rank {blind[0]} does not see {path.absolute()}, which rank 0 has just written to"
            error = InputError(got, "a directory that all machines share", "write run_dir=DIR on a shared file system")
            error.raised_on_all_ranks = True  # type: ignore[attr-defined]
            raise error

    def _claim(self, config: Config) -> None:
        saved = self.path / CONFIG_FILE
        if saved.exists():
            self._check_same(configuration.from_file(saved), config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK_FILE).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            got = f"another job is training in {self.path}"
            raise InputError(got, "one job per run directory", "wait for it, or write run_dir=DIR") from None
        except OSError as error:
            got = f"{self.path}: {error.strerror}"
            raise InputError(got, "a directory that can be written", "write run_dir=DIR") from None
        with published(saved) as partial:
            partial.write_text(configuration.to_yaml(config))

    def _check_same(self, old: Config, new: Config) -> None:
        changed = configuration.differences(old, new)
        if changed:
            values = ", ".join(f"{key}: {before!r} there, {now!r} now" for key, (before, now) in changed.items())
            raise InputError(
                f"{self.path} holds a run of another configuration ({values})",
                "the same configuration to resume it, or another directory",
                f"write run_dir=DIR to start a new run, or remove {self.path}",
            )
