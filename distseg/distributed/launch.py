"""Which process of a job this is, from what its launcher left in the environment.

Imports nothing heavy.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shards.errors import InputError

# the step's number of tasks: SLURM_NTASKS is the job's, and a batch script has it too
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
SHELLS = (b"sh", b"bash", b"dash", b"ksh", b"zsh", b"fish", b"csh", b"tcsh")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_log = logging.getLogger(__name__)


def resolve_ranks(environment: dict[str, str]) -> tuple[int, int, int]:
    """(rank, world_size, local_rank): torchrun's variables, else those of a step of srun, else (0,
    1, 0), as for what is typed in a shell that `srun --pty` has started with several tasks.

    Raises InputError when only some are set or they contradict each other: half a job would hang.
    """
    # torchrun first: inside a job of SLURM its ranks see the variables of both
    launched = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
    if launched:
        return _ranks_of_torchrun(environment, launched)
    # a batch script has SLURM's variables too, but no step: what it starts by itself is one process
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        missing = [name for name in SRUN_VARIABLES if name not in environment]
        if missing:
            action = "start with srun or torchrun, or unset SLURM_STEP_ID for a single process"
            raise InputError(
                f"SLURM_STEP_ID set but not {', '.join(missing)}", "all of srun's variables", action
            )
        values = _whole_numbers(
            environment, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), "srun"
        )
        if not _typed_in_a_shell(environment):
            return values[0], values[1], values[2]
        _say_that_it_is_alone(values[1])
    return 0, 1, 0


def _typed_in_a_shell(environment: dict[str, str]) -> bool:
    """Whether the step's task is a shell that a person types in: the other tasks had no terminal,
    and have ended.
    """
    # a program or a script that srun --pty has started itself runs in every task
    if "SLURM_PTY_PORT" not in environment:
        return False
    try:
        line = Path(f"/proc/{environment.get('SLURM_TASK_PID', '')}/cmdline").read_bytes()
    except OSError:  # of another process namespace, as in a container
        return False
    command, *words = line.split(b"\0")[:-1] or [b""]
    if command.rpartition(b"/")[2].lstrip(b"-") not in SHELLS:
        return False
    if b"-i" in words:
        return True
    # a script's name, or -c and -lc with the commands behind it
    return not any(re.match(rb"[^-]|-[a-z]*c", word) for word in words)


@functools.cache  # asked more than once, said once
def _say_that_it_is_alone(num_tasks: int) -> None:
    _log.warning(
        "srun --pty with %d tasks, of which only this one has a terminal: taking one process; "
        "torchrun --standalone --nproc_per_node=N -m distseg.train ... takes N here",
        num_tasks,
    )


def _ranks_of_torchrun(
    environment: dict[str, str], launched: Sequence[str]
) -> tuple[int, int, int]:
    missing = [name for name in TORCHRUN_VARIABLES if name not in environment]
    if missing:
        there = ", ".join(launched)
        raise InputError(
            f"{there} set but not {', '.join(missing)}",
            "all of torchrun's variables",
            f"start with `torchrun --nproc_per_node=N -m distseg.train ...`, or unset {there}",
        )
    rank, world_size, local_rank = _whole_numbers(environment, TORCHRUN_VARIABLES[:3], "torchrun")
    port = environment["MASTER_PORT"]
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"MASTER_PORT={port}", "a port from 0 to 65535", "start with torchrun")
    return rank, world_size, local_rank


def _whole_numbers(
    environment: dict[str, str], names: tuple[str, ...], launcher: str
) -> tuple[int, ...]:
    """The values of rank, world size and local rank, found to be numbers that agree."""
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names)
    except ValueError:
        got = ", ".join(f"{name}={environment[name]!r}" for name in names)
        raise InputError(got, "whole numbers", f"start with {launcher}") from None
    # the others would wait for a rank that can never come
    if not 0 <= rank < world_size:
        got = f"{names[0]}={rank} with {names[1]}={world_size}"
        raise InputError(got, f"0 <= {names[0]} < {names[1]}", f"start with {launcher}")
    return rank, world_size, local_rank


def rendezvous_of_srun(environment: dict[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for a step of srun: its first host, and a port that follows from
    the job.

    Values that are set already stay.
    """
    # a step may run on some of the job's machines only
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "localhost")
    found = {"MASTER_ADDR": first_host(nodes), "MASTER_PORT": str(port_of_job(environment))}
    # a user's own choice may be the one port that a firewall lets through
    return {name: environment.get(name, value) for name, value in found.items()}


def is_store_of_torchrun(environment: dict[str, str]) -> bool:
    """Whether torchrun's agent keeps the job's key-value store; else rank 0 does."""
    # torchrun's word to its ranks not to open one at that address themselves
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_keeper(environment: dict[str, str]) -> str:
    """Whose process keeps the job's key-value store, and where, for people."""
    who = "torchrun" if is_store_of_torchrun(environment) else "rank 0"
    return f"{who} on {environment.get('MASTER_ADDR', 'this machine')}"


def end_stopped_torchrun() -> None:
    """Kill the torchrun that has started this process where it is stopped (SIGSTOP), and those of
    its ranks that are too: for a rank that leaves because of it.
    """
    parent = os.getppid()
    if not is_store_of_torchrun(dict(os.environ)) or not _is_stopped(parent):
        return
    # It would never see that its ranks have left, and whoever waits for it would wait without an
    # end; nor end the other ranks, which keep their GPUs and the run's lock.
    with suppress(OSError):
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for pid in [*map(int, children), parent]:
            if _is_stopped(pid):
                os.kill(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"  # behind its name


def port_of_job(environment: dict[str, str], attempt: int = 0) -> int:
    """A port that other jobs of the host, and other starts of this one, are unlikely to choose.

    From 20000 to 29999: below the ephemeral ports, which any connection may hold. attempt: within
    this start, from 0.
    """
    # computed, not drawn: every rank must come to it alone, before it can talk to any other
    job = int(environment.get("SLURM_JOB_ID") or "0")
    restart = int(environment.get("SLURM_RESTART_COUNT") or "0")
    # jobs that follow each other are 61 apart: room for seven restarts of eight tries each
    return 20000 + (61 * job + 8 * restart + attempt) % 10000


def first_host(nodes: str) -> str:
    """The first name of SLURM's host list: "gpu[003-007,12],login1" gives "gpu003"."""
    # without `scontrol show hostnames`, which a container need not have
    # the name up to the bracket, then the bracket's first number as text: its zeros belong to it
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if first is None:
        raise InputError(
            f"a host list of {nodes!r}",
            "for example node1 or node[1-4]",
            "set MASTER_ADDR and MASTER_PORT",
        )
    return first.group(1) + (first.group(2) or "")
