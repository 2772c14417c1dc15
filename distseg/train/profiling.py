"""profile.steps: what steps are made of, as a trace of chosen ranks and a table of operators."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from distseg.config.rules.running import profiled_steps
from distseg.config.schema import ProfileConfig
from distseg.distributed.compat import record_memory_history, silence_profiler
from distseg.distributed.ranks import Ranks
from shards.errors import InputError
from shards.files import published, write_text

FOLDER = "profile"  # in the run's directory
_NUM_ROWS = 40  # operators in the table

_log = logging.getLogger(__name__)


def check_ranks(settings: ProfileConfig, world_size: int) -> None:
    """Raise InputError where the job has none of the ranks to profile."""
    # some are enough: a job may go on with fewer ranks than it began with
    if settings.steps and not any(rank < world_size for rank in settings.ranks):
        got = f"profile.ranks={settings.ranks} for {world_size} ranks"
        raise InputError(got, f"ranks from 0 to {world_size - 1}", "write profile.ranks=[0]")


class StepProfiler:
    """Records the steps of `profile.steps` on the ranks of `profile.ranks`; elsewhere nothing, at
    no cost. Files appear whole or not at all, and what cannot be written ends no training.
    """

    def __init__(self, settings: ProfileConfig, ranks: Ranks, run_dir: Path):
        is_chosen = bool(settings.steps) and ranks.rank in settings.ranks
        self._steps = profiled_steps(settings.steps) if is_chosen else range(0)
        self._ranks, self._folder = ranks, run_dir / FOLDER
        self._running: profile | None = None
        # of every rank, as any of them may be the one that runs out of memory
        if settings.memory and ranks.device.type == "cuda":
            record_memory_history()

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def before(self, step: int) -> None:
        """Step `step` (from 1) is about to begin."""
        if self._steps and step == self._steps[0]:
            activities = [ProfilerActivity.CPU]
            if self._ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            # here, and not before the run: kineto takes seconds to start, and memory
            # without shapes and stacks, which take longer than what is measured
            silence_profiler()
            self._running = profile(activities=activities)
            self._running.start()

    def after(self, step: int) -> Path | None:
        """Step `step` is done; the trace's path, where it has just been written."""
        if self._running is None or step != self._steps[-1]:
            return None
        recorded, self._running = self._running, None
        path = self._folder / f"steps-{self._steps[0]}-{step}-rank-{self._ranks.rank}.json.gz"
        return path if self._write(path, recorded) else None

    def close(self) -> None:
        """Drop what is running: fewer steps than were asked for would be taken for all."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def _write(self, path: Path, recorded: profile) -> bool:
        # by what an operator does itself, or the outermost would come first and say nothing
        order = "device" if self._ranks.device.type == "cuda" else "cpu"
        about = {"sort_by": f"self_{order}_time_total", "row_limit": _NUM_ROWS}
        return _written(path, lambda: _write_both(path, recorded, about))


def _write_both(path: Path, recorded: profile, about: dict[str, Any]) -> None:
    # which waits for the device, so that the last step's kernels are in it
    recorded.stop()
    table = recorded.key_averages().table(**about, max_name_column_width=60)
    with published(path) as partial:
        # compressed by torch, which goes by the name
        recorded.export_chrome_trace(str(partial))
    write_text(path.with_name(path.name.replace(".json.gz", ".txt")), table + "\n")


def _written(path: Path, write: Callable[[], Any]) -> bool:
    try:
        write()
    # whatever a profiler raises: on one rank alone it would end the job; and a disk that is full
    # will end the next checkpoint, with better words
    except Exception as error:
        _log.warning("no profile: %s: %s", path, error)
        return False
    return True
