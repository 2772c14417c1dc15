"""Run a function on several ranks, each in a process of its own, joined by gloo."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = """
import pickle, sys, torch
torch.set_num_threads(1)
function, arguments, out = pickle.load(open(sys.argv[1], "rb"))
from distseg.distributed import setup, teardown
ranks = setup("cpu", 60)
result = function(ranks, *arguments)
pickle.dump(result, open(f"{out}/{ranks.rank}", "wb"))
teardown()
"""


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(ranks, *arguments) of rank 0, of rank 1, ...]; the function must be importable."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((function, arguments, folder)))
        processes = []
        for rank in range(num_ranks):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = os.environ | {key: str(value) for key, value in variables.items()}
            environment["PYTHONPATH"] = os.pathsep.join(sys.path)
            processes.append(subprocess.Popen([sys.executable, "-c", PROGRAM, str(task)], env=environment))
        try:
            codes = [process.wait(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * num_ranks, f"exit codes of the ranks: {codes}"
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]
