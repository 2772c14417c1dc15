"""The batch job that this process is in, as SLURM's commands know it, and what srun says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

# EX_TEMPFAIL of sysexits.h
TEMPORARY = 75
TERMINATION_SECONDS = 10.0  # beyond KillWait, for whatever ends slowly
EXCLUDE_TRIES = 20  # a second apart; SLURM ends this process sooner, after KillWait
ASK_SECONDS = 60  # how long a controller that is busy may take
# what srun would say again: nothing of it passes by itself, as a node that is busy or lost does
FATAL = re.compile(
    rb"srun: (fatal: .*|(?:unrecognized|invalid) option .*|error: Unable to create step for job "
    rb"\d+: (?:Requested node configuration|More processors requested|Memory required by task"
    rb"|Invalid (?:generic resource|feature|partition|qos)).*)",
    re.IGNORECASE,
)
# a task that has ended badly, and a node on which none could be started
TASK_ENDED = re.compile(rb"srun: error: [^\s:]+: tasks? [^:]+: ")
NOT_LAUNCHED = re.compile(rb"srun: error: Task launch for \S+ failed on node ([^\s:]+): (.*)")
KILL_WAIT = re.compile(r"KillWait\s*=\s*(\d+)")
KILL_WAIT_SECONDS = 30.0  # SLURM's default
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


def node_names() -> list[str]:
    """The nodes that this job has by now; [] where SLURM does not say."""
    # a job may have lost or given back some of those that its environment names
    nodes = _output("squeue", "-h", "-j", job_id(), "-o", "%N").strip()
    nodes = nodes or os.environ.get("SLURM_JOB_NODELIST", "")
    return _output("scontrol", "show", "hostnames", nodes).split() if nodes else []


def give_back_all_but(nodes: Sequence[str]) -> None:
    """Leave the job only these of its nodes: what then happens to the others does not end it."""
    update = ["scontrol", "update", f"JobId={job_id()}", f"NodeList={','.join(nodes)}"]
    # it leaves scripts, with which a shell would correct its variables, in the current directory
    with tempfile.TemporaryDirectory() as folder, suppress(OSError):
        answer = subprocess.run(update, cwd=folder, capture_output=True, text=True)
        if answer.returncode:
            said = answer.stderr.strip()
            print(f"the job keeps all of its nodes, and SLURM may end it for one: {said}")


def termination_seconds() -> float:
    """How long tasks can live on that SLURM has begun to end."""
    found = KILL_WAIT.search(_output("scontrol", "show", "config"))
    return (float(found.group(1)) if found else KILL_WAIT_SECONDS) + TERMINATION_SECONDS


def end_step(srun: subprocess.Popen, seconds: float) -> None:
    """End a step, after so many seconds without SLURM's word that its tasks have ended: of a node
    that is gone it has none until it has noticed.
    """
    srun.terminate()  # which it takes for the end of its tasks
    try:
        srun.wait(seconds)
    except subprocess.TimeoutExpired:
        srun.kill()
        srun.wait()


def _output(*command: str) -> str:
    """What a command of SLURM prints; "" where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def requeue(without: Sequence[str] = ()) -> int:
    """Give the nodes back and put this job into the queue again, to start on other nodes than
    `without`.

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
        if without:
            _exclude(job, without)
        time.sleep(600)  # SLURM ends this process
    print(
        f"job {job}: `scontrol requeue` failed: {answer.stderr.strip()}; submit it again to go on",
        flush=True,
    )
    return TEMPORARY


def _exclude(job: str, nodes: Sequence[str]) -> None:
    """Tell SLURM not to start a job, which has just been requeued, on these nodes."""
    # SLURM has begun to end this job: what is ignored here, scontrol ignores as well
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job_now = _output("scontrol", "show", "job", job)
    before = re.findall(r"ExcNodeList=(\S+)", job_now)
    excluded = ",".join([*(name for name in before[:1] if name != "(null)"), *nodes])
    # with nodes of its own choice it could never start again
    if "ReqNodeList=(null)" in job_now:
        for _ in range(EXCLUDE_TRIES):
            update = ["scontrol", "update", f"JobId={job}", f"ExcNodeList={excluded}"]
            answer = subprocess.run(update, capture_output=True, text=True)
            if not answer.returncode:
                print(f"job {job}: comes back without {', '.join(nodes)}", flush=True)
                return
            time.sleep(1)  # not before it is pending
    print(f"submit it with --exclude={excluded} to keep it away from there", flush=True)


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
    """Passes srun's stderr on to this process's, and keeps what srun itself said.

    fatal: what was; not_launched: {node: why no task could be started there}; ended_at: by
    time.monotonic, when it said first that a task had ended badly.
    """

    def __init__(self, source: IO[bytes]):
        super().__init__(name="stderr of srun", daemon=True)
        # the file, not its number: closed with its process, that would soon be another's
        self._source = source
        self.fatal = ""
        self.not_launched: dict[str, str] = {}
        self.ended_at: float | None = None
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
            for one in whole:
                self._hear(one)

    def _hear(self, line: bytes) -> None:
        if (found := FATAL.match(line)) is not None:
            self.fatal = self.fatal or found.group().decode(errors="replace")
        elif (found := NOT_LAUNCHED.match(line)) is not None:
            node, why = (word.decode(errors="replace") for word in found.groups())
            self.not_launched[node] = why
        # the first: from then on srun ends the others
        elif self.ended_at is None and TASK_ENDED.match(line):
            self.ended_at = time.monotonic()
