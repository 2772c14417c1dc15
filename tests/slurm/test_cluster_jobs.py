"""Jobs through submitit on a real cluster: results, exceptions and preemptions come back."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import submitit

from distseg.runs import attempts
from launchers import status, submit, sweep
from tests.slurm.runs import ROOT, Run, wait_until

PARTLY: dict[str, Any] = {"gpus_per_node": 1, "slurm": {"mem": 400}}


@pytest.fixture
def login_node(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run whose environment, and the cluster's, are this process's."""
    for name, value in (run.variables | run.cluster.environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{run.variables['PYTHONPATH']}")
    monkeypatch.delenv("DISTSEG_RANKS_PER_NODE")
    monkeypatch.chdir(run.folder)
    monkeypatch.setattr(submitit.SlurmJob.watcher, "_delay_s", 1)
    yield run


def test_two_nodes_preempted_in_the_middle(
    login_node: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = login_node
    monkeypatch.setenv("DISTSEG_HEALTH_SECONDS", "120")
    run.hold(5)
    job = submit("preset=voc", *run.overrides, nodes=2, **PARTLY)
    run.job = job.job_id
    run.wait_at(5)
    # what --signal=B:USR2 does before the limit
    run.cluster.run("scancel", "--batch", "--signal=USR2", job.job_id)
    wait_until(lambda: "Calling checkpoint method" in job.stdout(), run.describe)
    run.release(5)
    scores = job.result()
    assert scores == json.loads((run.run_dir / "evaluation.json").read_text()) | {
        "run_dir": str(run.run_dir)
    }
    assert run.show()["Restarts"] == "1"
    assert [attempt.outcome for attempt in run.attempts()] == ["stopped", "done"]
    assert run.attempts()[0].hosts == ["node1", "node2"]
    run.check_finished()


def test_an_array_of_six_with_one_that_fails(
    login_node: Run, capsys: pytest.CaptureFixture
) -> None:
    run = login_node
    run.hold(1)
    base = [word for word in run.overrides if not word.startswith(("run_dir=", "steps="))]
    (run.folder / "refuse-2-1").touch()
    plan = {"base": [*base, "steps=2"], "grid": {"seed": list(range(6))}}
    jobs = sweep(plan, run.folder / "sweep", parallelism=3, **PARTLY)
    run.job = jobs[0].job_id.split("_")[0]
    run.wait_at(1)
    wait_until(lambda: [row.state for row in status("sweep")].count("running") == 3, run.describe)
    assert [row.state for row in status("sweep")].count("waiting") == 3, "three at a time"
    run.release(1)
    for number, job in enumerate(jobs):
        if number == 1:
            with pytest.raises(
                submitit.core.utils.FailedJobError, match="a test's bad input at step 2"
            ):
                job.result()
        else:
            assert job.result()["step"] == 2
    rows = status("sweep")
    assert [row.state for row in rows] == ["done", "failed", "done", "done", "done", "done"]
    assert all(row.metric is not None for row in rows if row.state == "done")


def test_a_task_of_an_array_that_is_preempted_leaves_the_others_alone(login_node: Run) -> None:
    run = login_node
    run.hold(1)
    base = [word for word in run.overrides if not word.startswith(("run_dir=", "steps="))]
    plan = {"base": [*base, "steps=4"], "grid": {"seed": [0, 1]}}
    jobs = sweep(plan, run.folder / "sweep", parallelism=2, **PARTLY)
    run.job = jobs[-1].job_id  # whose number is the array's
    wait_until(lambda: [row.state for row in status("sweep")] == ["running"] * 2, run.describe)
    run.wait_at(1)
    run.cluster.run("scancel", "--batch", "--signal=USR2", run.job)
    wait_until(lambda: "told to stop" in jobs[-1].stdout(), run.describe)
    time.sleep(1)  # the signal follows
    run.release(1)
    assert [job.result()["step"] for job in jobs] == [4, 4]
    folders = [run.folder / "sweep" / f"trial-{number:03d}" for number in range(2)]
    assert [len(attempts.read(folder)) for folder in folders] == [1, 2]


def test_what_is_typed_in_a_shell_of_srun_pty_waits_for_no_other_ranks(login_node: Run) -> None:
    ours, theirs = pty.openpty()
    shell = ["srun", "--pty", "--ntasks=3", "--oversubscribe", "bash", "--norc"]
    look = "import os; from distseg.distributed import launch; "
    look += "print('ranks', launch.resolve_ranks(dict(os.environ)))"
    with subprocess.Popen(shell, stdin=theirs, stdout=theirs, stderr=theirs) as step:
        os.close(theirs)
        os.write(ours, f'{sys.executable} -c "{look}"\nexit\n'.encode())
        said = b""
        with suppress(OSError):  # a terminal that is closed ends in EIO
            while data := os.read(ours, 4096):
                said += data
    assert step.returncode == 0 and b"ranks (0, 1, 0)" in said, said
    assert b"srun --pty with 3 tasks" in said


def test_what_the_cluster_has_not_is_refused_at_submission(login_node: Run) -> None:
    with pytest.raises(
        ValueError, match=r"sbatch: .*Requested node configuration is not available"
    ):
        submit(*login_node.overrides, "batch_size=9", gpus_per_node=9)
