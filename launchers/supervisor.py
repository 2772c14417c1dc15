"""What a batch job does: start the nodes, pass a wish to stop on to them, and see that an
unfinished run comes back.

    python -m launchers.supervisor distseg.train preset=voc steps=500

It is the batch script's own process (slurm/*.sh end with exec) and that of a submitit job: one
place for

  done                                    -> exit code 0
  bad input (exit code 2 of a rank)       -> exit code 2: the same would happen again
  stopped (time limit, preemption)        -> `scontrol requeue`, until the configured steps are
                                             done; after MAX_TURNS in a row that saved no step,
                                             however they ended, an exit code that says so
  srun refuses the job's own settings     -> exit code 2: the same would happen again
  a node is not fit, or is gone           -> the other nodes alone, where they may (nodes.py); else
                                             `scontrol requeue`, for other nodes
  a rank was lost, or anything else       -> the nodes are started again inside the allocation;
                                             after MAX_FAILURES in a row that got no step further,
                                             that exit code
A node that SLURM loses ends the whole job, batch script included; SLURM requeues it by itself.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distseg.config import loading
from distseg.runs import attempts
from launchers import batch_job, turns
from launchers.batch_job import TEMPORARY, requeue
from launchers.check import check_run
from launchers.nodes import JobNodes, UnfitError, counts_of_job
from launchers.places import TRY_VARIABLE, python_on_nodes, ranks_per_node
from launchers.stopping import REPEAT_SECONDS, stop_signal, tell_ranks
from shards.errors import InputError, TemporaryError
from shards.terminal import use_utf8

# a transient fault goes away by the second try; a third comes after SLURM had time to find a dead
# node
MAX_FAILURES = 3
# before the last try: above SLURM's SlurmdTimeout, which is 300 s by default
PAUSE_VARIABLE = "DISTSEG_PAUSE_SECONDS"
FIRST_PAUSE_SECONDS = 5.0
LAST_WORDS_SECONDS = 5.0  # for what srun wrote before it ended
# of submitit: one number for all turns of a job here
LOCAL_JOB_VARIABLE = "SUBMITIT_LOCAL_JOB_ID"
BEFORE_THE_NODES = "told to stop before the nodes were started"
BAD_INPUT, INTERRUPTED = 2, 130  # argparse's code, also ours; 128 + SIGINT


@dataclass(frozen=True)
class Decision:
    """What is to be done: "done", "requeue", "again" (start the nodes again, here) or "fail" with
    an exit code. without: nodes that a requeued job should not get again.
    """

    action: str
    reason: str
    exit_code: int = 0
    without: tuple[str, ...] = ()


def decide(exit_code: int, attempt: attempts.Attempt | None, stopping: bool) -> Decision:
    """The decision on one start of the nodes. attempt: what the run noted of it, if anything."""
    codes, reason = [exit_code], f"exit code {exit_code}"
    # a run that noted nothing was killed, or is none of ours: only its exit code speaks for it
    outcome = "done" if exit_code == 0 and not stopping else "killed"
    if attempt is not None:
        # srun gives the highest code of its tasks, the notes give each rank's
        codes += attempt.exit_codes
        outcome, reason = attempt.outcome, attempt.reason or reason
    if outcome == "done":
        return Decision("done", "done")
    # one rank is enough: torchrun kills the others, whose codes then say nothing
    if outcome == "refused" or BAD_INPUT in codes:
        return Decision("fail", reason, BAD_INPUT)
    # whoever sends that wants no other turn
    if outcome == "stopped" and reason.startswith("SIGINT"):
        return Decision("fail", "stopped by hand", INTERRUPTED)
    # also where saving failed: the last checkpoint is as good as before
    if outcome == "stopped" or stopping:
        return Decision("requeue", reason)
    # never 0: SLURM would call the job COMPLETED, and jobs that depend on it would start
    return Decision("again", reason, exit_code or TEMPORARY)


def may_be_the_machines(attempt: attempts.Attempt | None) -> bool:
    """Whether a failure may be a machine's: nothing was noted, or ranks were killed or lost."""
    if attempt is None or not attempt.exit_codes:
        return True
    return any(code < 0 or code == TEMPORARY for code in attempt.exit_codes)


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
        self._errors: batch_job.Errors | None = None  # of srun
        self._started = ""  # label of the last start
        self._stopping_since: float | None = None
        self._told_at = 0.0

    @functools.cached_property
    def _job(self) -> str:
        """What the turns of this run in one job have in common."""
        if self._with_srun:
            return batch_job.job_id()
        return f"process {os.environ.get(LOCAL_JOB_VARIABLE, os.getpid())}"

    def run(self) -> Decision:
        """A turn: start the nodes, again while that may help; the last decision."""
        if self._run_dir is not None:
            # earlier turns that were killed with their supervisor, which could not count them
            decision = self._unless_in_vain(Decision("requeue", "killed"))
            if decision.action == "fail":
                return decision
            turns.note(self._run_dir, self._job)
        if self._stopping_since is not None:
            print(BEFORE_THE_NODES, flush=True)
            return self._unless_in_vain(Decision("requeue", BEFORE_THE_NODES))
        return self._turn()

    @functools.cached_property
    def _nodes(self) -> JobNodes:
        return JobNodes(None if self._run_dir is None else self._arguments)

    def _unfit(self) -> Decision | None:
        """Choose the nodes of the next start; a decision where there can be none."""
        if not self._with_srun:
            return None
        try:
            self._nodes.choose(lambda: self._stopping_since is not None)
        except UnfitError as error:
            decision = self._unless_in_vain(Decision("requeue", str(error), without=error.nodes))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            decision = Decision("fail", error.got, BAD_INPUT)
        else:
            if self._stopping_since is None:
                return None
            decision = self._unless_in_vain(Decision("requeue", BEFORE_THE_NODES))
        print(f"{decision.action} ({decision.reason})", flush=True)
        return decision

    def _turn(self) -> Decision:
        num_failures = 0  # in a row, of attempts that began at one step
        failed_at: int | None = -1  # that step
        last_pause = float(os.environ.get(PAUSE_VARIABLE) or 330)
        for number in itertools.count():
            # a new label each time: an attempt that noted nothing must not be judged by the one
            # before
            self._started = label = self._label(number)
            if (unfit := self._unfit()) is not None:
                return unfit
            exit_code = self._run_nodes(label, number)
            attempt = self._noted(label)
            decision = self._decide(exit_code, attempt)
            print(f"{label}: {decision.action} ({decision.reason})", flush=True)
            # without a run, nothing says what was reached
            if decision.action != "again" or self._run_dir is None:
                return decision
            # a run that reached another checkpoint in between may fail as often again
            step = attempt.first_step if attempt else None
            num_failures = num_failures + 1 if step == failed_at else 1
            failed_at = step
            if num_failures >= MAX_FAILURES:
                reason = f"{MAX_FAILURES} failures in a row at step {step}"
                return _said(f"{reason}; the last: {decision.reason}", decision.exit_code)
            # an error of the run itself waits for nothing
            if may_be_the_machines(attempt):
                self._pause(FIRST_PAUSE_SECONDS if num_failures == 1 else last_pause)
            if self._stopping_since is not None:
                return self._unless_in_vain(Decision("requeue", "told to stop between two tries"))
        raise AssertionError  # count() has no end

    def decision(self) -> Decision:
        """On the nodes' last start, after `wait`: for a handler that has interrupted `run`."""
        if self._process is None:
            return self._unless_in_vain(Decision("requeue", BEFORE_THE_NODES))
        return self._decide(_exit_code(self._process), self._noted(self._started))

    def _decide(self, exit_code: int, attempt: attempts.Attempt | None) -> Decision:
        if attempt is None and self._errors is not None and self._errors.fatal:
            return Decision("fail", self._errors.fatal, BAD_INPUT)
        return self._unless_in_vain(
            decide(exit_code, attempt, self._stopping_since is not None), exit_code
        )

    def _unless_in_vain(self, decision: Decision, exit_code: int = 0) -> Decision:
        """The decision, but for a job that would come back for ever: one whose turns are too short
        to save anything, or that fails whenever it is told to stop.
        """
        if decision.action != "requeue":
            return decision
        # from a file, not from a counter: each turn is another process, maybe on other nodes
        if self._run_dir is not None:
            count, reason = turns.in_vain(self._run_dir, self._job), turns.reason(self._run_dir)
        else:
            # what has no run, as an evaluation, begins anew each time
            count, reason = _restarts() + 1, turns.UNFINISHED
        if count < turns.MAX_TURNS:
            return decision
        return _said(f"{reason}; the last: {decision.reason}", exit_code or TEMPORARY)

    def _pause(self, seconds: float) -> None:
        """Until told to stop, leave SLURM time to find a dead node, which ends this process."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._stopping_since is None:
            time.sleep(0.2)  # short, so that a wish to stop is heard

    def stop(self) -> None:
        """Ask the ranks to save and leave.

        Only notes the wish: it may be called in a signal handler.
        """
        # the first wish counts: SLURM may repeat its signal, which must not lengthen the patience
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()

    def wait(self) -> None:
        """Wait until the nodes have ended, passing a wish to stop on."""
        # polled, not waited for: a wish to stop, noted by a handler, has to be passed on meanwhile
        while self._process is not None and self._process.poll() is None:
            if self._stopping_since is not None:
                self._tell_ranks(self._process)
            if self._has_ended_but_for_a_node():
                batch_job.end_step(self._process, LAST_WORDS_SECONDS)
                self._nodes.may_overlap = True
            time.sleep(0.2)

    def _has_ended_but_for_a_node(self) -> bool:
        """Whether srun waits for a node that is gone, as it does until SLURM has noticed."""
        ended_at = None if self._errors is None else self._errors.ended_at
        if ended_at is None or not self._nodes.are_looked_at:
            return False
        # a task that ends badly ends the others: SIGTERM, and KillWait later SIGKILL
        return time.monotonic() - ended_at > self._seconds_to_end

    @functools.cached_property
    def _seconds_to_end(self) -> float:
        return batch_job.termination_seconds()

    def _run_nodes(self, label: str, number: int) -> int:
        # its own session: Ctrl-C and the job's signals reach this process, which passes them on
        environment = os.environ | {attempts.LABEL_VARIABLE: label, TRY_VARIABLE: str(number)}
        self._process = subprocess.Popen(
            self._command(),
            env=environment,
            start_new_session=True,
            stderr=subprocess.PIPE if self._with_srun else None,
        )
        if self._process.stderr is not None:
            self._errors = batch_job.Errors(self._process.stderr)
        self.wait()
        if self._errors is not None:
            self._errors.join(LAST_WORDS_SECONDS)
        return _exit_code(self._process)

    def _command(self) -> list[str]:
        agent = ["-u", "-m", "launchers.agent"]
        agent += [] if self._run_dir is None else ["--run-dir", str(self._run_dir)]
        work = [self._module, *self._arguments]
        if not self._with_srun:
            return [sys.executable, *agent, "--alone", f"--supervisor={os.getpid()}", *work]
        # one torchrun a node; it starts the ranks, so that a rank's end is noted where it happened
        # without it the other nodes would wait in a collective for the one that is gone, until
        # their time limit
        srun = [*self._nodes.srun(), "--kill-on-bad-exit=1"]
        # last: options of srun may stand before a container's Python
        return [*srun, *python_on_nodes(dict(os.environ)), *agent, *work]

    def _tell_ranks(self, process: subprocess.Popen) -> None:
        now = time.monotonic()
        assert self._stopping_since is not None
        if not self._told_at:
            print("told to stop: the ranks save and leave", flush=True)
        number = stop_signal(now - self._stopping_since)
        # said again and again: ranks that are still starting ignore it
        if now - self._told_at < REPEAT_SECONDS and number != signal.SIGKILL:
            return
        self._told_at = now
        if self._with_srun:  # all steps of the job, not the batch script
            command = ["scancel", f"--signal={number.name[3:]}", self._job]
            # it fails where the job is ending already
            subprocess.run(command, capture_output=True, check=False)
            return
        tell_ranks(process.pid, number)

    def _label(self, number: int) -> str:
        if not self._with_srun:
            return f"process {os.getpid()}, try {number + 1}"
        return f"job {self._job}, restart {_restarts()}, try {number + 1}"

    def _noted(self, label: str) -> attempts.Attempt | None:
        found: list[attempts.Attempt] = []
        # a disk that does not answer is what may have ended the ranks, and no reason to end here
        with suppress(OSError, TemporaryError):
            found = [] if self._run_dir is None else attempts.read(self._run_dir)
        # another label: the last attempt is an earlier start's, this one died before it noted any
        return found[-1] if found and found[-1].label == label else None


def _said(reason: str, exit_code: int) -> Decision:
    """The end of a job for a reason that its output and its result both give."""
    print(reason, flush=True)
    return Decision("fail", reason, exit_code)


def _restarts() -> int:
    """How often SLURM has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or "0")


def _exit_code(process: subprocess.Popen) -> int:
    """128 + n for a death by signal n."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def main(arguments: list[str]) -> int:
    """The command line, inside a batch job."""
    module, rest = arguments[0], arguments[1:]
    told: list[int] = []
    # SIGUSR1: before the time limit, as --signal of the script says; SIGTERM: preemption. From the
    # start: a short job is told at once, while its input is still being checked
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    try:
        _check_in_job()
        # other modules, as an evaluation, have no run that could be gone on with
        run_dir = _checked(rest) if module == "distseg.train" else None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    supervisor = Supervisor(module, rest, run_dir)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # a flag and no more: to save in a handler could hang in a collective, or tear a file
        signal.signal(number, lambda *_: supervisor.stop())
    if told:
        supervisor.stop()
    decision = supervisor.run()
    code = requeue(decision.without) if decision.action == "requeue" else decision.exit_code
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
    config = loading.load(overrides)
    num_nodes = counts_of_job(config)[0]
    # accepted at the first start; a requeued job need not build the networks once more
    if not _restarts():
        config = check_run(overrides, num_nodes * ranks_per_node(dict(os.environ)))
    return Path(config.run_dir)


if __name__ == "__main__":
    use_utf8()
    sys.exit(main(sys.argv[1:]))
