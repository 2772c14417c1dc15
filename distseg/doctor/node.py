"""Whether ranks can be started on this machine: what `distseg doctor` measures, in a short form.

For every start of a job, so only what would end or break it, and without a process group of all
ranks: a machine that hangs must not keep the others from being looked at.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from distseg.config.schema import Config
from distseg.data.samples import open_reader
from distseg.distributed.bounded import LateError, in_time
from distseg.doctor import SHARED
from distseg.doctor.checkup import (
    CheckResult,
    device_memory,
    open_files,
    run_directory,
    write_speed,
)
from shards.errors import InputError

GPUS_VARIABLE = "SLURM_GPUS_ON_NODE"
_SIDES, _REPEATS = {"cuda": 2048, "cpu": 256}, 4  # of the matrices; products
_NUM_REDUCED = 1 << 18  # numbers of the all-reduce: 1 MiB
# little: every machine of a job writes it at the same moment
_FILE_BYTES, _TEMPORARY_BYTES = 1 << 12, 16 << 20
# torch has been imported then, and its state is of no device yet
_CONTEXT = multiprocessing.get_context("fork")
Check = Callable[[], CheckResult]


def examine_node(config: Config | None, num_ranks: int, seconds: float) -> list[CheckResult]:
    """What is wrong with this machine, in so many seconds at most; [] where nothing is.

    config: of the run that is to be started, if it is one. To be called before anything else of
    this process computes or uses a GPU.
    """
    # first, as they are forked: no thread of this process must hold a lock then
    ranks = _Ranks(num_ranks, "auto" if config is None else config.device)
    end = time.monotonic() + seconds
    checks: list[tuple[str, Check]] = [("open files", open_files)]
    checks.append(("temporary files", temporary_files))
    if config is not None:
        run_dir = Path(config.run_dir)
        checks.append(("run directory", lambda: run_directory(run_dir, _FILE_BYTES)))
        checks.append(("shards", lambda: shards(config)))
    found = [_bounded(name, check, end) for name, check in checks]
    found += ranks.results(end)
    # what is little of something shared is said by `distseg doctor`, and not by every machine
    return [r for r in found if r.level == "error" or (r.level != "ok" and r.name not in SHARED)]


def _bounded(name: str, check: Check, end: float) -> CheckResult:
    """What a check finds until then."""
    left = max(1.0, end - time.monotonic())
    try:
        # a disk that does not answer keeps whoever asks it, with no limit of its own
        return in_time(left, check)
    except LateError as error:
        return CheckResult("error", name, str(error), "look at what is mounted there")
    except Exception as error:
        text = error.got if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        return CheckResult("error", name, text, "see the message")


def temporary_files() -> CheckResult:
    """Whether there is some room for them: torchrun and torch.compile write a few."""
    folder, name = Path(tempfile.gettempdir()), "temporary files"
    _, problem = write_speed(folder, _FILE_BYTES)
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {problem or f'{free / 1e6:.0f} MB free'}"
    level = "error" if problem or free < _TEMPORARY_BYTES else "ok"
    return CheckResult(level, name, text, "remove old files there, or set TMPDIR")


def shards(config: Config) -> CheckResult:
    """Whether what a run reads first is there: of local shards a sample, of others the manifest."""
    data = config.data
    wanted = [(data.train_split, folder) for folder in data.shards]
    wanted.append((data.val_split, data.val_shards or data.shards[0]))
    for split, folder in wanted:
        reader = open_reader(data, split, folder)
        # of a bucket it would be a whole shard, which may take longer than there is time
        if "://" not in folder:
            reader.read(0)
    return CheckResult("ok", "shards", f"{len(wanted)} read")


class _Ranks:
    """A process for each rank: its device computes, and all of them come to one sum."""

    def __init__(self, num_ranks: int, device: str):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        store = f"{self._folder.name}/store"
        for rank in range(num_ranks):
            ours, theirs = _CONTEXT.Pipe()
            place = (rank, num_ranks, device, store)
            process = _CONTEXT.Process(target=_of_rank, args=(theirs, *place), daemon=True)
            process.start()
            theirs.close()  # the end of the pipe is then the end of the process
            self._ranks.append((process, ours))

    def results(self, end: float) -> list[CheckResult]:
        """What they have found until then; one that does not answer is named."""
        found = self._answers("device", end)
        is_sound = all(result.level != "error" for result in found)
        # only when all can come: they would wait for one that cannot
        if is_sound and len(self._ranks) > 1:
            for _, connection in self._ranks:
                connection.send("all have computed")
            found += self._answers("all-reduce", end)
        # not waited for: one that hangs in a driver cannot even be killed
        for process, _ in self._ranks:
            process.kill()
        self._folder.cleanup()
        return found

    def _answers(self, name: str, end: float) -> list[CheckResult]:
        found: list[CheckResult] = []
        for rank, (process, connection) in enumerate(self._ranks):
            action = "look at it with nvidia-smi -q, and at dmesg"
            # one after the other, with one end for all: who is late has had its time by then
            try:
                if connection.poll(max(0.1, end - time.monotonic())):
                    level, text = connection.recv()
                else:
                    level, text = "error", "does not answer"
            except EOFError:
                process.join(1)
                level, text = "error", f"has died (exit code {process.exitcode})"
            found.append(CheckResult(level, name, f"local rank {rank}: {text}", action))
        return found


def _of_rank(connection: Connection, rank: int, num_ranks: int, device: str, store: str) -> None:
    """The process of a local rank: two answers, (level, text), of its device and of the sum."""
    try:
        torch.set_num_threads(1)  # ranks of a machine without GPUs share its cores
        own = _device(rank, num_ranks, device)
        problem, memory = known_product(own), device_memory(own)
        if not problem and memory is not None and memory.level != "ok":
            connection.send((memory.level, memory.text))
        else:
            connection.send(_answer(problem))
        connection.recv()
        connection.send(_answer(known_sum(own, rank, num_ranks, store)))
    except EOFError:  # nobody asks any more
        return
    except Exception as error:
        # of CUDA's errors the first line says what, and the others how to debug a kernel
        connection.send(_answer(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))


def _answer(problem: str) -> tuple[str, str]:
    return ("error" if problem else "ok"), problem


def _device(rank: int, num_ranks: int, device: str) -> torch.device:
    """The device that training would take on this rank. Raises RuntimeError where it is not there,
    although the job has GPUs here.
    """
    if device == "cpu":
        return torch.device("cpu")
    there, given = torch.cuda.device_count(), int(os.environ.get(GPUS_VARIABLE) or "0")
    # a torch that knows no CUDA computes on the CPU, whatever the job was given
    if there < num_ranks and (there or (given and torch.version.cuda) or device == "cuda"):
        raise RuntimeError(f"{there} CUDA devices for {num_ranks} ranks")
    if not there:
        return torch.device("cpu")
    # before NCCL's first use, which takes the current one
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def known_product(device: torch.device) -> str:
    """What is wrong with products of matrices on this device, whose result is known; "" if nothing.

    (u v^T)(w z^T) = (v . w) u z^T, of small whole numbers: exact in fp32 and TF32, in any order.
    """
    side = _SIDES[device.type]
    number = torch.arange(side, device=device)
    u, v, w, z = ((number % p - p // 2).float() for p in (7, 5, 3, 11))
    expected = int((v.double() @ w.double()).item()) * torch.outer(u, z)
    left, right = torch.outer(u, v), torch.outer(w, z)
    # again, as a fault may come and go
    for _ in range(_REPEATS):
        num_wrong = int((torch.matmul(left, right) != expected).sum().item())
        if num_wrong:
            return f"{device} multiplies wrongly: {num_wrong} of {side * side} numbers"
    return ""


def known_sum(device: torch.device, rank: int, num_ranks: int, store: str) -> str:
    """What is wrong with an all-reduce over this machine's ranks; "" if nothing."""
    # a file, as a port might be taken
    keeper, timeout = dist.FileStore(store, num_ranks), timedelta(seconds=60)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=keeper, rank=rank, world_size=num_ranks, timeout=timeout)
    numbers = torch.full((_NUM_REDUCED,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    num_wrong = int((numbers != num_ranks * (num_ranks + 1) / 2).sum().item())
    return f"{backend} adds wrongly: {num_wrong} of {_NUM_REDUCED} numbers" if num_wrong else ""
