"""Whether damage of checkpoints is found, and what looking for it costs.

Of each run that is named, the last checkpoint is copied, and one bit of the copy is flipped at each
of so many random places, over all files by their bytes and as often over the files alike (else a
small one would hardly be hit). Found means: the ranks that would load it agree that it is damaged.
Then a checkpoint of so many megabytes is written and loaded, and the checksums' share is timed.

Run: python -m benchmarks.checkpoints [RUN ...] [--places 200] [--megabytes 700]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.conditions import conditions
from distseg.distributed.ranks import Ranks
from distseg.runs import checkpointer
from distseg.runs.checkpoint import find, verified
from distseg.runs.checkpointer import Checkpointer
from distseg.runs.tensor_files import DamagedCheckpoint


class Tensors:
    """What a checkpoint is made of here: one part of random tensors."""

    def __init__(self, num_bytes: int):
        # pieces of 4 MB, as large layers have
        count = max(1, num_bytes // 2**22)
        self.tensors = {f"{number}": torch.rand(2**20) for number in range(count)}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"network": self.tensors}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state["network"][name])


def num_found(run_dir: Path, num_places: int) -> tuple[int, list[str]]:
    """How many flipped bits are found, and where those are that are not."""
    rng, missed = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        path = find(run_dir, "last")
        copied = Path(shutil.copytree(path, Path(folder) / path.name))
        files = sorted(copied.iterdir())
        sizes = np.array([file.stat().st_size for file in files])
        # as many ranks as the most that a part has files for
        world_size = max([1, *(int(f.stem.split("-of-")[1]) for f in files if "-of-" in f.stem)])
        for number in range(num_places):
            shares = sizes / sizes.sum() if number % 2 else np.full(len(files), 1 / len(files))
            file = files[rng.choice(len(files), p=shares)]
            bit = int(rng.integers(8 * file.stat().st_size))
            _flip(file, bit)
            if not _is_found(copied, world_size):
                missed.append(f"{file.name}, bit {bit}")
            _flip(file, bit)
        for rank in range(world_size):
            verified(copied, rank, world_size)  # as it was, it is sound
    return num_places - len(missed), missed


def _flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        changed = opened.read(1)[0] ^ 1 << bit % 8
        opened.seek(bit // 8)
        opened.write(bytes([changed]))


def _is_found(path: Path, world_size: int) -> bool:
    for rank in range(world_size):
        try:
            verified(path, rank, world_size)
        except DamagedCheckpoint:
            return True
    return False


def _seconds(work: Callable[[], object], repetitions: int = 3) -> float:
    """Of the processor, the least of some runs: the machine may have other work."""
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def cost(num_bytes: int) -> None:
    """Print what checksums cost a save and a load."""
    learners = {"segmentor": Tensors(num_bytes)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpointer(Path(folder), 1, {}, Ranks(0, 1, 0, torch.device("cpu")))
        sha256_of, steps = checkpointer.sha256_of, iter(range(100))

        def save() -> None:
            checkpoints.save(learners, {"step": next(steps)})

        saving = _seconds(save)
        checkpointer.sha256_of = lambda path: ""
        without = _seconds(save)
        checkpointer.sha256_of = sha256_of
        save()
        saved = verified(find(Path(folder), "last"))
        verifying = _seconds(lambda: verified(saved.path))
        loading = _seconds(lambda: checkpoints.load(saved, learners))
    print(f"{num_bytes / 1e6:.0f} MB, seconds of one core, without waiting for a disk:")
    print(f"saving {saving:.2f}, without checksums {without:.2f}")
    print(f"verifying {verifying:.2f}, and then loading {loading:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--places", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=700)
    options = parser.parse_args()
    print(conditions(threads=1))
    for run_dir in options.runs:
        found, missed = num_found(run_dir, options.places)
        print(
            f"{run_dir.name}: {found} of {options.places} flipped bits found", *missed, sep="\n  "
        )
    cost(options.megabytes * 10**6)


if __name__ == "__main__":
    main()
