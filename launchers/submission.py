"""Runs handed to SLURM, or to processes here, through submitit."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from distseg.config import loading
from launchers import batch_job, slots
from launchers.check import check_run, node_counts
from launchers.job import Job
from launchers.places import RANKS_VARIABLE
from shards.errors import InputError
from shards.words import counted

EXECUTORS = ("slurm", "local", "debug")
# the command's word and the library's: both come here
HERE = "take this machine: --executor local, or from Python executor='local'"
SITE_FILE = Path("slurm/cluster.sh")
# what SLURM's commands say then
NO_CONTROLLER = re.compile("config(uration)? source|fetch.config|Unable to contact")
NO_LIMIT = 10**6  # submitit gives up after so many time limits; a run of ours has its own end


@dataclass(frozen=True)
class Resources:
    """What a job gets. executor: slurm, local (in the background, here) or debug (waits)."""

    executor: str = "slurm"
    nodes: int = 1
    min_nodes: int | None = None  # it may go on with so few; None: with all alone
    gpus_per_node: int | None = None  # None: whole nodes, with all their GPUs
    ranks_per_node: int | None = None  # None: one for each GPU, one without GPUs
    minutes: int = 240  # of one turn; the job comes back until its run is done
    signal_seconds: int = 300  # before the time limit, when it saves
    folder: str = "runs/jobs"  # of submitit's files and the jobs' output; all nodes must see it
    # further options of sbatch: {"partition": "gpu"}
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise InputError(
                f"executor {self.executor!r}",
                f"one of: {', '.join(EXECUTORS)}",
                "choose one of them",
            )
        if self.executor != "slurm" and self.nodes != 1:
            raise InputError(
                f"{self.nodes} nodes with executor {self.executor}",
                "1",
                "choose the executor slurm",
            )
        for name in ("nodes", "min_nodes", "minutes", "gpus_per_node", "ranks_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(
                    f"{name}={value}", "at least 1", f"correct {name}, or leave it out"
                )
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            got = f"min_nodes={self.min_nodes} of {counted(self.nodes, 'node')}"
            raise InputError(got, "at most nodes", "correct min_nodes, or ask for more nodes")
        if not 0 < self.signal_seconds < 60 * self.minutes:
            got = f"signal_seconds={self.signal_seconds} in {self.minutes} minutes"
            raise InputError(got, "less than the time limit", "correct signal_seconds")


def submit(*overrides: str, **resources: Any) -> submitit.Job:
    """Submit one run; returns submitit's job, whose result() is what evaluation.json holds, with
    run_dir.

    overrides: "preset=voc", "steps=500", ...; resources: the fields of Resources. Raises
    InputError, at once, for what training would refuse, and for what SLURM does.
    """
    wanted = Resources(**resources)
    (job,) = hand_in(prepare([list(overrides)], wanted), wanted)
    return job


def prepare(runs: list[list[str]], resources: Resources) -> list[Job]:
    """The jobs of runs, every one of which is checked.

    Relative paths start in the current directory.
    """
    with_srun = resources.executor == "slurm"
    if with_srun:
        if shutil.which("sbatch") is None:
            raise InputError("no sbatch here", "a login node of SLURM", f"log in to one, or {HERE}")
        _adopt_site()
    ranks_per_node = resources.ranks_per_node or resources.gpus_per_node or _ranks_here()
    jobs = []
    # all before one is submitted: half a sweep in the queue is worse than none
    for overrides in runs:
        num_nodes, least = resources.nodes, resources.min_nodes
        if least is not None:
            num_nodes = node_counts(loading.load(overrides), ranks_per_node, least, num_nodes)[0]
        config = check_run(overrides, num_nodes * ranks_per_node)
        place = (os.getcwd(), with_srun, resources.ranks_per_node, least)
        jobs.append(Job(tuple(overrides), config.run_dir, *place))
    return jobs


def hand_in(
    jobs: list[Job], resources: Resources, parallelism: int | None = None
) -> Iterator[submitit.Job]:
    """Submit jobs, of which `parallelism` run at a time: on SLURM as one array, here by slots.

    Each is yielded once it is submitted.
    """
    # "local" and "debug" by name: where there is an srun, AutoExecutor would take SLURM by itself
    executor = _executor(resources, parallelism)
    try:
        if resources.executor != "slurm":
            for job in jobs:
                yield executor.submit(job)
            return
        with batch_job.outside(os.environ):
            submitted = _one_job_or_array(executor, jobs)
        yield from submitted
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        # sbatch writes notes too, and the line with the error last
        text = [line for line in str(error).splitlines() if "rror" in line] or [str(error)]
        got = f"sbatch: {text[-1].strip()}"
        if NO_CONTROLLER.search(str(error)):
            action = f"log in to a login node of the cluster, or {HERE}"
            raise no_controller(got, action) from None
        action = "correct nodes, gpus_per_node, minutes or slurm; `sinfo` shows what there is"
        raise InputError(got, "resources that the cluster has", action) from None


def _one_job_or_array(executor: submitit.AutoExecutor, jobs: list[Job]) -> list[submitit.Job]:
    """One call of sbatch; SLURM itself holds to an array's parallelism, with nothing of ours left
    running.
    """
    if len(jobs) == 1:
        return [executor.submit(jobs[0])]
    with executor.batch():
        return [executor.submit(job) for job in jobs]


def no_controller(got: str, action: str) -> InputError:
    """The error for a command of SLURM that is installed, and finds no cluster."""
    return InputError(got, "a SLURM controller that can be reached from here", action)


def _executor(resources: Resources, parallelism: int | None) -> submitit.AutoExecutor:
    options: dict[str, Any] = {}
    if resources.executor == "slurm":
        options["slurm_max_num_timeout"] = NO_LIMIT
        # B: signals the script's own process alone
        options["slurm_python"] = f"exec {shlex.quote(sys.executable)}"
    try:
        Path(resources.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{resources.folder}: {error.strerror}"
        action = "move away what is there, or submit in another directory"
        raise InputError(got, "a folder for the jobs' output that can be written", action) from None
    executor = submitit.AutoExecutor(resources.folder, cluster=resources.executor, **options)
    executor.update_parameters(name="distseg", timeout_min=resources.minutes)
    if resources.executor == "local" and parallelism is not None:
        executor.update_parameters(local_setup=slots.setup(resources.folder, parallelism))
    if resources.gpus_per_node is not None:
        executor.update_parameters(gpus_per_node=resources.gpus_per_node)
    if resources.executor == "slurm":
        # submitit believes in one task on one node: that is its process, which starts the nodes
        extra: dict[str, Any] = {"nodes": resources.nodes, "ntasks-per-node": 1, "requeue": True}
        # USR2 is what submitit listens to; NCCL may catch USR1. Without B: only the steps are
        # signalled, and a batch script that uses no srun of its own would not hear it
        extra |= {"signal": f"B:USR2@{resources.signal_seconds}"}
        # exclusive alone gives the cores, mem=0 all of the node's memory too
        if resources.gpus_per_node is None:
            extra |= {"exclusive": True, "mem": 0}
        setup = [f"source {shlex.quote(str(SITE_FILE.absolute()))}"] if SITE_FILE.is_file() else []
        setup += ["trap '' USR1 USR2 TERM  # until the job is ready to answer them"]
        executor.update_parameters(
            slurm_additional_parameters=extra | resources.slurm,
            slurm_use_srun=False,
            slurm_setup=setup,
            slurm_stderr_to_stdout=True,
            slurm_array_parallelism=parallelism or 1,
        )
    return executor


def _ranks_here() -> int:
    text = os.environ.get(RANKS_VARIABLE, "1")
    return int(text) if text.isdecimal() else 1


def _adopt_site() -> None:
    """Take over sbatch's variables (SBATCH_PARTITION, ...) from slurm/cluster.sh, where they are
    not set here.
    """
    if not SITE_FILE.is_file():
        return
    # NUL between variables: values may have line breaks. What the file prints goes elsewhere
    script = f"source {SITE_FILE} >&2 && env -0"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    if done.returncode:
        raise InputError(
            f"{SITE_FILE}: {done.stderr.strip()}",
            "a file that bash can source",
            f"correct {SITE_FILE}",
        )
    for item in done.stdout.split("\0"):
        name, _, value = item.partition("=")
        if name.startswith("SBATCH_"):
            # set by hand for one submission counts more than the site's file
            os.environ.setdefault(name, value)
