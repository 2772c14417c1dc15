"""What one process measures of the machine that it is on; each check takes at most a second or
two.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distseg.config.schema import DataConfig
from distseg.data.samples import SampleSet, open_reader
from distseg.distributed.ranks import Ranks
from distseg.runs.version import package_version
from distseg.tracking.wandb_run import choose_mode
from shards.errors import InputError
from shards.sample import decode_image
from shards.words import counted

SHARED_MEMORY = Path("/dev/shm")
# the reader keeps 128 shards open, and every rank a few connections
_MIN_FILES, _FEW_FILES = 256, 1024
# NCCL's buffers between the GPUs of a machine; Docker's default is no more
_MIN_SHARED_BYTES = 64 << 20
# the smallest and a usual run's checkpoints
_MIN_FREE_BYTES, _LITTLE_FREE_BYTES = 100 << 20, 5 << 30
_FILE_BYTES = 32 << 20
_SECONDS = 1.0  # that a measurement of speed takes, about
_MATRIX, _REPEATS = 768, 7


# hashable: what several ranks find alike is one key (`command.of_ranks`)
@dataclass(frozen=True)
class CheckResult:
    """level: ok, warning (a run may suffer) or error (it would break).

    Action: what to do, for the latter two.
    """

    level: str
    name: str
    text: str
    action: str = ""


@dataclass
class Checkup:
    """One rank's results, and values that the ranks compare."""

    rank: int
    host: str
    results: list[CheckResult] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)  # none is wrong by itself

    def add(self, check: Callable[[], CheckResult | None]) -> None:
        """Keep what a check finds.

        One that fails itself is an error, and the other ranks do not wait for this one.
        """
        try:
            found = check()
        # whatever it is: a rank that is missing at the next exchange would hang the others
        except Exception as error:
            name = check.__name__.replace("_", " ").strip()
            found = CheckResult(
                "error", name, f"{type(error).__name__}: {error}", "see the message"
            )
        if found is not None:
            self.results.append(found)


def versions(device: torch.device) -> dict[str, str]:
    """What must be the same on all ranks."""
    found = {
        "python": platform.python_version(),
        "distseg": package_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        # ranks that differ in these can fail, or wait for ever, in their first collective
        found |= {
            "cuda": str(torch.version.cuda),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def device_name(device: torch.device) -> str:
    """The GPU, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # platform.processor() is empty or just "x86_64" on Linux
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_memory(device: torch.device) -> CheckResult | None:
    """Whether somebody else has the GPU's memory."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    text = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    # a fifth is more than the contexts of our own ranks take
    if free < 0.8 * total:
        return CheckResult(
            "warning", "device memory", text, "look for other processes with nvidia-smi"
        )
    return CheckResult("ok", "device memory", text)


def cores(ranks_here: int) -> CheckResult:
    """Whether every rank of this machine has a core, and no more threads than cores are wanted."""
    there = (
        # this job's share, which may be fewer than the machine has
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = torch.get_num_threads()
    text = f"{there} for {counted(ranks_here, 'rank')} of {counted(threads, 'thread')}"
    if there < ranks_here:
        action = "ask for more cores (srun --cpus-per-task), or start fewer ranks"
        return CheckResult("warning", "cores", text, action)
    # threads that take turns on a core: often slower than fewer of them
    if ranks_here * threads > there:
        return CheckResult("warning", "cores", text, f"set OMP_NUM_THREADS={there // ranks_here}")
    return CheckResult("ok", "cores", text)


def open_files() -> CheckResult:
    """How many files a process may open."""
    # the soft limit counts; its user may raise it up to the other
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return CheckResult("ok", "open files", "no limit")
    level = "error" if limit < _MIN_FILES else "warning" if limit < _FEW_FILES else "ok"
    known = "" if most == resource.RLIM_INFINITY else f" (up to {most} allowed)"
    return CheckResult(
        level, "open files", f"{limit} a process", f"write ulimit -n 4096 before the command{known}"
    )


def shared_memory(is_needed: bool) -> CheckResult:
    """Room in /dev/shm; is_needed.

    Several GPUs of this machine are used, between which NCCL passes data there.
    """
    if not SHARED_MEMORY.is_dir():
        return CheckResult(
            "error" if is_needed else "ok", "shared memory", f"no {SHARED_MEMORY}", "mount it"
        )
    usage = shutil.disk_usage(SHARED_MEMORY)
    text = f"{usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB free"
    if usage.free >= _MIN_SHARED_BYTES:
        return CheckResult("ok", "shared memory", text)
    action = "start the container with --shm-size=1g (or --ipc=host), or remove old files there"
    return CheckResult("error" if is_needed else "warning", "shared memory", text, action)


def run_directory(path: Path, num_bytes: int = _FILE_BYTES) -> CheckResult:
    """Whether a run can be written there, how fast, and how much fits.

    num_bytes: that are written to see, at most.
    """
    # what will hold the run: the directory itself is made by training
    parent = nearest(path)
    speed, problem = write_speed(parent, num_bytes)
    if problem:
        action = "choose another with --run-dir, and run_dir=DIR in training"
        return CheckResult(
            "error", "run directory", f"{parent} cannot be written: {problem}", action
        )
    free = shutil.disk_usage(parent).free
    text = f"{path}: {speed / 1e6:.0f} MB/s written, {free / 1e9:.1f} GB free"
    if free < _MIN_FREE_BYTES:
        return CheckResult("error", "run directory", text, "free some space, or choose another")
    if free < _LITTLE_FREE_BYTES:
        return CheckResult("warning", "run directory", text, "a run with checkpoints may take more")
    return CheckResult("ok", "run directory", text)


def write_speed(folder: Path, num_bytes: int) -> tuple[float, str]:
    """(bytes a second, what went wrong) of a file of at most so many bytes, which is removed."""
    start, written, problem = time.perf_counter(), 0, ""
    # named by machine and process, as the first ranks of all machines write at the same time
    probe = folder / f".distseg-doctor-{socket.gethostname()}-{os.getpid()}"
    # random: a file system that compresses would take zeros at no cost
    content = os.urandom(min(num_bytes, 1 << 20))
    try:
        with probe.open("wb") as file:
            # by time as well: a slow file system must not make the check slow
            while written < num_bytes and time.perf_counter() - start < _SECONDS:
                written += file.write(content)
            file.flush()
            # within the time: without it the memory's speed would be measured
            os.fsync(file.fileno())
    except OSError as error:
        problem = error.strerror or str(error)
    # also where the disk was full: what filled it must not stay
    finally:
        with suppress(OSError):
            probe.unlink()
    return written / (time.perf_counter() - start), problem


def nearest(path: Path) -> Path:
    """The path itself, or what is there of it: a folder, or a file that is in the way."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def shards(location: str, split: str) -> CheckResult:
    """How fast samples are read and decoded by one thread. Shards that are not there are an
    error.
    """
    try:
        samples = SampleSet(open_reader(DataConfig(shards=[location]), split), labelled=False)
        raw, num_bytes, start = [], 0, time.perf_counter()
        step = max(1, len(samples) // 64)  # of all shards, and not of one that is in memory already
        for index in range(0, len(samples), step):
            raw.append(samples.reader.read(index))
            num_bytes += len(raw[-1].image) + len(raw[-1].label or b"")
            if time.perf_counter() - start > _SECONDS:
                break
        seconds = time.perf_counter() - start
        # from memory and again and again: here the disk's speed is left out
        decoded, start = 0, time.perf_counter()
        while time.perf_counter() - start < _SECONDS / 2:
            one = raw[decoded % len(raw)]
            decode_image(one.image)
            if one.label is not None:
                samples.reader.manifest.decode_label(one.label)
            decoded += 1
        rate = decoded / (time.perf_counter() - start)
    except InputError as error:
        return CheckResult("error", "shards", error.got, error.action)
    return CheckResult(
        "ok",
        "shards",
        f"{counted(len(samples), 'sample')} in {split}; {len(raw) / seconds:.0f} read a second "
        f"({num_bytes / seconds / 1e6:.0f} "
        f"MB/s, may be cached), {rate:.0f} decoded a second by a thread",
    )


def tracking() -> CheckResult:
    """Whether W&B answers where a run would ask it; nothing breaks when it does not."""
    # by the function that a run asks, so that both come to the same
    mode = choose_mode("auto")
    if mode != "online":
        how = (
            "no login"
            if "WANDB_MODE" not in os.environ
            else f"WANDB_MODE={os.environ['WANDB_MODE']}"
        )
        return CheckResult(
            "ok",
            "W&B",
            f"{mode} ({how})" + ("; send runs later by wandb sync" if mode == "offline" else ""),
        )
    # a company's own server is asked in its place
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=3 * _SECONDS
        ).close()
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        action = "set WANDB_MODE=offline and send the runs later by wandb sync; or see HTTPS_PROXY"
        return CheckResult("warning", "W&B", f"{url} does not answer: {reason}", action)
    return CheckResult("ok", "W&B", f"{url} answers")


def compute_seconds(device: torch.device) -> float:
    """The least time of a fixed piece of work: products of matrices on the device."""
    # larger on a GPU, where a small product is over before its launch
    side = _MATRIX * (8 if device.type == "cuda" else 1)
    matrix = torch.ones(side, side, device=device)
    least = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            # or the time of the launch alone would be taken
            torch.cuda.synchronize(device)
        # the least of several: the first warms up, and other work can only add time
        least = min(least, time.perf_counter() - start)
    return least


def check_rank(
    ranks: Ranks, ranks_here: int, run_dir: Path, location: str | None, split: str
) -> Checkup:
    """All that this rank can find by itself; what belongs to the machine is left to its first
    rank.
    """
    found = Checkup(ranks.rank, socket.gethostname())
    found.values = {"versions": versions(ranks.device), "device": device_name(ranks.device)}
    found.values["kind"] = ranks.device.type
    found.add(lambda: device_memory(ranks.device))
    found.add(open_files)
    # once a machine: side by side they would measure each other
    if ranks.local_rank == 0:
        found.add(lambda: cores(ranks_here))
        found.add(lambda: shared_memory(ranks.device.type == "cuda" and ranks_here > 1))
        found.add(lambda: run_directory(run_dir))
        if location is not None:
            found.add(lambda: shards(location, split))
    # as in a run, where the main rank alone talks to W&B
    if ranks.is_main:
        found.add(tracking)
    return found
