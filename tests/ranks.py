"""Run a function on several ranks, each in a process of its own, joined by gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Forked from one process that has imported torch, which takes longer than most of what is run here
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distseg.train", "distseg.parallel.fsdp"])
TIMEOUT_SECONDS = 240


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(ranks, *arguments) of rank 0, of rank 1, ...]; the function must be importable."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(num_ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {key: str(value) for key, value in variables.items()}
            target = (environment, sys.path, function, arguments, Path(folder) / str(rank))
            processes.append(CONTEXT.Process(target=_run_rank, args=target))
            processes[-1].start()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * num_ranks, f"exit codes of the ranks: {codes}"
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def _run_rank(
    environment: dict[str, str], path: list[str], function: Callable[..., Any], arguments: tuple[Any, ...], out: Path
) -> None:
    import torch

    from distseg.distributed import setup, teardown

    os.environ.update(environment)
    sys.path[:] = path
    torch.set_num_threads(1)
    ranks = setup("cpu", 60)
    out.write_bytes(pickle.dumps(function(ranks, *arguments)))
    teardown()
