"""In the ranks of test jobs: holds a step until the test has done what it wants to happen during
it, or fails there.

DISTSEG_TEST_BRAKE is a folder. A rank that is about to take step N (from 1) writes `at-N` and waits
while `hold-N` is there; with `crash-N` it raises an error instead, with `refuse-N-SEED`, in the run
of that seed, an InputError. With `wrong-NODE` a node multiplies wrongly when it is looked at.
"""

import os
import sys
import time
from pathlib import Path


def _install(folder: Path) -> None:
    from distseg.train.trainer import Trainer
    from shards.errors import InputError

    take = Trainer.train_step

    def braked(self, batch):
        step = self.state.step + 1
        if (folder / f"crash-{step}").exists():
            raise RuntimeError(f"this step is to fail: {step}")
        if (folder / f"refuse-{step}-{self.config.seed}").exists():
            raise InputError(f"a test's bad input at step {step}", "another", "none")
        if (folder / f"hold-{step}").exists():
            (folder / f"at-{step}").touch()
        while (folder / f"hold-{step}").exists():
            time.sleep(0.05)
        return take(self, batch)

    Trainer.train_step = braked


def _multiply_wrongly() -> None:
    import torch

    right = torch.matmul

    def wrong(*matrices):
        product = right(*matrices)
        product[-1, -1] += 1
        return product

    torch.matmul = wrong


if "launchers.examine" in sys.orig_argv and "DISTSEG_TEST_BRAKE" in os.environ:
    node = os.environ.get("SLURMD_NODENAME")
    if (Path(os.environ["DISTSEG_TEST_BRAKE"]) / f"wrong-{node}").exists():
        _multiply_wrongly()

if "RANK" in os.environ and "DISTSEG_TEST_BRAKE" in os.environ:
    _install(Path(os.environ["DISTSEG_TEST_BRAKE"]))
