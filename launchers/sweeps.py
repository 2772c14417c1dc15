"""Sweeps: many runs with other settings, their table, and once more those that failed."""

from __future__ import annotations

import json
import pickle
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import JobPaths

from distseg import attempts
from distseg.wandb_run import URL_FILE
from launchers import trials
from launchers.job import evaluation
from launchers.submission import Resources, submit_all
from shards.errors import InputError
from shards.files import published

FILE_NAME = "sweep.json"
METRIC = "val/mean_iou"
ERROR_LINES = 3
FAILED = ("failed", "lost")


@dataclass
class Row:
    """A trial as it stands: waiting, running, stopped (it comes back), done, failed, or lost (no job, not done)."""

    trial: int
    overrides: list[str]
    state: str
    job: str
    run_dir: str
    step: int | None = None
    metric: float | None = None  # of the last step, on the validation split
    url: str = ""
    error: list[str] = field(default_factory=list)  # the last lines of what went wrong


def sweep(plan: dict[str, Any], directory: str | Path, parallelism: int = 4, **resources: Any) -> list[submitit.Job]:
    """Submit every trial of a plan (see launchers.trials), at most `parallelism` at a time on SLURM; submitit's jobs.

    Trial i trains in directory/trial-00i. resources: the fields of launchers.submission.Resources. Raises InputError
    before anything is submitted, also when one of the trials cannot be trained or the directory holds a sweep.
    """
    directory = Path(directory)
    if (directory / FILE_NAME).exists():
        action = f"`distseg sweep status {directory}`, `distseg sweep resubmit {directory}`, or another directory"
        raise InputError(f"{directory} holds a sweep", "a directory for a new one", action)
    runs = [
        [*overrides, f"run_dir={directory / f'trial-{number:03d}'}"]
        for number, overrides in enumerate(trials.expand(plan))
    ]
    wanted = Resources(**({"folder": str(directory / "jobs")} | resources))
    jobs = submit_all(runs, wanted, parallelism)
    content = {"resources": asdict(wanted), "parallelism": parallelism}
    entries = [{"overrides": run, "job": job.job_id} for run, job in zip(runs, jobs, strict=True)]
    _write(directory, content | {"trials": entries})
    return jobs


def resubmit(directory: str | Path) -> list[submitit.Job]:
    """Submit once more the trials that failed or whose jobs are gone; each goes on from its last checkpoint."""
    directory = Path(directory)
    content = _read(directory)
    again = [row for row in status(directory) if row.state in FAILED]
    if not again:
        return []
    runs = [row.overrides for row in again]
    jobs = submit_all(runs, Resources(**content["resources"]), content["parallelism"])
    for row, job in zip(again, jobs, strict=True):
        content["trials"][row.trial]["job"] = job.job_id
    _write(directory, content)
    return jobs


def status(directory: str | Path) -> list[Row]:
    """How every trial stands, also while they run."""
    content = _read(Path(directory))
    folder, executor = content["resources"]["folder"], content["resources"]["executor"]
    states = _states([entry["job"] for entry in content["trials"]], folder, executor)
    rows = []
    for number, entry in enumerate(content["trials"]):
        run_dir = Path(entry["overrides"][-1].removeprefix("run_dir="))
        url = run_dir / URL_FILE
        row = Row(number, entry["overrides"], states[entry["job"]], entry["job"], str(run_dir))
        row.url = url.read_text().strip() if url.is_file() else ""
        row.step, row.metric = _progress(run_dir)
        if row.state in FAILED:
            row.error = _error(JobPaths(folder, entry["job"]), run_dir)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """The rows for people, best metric first; below, what went wrong in those that failed."""
    common = set.intersection(*(set(row.overrides) for row in rows)) if len(rows) > 1 else set()
    best_first = sorted(rows, key=lambda row: (row.metric is None, -(row.metric or 0), row.trial))
    lines = [("trial", "state", "job", "step", METRIC, "settings", "run")]
    for row in best_first:
        settings = " ".join(item for item in row.overrides[:-1] if item not in common)
        numbers = "" if row.step is None else str(row.step), "" if row.metric is None else f"{row.metric:.4f}"
        lines.append((str(row.trial), row.state, row.job, *numbers, settings, row.url or row.run_dir))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for row in rows:
        if row.error:
            text += [f"trial {row.trial} {row.state}:", *(f"  {line}" for line in row.error)]
    return "\n".join(text)


def _progress(run_dir: Path) -> tuple[int | None, float | None]:
    """The last step that is known, and the metric of the finished or else of the last evaluation."""
    scores = evaluation(run_dir)
    if scores:
        return scores["step"], scores[METRIC]
    path, step, metric = run_dir / "metrics.jsonl", None, None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # being written
            continue
        step, metric = row["step"], row.get(METRIC, metric)
    return step, metric if isinstance(metric, float) else None


def _error(paths: JobPaths, run_dir: Path) -> list[str]:
    """The last lines of a job's exception, or of its output, or what the run itself noted."""
    if paths.result_pickle.is_file():
        kind, text = pickle.loads(paths.result_pickle.read_bytes())  # of our own job; a traceback as text
        if kind == "error":
            return text.strip().splitlines()[-ERROR_LINES:]
    for path in (paths.stderr, paths.stdout):
        lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
        if lines:
            return lines[-ERROR_LINES:]
    noted = attempts.read(run_dir)
    return [noted[-1].reason] if noted else ["no output: was the job cancelled before it began?"]


def _states(jobs: list[str], folder: str, executor: str) -> dict[str, str]:
    """The state of each job, by what it returned and, before that, by what SLURM or the process table says."""
    words = {"PENDING": "waiting", "RUNNING": "running", "COMPLETING": "running", "CONFIGURING": "waiting"}
    words |= {"REQUEUED": "stopped", "PREEMPTED": "stopped", "SUSPENDED": "stopped"}
    alive = {job: words.get(state, "lost") for job, state in (_queue() if executor == "slurm" else {}).items()}
    found = {}
    for job in jobs:
        result = JobPaths(folder, job).result_pickle
        if result.is_file():  # written at the very end, when SLURM may call the job running still
            found[job] = "done" if pickle.loads(result.read_bytes())[0] == "success" else "failed"
        elif job in alive and alive[job] != "lost":
            found[job] = alive[job]
        else:
            found[job] = "running" if executor != "slurm" and Path(f"/proc/{job}").exists() else "lost"
    return found


def _queue() -> dict[str, str]:
    """{job: state} of all jobs that SLURM still knows of, an array's one by one."""
    try:
        done = subprocess.run(["squeue", "-h", "-r", "-o", "%i|%T"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        action = "look at the sweep where its jobs were submitted"
        raise InputError("no squeue here", "a login node of SLURM", action) from None
    return dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)


def _read(directory: Path) -> dict[str, Any]:
    path = directory / FILE_NAME
    if not path.is_file():
        raise InputError(f"no {path}", "the directory of a sweep", "name what `distseg sweep` was given")
    return json.loads(path.read_text(encoding="utf-8"))


def _write(directory: Path, content: dict[str, Any]) -> None:
    with published(directory / FILE_NAME) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
