"""What a batch job does: start the nodes, pass a wish to stop on to them, and see that an
unfinished run comes back.

    python -m launchers.supervisor distseg.train preset=voc steps=500

It is the batch script's own process (slurm/*.sh end with exec) and that of a submitit job: one
place for

  done                                    -> exit code 0
  bad input (exit code 2 of a rank)       -> exit code 2: the same would happen again
  stopped (time limit, preemption)        -> `scontrol requeue`, until the configured steps are done
                                             (an error while it stops, MAX_FAILURES in a row: that
                                             exit code)
  a rank was lost, or anything else       -> the nodes are started again inside the allocation;
                                             after MAX_FAILURES in a row that got no step further,
                                             that exit code
A node that SLURM loses ends the whole job, batch script included; SLURM requeues it by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.config import loading
from distseg.runs import attempts
from launchers.check import check_run
from launchers.places import TRY_VARIABLE, ranks_per_node
from launchers.stopping import REPEAT_SECONDS, stop_signal, tell_ranks
from shards.errors import InputError

MAX_FAILURES = 3
# before the last try: above SLURM's SlurmdTimeout, which is 300 s by default
PAUSE_VARIABLE = "DISTSEG_PAUSE_SECONDS"
FIRST_PAUSE_SECONDS = 5.0
BAD_INPUT, TEMPORARY, INTERRUPTED = 2, 75, 130


@dataclass(frozen=True)
class Verdict:
    """What is to be done: "done", "requeue", "again" (start the nodes again, here) or "fail" with
    an exit code.
    """

    action: str
    reason: str
    exit_code: int = 0


def judge(exit_code: int, attempt: attempts.Attempt | None, stopping: bool) -> Verdict:
    """The verdict on one start of the nodes. attempt: what the run noted of it, if anything."""
    codes = [exit_code, *(attempt.exit_codes if attempt else [])]
    outcome = (
        attempt.outcome if attempt else ("done" if exit_code == 0 and not stopping else "killed")
    )
    reason = attempt.reason if attempt and attempt.reason else f"exit code {exit_code}"
    if outcome == "done":
        return Verdict("done", "done")
    if outcome == "refused" or BAD_INPUT in codes:
        return Verdict("fail", reason, BAD_INPUT)
    if outcome == "stopped" and reason.startswith("SIGINT"):
        return Verdict("fail", "stopped by hand", INTERRUPTED)
    if outcome == "stopped" or stopping:
        return Verdict("requeue", reason)
    return Verdict("again", reason, exit_code or TEMPORARY)


def may_be_the_machines(attempt: attempts.Attempt | None) -> bool:
    """Whether a failure may be a machine's: nothing was noted, or ranks were killed or lost."""
    if attempt is None or not attempt.exit_codes:
        return True
    return any(code < 0 or code == TEMPORARY for code in attempt.exit_codes)


def failures_in_a_row(found: Sequence[attempts.Attempt]) -> int:
    """How many attempts at the end began at one step and failed by the run's own error, not by lost
    ranks.
    """
    by_itself = [
        attempt.outcome == "failed"
        and attempt.first_step == found[-1].first_step
        and any(code > 0 and code != TEMPORARY for code in attempt.exit_codes)
        for attempt in reversed(found)
    ]
    return [*by_itself, False].index(False)


class Supervisor:
    """Runs one module on all nodes of a job until it is done, or until the job has to give its
    nodes back.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        run_dir: Path | None = None,
        with_srun: bool = True,
    ):
        self._module, self._arguments, self._run_dir = module, list(arguments), run_dir
        self._with_srun = with_srun
        self._process: subprocess.Popen | None = None
        self._started = ""  # label of the last start
        self._stopping_since: float | None = None
        self._told_at = 0.0

    def run(self) -> Verdict:
        """Start the nodes, again while that may help; the last verdict."""
        failed_at: list[int | None] = []
        last_pause = float(os.environ.get(PAUSE_VARIABLE) or 330)
        for number in range(10**6):
            self._started = label = self._label(number)
            exit_code = self._run_nodes(label, number)
            attempt = self._noted(label)
            verdict = self._judge(exit_code, attempt)
            print(f"{label}: {verdict.action} ({verdict.reason})", flush=True)
            # without a run, nothing says what was reached
            if verdict.action != "again" or self._run_dir is None:
                return verdict
            step = attempt.first_step if attempt else None
            failed_at = [*failed_at, step] if failed_at and failed_at[-1] == step else [step]
            if len(failed_at) >= MAX_FAILURES:
                reason = (
                    f"{MAX_FAILURES} failures in a row at step {step}; the last: {verdict.reason}"
                )
                print(reason, flush=True)
                return Verdict("fail", reason, verdict.exit_code)
            if may_be_the_machines(attempt):
                self._pause(FIRST_PAUSE_SECONDS if len(failed_at) == 1 else last_pause)
            if self._stopping_since is not None:
                return Verdict("requeue", "told to stop between two tries")
        raise AssertionError

    def verdict(self) -> Verdict:
        """On the nodes' last start, after `wait`: for a handler that has interrupted `run`."""
        if self._process is None:
            return Verdict("requeue", "told to stop before the nodes were started")
        return self._judge(_exit_code(self._process), self._noted(self._started))

    def _judge(self, exit_code: int, attempt: attempts.Attempt | None) -> Verdict:
        verdict = judge(exit_code, attempt, self._stopping_since is not None)
        if verdict.action != "requeue" or attempt is None or self._run_dir is None:
            return verdict
        if failures_in_a_row(attempts.read(self._run_dir)) < MAX_FAILURES:
            return verdict
        reason = (
            f"{MAX_FAILURES} failures in a row at step {attempt.first_step}; "
            f"the last: {verdict.reason}"
        )
        return Verdict("fail", reason, exit_code or TEMPORARY)

    def _pause(self, seconds: float) -> None:
        """Leave SLURM the time to find that a node is dead, which ends this process.

        Unless told to stop.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._stopping_since is None:
            time.sleep(0.2)

    def stop(self) -> None:
        """Ask the ranks to save and leave.

        Only notes the wish: it may be called in a signal handler.
        """
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()

    def wait(self) -> None:
        """Wait until the nodes have ended, passing a wish to stop on."""
        while self._process is not None and self._process.poll() is None:
            if self._stopping_since is not None:
                self._tell_ranks(self._process)
            time.sleep(0.2)

    def _run_nodes(self, label: str, number: int) -> int:
        environment = os.environ | {attempts.LABEL_VARIABLE: label, TRY_VARIABLE: str(number)}
        self._process = subprocess.Popen(self._command(), env=environment, start_new_session=True)
        self.wait()
        return _exit_code(self._process)

    def _command(self) -> list[str]:
        agent = [sys.executable, "-u", "-m", "launchers.agent"]
        agent += [] if self._run_dir is None else ["--run-dir", str(self._run_dir)]
        work = [self._module, *self._arguments]
        if not self._with_srun:
            return [*agent, "--alone", f"--supervisor={os.getpid()}", *work]
        num_nodes = os.environ["SLURM_JOB_NUM_NODES"]
        srun = [
            "srun",
            f"--nodes={num_nodes}",
            f"--ntasks={num_nodes}",
            "--ntasks-per-node=1",
            "--input=none",
        ]
        # of an exclusive node a step gets no GPU that it does not ask for
        if "SLURM_GPUS_ON_NODE" in os.environ:
            srun += [f"--gpus-per-node={os.environ['SLURM_GPUS_ON_NODE']}"]
        return [*srun, "--kill-on-bad-exit=1", *agent, *work]

    def _tell_ranks(self, process: subprocess.Popen) -> None:
        now = time.monotonic()
        assert self._stopping_since is not None
        if not self._told_at:
            print("told to stop: the ranks save and leave", flush=True)
        number = stop_signal(now - self._stopping_since)
        if now - self._told_at < REPEAT_SECONDS and number != signal.SIGKILL:
            return
        self._told_at = now
        if self._with_srun:  # all steps of the job, not the batch script
            command = ["scancel", f"--signal={number.name[3:]}", os.environ["SLURM_JOB_ID"]]
            # it fails where the job is ending already
            subprocess.run(command, capture_output=True, check=False)
            return
        tell_ranks(process.pid, number)

    def _label(self, number: int) -> str:
        if not self._with_srun:
            return f"process {os.getpid()}, try {number + 1}"
        restart = os.environ.get("SLURM_RESTART_COUNT") or "0"
        return f"job {os.environ['SLURM_JOB_ID']}, restart {restart}, try {number + 1}"

    def _noted(self, label: str) -> attempts.Attempt | None:
        found = [] if self._run_dir is None else attempts.read(self._run_dir)
        return found[-1] if found and found[-1].label == label else None


def _exit_code(process: subprocess.Popen) -> int:
    """128 + n for a death by signal n."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def requeue() -> int:
    """Give the nodes back and put this job into the queue again.

    Returns only when SLURM refuses to.
    """
    job = os.environ["SLURM_JOB_ID"]
    state = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True
    ).stdout.strip()
    if state not in ("RUNNING", "PREEMPTED"):  # cancelled, or SLURM requeues it already
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


def main(arguments: list[str]) -> int:
    """The command line, inside a batch job."""
    module, rest = arguments[0], arguments[1:]
    try:
        _check_in_job()
        run_dir = _checked(rest) if module == "distseg.train" else None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    supervisor = Supervisor(module, rest, run_dir)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.stop())
    verdict = supervisor.run()
    code = requeue() if verdict.action == "requeue" else verdict.exit_code
    # Python ends without its handlers, and would die of a late one
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return code


def _check_in_job() -> None:
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES") if name not in os.environ]
    if missing:
        action = "submit it with sbatch, for example: sbatch slurm/train_voc.sh"
        raise InputError(f"not inside a SLURM job: no {', '.join(missing)}", "a batch job", action)


def _checked(overrides: list[str]) -> Path:
    """The run directory of overrides that can be trained.

    Looked at closely only by a job's first start.
    """
    if int(os.environ.get("SLURM_RESTART_COUNT") or "0"):
        return Path(loading.load(overrides).run_dir)
    num_ranks = int(os.environ["SLURM_JOB_NUM_NODES"]) * ranks_per_node(dict(os.environ))
    return Path(check_run(overrides, num_ranks).run_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
