"""A run as a submitit job: what is pickled, what it returns, and what its checkpoint() does.

submitit runs it in one process, on the first node, which starts one torchrun per node as slurm/*.sh
do. With one submitit task per GPU instead, checkpoint() would be called inside one training
process, in a signal handler, in the middle of a step, while the others are killed; here it runs
beside the ranks, tells them to save at a step boundary and waits.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from launchers.batch_job import requeue
from launchers.nodes import MIN_NODES_VARIABLE
from launchers.places import RANKS_VARIABLE
from launchers.supervisor import Decision, Supervisor
from shards.errors import InputError


class RunError(RuntimeError):
    """A run ended before it was done; the text says how."""


@dataclass
class Job:
    """One run of `distseg train` with these overrides, by as many jobs as it takes."""

    overrides: tuple[str, ...]
    # plain values only: submitit pickles this on the login node, and again for each requeue
    run_dir: str
    folder: str  # relative paths in the overrides start here
    with_srun: bool  # on SLURM; else on this machine alone
    ranks_per_node: int | None = None
    min_nodes: int | None = None

    def __call__(self) -> dict[str, Any]:
        """Train to the end; returns the run directory and what evaluation.json holds. RunError."""
        # submitit starts its jobs elsewhere than where they were submitted
        os.chdir(self.folder)
        if self.ranks_per_node is not None:
            # by the environment, since srun passes that on to the agents of all nodes
            os.environ[RANKS_VARIABLE] = str(self.ranks_per_node)
        if self.min_nodes is not None:
            os.environ[MIN_NODES_VARIABLE] = str(self.min_nodes)
        _supervisors[self.run_dir] = supervisor = Supervisor(
            "distseg.train", self.overrides, Path(self.run_dir), self.with_srun
        )
        # preempted: SLURM may say only this
        before = signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
        try:
            return self._outcome(supervisor.run())
        finally:
            # submitit's own handler, which it set before it called us
            signal.signal(signal.SIGTERM, before)

    def checkpoint(self, *_: Any) -> DelayedSubmission:
        """Called by submitit at the time limit or a preemption: when the ranks have saved, the same
        job again.

        Raises RunError, which submitit takes for the job's end, when the run would fail once more.
        """
        supervisor = _supervisors.get(self.run_dir)
        if supervisor is not None:
            supervisor.stop()
            # submitit leaves the process when this returns, and SLURM kills whatever still runs
            # then
            supervisor.wait()  # here, since the handler has interrupted `run`
            decision = supervisor.decision()
            if decision.action == "fail":
                raise self._error(decision)
        # Once submitit's `scontrol requeue` is heard, SLURM sends SIGTERM to all of the job: to
        # scontrol too, which would then seem to have failed. What is ignored here, it ignores.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # the same Job: what the run has reached lies in its run directory, not in here
        return DelayedSubmission(self)

    def _outcome(self, decision: Decision) -> dict[str, Any]:
        # the nodes may have stopped before submitit's signal came, by a SIGTERM of a preemption
        if decision.action == "requeue" and self.with_srun:
            requeue(decision.without)  # returns only when SLURM refuses: then it is an error
        if decision.action != "done":
            raise self._error(decision)
        return {"run_dir": self.run_dir} | evaluation(Path(self.run_dir))

    def _error(self, decision: Decision) -> RunError:
        return RunError(f"{self.run_dir}: {decision.reason} (exit code {decision.exit_code})")


_supervisors: dict[str, Supervisor] = {}  # of this process; a Job is pickled, and they are not


def evaluation(run_dir: Path) -> dict[str, Any]:
    """What evaluation.json holds; {} where there is none yet."""
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(
            f"{path}: no JSON object", "the file that a run wrote", "train or evaluate again"
        ) from None
