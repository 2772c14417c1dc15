"""The batch job that this process is in, as SLURM's commands know it, and what srun says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import IO

# EX_TEMPFAIL of sysexits.h
TEMPORARY = 75
ASK_SECONDS = 60  # how long a controller that is busy may take
# what srun would say again: nothing of it passes by itself, as a node that is busy or lost does
FATAL = re.compile(
    rb"srun: (fatal: .*|(?:unrecognized|invalid) option .*|error: Unable to create step for job "
    rb"\d+: (?:Requested node configuration|More processors requested|Memory required by task"
    rb"|Invalid (?:generic resource|feature|partition|qos)).*)",
    re.IGNORECASE,
)
# variables that are settings of SLURM's commands, not of an allocation
COMMANDS_OWN = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")


def job_id() -> str:
    """What scancel and scontrol take for this job alone: "12", or "12_3" for a task of an array.

    SLURM_JOB_ID is a number of its own for each task but the last, whose number is the array's: by
    that, all tasks are addressed.
    """
    number = os.environ["SLURM_JOB_ID"]
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if not array or not task:
        return number
    # sbatch passes its environment on: within a job that an array's task has submitted, these are
    # that task's
    command = ["squeue", "-h", "-j", f"{array}_{task}", "-o", "%A"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return f"{array}_{task}"
    if not _has_answered(done):
        return f"{array}_{task}"
    return f"{array}_{task}" if done.stdout.strip() == number else number


def _has_answered(squeue: subprocess.CompletedProcess[str]) -> bool:
    """Whether the controller has; that it knows no such job is an answer."""
    return not squeue.returncode or "nvalid job id" in squeue.stderr


def requeue() -> int:
    """Give the nodes back and put this job into the queue again.

    Returns only when SLURM refuses to.
    """
    job = job_id()
    # a preemption may have requeued it already: requeued again, the new start would be ended
    asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True)
    state = asked.stdout.strip()
    # cancelled, or SLURM requeues it already; a controller that is busy has said nothing of it
    if state not in ("RUNNING", "PREEMPTED") and _has_answered(asked):
        print(f"job {job} is {state or 'gone'}: not requeued", flush=True)
        return 128 + signal.SIGTERM
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    # which SLURM may send to scontrol too, as to all of the job
    if answer.returncode in (0, -signal.SIGTERM):
        print(f"job {job}: requeued", flush=True)
        time.sleep(600)  # SLURM ends this process
    print(
        f"job {job}: `scontrol requeue` failed: {answer.stderr.strip()}; submit it again to go on",
        flush=True,
    )
    return TEMPORARY


@contextmanager
def outside(environment: MutableMapping[str, str]) -> Iterator[None]:
    """The environment without an allocation that this process is in, for the time of a submission.

    sbatch passes everything on, and a new job would take it for its own: memory that excludes the
    job's, GPUs that it has not, the place in another array.
    """
    inherited = {
        name: value
        for name, value in environment.items()
        if "SLURM_JOB_ID" in environment and name.startswith("SLURM_") and name not in COMMANDS_OWN
    }
    for name in inherited:
        del environment[name]
    try:
        yield
    finally:
        environment.update(inherited)


class Errors(threading.Thread):
    """Passes srun's stderr on to this process's, and keeps what srun itself said was fatal."""

    def __init__(self, source: IO[bytes]):
        super().__init__(name="stderr of srun", daemon=True)
        # the file, not its number: closed with its process, that would soon be another's
        self._source = source
        self.fatal = ""
        self.start()

    def run(self) -> None:
        line = b""
        # as it comes, not by lines: a progress line has no end
        while data := os.read(self._source.fileno(), 1 << 16):
            # a full disk under the job's output: srun would wait for ever for who reads no more
            with suppress(OSError):
                os.write(2, data)
            *whole, line = (line + data).split(b"\n")
            line = line[-4096:]
            for found in filter(None, map(FATAL.match, whole)):
                self.fatal = self.fatal or found.group().decode(errors="replace")
