"""What happens to a job of which processes are stopped (SIGSTOP), at every place of a run.

    python -m tests.stopped_processes [--timeout SECONDS] [--only WORD ...]

{rank 0, rank 1, ranks 0 and 1, torchrun, torchrun and rank 1} x {start, data, step, evaluation,
checkpoint, pictures} x {torchrun, plain processes}, three ranks each. A line for each case: how
long after the stop the last of the other ranks lived, their exit codes, and whom they named. The
ranks stop themselves at the very place; what is tried is the run's own command. Takes about half a
minute a case, so that the tests try a few of them only (tests/test_watchdog.py).
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_RANKS = 3
PLACES = ("start", "data", "step", "evaluation", "checkpoint", "pictures")
# who is stopped, and the words of which the survivors must say one
TARGETS = {
    "rank 0": ((0,), ("rank 0",)),
    "rank 1": ((1,), ("rank 1",)),
    "ranks 0 and 1": ((0, 1), ("rank 0", "rank 1")),
    "torchrun": (("torchrun",), ("torchrun",)),
    "torchrun and rank 1": (("torchrun", 1), ("torchrun",)),
}
SETTINGS = [
    "segmentor=multiscale",
    "segmentor.init=random",
    "segmentor.options.norm=batch",
    "segmentor.options.hidden=8",
    "discriminator.options.width=0.125",
    "data.crop_px=48",
    "data.num_threads=1",
    "batch_size=3",
    "steps=4",
    "checkpoint.every_steps=2",
    "evaluate.every_steps=2",
    "evaluate.num_pictures=2",
    "tracking.wandb=disabled",
    "device=cpu",
]


def stop_at(place: str, pids: list[int | Path], folder: Path) -> None:
    """Stop these processes (ids, or files that hold them by then), this one last, once it comes to
    the place for the second time.
    """
    if place == "start":
        _stop(pids, folder)
        return
    from distseg.data.stream import TrainStream
    from distseg.evaluate.inference import TestTimeAugmentation
    from distseg.runs.tensor_files import TensorFile
    from distseg.tracking import figures
    from distseg.train import trainer

    owner, name = {
        "data": (TrainStream, "__next__"),
        "step": (trainer, "training_step"),
        "evaluation": (TestTimeAugmentation, "__call__"),
        "checkpoint": (TensorFile, "write"),
        "pictures": (figures, "sample_panel"),
    }[place]
    original: Callable[..., Any] = getattr(owner, name)
    count = itertools.count()

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        if next(count) == 1:
            _stop(pids, folder)
        return original(*arguments, **keywords)

    setattr(owner, name, stopping)


def _stop(pids: list[int | Path], folder: Path) -> None:
    numbers = [pid if isinstance(pid, int) else int(pid.read_text()) for pid in pids]
    (folder / "stopped").touch()
    for pid in sorted(numbers, key=lambda pid: pid == os.getpid()):
        os.kill(pid, signal.SIGSTOP)


def rank_main(place: str, target: str, folder: Path, arguments: list[str]) -> int:
    """One rank: the command, with a stop in it where this rank is one that stops."""
    rank = int(os.environ["RANK"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    who = TARGETS[target][0]
    # pictures are rank 0's alone, and a write of a checkpoint that is large enough for one, so
    # that rank stops the others; elsewhere each stops itself
    by_rank_0 = place in ("pictures", "checkpoint")
    _note_joining(folder / f"joining-{rank}")
    pids: list[int | Path] = []
    for one in who:
        if one == "torchrun" and rank == 0:
            pids.append(os.getppid())
        elif by_rank_0 and rank == 0:
            pids.append(folder / f"pid-{one}")
        elif one == rank and not by_rank_0:
            pids.append(os.getpid())
    if pids:
        stop_at(place, pids, folder)
    from distseg.cli import main

    return main(["train", *arguments])


def _note_joining(path: Path) -> None:
    """Write the file when the rank begins to wait for the others."""
    from distseg.distributed import ranks

    original = ranks.join

    def join(*arguments: Any) -> None:
        path.touch()
        original(*arguments)

    ranks.join = join


def launch(case: tuple[str, str, str], folder: Path, timeout: float) -> list[Process]:
    """The processes of a case: torchrun, or all ranks."""
    launcher, place, target = case
    shards = folder.parent / "shards"
    overrides = [f"data.shards={shards}", f"run_dir={folder / 'run'}"]
    overrides += [*SETTINGS, f"parallel.timeout_seconds={timeout}"]
    command = ["-m", "tests.stopped_processes", "--rank", place, target, str(folder), *overrides]
    from tests.ranks import environments

    ranks = environments(NUM_RANKS)
    if launcher == "torchrun":
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
        command, ranks = ["-m", *torchrun, *command], [{}]
    if launcher == "plain":
        # forked from a process that has imported torch: seconds instead of a minute
        return [Fork(place, target, folder, overrides, variables) for variables in ranks]
    processes: list[Process] = []
    for number, variables in enumerate(ranks):
        with (folder / f"output-{number}").open("w") as out:
            variables |= {"OMP_NUM_THREADS": "1"}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=os.environ | variables,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


class Fork:
    """A rank as a process that is forked, to be used as a subprocess.Popen."""

    def __init__(
        self, place: str, target: str, folder: Path, overrides: list[str], variables: dict[str, str]
    ):
        from tests.ranks import CONTEXT

        case = (place, target, folder, overrides)
        self._process = CONTEXT.Process(target=_forked, args=(case, variables))
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def wait(self) -> None:
        """Until it has ended."""
        self._process.join()


Process = subprocess.Popen | Fork


def _forked(case: tuple[str, str, Path, list[str]], variables: dict[str, str]) -> None:
    os.environ.update(variables, OMP_NUM_THREADS="1")
    with (case[2] / f"output-{variables['RANK']}").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    sys.exit(rank_main(*case))


def try_case(case: tuple[str, str, str], parent: Path, timeout: float) -> str:
    """One line on it; it begins with "ok" or "BAD"."""
    launcher, _, target = case
    folder = parent / "-".join(case).replace(" ", "_")
    folder.mkdir()
    processes = launch(case, folder, timeout)
    try:
        deadline = time.monotonic() + 20 * timeout
        who, words = TARGETS[target]
        survivors = [rank for rank in range(NUM_RANKS) if rank not in who]
        # nobody waits for a rank before it has begun to
        needed = [folder / "stopped", *(folder / f"joining-{rank}" for rank in survivors)]
        while not all(path.exists() for path in needed):
            ended = all(process.poll() is not None for process in processes)
            if ended or time.monotonic() > deadline:
                said = (folder / "output-0").read_text()[-300:]
                return f"BAD {' | '.join(case)}: did not come to the place {said}"
            time.sleep(0.05)
        start = time.monotonic()
        while any(_lives(folder, rank, processes, launcher) for rank in survivors):
            if time.monotonic() > start + 3 * timeout:
                return f"BAD {' | '.join(case)}: still there after {3 * timeout:.0f} s"
            time.sleep(0.05)
        seconds = time.monotonic() - start
        said = "".join(path.read_text() for path in sorted(folder.glob("output-*")))
        lines = [line for line in said.splitlines() if line.startswith("error")]
        codes = [processes[rank].poll() for rank in survivors] if launcher == "plain" else []
        named = any(word in line for line in lines for word in words)
        # a start lasts for as long as the time limit, which begins when the first rank has come
        # a rank that is done when another stops at the very end has nothing to complain of
        told = not codes or (75 in codes and set(codes) <= {0, 75})
        good = named and told and seconds < timeout + 5
        first = lines[0] if lines else said[-300:]
        return f"{'ok ' if good else 'BAD'} {' | '.join(case)}: {seconds:.0f} s, {codes} {first}"
    finally:
        _kill(folder, processes)


def _lives(folder: Path, rank: int, processes: list[Process], launcher: str) -> bool:
    if launcher == "plain":
        return processes[rank].poll() is None
    try:
        status = Path(f"/proc/{(folder / f'pid-{rank}').read_text()}/stat").read_text()
    except OSError:
        return False
    # a child of a torchrun that is stopped stays a zombie
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def _kill(folder: Path, processes: list[Process]) -> None:
    for process in processes:
        process.kill()
    for path in folder.glob("pid-*"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            continue
    for process in processes:
        process.wait()


def main() -> int:
    """All cases, or those with all of the words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=float, default=16.0)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    from shards.maps import write_maps
    from shards.pack import pack
    from shards.sample import STANFORD
    from tests.conftest import toy_samples

    lines = []
    with tempfile.TemporaryDirectory() as name:
        samples = toy_samples()
        write_maps(Path(name) / "maps.h5", "toy", STANFORD, samples, total=len(samples))
        pack(Path(name) / "maps.h5", Path(name) / "shards", samples_per_shard=3)
        for case in itertools.product(("plain", "torchrun"), PLACES, TARGETS):
            if "torchrun" in case[2] and case[0] == "plain":
                continue
            if all(word in " | ".join(case) for word in options.only):
                lines.append(try_case(case, Path(name), options.timeout))
                print(lines[-1], flush=True)
    return int(any(line.startswith("BAD") for line in lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(rank_main(sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:]))
    sys.exit(main())
