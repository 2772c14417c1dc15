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

import itertools
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

# a transient fault goes away by the second try; a third comes after SLURM had time to find a dead
# node
MAX_FAILURES = 3
# before the last try: above SLURM's SlurmdTimeout, which is 300 s by default
PAUSE_VARIABLE = "DISTSEG_PAUSE_SECONDS"
FIRST_PAUSE_SECONDS = 5.0
# argparse's code, also ours; EX_TEMPFAIL of sysexits.h; 128 + SIGINT
BAD_INPUT, TEMPORARY, INTERRUPTED = 2, 75, 130


@dataclass(frozen=True)
class Decision:
    """What is to be done: "done", "requeue", "again" (start the nodes again, here) or "fail" with
    an exit code.
    """

    action: str
    reason: str
    exit_code: int = 0


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


def failures_in_a_row(found: Sequence[attempts.Attempt]) -> int:
    """How many attempts at the end began at one step and failed by the run's own error, not by lost
    ranks.
    """
    count = 0
    for attempt in reversed(found):
        # a rank that was lost takes the others with it: these leave with a signal or TEMPORARY
        own_error = any(code > 0 and code != TEMPORARY for code in attempt.exit_codes)
        got_further = attempt.first_step != found[-1].first_step
        if attempt.outcome != "failed" or got_further or not own_error:
            break
        count += 1
    return count


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

    def run(self) -> Decision:
        """Start the nodes, again while that may help; the last decision."""
        num_failures = 0  # in a row, of attempts that began at one step
        failed_at: int | None = -1  # that step
        last_pause = float(os.environ.get(PAUSE_VARIABLE) or 330)
        for number in itertools.count():
            # a new label each time: an attempt that noted nothing must not be judged by the one
            # before
            self._started = label = self._label(number)
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
                return _given_up(step, decision, decision.exit_code, say=True)
            # an error of the run itself waits for nothing
            if may_be_the_machines(attempt):
                self._pause(FIRST_PAUSE_SECONDS if num_failures == 1 else last_pause)
            if self._stopping_since is not None:
                return Decision("requeue", "told to stop between two tries")
        raise AssertionError  # count() has no end

    def decision(self) -> Decision:
        """On the nodes' last start, after `wait`: for a handler that has interrupted `run`."""
        if self._process is None:
            return Decision("requeue", "told to stop before the nodes were started")
        return self._decide(_exit_code(self._process), self._noted(self._started))

    def _decide(self, exit_code: int, attempt: attempts.Attempt | None) -> Decision:
        decision = decide(exit_code, attempt, self._stopping_since is not None)
        # a run that fails whenever it is told to stop would be requeued for ever
        if decision.action != "requeue" or attempt is None or self._run_dir is None:
            return decision
        # from the file, not from a counter: each turn is another process, maybe on other nodes
        if failures_in_a_row(attempts.read(self._run_dir)) < MAX_FAILURES:
            return decision
        return _given_up(attempt.first_step, decision, exit_code or TEMPORARY)

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
            time.sleep(0.2)

    def _run_nodes(self, label: str, number: int) -> int:
        # its own session: Ctrl-C and the job's signals reach this process, which passes them on
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
        # one torchrun a node; it starts the ranks, so that a rank's end is noted where it happened
        # said in full, since srun does not take over every option of sbatch; one task per node is
        # what Place counts on
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
        # without it the other nodes would wait in a collective for the one that is gone, until
        # their time limit
        return [*srun, "--kill-on-bad-exit=1", *agent, *work]

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
        # another label: the last attempt is an earlier start's, this one died before it noted any
        return found[-1] if found and found[-1].label == label else None


def _given_up(step: int | None, last: Decision, exit_code: int, say: bool = False) -> Decision:
    reason = f"{MAX_FAILURES} failures in a row at step {step}; the last: {last.reason}"
    if say:
        print(reason, flush=True)
    return Decision("fail", reason, exit_code)


def _exit_code(process: subprocess.Popen) -> int:
    """128 + n for a death by signal n."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def requeue() -> int:
    """Give the nodes back and put this job into the queue again.

    Returns only when SLURM refuses to.
    """
    job = os.environ["SLURM_JOB_ID"]
    # a preemption may have requeued it already: requeued again, the new start would be ended
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
        # other modules, as an evaluation, have no run that could be gone on with
        run_dir = _checked(rest) if module == "distseg.train" else None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    supervisor = Supervisor(module, rest, run_dir)
    # SIGUSR1: before the time limit, as --signal of the script says; SIGTERM: preemption
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # a flag and no more: to save in a handler could hang in a collective, or tear a file
        signal.signal(number, lambda *_: supervisor.stop())
    decision = supervisor.run()
    code = requeue() if decision.action == "requeue" else decision.exit_code
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
    # accepted at the first start; a requeued job need not build the networks once more
    if int(os.environ.get("SLURM_RESTART_COUNT") or "0"):
        return Path(loading.load(overrides).run_dir)
    num_ranks = int(os.environ["SLURM_JOB_NUM_NODES"]) * ranks_per_node(dict(os.environ))
    return Path(check_run(overrides, num_ranks).run_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
