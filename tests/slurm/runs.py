"""Training runs on the test cluster, which can be held at a step."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from distseg.runs import attempts
from launchers import turns
from tests.slurm.cluster import ROOT, Cluster
from tests.test_train import SMALL

WAIT_SECONDS = 600  # for anything; what takes so long has failed
STEPS = 12
OVERRIDES = [*SMALL, "data.num_classes=8", "segmentor=multiscale", "segmentor.options.hidden=16"]
OVERRIDES += ["segmentor.batch_norm=per_rank", "evaluate.every_steps=0", f"steps={STEPS}"]
OVERRIDES += ["parallel.timeout_seconds=120"]  # above what a test holds a step for


def wait_until(what: Callable[[], object], message: Callable[[], str]) -> None:
    """Wait for something to become true; fails with a message when it does not."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not what():
        assert time.monotonic() < deadline, message()
        time.sleep(0.1)


@dataclass
class Run:
    """A training run on the cluster, with its brake and its jobs."""

    cluster: Cluster
    folder: Path
    shards: Path
    # the last checkpoint of a run that nothing happened to
    reference: Callable[[], dict[str, bytes]]
    job: str = ""

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def variables(self) -> dict[str, str]:
        """The environment of its jobs: one rank per node, and the brake."""
        path = f"{ROOT / 'tests' / 'slurm' / 'brake'}"
        found = {
            "DISTSEG_PYTHON": sys.executable,
            "DISTSEG_RANKS_PER_NODE": "1",
            "DISTSEG_PAUSE_SECONDS": "30",
            # most scenarios are of what comes later, and start often
            "DISTSEG_HEALTH_SECONDS": "0",
        }
        return found | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            "DISTSEG_TEST_BRAKE": str(self.folder),
        }

    @property
    def overrides(self) -> list[str]:
        return [*OVERRIDES, f"data.shards={self.shards}", f"run_dir={self.run_dir}"]

    def sbatch(
        self,
        *words: str,
        options: tuple[str, ...] = (),
        variables: dict[str, str] | None = None,
        before: tuple[str, ...] = (),
    ) -> None:
        """Submit slurm/train_voc.sh with further overrides.

        Options are sbatch's, two nodes in part unless they say. before: words of a command that
        runs sbatch.
        """
        usual = ["--parsable", f"--output={self.folder}/out.txt", "--oversubscribe", "--mem=400"]
        overrides = [*self.overrides, *words]
        command = [*before, "sbatch", *usual, *options, "slurm/train_voc.sh", *overrides]
        self.job = self.cluster.run(*command, variables=self.variables | (variables or {})).strip()

    def hold(self, step: int) -> None:
        """Ranks will wait before this step."""
        (self.folder / f"hold-{step}").touch()

    def wait_at(self, step: int) -> None:
        """Wait until a rank waits before this step."""
        wait_until((self.folder / f"at-{step}").exists, self.describe)

    def release(self, step: int) -> None:
        """Let the ranks take this step."""
        (self.folder / f"hold-{step}").unlink()

    def show(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.cluster.run("scontrol", "show", "job", self.job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, state: str = "COMPLETED") -> dict[str, str]:
        """Wait for the end of the job, which has to be this one."""
        ends = (
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
        )
        wait_until(lambda: self.show()["JobState"] in ends, self.describe)
        found = self.show()
        assert found["JobState"] == state, self.describe()
        return found

    def said(self, text: str) -> bool:
        """Whether the job's output holds a text."""
        return text in self.output()

    def output(self) -> str:
        path = self.folder / "out.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def attempts(self) -> list[attempts.Attempt]:
        return attempts.read(self.run_dir)

    def turns(self) -> int:
        """How many turns have been noted."""
        path = self.run_dir / turns.FILE_NAME
        return len(path.read_text().splitlines()) if path.exists() else 0

    def parameters(self) -> dict[str, bytes]:
        """All files of the last checkpoint."""
        files = sorted((self.run_dir / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
        assert len(files) == 8, self.describe()
        return {file.name: file.read_bytes() for file in files}

    def check_finished(self) -> None:
        """Fails unless the run is done, with the bits of one that nothing happened to."""
        assert self.attempts()[-1].outcome == "done" and self.attempts()[-1].last_step == STEPS, (
            self.describe()
        )
        assert self.parameters() == self.reference(), "other parameters than without interruption"

    def another(self) -> Run:
        """A second run on the same cluster."""
        folder = self.folder / "another"
        folder.mkdir()
        return replace(self, folder=folder, job="")

    def describe(self) -> str:
        """Everything that helps to find out what went wrong."""
        job = self.cluster.run("scontrol", "show", "job", self.job, check=False)
        return "\n".join([job, self.output()[-6000:], *map(str, self.attempts())])
