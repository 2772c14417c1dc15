"""Runs and sweeps through submitit, here; on a cluster: tests/slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import submitit

from distseg.cli import main
from launchers import resubmit, status, submit, sweep, table
from launchers.sweeps import Row
from shards.errors import InputError
from tests.test_train import SMALL

ROOT = Path(__file__).parent.parent
TINY = [*SMALL, "segmentor=multiscale", "segmentor.options.hidden=16", "steps=6", "evaluate.every_steps=0"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the jobs: one thread, and a way to make them fail."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'slurm' / 'brake'}")
    monkeypatch.setenv("DISTSEG_TEST_BRAKE", str(tmp_path))


def test_a_sweep_with_a_trial_that_fails_and_is_submitted_again(toy_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "refuse-2-1").touch()
    plan = {"base": [*TINY, f"data.shards={toy_shards}"], "grid": {"seed": [0, 1]}}
    good, bad = sweep(plan, tmp_path / "sweep", executor="local", ranks_per_node=2)
    scores = json.loads((Path(good.result()["run_dir"]) / "evaluation.json").read_text())
    assert good.result() == scores | {"run_dir": str(tmp_path / "sweep" / "trial-000")}
    with pytest.raises(submitit.core.utils.FailedJobError, match="a test's bad input at step 2"):
        bad.result()
    rows = status(tmp_path / "sweep")
    assert [row.state for row in rows] == ["done", "failed"]
    assert (rows[0].step, rows[0].metric) == (6, scores["val/mean_iou"]) and not rows[0].error
    assert "RunError" in rows[1].error[-1] and "exit code 2" in rows[1].error[-1]
    assert "seed=1" in table(rows) and "crop_px" not in table(rows), "what all trials share is left out"
    (again,) = resubmit(tmp_path / "sweep")
    after = status(tmp_path / "sweep")
    assert [row.job for row in after] == [good.job_id, again.job_id] and after[0].state == "done"
    again.exception()
    with pytest.raises(InputError, match="holds a sweep"):
        sweep(plan, tmp_path / "sweep", executor="local")


def test_the_table_has_the_best_first_and_then_what_went_wrong() -> None:
    rows = [Row(0, ["a=1", "seed=0", "run_dir=r0"], "failed", "7_0", "r0", 3, None, error=["Traceback", "boom"])]
    rows += [Row(1, ["a=1", "seed=1", "run_dir=r1"], "running", "7_1", "r1", 5, 0.25)]
    rows += [Row(2, ["a=1", "seed=2", "run_dir=r2"], "done", "7_2", "r2", 9, 0.5, url="https://w.b/r2")]
    lines = table(rows).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["trial", "2", "1", "0"]
    assert lines[1].split() == ["2", "done", "7_2", "9", "0.5000", "seed=2", "https://w.b/r2"]
    assert lines[4:] == ["trial 0 failed:", "  Traceback", "  boom"]


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
    assert "distseg prepare voc --root ROOT --out data/voc.h5 && distseg pack data/voc.h5 --out data/voc" in text
    assert "sbatch slurm/pack_shards.sh voc --root ROOT --out data/voc.h5" in text
    (tmp_path / "file").write_text("")
    assert "file cannot be written" in refused(*good, "run_dir=file/run", **local)
    assert "2 nodes with executor local" in refused(*good, nodes=2, **local)
    assert "one of: slurm, local, debug" in refused(*good, executor="pbs")
    assert "signal_seconds=60 in 1 minutes" in refused(*good, minutes=1, signal_seconds=60)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch here" in refused(*good)
    assert main(["submit", *good]) == 2
    assert capsys.readouterr().err.startswith("error: no sbatch here")
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


def test_a_run_directory_of_another_configuration_is_refused_at_submission(toy_shards: Path, tmp_path: Path) -> None:
    from distseg import configuration

    good = [*TINY, f"data.shards={toy_shards}", f"run_dir={tmp_path}"]
    (tmp_path / "config.yaml").write_text(configuration.to_yaml(configuration.load(good)))
    assert "seed: 0 there, 5 now" in refused(*good, "seed=5", executor="local")


def test_checking_starts_no_cuda(toy_shards: Path, tmp_path: Path) -> None:
    overrides = [*TINY, f"data.shards={toy_shards}", f"run_dir={tmp_path / 'run'}"]
    program = f"import torch; from launchers.check import check_run; check_run({overrides!r}, 2)\n"
    program += "print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
