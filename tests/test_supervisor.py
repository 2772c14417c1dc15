"""What a job does after its nodes have ended, and how it learns its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distseg.runs.attempts import LABEL_VARIABLE, Attempt, Note, note_failure
from launchers import supervisor
from launchers.job import Job, RunError
from launchers.places import Place, ranks_per_node
from launchers.supervisor import (
    Decision,
    Supervisor,
    decide,
    failures_in_a_row,
    may_be_the_machines,
)
from shards.errors import InputError


def attempt(outcome: str, reason: str = "", exit_codes: tuple[int, ...] = ()) -> Attempt:
    return Attempt("job 1", outcome=outcome, reason=reason, exit_codes=list(exit_codes))


@pytest.mark.parametrize(
    ("exit_code", "noted", "stopping", "action", "code"),
    [
        (0, attempt("done"), False, "done", 0),
        (143, attempt("done"), True, "done", 0),  # told to stop after the last step
        (0, attempt("stopped", "SIGUSR1 here"), True, "requeue", 0),
        # preempted: only the ranks were told
        (143, attempt("stopped", "SIGTERM here"), False, "requeue", 0),
        (0, attempt("stopped", "SIGINT here"), False, "fail", 130),  # W&B's stop button
        (137, attempt("killed"), True, "requeue", 0),  # did not save in time
        (143, attempt("refused", "a full disk"), False, "fail", 2),
        # one rank's bad input
        (143, attempt("failed", "rank 3 on b: exit code 2", (75, 2)), False, "fail", 2),
        (75, attempt("failed", "rank 1 is gone", (75,)), False, "again", 75),
        (137, attempt("killed"), False, "again", 137),
        # never 0, which SLURM would call COMPLETED
        (0, attempt("failed", "an error after the last collective", (1,)), False, "again", 75),
        (1, None, False, "again", 1),
        (2, None, False, "fail", 2),
        (0, None, False, "done", 0),  # no training run
        (0, None, True, "requeue", 0),
    ],
)
def test_decisions(
    exit_code: int, noted: Attempt | None, stopping: bool, action: str, code: int
) -> None:
    decision = decide(exit_code, noted, stopping)
    assert (decision.action, decision.exit_code) == (action, code)


class Scripted(Supervisor):
    """A supervisor whose nodes fail with 1, having begun at the steps given."""

    def __init__(self, steps: list[int]):
        super().__init__("distseg.train", [], Path("nowhere"), with_srun=False)
        self.steps = steps

    def _run_nodes(self, label: str, number: int) -> int:
        return 1

    def _noted(self, label: str) -> Attempt:
        return Attempt(label, outcome="failed", first_step=self.steps.pop(0), exit_codes=[1])


def test_failures_without_progress_come_to_an_end_and_others_do_not() -> None:
    scripted = Scripted([0, 0, 10, 10, 20, 20, 20, 30])
    decision = scripted.run()
    assert scripted.steps == [30] and decision.action == "fail" and decision.exit_code == 1
    assert "3 failures in a row at step 20" in decision.reason


class Unsaved(Supervisor):
    """A supervisor that is told to stop, and whose rank 0 then leaves with the exit code given."""

    def __init__(self, run_dir: Path, step: int, exit_code: int):
        super().__init__("distseg.train", [], run_dir, with_srun=False)
        self.run_dir, self.step, self.exit_code = run_dir, step, exit_code

    def _run_nodes(self, label: str, number: int) -> int:
        os.environ[LABEL_VARIABLE] = label
        note = Note(self.run_dir, ["here"], self.step)
        self.stop()
        if self.exit_code > 0:
            note.fail(self.step + 5, RuntimeError("not saved"))
        note_failure(self.run_dir, "here", 0, self.exit_code)
        return 1


def test_a_run_that_always_fails_while_it_stops_is_not_requeued_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LABEL_VARIABLE, "")  # and as it was, afterwards
    # progress in between, or a rank that was killed
    turns = [(0, 1), (0, 1), (8, 1), (8, -9), (8, 1), (8, 1)]
    for step, code in turns:
        assert Unsaved(tmp_path, step, code).run().action == "requeue"
    decision = Unsaved(tmp_path, 8, 1).run()
    assert (decision.action, decision.exit_code) == ("fail", 1)
    assert decision.reason == "3 failures in a row at step 8; the last: RuntimeError: not saved"


@pytest.mark.parametrize("action", ["requeue", "done", "fail"])
def test_a_submitit_job_comes_back_unless_its_run_would_fail_again(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = Decision(action, "why", 1 if action == "fail" else 0)
    monkeypatch.setattr(Supervisor, "decision", lambda _: decision)
    job = Job((), "run", str(tmp_path), with_srun=False)
    monkeypatch.setattr(
        "launchers.job._supervisors", {"run": Supervisor("distseg.train", [], with_srun=False)}
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        if action == "fail":
            with pytest.raises(RunError, match=r"run: why \(exit code 1\)"):
                job.checkpoint()
        else:
            assert job.checkpoint().function is job
            # which SLURM sends to scontrol too
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_failures_that_may_be_a_machines_are_waited_for() -> None:
    assert may_be_the_machines(None) and may_be_the_machines(attempt("killed"))
    assert may_be_the_machines(attempt("failed", "", (75,))) and may_be_the_machines(
        attempt("failed", "", (1, -9))
    )
    assert not may_be_the_machines(attempt("failed", "RuntimeError: a mistake", (1, 1)))


def test_ranks_that_were_lost_are_no_failures_of_the_run() -> None:
    own, lost = attempt("failed", "", (75, 1)), attempt("failed", "", (75, -9))
    assert failures_in_a_row([own, own]) == 2 and failures_in_a_row([own, lost]) == 0
    assert failures_in_a_row([own, attempt("done"), own]) == 1
    further = attempt("failed", "", (1,))
    further.first_step = 8
    assert failures_in_a_row([own, further]) == 1 and failures_in_a_row([]) == 0


def test_a_start_is_judged_by_its_own_note_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LABEL_VARIABLE, "job 7, restart 0, try 1")
    Note(tmp_path, ["here"], 0).finish(9, "done")
    run = Supervisor("distseg.train", [], tmp_path, with_srun=False)
    noted = run._noted("job 7, restart 0, try 1")
    assert noted is not None and noted.outcome == "done"
    assert run._noted("job 7, restart 0, try 2") is None  # it was killed before it noted anything


def test_a_death_by_a_signal_has_the_exit_code_of_shells() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process.kill()
    process.wait()
    assert supervisor._exit_code(process) == 137


def test_the_exit_code_of_a_rank_comes_through_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves.py").write_text("import os, sys\nsys.exit(7 * int(os.environ['RANK']))\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent}")
    monkeypatch.setenv("DISTSEG_RANKS_PER_NODE", "2")
    run = Supervisor("leaves", [], with_srun=False)
    assert run.run() == Decision("again", "exit code 7", 7)


def test_a_step_of_srun_gives_node_port_and_ranks() -> None:
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    step |= {
        "SLURM_JOB_ID": "100",
        "SLURM_RESTART_COUNT": "3",
        "SLURM_GPUS_ON_NODE": "4",
        "DISTSEG_TRY": "2",
    }
    assert Place.of_step(step) == Place(2, 1, 4, "gpu07", 26126)  # 20000 + 61 * 100 + 8 * 3 + 2
    assert Place.of_step(step | {"SLURM_JOB_ID": "101"}).port != Place.of_step(step).port
    with pytest.raises(InputError, match="SLURM_NODEID"):
        Place.of_step({key: value for key, value in step.items() if key != "SLURM_NODEID"})


def test_ranks_of_a_node() -> None:
    assert ranks_per_node({}) == 1
    assert ranks_per_node({"SLURM_GPUS_ON_NODE": "8"}) == 8
    assert ranks_per_node({"SLURM_GPUS_ON_NODE": "8", "DISTSEG_RANKS_PER_NODE": "2"}) == 2
    with pytest.raises(InputError, match="DISTSEG_RANKS_PER_NODE=two"):
        ranks_per_node({"DISTSEG_RANKS_PER_NODE": "two"})


@pytest.mark.parametrize(("state", "answer"), [("CANCELLED", 143), ("COMPLETING", 143), ("", 143)])
def test_only_a_running_job_is_requeued(
    state: str,
    answer: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name, text in (("squeue", f"echo {state}"), ("scontrol", f"touch {tmp_path}/called")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert supervisor.requeue() == answer
    assert not (tmp_path / "called").exists() and "not requeued" in capsys.readouterr().out
