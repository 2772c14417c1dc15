"""Runs and sweeps through submitit, here; on a cluster: tests/slurm."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit
import torch

from distseg.cli import main
from distseg.runs import attempts
from launchers import resubmit, slots, status, submit, sweep, sweeps, table
from launchers.check import check_run
from launchers.job import Job
from launchers.sweeps import Row
from shards.errors import InputError
from tests.test_train import SMALL, TIMEOUT_SECONDS

ROOT = Path(__file__).parent.parent
TINY = [
    *SMALL,
    "segmentor=multiscale",
    "segmentor.options.hidden=16",
    "steps=2",
    "evaluate.every_steps=0",
    "evaluate.num_pictures=0",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the jobs: one thread, and a way to make them fail."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'slurm' / 'brake'}")
    monkeypatch.setenv("DISTSEG_TEST_BRAKE", str(tmp_path))


def test_a_sweep_with_a_trial_that_fails_and_is_submitted_again(
    toy_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "refuse-2-1").touch()
    plan = {"base": [*TINY, f"data.shards={toy_shards}"], "grid": {"seed": [0, 1]}}
    good, bad = sweep(plan, tmp_path / "sweep", parallelism=1, executor="local")
    scores = json.loads((Path(good.result()["run_dir"]) / "evaluation.json").read_text())
    assert good.result() == scores | {"run_dir": str(tmp_path / "sweep" / "trial-000")}
    with pytest.raises(submitit.core.utils.FailedJobError, match="a test's bad input at step 2"):
        bad.result()
    one, other = (attempts.read(tmp_path / "sweep" / f"trial-00{number}")[0] for number in (0, 1))
    assert one.ended and other.ended
    assert one.ended < other.started or other.ended < one.started, "one at a time"
    rows = status(tmp_path / "sweep")
    assert [row.state for row in rows] == ["done", "failed"]
    assert (rows[0].step, rows[0].metric) == (2, scores["val/mean_iou"]) and not rows[0].error
    assert rows[1].error[0].endswith("trial-001: a test's bad input at step 2 (exit code 2)")
    assert rows[1].error[1:] == [
        "error: a test's bad input at step 2",
        "  needed: another",
        "  to do:  none",
    ]
    assert "seed=1" in table(rows) and "crop_px" not in table(rows), (
        "what all trials share is left out"
    )
    held = slots.take(tmp_path / "sweep" / "jobs", 1)  # it waits, and trains no more
    (again,) = resubmit(tmp_path / "sweep")
    after = status(tmp_path / "sweep")
    assert [row.job for row in after] == [good.job_id, again.job_id] and after[0].state == "done"
    os.kill(int(again.job_id), signal.SIGKILL)
    again.wait()
    os.close(held)
    with pytest.raises(InputError, match="holds a sweep"):
        sweep(plan, tmp_path / "sweep", executor="local")


def wait_until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_whose_job_was_killed_stops_and_is_no_others_until_then(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hold-2").touch()
    (tmp_path / "shards").symlink_to(toy_shards)
    # it ends only by being told to
    plan = {"base": [*TINY, "data.shards=shards"], "list": [{"steps": 10**6}]}
    (job,) = sweep(plan, "sweep", executor="local")
    wait_until((tmp_path / "at-2").exists)
    (supervisor,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(supervisor), signal.SIGKILL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # also while the job is a zombie: nobody waits for it
    wait_until(lambda: status("../sweep")[0].state != "running")
    (row,) = status("../sweep")
    assert row.state == "orphaned" and row.error[0].startswith(
        "still training without its job (process "
    )
    with pytest.raises(InputError, match="trial 0: still training without its job"):
        resubmit("../sweep")
    (tmp_path / "hold-2").unlink()
    wait_until(lambda: status("../sweep")[0].state == "lost")
    assert status("../sweep")[0].error == ["its process ended without a result"]
    run_dir = tmp_path / "sweep" / "trial-000"
    (first,) = attempts.read(run_dir)
    assert (first.outcome, first.reason) == ("stopped", "SIGUSR1 here")
    (again,) = resubmit("../sweep")
    assert os.getcwd() == str(tmp_path / "elsewhere")
    wait_until(lambda: len(attempts.read(run_dir)) == 2)
    os.kill(int(again.job_id), signal.SIGTERM)
    assert "SIGUSR1 here (exit code 0)" in str(again.exception())
    assert attempts.read(run_dir)[1].first_step == first.last_step


def test_trials_that_a_broken_off_submission_left_are_known_and_submitted_later(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(["7", "", "8", "9"])

    def hand_in(jobs: list[Job], *_: Any) -> Iterator[SimpleNamespace]:
        for _ in jobs:
            job = SimpleNamespace(job_id=next(ids))
            if not job.job_id:
                raise KeyboardInterrupt
            yield job

    monkeypatch.setattr(sweeps, "hand_in", hand_in)
    plan = {"base": [*TINY, f"data.shards={toy_shards}"], "grid": {"seed": [0, 1, 2]}}
    with pytest.raises(KeyboardInterrupt):
        sweep(plan, tmp_path / "sweep", executor="local")
    monkeypatch.setattr(sweeps, "_state_here", lambda job: "running")
    assert [(row.state, row.job) for row in status(tmp_path / "sweep")] == [
        ("running", "7"),
        ("not submitted", ""),
        ("not submitted", ""),
    ]
    resubmit(tmp_path / "sweep")
    assert [row.job for row in status(tmp_path / "sweep")] == ["7", "8", "9"]


def test_a_sweep_that_is_refused_leaves_its_directory_free(
    toy_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "jobs").write_text("")
    with pytest.raises(InputError, match="jobs: File exists"):
        sweep(
            {"base": [*TINY, f"data.shards={toy_shards}"], "list": [{"seed": 0}]},
            tmp_path,
            executor="local",
        )
    assert not (tmp_path / "sweep.json").exists()


def test_a_cluster_that_cannot_be_reached_is_told_from_resources_that_it_has_not(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "squeue", "srun"):
        text = (
            f"{name}: error: fetch_config: DNS SRV lookup failed\n"
            f"{name}: error: failed to fetch config"
        )
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    text = refused(*TINY, f"data.shards={toy_shards}", "run_dir=run")
    assert "needed: a SLURM controller that can be reached" in text and "--executor local" in text
    content = {
        "resources": {"folder": "jobs", "executor": "slurm"},
        "trials": [{"overrides": ["run_dir=r"], "job": "5"}],
    }
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="a SLURM controller that can be reached"):
        status(tmp_path)  # not "lost": that would be submitted again


def test_what_another_tool_left_in_a_run_directory_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"step": 9}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "val/mean_iou": 0.5}\n17\n{"loss": 1.0}\n{"step": 4}\n{"st'
    )
    assert sweeps._progress(tmp_path) == (4, 0.5)


def test_the_table_has_the_best_first_and_then_what_went_wrong() -> None:
    rows = [
        Row(
            0,
            ["a=1", "seed=0", "run_dir=r0"],
            "failed",
            "7_0",
            "r0",
            3,
            None,
            error=["Traceback", "boom"],
        )
    ]
    rows += [Row(1, ["a=1", "seed=1", "run_dir=r1"], "running", "7_1", "r1", 5, 0.25)]
    rows += [
        Row(2, ["a=1", "seed=2", "run_dir=r2"], "done", "7_2", "r2", 9, 0.5, url="https://w.b/r2")
    ]
    lines = table(rows).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["trial", "2", "1", "0"]
    assert lines[1].split() == ["2", "done", "7_2", "9", "0.5000", "seed=2", "https://w.b/r2"]
    assert lines[4:] == ["trial 0 failed:", "  Traceback", "  boom"]
    # what has failed is last, however well it stood until then
    rows[0].metric = 0.9
    assert [line.split()[0] for line in table(rows).splitlines()[1:4]] == ["2", "1", "0"]


def test_jobs_here_wait_for_a_slot_which_ends_with_its_holder(tmp_path: Path) -> None:
    first, second = (slots.take(tmp_path, 2) for _ in range(2))
    with pytest.raises(BlockingIOError):
        fcntl.flock((tmp_path / "slot-0").open(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    found: list[int] = []
    third = threading.Thread(target=lambda: found.append(slots.take(tmp_path, 2)), daemon=True)
    third.start()
    third.join(3 * slots.POLL_SECONDS)
    assert third.is_alive(), "both slots are held"
    os.close(second)
    third.join(TIMEOUT_SECONDS)
    assert os.fstat(found[0]).st_ino == (tmp_path / "slot-1").stat().st_ino
    for held in (first, *found):
        os.close(held)


def refused(*overrides: str, **resources: Any) -> str:
    with pytest.raises(InputError) as caught:
        submit(*overrides, **resources)
    return str(caught.value)


def test_bad_input_is_refused_at_submission(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    good = [*TINY, f"data.shards={toy_shards}", "run_dir=run"]
    local = {"executor": "local"}
    assert "did you mean steps?" in refused(*good, "step=3", **local)
    assert "key=value" in refused(*good, "steps", **local)
    assert "one of: " in refused("preset=vocc", **local)
    assert "batch_size=4 for 3 ranks" in refused(*good, ranks_per_node=3, **local)
    assert "width" in refused(*good, "discriminator.options.depth=3", **local)
    text = refused("preset=voc", **local)
    assert (
        "distseg prepare voc --root ROOT --out data/voc.h5 "
        "&& distseg pack data/voc.h5 --out data/voc" in text
    )
    assert "sbatch slurm/pack_shards.sh voc --root ROOT --out data/voc.h5" in text
    (tmp_path / "file").write_text("")
    assert "file cannot be written" in refused(*good, "run_dir=file/run", **local)
    assert "2 nodes with executor local" in refused(*good, nodes=2, **local)
    assert "one of: slurm, local, debug" in refused(*good, executor="pbs")
    assert "signal_seconds=60 in 1 minutes" in refused(*good, minutes=1, signal_seconds=60)
    (tmp_path / "runs").write_text("")
    assert "runs/jobs: Not a directory" in refused(*good, **local)
    with pytest.raises(InputError, match="parallelism=0"):
        sweep({"base": good}, tmp_path / "sweep", 0, **local)
    (tmp_path / "runs").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch here" in refused(*good)
    assert main(["submit", *good]) == 2
    assert capsys.readouterr().err.startswith("error: no sbatch here")
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


def test_a_run_directory_of_another_configuration_is_refused_at_submission(
    toy_shards: Path, tmp_path: Path
) -> None:
    from distseg.config import loading

    good = [*TINY, f"data.shards={toy_shards}", f"run_dir={tmp_path}"]
    (tmp_path / "config.yaml").write_text(loading.to_yaml(loading.load(good)))
    assert "seed: 0 there, 5 now" in refused(*good, "seed=5", executor="local")


def test_checking_starts_no_cuda(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what every first use of CUDA calls, also where there is none
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was started"))
    check_run([*TINY, f"data.shards={toy_shards}", f"run_dir={tmp_path / 'run'}"], 2)
