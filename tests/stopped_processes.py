"""What happens to a job of which processes are stopped (SIGSTOP), at every place of a run.

    python -m tests.stopped_processes [--timeout SECONDS] [--only WORD ...] [--at-a-time N]

{rank 0, rank 1, ranks 0 and 1, torchrun, torchrun and rank 1} x {start, data, step, evaluation,
checkpoint, pictures} x {plain processes, torchrun, srun}, three ranks each. The first two are
forked from a process that has imported torch. Under srun each rank is a task, or torchrun's, which
is launchers/agent.py there, started by srun; on a cluster of its own (tests/slurm/cluster.py: as
root, with SLURM's packages). A line for each case: how long after the stop the last of the other
ranks lived, their exit codes, and whom they named. A torchrun that is stopped must have ended too,
or whoever waits for it would wait for ever. The ranks stop themselves at the very place; what is
tried is the run's own command. Takes about half a minute a case, so that the tests try a few of
them only (tests/test_watchdog.py).
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster

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
    rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    path = folder / f"pid-{rank}"
    path.write_text(str(os.getpid()))
    # held for as long as the process lives: how others learn of its end
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH)
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
    # torchrun has started all of its ranks by the time that it is stopped
    while not all((folder / f"pid-{one}").exists() for one in range(NUM_RANKS)):
        time.sleep(0.05)
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


def launch(
    case: tuple[str, str, str], folder: Path, timeout: float, cluster: Cluster | None
) -> list[Process]:
    """The processes of a case: torchrun, srun, or all ranks."""
    launcher, place, target = case
    overrides = [f"data.shards={folder.parent / 'shards'}", f"run_dir={folder / 'run'}"]
    overrides += [*SETTINGS, f"parallel.timeout_seconds={timeout}"]
    if launcher != "srun":
        from tests.ranks import environments

        # forked from a process that has imported torch: seconds instead of a minute
        of_all = environments(NUM_RANKS) if launcher == "plain" else [{}]
        return [Fork((place, target, folder, overrides), of_one) for of_one in of_all]
    assert cluster is not None
    by_agent = "torchrun" in target
    command = ["srun", f"--ntasks={1 if by_agent else NUM_RANKS}", "--nodes=1", "--mem=100"]
    command += ["--kill-on-bad-exit=1", "--oversubscribe", sys.executable, "-m"]
    command += [*(["launchers.agent"] if by_agent else []), "tests.stopped_processes", "--rank"]
    command += [place, target, str(folder), *overrides]
    variables = {"OMP_NUM_THREADS": "1", "DISTSEG_RANKS_PER_NODE": str(NUM_RANKS)}
    environment = os.environ | cluster.environment | variables
    with (folder / "output-0").open("w") as out:
        return [subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)]


class Fork:
    """A rank, or torchrun where it has no rank's variables, as a process that is forked; to be used
    as a subprocess.Popen.
    """

    def __init__(self, case: tuple[str, str, Path, list[str]], variables: dict[str, str]):
        from tests.ranks import CONTEXT

        self._process = CONTEXT.Process(target=_forked, args=(case, variables))
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended, or so many seconds."""
        self._process.join(timeout)


Process = subprocess.Popen | Fork


def _forked(case: tuple[str, str, Path, list[str]], variables: dict[str, str]) -> None:
    os.environ.update(variables, OMP_NUM_THREADS="1")
    with (case[2] / f"output-{variables.get('RANK', 0)}").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    if variables:
        sys.exit(rank_main(*case))
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what torchrun --standalone does, but for its ranks, which are forked
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=NUM_RANKS,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _rank_of_torchrun)(*case)


def _rank_of_torchrun(*case: Any) -> None:
    sys.exit(rank_main(*case))


def try_case(
    case: tuple[str, str, str], parent: Path, timeout: float, cluster: Cluster | None
) -> str:
    """One line on it; it begins with "ok" or "BAD"."""
    folder = parent / "-".join(case).replace(" ", "_")
    folder.mkdir()
    processes = launch(case, folder, timeout, cluster)
    who = TARGETS[case[2]][0]
    survivors = [rank for rank in range(NUM_RANKS) if rank not in who]
    try:
        if not came_to_the_place(folder, survivors, processes, 20 * timeout):
            said = errors_of(folder) or [(folder / "output-0").read_text()[-300:]]
            return f"BAD {' | '.join(case)}: did not come to the place: {said[0]}"
        start = time.monotonic()
        while not have_left(folder, survivors, processes, "torchrun" in who):
            if time.monotonic() > start + 3 * timeout:
                return f"BAD {' | '.join(case)}: still there after {3 * timeout:.0f} s"
            time.sleep(0.05)
        return verdict(case, folder, processes, time.monotonic() - start, timeout)
    finally:
        end(folder, processes)


def came_to_the_place(
    folder: Path, survivors: list[int], processes: list[Process], seconds: float
) -> bool:
    """Wait for the stop; False where the job has ended before, or not come to it in time."""
    deadline = time.monotonic() + seconds
    # nobody waits for a rank before it has begun to
    needed = [folder / "stopped", *(folder / f"joining-{rank}" for rank in survivors)]
    while not all(path.exists() for path in needed):
        ended = all(process.poll() is not None for process in processes)
        if ended or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def have_left(
    folder: Path, survivors: list[int], processes: list[Process], and_launcher: bool
) -> bool:
    """Whether these ranks have ended, and their launcher where it has to."""
    if and_launcher and processes[0].poll() is None:
        return False
    for rank in survivors:
        with (folder / f"pid-{rank}").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


def verdict(
    case: tuple[str, str, str],
    folder: Path,
    processes: list[Process],
    seconds: float,
    timeout: float,
) -> str:
    """The line on a case whose other ranks have left."""
    who, words = TARGETS[case[2]]
    lines = errors_of(folder)
    codes = [process.poll() for process in processes]
    if case[0] == "plain":
        left = [process for rank, process in enumerate(processes) if rank not in who]
        for process in left:
            process.wait(5)  # its files are closed a moment before its exit code is known
        codes = [process.poll() for process in left]
    named = any(word in line for line in lines for word in words)
    # a rank that is done when another stops at the very end has nothing to complain of
    told = case[0] != "plain" or (75 in codes and set(codes) <= {0, 75})
    # a start lasts for as long as the time limit, which begins when the first rank has come
    good = named and told and seconds < timeout + 5
    first = lines[0] if lines else "and nothing was said"
    return f"{'ok ' if good else 'BAD'} {' | '.join(case)}: {seconds:.0f} s, {codes} {first}"


def errors_of(folder: Path) -> list[str]:
    """What the processes of a case have said of what went wrong."""
    said = "".join(path.read_text() for path in sorted(folder.glob("output-*")))
    return [line for line in said.splitlines() if line.startswith("error")]


def end(folder: Path, processes: list[Process]) -> None:
    """Kill whatever is left of a case."""
    srun = [process.pid for process in processes if isinstance(process, subprocess.Popen)]
    for path in Path("/proc").glob("[0-9]*") if srun else []:
        with suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if str(folder).encode() in words and int(path.name) not in srun:
                os.kill(int(path.name), signal.SIGKILL)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            # srun sees its tasks end; killed before, it would leave its job behind
            process.wait(10 if srun else 0)
        process.kill()
        process.wait()
    # of a node of the cluster, these are ids within it
    for path in [] if srun else folder.glob("pid-*"):
        with suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def main() -> int:
    """All cases, or those with all of the words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=float, default=16.0)
    parser.add_argument("--only", nargs="*", default=[], help="words that a case must have")
    parser.add_argument("--at-a-time", type=int, default=1, help="cases, which mostly wait")
    options = parser.parse_args()
    from shards.maps import write_maps
    from shards.pack import pack
    from shards.sample import STANFORD
    from tests.conftest import toy_samples
    from tests.slurm.cluster import Cluster

    cases = []
    for case in itertools.product(("plain", "torchrun", "srun"), PLACES, TARGETS):
        possible = case[0] != "plain" or "torchrun" not in case[2]
        if possible and all(word in " | ".join(case) for word in options.only):
            cases.append(case)
    cluster, good = Cluster(num_nodes=1, cpus=64, gpus=0), 0
    with tempfile.TemporaryDirectory() as name:
        samples = toy_samples()
        write_maps(Path(name) / "maps.h5", "toy", STANFORD, samples, total=len(samples))
        pack(Path(name) / "maps.h5", Path(name) / "shards", samples_per_shard=3)
        try:
            if any(case[0] == "srun" for case in cases):
                cluster.start()
            with ThreadPoolExecutor(options.at_a_time) as pool:
                tried = functools.partial(
                    try_case, parent=Path(name), timeout=options.timeout, cluster=cluster
                )
                for line in pool.map(tried, cases):
                    good += line.startswith("ok")
                    print(line, flush=True)
        finally:
            cluster.stop()
    print(f"{good} of {len(cases)}")
    return int(good < len(cases))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(rank_main(sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:]))
    sys.exit(main())
