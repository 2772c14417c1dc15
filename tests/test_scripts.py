"""The shell scripts: clean for shellcheck, and clear to who calls them wrongly.

On a cluster: tests/slurm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "slurm").glob("*.sh"))


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck"
)
@pytest.mark.parametrize(
    "script", [*SCRIPTS, ".ci/run", "tests/slurm/sacct", "tests/slurm/demo.sh"]
)
def test_shellcheck_finds_nothing(script: str) -> None:
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run(script: str, *arguments: str, cwd: Path, submitted: bool) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
    }
    environment |= {"DISTSEG_PYTHON": sys.executable} | (
        {"SLURM_SUBMIT_DIR": str(cwd)} if submitted else {}
    )
    command = ["bash", str(ROOT / "slurm" / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_what_is_called_wrongly_says_how_to_call_it(tmp_path: Path) -> None:
    assert "sbatch slurm/train_voc.sh" in run("train_voc.sh", cwd=ROOT, submitted=False).stderr
    elsewhere = run("train_voc.sh", cwd=tmp_path, submitted=True)
    assert elsewhere.returncode == 2 and "call sbatch in the repository" in elsewhere.stderr
    by_hand = run("train_voc.sh", cwd=ROOT, submitted=True)
    assert by_hand.returncode == 2 and by_hand.stderr.startswith(
        "error: not inside a SLURM job: no SLURM_JOB_ID"
    )
    no_file = run("pack_shards.sh", "voc", cwd=ROOT, submitted=True)
    assert no_file.returncode == 2 and "--out data/voc.h5" in no_file.stderr


def test_the_packing_job_makes_shards_that_training_takes(tmp_path: Path) -> None:
    out = tmp_path / "toy.h5"
    done = run(
        "pack_shards.sh",
        "toy",
        f"--out={out}",
        "num_train=2",
        "num_val=1",
        cwd=ROOT,
        submitted=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy" / "verified.json").is_file()
