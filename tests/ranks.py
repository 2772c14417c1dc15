"""Functions and whole commands on several ranks, each in a process of its own, joined by gloo."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Forked from one process that has imported torch, which takes longer than most of what is run here
CONTEXT = multiprocessing.get_context("forkserver")
# (torch._dynamo: what the first step of any optimizer would import; torch._inductor: what
# DeepSpeed's first engine would; pytest: modules of tests do)
PRELOADED = ["distseg.train.run", "distseg.train.showcase", "distseg.parallel.fsdp"]
CONTEXT.set_forkserver_preload(
    [*PRELOADED, "torch._dynamo", "torch._inductor.compile_fx", "pytest"]
)
# How many times as long as on two idle cores everything may take, before a test gives it up as
# hanging
PATIENCE = float(os.environ.get("DISTSEG_TEST_PATIENCE", "1"))
TIMEOUT_SECONDS = 240 * PATIENCE


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """[function(ranks, *arguments) of rank 0, of rank 1, ...]; the function must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, environment in enumerate(environments(num_ranks)):
            target = (environment, sys.path, function, arguments, Path(folder) / str(rank))
            processes.append(CONTEXT.Process(target=_run_rank, args=target))
            processes[-1].start()
        deadline = time.monotonic() + timeout_seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * num_ranks, f"exit codes of the ranks: {codes}"
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def environments(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun would set for each rank, but with a port of this call's own."""
    common = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | common for rank in range(num_ranks)]


def leave_out(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Runs of this process draw nothing, count no operations and do not measure the device: that
    takes longer than a dozen small steps, and changes no bit of what is learned.
    """
    from distseg.train import assembly, run, showcase
    from distseg.train.flops import StepWork

    replace(showcase, "draw_scores", lambda *_: None)
    replace(showcase.figures, "sample_panel", lambda *_: None)
    replace(run, "StepWork", SimpleNamespace(of=lambda *_: StepWork(1.0)))
    replace(assembly, "convolution_peak", lambda *_: 1.0)


def whole(arguments: list[str]) -> int:
    """The command as it is."""
    import torch

    from distseg.cli import main

    # here, and not before `restarting` forks: autograd's threads then race for torch's pool
    torch.set_num_threads(1)
    return main(arguments)


def bare(arguments: list[str]) -> int:
    """The command without what is only looked at."""
    leave_out()
    return whole(arguments)


def slow(arguments: list[str]) -> int:
    """A bare command whose steps wait, at no cost: what comes in the middle of such a run comes
    before its end, also where the test gets its turn late.
    """
    from distseg.train.trainer import Trainer

    step = Trainer.train_step

    def late(self: Trainer, batch: Any) -> Any:
        time.sleep(0.15)
        return step(self, batch)

    Trainer.train_step = late  # type: ignore[method-assign]
    return bare(arguments)


def restarting(arguments: list[str]) -> int:
    """What torchrun --standalone --nproc_per_node=2 --max-restarts=1 does, but for its ranks, which
    are forked.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=1,
        start_method="fork",
    )
    elastic_launch(config, _rank_of_torchrun)(arguments)
    return 0


def agent_of_node(arguments: list[str]) -> int:
    """What `python -m launchers.agent` does with its arguments, but for its ranks, which are forked
    and are slow.
    """
    from dataclasses import replace

    from torch.distributed.launcher.api import elastic_launch

    from launchers import agent

    def forked(config: Any, executable: str) -> Callable[..., Any]:
        return lambda unbuffered, module, name, *words: elastic_launch(
            replace(config, start_method="fork"), _slow_rank_of_torchrun
        )(list(words))

    agent.elastic_launch = forked  # type: ignore[assignment]
    sys.argv = ["agent", *arguments]
    return agent.main()


def _slow_rank_of_torchrun(arguments: list[str]) -> None:
    if code := slow(["train", *arguments]):
        sys.exit(code)


def _rank_of_torchrun(arguments: list[str]) -> None:
    if code := whole(arguments):
        sys.exit(code)


class Program:
    """`distseg` with some arguments, as a subprocess.Popen whose process has imported torch
    already. how: it is run.
    """

    def __init__(
        self,
        arguments: list[str],
        variables: dict[str, str] | None = None,
        how: Callable[[list[str]], int] = whole,
    ):
        descriptor, name = tempfile.mkstemp(prefix="output-of-a-program-")
        os.close(descriptor)
        self._output = Path(name)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {})
        target = (arguments, dict(environment), sys.path, self._output, how)
        self._process = CONTEXT.Process(target=_run_program, args=target)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = TIMEOUT_SECONDS) -> tuple[str, None]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout, self._output.read_text())
        return self._output.read_text(), None

    def __del__(self) -> None:
        self._output.unlink(missing_ok=True)


class Job:
    """A Program on several ranks, as one Popen: it ends when all have, and badly when one has."""

    def __init__(
        self, num_ranks: int, arguments: list[str], how: Callable[[list[str]], int] = whole
    ):
        variables = environments(num_ranks) if num_ranks > 1 else [{}]
        self.ranks = [Program(arguments, of_rank, how) for of_rank in variables]

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        codes = [rank.poll() for rank in self.ranks]
        return next((code for code in codes if code), None if None in codes else 0)

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def communicate(self, timeout: float = TIMEOUT_SECONDS) -> tuple[str, None]:
        return "".join(rank.communicate(timeout)[0] for rank in self.ranks), None


def _run_program(
    arguments: list[str],
    environment: dict[str, str],
    path: list[str],
    out: Path,
    how: Callable[[list[str]], int],
) -> None:
    gc.freeze()  # as below
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    with out.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(how(arguments))


def _run_rank(
    environment: dict[str, str],
    path: list[str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    out: Path,
) -> None:
    import torch

    from distseg.distributed.ranks import setup, teardown

    # what was there before the fork stays: DeepSpeed collects garbage for every engine
    gc.freeze()
    os.environ.update(environment)
    sys.path[:] = path
    torch.set_num_threads(1)
    ranks = setup("cpu", 60 * PATIENCE)
    out.write_bytes(pickle.dumps(function(ranks, *arguments)))
    teardown()
