"""Sweeps: many runs with other settings, their table, and once more those that failed."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import JobPaths

from distseg.runs.lock import holder
from distseg.tracking.wandb_run import URL_FILE
from launchers import slots, trials
from launchers.job import Job, RunError, evaluation
from launchers.submission import Resources, hand_in, no_controller, prepare
from shards.errors import InputError
from shards.files import published

FILE_NAME = "sweep.json"
METRIC = "val/mean_iou"
ERROR_LINES = 3
# how our commands, and SLURM's, begin a line about an error
ERROR = re.compile(r"(.*: )?error( on rank \d+)?: ")
TO_RESUBMIT = ("not submitted", "failed", "lost")
FAILED = ("failed", "lost", "orphaned")


@dataclass
class Row:
    """A trial as it stands: not submitted, waiting, running, stopped (it comes back), done, failed,
    lost or orphaned.

    lost: its job is gone and was not done; orphaned: its job is gone, and its run directory is
    still trained in.
    """

    trial: int
    overrides: list[str]
    state: str
    job: str
    run_dir: str
    step: int | None = None
    metric: float | None = None  # of the last step, on the validation split
    url: str = ""
    error: list[str] = field(default_factory=list)  # the last lines of what went wrong


def sweep(
    plan: dict[str, Any], directory: str | Path, parallelism: int = 4, **resources: Any
) -> list[submitit.Job]:
    """Submit every trial of a plan (see launchers.trials), of which at most `parallelism` run at a
    time; submitit's jobs.

    Trial i trains in directory/trial-00i. resources: the fields of launchers.submission.Resources.
    Raises InputError before anything is submitted, also when one of the trials cannot be trained or
    the directory holds a sweep.
    """
    directory = Path(directory).absolute()
    _check_new(directory, parallelism)
    runs = [
        [*overrides, f"run_dir={directory / f'trial-{number:03d}'}"]
        for number, overrides in enumerate(trials.expand(plan))
    ]
    # jobs may run elsewhere than here, and `resubmit` may be called from elsewhere
    wanted = Resources(**({"folder": str(directory / "jobs")} | resources))
    wanted = replace(wanted, folder=str(Path(wanted.folder).absolute()))
    jobs = prepare(runs, wanted)
    content: dict[str, Any] = {
        "cwd": os.getcwd(),
        "resources": asdict(wanted),
        "parallelism": parallelism,
    }
    content["trials"] = [{"overrides": run, "job": None} for run in runs]
    try:
        return _hand_in(directory, content, dict(enumerate(jobs)))
    except InputError:
        # refused: the directory is free for another try
        if all(entry["job"] is None for entry in content["trials"]):
            (directory / FILE_NAME).unlink(missing_ok=True)
        raise


def _check_new(directory: Path, parallelism: int) -> None:
    """Raise InputError where no sweep can begin."""
    if parallelism < 1:
        raise InputError(
            f"parallelism={parallelism}",
            "at least 1 trial at a time",
            "correct it, or leave it out",
        )
    # its trials have the same run directories: they would go on from another plan's checkpoints
    if (directory / FILE_NAME).exists():
        action = (
            f"`distseg sweep status {directory}`, `distseg sweep resubmit {directory}`, "
            "or another directory"
        )
        raise InputError(f"{directory} holds a sweep", "a directory for a new one", action)


def resubmit(directory: str | Path) -> list[submitit.Job]:
    """Submit once more the trials that failed or whose jobs are gone; each goes on from its last
    checkpoint.

    In the directory that the sweep was submitted in. Raises InputError, before anything is
    submitted, when one of them is still training without its job.
    """
    directory = Path(directory).absolute()
    content = _read(directory)
    rows = status(directory)
    # two processes in one run directory would write over each other's checkpoints
    orphaned = [row for row in rows if row.state == "orphaned"]
    if orphaned:
        got = "; ".join(f"trial {row.trial}: {' '.join(row.error)}" for row in orphaned)
        action = (
            "wait until that process has ended, or tell it to save and leave with SIGTERM; "
            "then resubmit"
        )
        raise InputError(got, "one job per run directory", action)
    again = {row.trial: row.overrides for row in rows if row.state in TO_RESUBMIT}
    if not again:
        return []
    # as when it was submitted: data.shards and own code may be relative paths
    with _inside(content.get("cwd", os.getcwd())):
        jobs = prepare(list(again.values()), Resources(**content["resources"]))
        return _hand_in(directory, content, dict(zip(again, jobs, strict=True)))


def status(directory: str | Path) -> list[Row]:
    """How every trial stands, also while they run."""
    content = _read(Path(directory))
    folder, executor = content["resources"]["folder"], content["resources"]["executor"]
    states = _states(
        [entry["job"] for entry in content["trials"] if entry["job"]], folder, executor
    )
    rows = []
    for number, entry in enumerate(content["trials"]):
        # the last override, since `sweep` adds it last
        run_dir = Path(entry["overrides"][-1].removeprefix("run_dir="))
        url = run_dir / URL_FILE
        state = states.get(entry["job"], "not submitted")
        row = Row(number, entry["overrides"], state, entry["job"] or "", str(run_dir))
        row.url = url.read_text().strip() if url.is_file() else ""
        row.step, row.metric = _progress(run_dir)
        # running trials are not asked for their lock: its test takes it for a moment
        if row.state in TO_RESUBMIT:
            row.error = _error(JobPaths(folder, row.job)) if row.job else []
            trainer = holder(run_dir)
            if trainer:
                row.state, row.error = "orphaned", [f"still training without its job ({trainer})"]
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """The rows for people, best metric first and those that failed last; below, what went wrong.

    Plain text, not rich's table: it must not be cut at the width of a terminal, and is grepped.
    """
    best_first = sorted(rows, key=_order)
    common = _common_overrides(rows)
    lines = [["trial", "state", "job", "step", METRIC, "settings", "run"]]
    lines += [_cells(row, common) for row in best_first]
    text = _aligned(lines)
    for row in rows:
        if row.error:
            text.append(f"trial {row.trial} {row.state}:")
            text += [f"  {line}" for line in row.error]
    return "\n".join(text)


def _order(row: Row) -> tuple[bool, bool, float, int]:
    """What has failed has no place among the others, however good it was until then."""
    has_no_metric = row.metric is None or math.isnan(row.metric)
    return row.state in FAILED, has_no_metric, -(row.metric or 0.0), row.trial


def _common_overrides(rows: list[Row]) -> set[str]:
    """What all trials were given, which tells none from another; of a single trial nothing."""
    if len(rows) < 2:
        return set()
    common = set(rows[0].overrides)
    for row in rows[1:]:
        common &= set(row.overrides)
    return common


def _cells(row: Row, common: set[str]) -> list[str]:
    step = "" if row.step is None else str(row.step)
    metric = "" if row.metric is None else f"{row.metric:.4f}"
    # the last override is run_dir, which has a column of its own
    settings = " ".join(item for item in row.overrides[:-1] if item not in common)
    return [str(row.trial), row.state, row.job, step, metric, settings, row.url or row.run_dir]


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(cells).rstrip())
    return text


def _hand_in(directory: Path, content: dict[str, Any], jobs: dict[int, Job]) -> list[submitit.Job]:
    """Submit jobs of trials; the sweep's file knows each as soon as it is submitted.

    So whoever is interrupted in between can resubmit the rest, and no job is unknown to the sweep.
    """
    # before the first job: a kill in between leaves trials "not submitted", never jobs that no
    # sweep knows
    _write(directory, content)
    submission = hand_in(
        list(jobs.values()), Resources(**content["resources"]), content["parallelism"]
    )
    submitted = []
    for number, job in zip(jobs, submission, strict=True):
        content["trials"][number]["job"] = job.job_id
        _write(directory, content)
        submitted.append(job)
    return submitted


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    try:
        os.chdir(folder)
    except OSError as error:
        got = f"{folder}, where the sweep was submitted: {error.strerror}"
        raise InputError(
            got, "that directory: paths in the plan start there", "put it back"
        ) from None
    try:
        yield
    finally:
        os.chdir(before)


def _progress(run_dir: Path) -> tuple[int | None, float | None]:
    """The last known step, and the metric of the finished or else of the last evaluation."""
    scores = evaluation(run_dir)
    if METRIC in scores:
        return scores.get("step"), scores[METRIC]
    path, step, metric = run_dir / "metrics.jsonl", None, None
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):  # being written, or torn by a kill
            continue
        step, metric = row.get("step", step), row.get(METRIC, metric)
    return step, metric if isinstance(metric, float) else None


def _error(paths: JobPaths) -> list[str]:
    """How a job ended: the end of its exception; of a failed or lost run what its ranks said."""
    end = ["its process ended without a result"]
    if paths.result_pickle.is_file():
        # of our own job; a traceback as text
        text = pickle.loads(paths.result_pickle.read_bytes())[1].strip()
        _, ours, reason = text.rpartition(f"{RunError.__module__}.{RunError.__name__}: ")
        if not ours:
            return text.splitlines()[-ERROR_LINES:]
        end = reason.splitlines()
    for path in (paths.stderr, paths.stdout):
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        starts = [number for number, line in enumerate(lines) if ERROR.match(line)]
        if starts:
            return end + lines[starts[-1] : starts[-1] + ERROR_LINES]
    return end


def _states(jobs: list[str], folder: str, executor: str) -> dict[str, str]:
    """The state of each job, by what it returned and, before that, by what SLURM or the process
    table says.
    """
    words = {
        "PENDING": "waiting",
        "RUNNING": "running",
        "COMPLETING": "running",
        "CONFIGURING": "waiting",
    }
    words |= {"REQUEUED": "stopped", "PREEMPTED": "stopped", "SUSPENDED": "stopped"}
    # one squeue for all jobs: one each would load the controller, and be refused at some sites
    queue = _queue() if executor == "slurm" else {}
    # FAILED, TIMEOUT, ...: squeue shows them for some minutes more
    alive = {job: words.get(state, "lost") for job, state in queue.items()}
    found = {}
    for job in jobs:
        result = JobPaths(folder, job).result_pickle
        if result.is_file():  # written at the very end, when SLURM may call the job running still
            found[job] = "done" if pickle.loads(result.read_bytes())[0] == "success" else "failed"
        elif executor == "slurm":
            found[job] = alive.get(job, "lost")
        else:
            found[job] = _state_here(job)
    return found


def _state_here(pid: str) -> str:
    """The state of a local job, by the command line of the process that it is known by.

    A zombie, or another process with its number, has not that of a job.
    """
    try:
        # process ids are used again: a kill -0 would take any process of that number for the job
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "lost"
    if slots.is_waiting(words):
        return "waiting"
    return "running" if b"submitit.local._local" in words else "lost"


def _queue() -> dict[str, str]:
    """{job: state} of all jobs that SLURM still knows of, an array's one by one."""
    action = "look at the sweep where its jobs were submitted"
    try:
        # -r: an array's waiting tasks are else one line, 12_[3-7], in which no job is found
        done = subprocess.run(
            ["squeue", "-h", "-r", "-o", "%i|%T"], capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError:
        raise InputError("no squeue here", "a login node of SLURM", action) from None
    except subprocess.TimeoutExpired:
        raise no_controller("squeue: no answer", action) from None
    if done.returncode:
        raise no_controller(f"squeue: {done.stderr.strip()}", action)
    return dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)


def _read(directory: Path) -> dict[str, Any]:
    path = directory / FILE_NAME
    if not path.is_file():
        raise InputError(
            f"no {path}", "the directory of a sweep", "name what `distseg sweep` was given"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _write(directory: Path, content: dict[str, Any]) -> None:
    with published(directory / FILE_NAME) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
