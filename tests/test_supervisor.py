"""What a job does after its nodes have ended, and how it learns its place."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distseg.runs.attempts import LABEL_VARIABLE, Attempt, Note
from launchers import batch_job, check, supervisor, turns
from launchers.job import Job, RunError
from launchers.places import Place, python_on_nodes, ranks_per_node
from launchers.supervisor import Decision, Supervisor, decide, may_be_the_machines
from shards.errors import InputError


def attempt(outcome: str, reason: str = "", exit_codes: tuple[int, ...] = ()) -> Attempt:
    return Attempt("job 1", outcome=outcome, reason=reason, exit_codes=list(exit_codes))


@pytest.mark.parametrize(
    ("exit_code", "noted", "stopping", "action", "code"),
    [
        (0, attempt("done"), False, "done", 0),
        (143, attempt("done"), True, "done", 0),  # told to stop after the last step
        (0, attempt("stopped", "SIGUSR1 here"), True, "requeue", 0),
        # preempted: only the ranks were told
        (143, attempt("stopped", "SIGTERM here"), False, "requeue", 0),
        (0, attempt("stopped", "SIGINT here"), False, "fail", 130),  # W&B's stop button
        (137, attempt("killed"), True, "requeue", 0),  # did not save in time
        (143, attempt("refused", "a full disk"), False, "fail", 2),
        # one rank's bad input
        (143, attempt("failed", "rank 3 on b: exit code 2", (75, 2)), False, "fail", 2),
        (75, attempt("failed", "rank 1 is gone", (75,)), False, "again", 75),
        (137, attempt("killed"), False, "again", 137),
        # never 0, which SLURM would call COMPLETED
        (0, attempt("failed", "an error after the last collective", (1,)), False, "again", 75),
        (1, None, False, "again", 1),
        (2, None, False, "fail", 2),
        (0, None, False, "done", 0),  # no training run
        (0, None, True, "requeue", 0),
    ],
)
def test_decisions(
    exit_code: int, noted: Attempt | None, stopping: bool, action: str, code: int
) -> None:
    decision = decide(exit_code, noted, stopping)
    assert (decision.action, decision.exit_code) == (action, code)


class Scripted(Supervisor):
    """A supervisor whose nodes fail with 1, having begun at the steps given."""

    def __init__(self, run_dir: Path, steps: list[int]):
        super().__init__("distseg.train", [], run_dir, with_srun=False)
        self.steps = steps

    def _run_nodes(self, label: str, number: int) -> int:
        return 1

    def _noted(self, label: str) -> Attempt:
        return Attempt(label, outcome="failed", first_step=self.steps.pop(0), exit_codes=[1])


def test_failures_without_progress_come_to_an_end_and_others_do_not(tmp_path: Path) -> None:
    scripted = Scripted(tmp_path, [0, 0, 10, 10, 20, 20, 20, 30])
    decision = scripted.run()
    assert scripted.steps == [30] and decision.action == "fail" and decision.exit_code == 1
    assert "3 failures in a row at step 20" in decision.reason


class Turn(Supervisor):
    """A supervisor that is told to stop; its ranks save a step first, or do not."""

    def __init__(self, run_dir: Path | None, saved: int | None = None):
        super().__init__("distseg.train", [], run_dir, with_srun=False)
        self.run_dir, self.saved = run_dir, saved

    def _run_nodes(self, label: str, number: int) -> int:
        if self.saved is not None and self.run_dir is not None:
            checkpoint = self.run_dir / "checkpoints" / f"step-{self.saved:08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "state.json").touch()
        self.stop()
        return 137  # killed: it noted nothing, and does not count as refused


class Killed(Turn):
    """A supervisor that is killed together with its nodes."""

    def _run_nodes(self, label: str, number: int) -> int:
        raise KeyboardInterrupt


def test_a_job_whose_turns_save_no_step_ends_with_the_reason(tmp_path: Path) -> None:
    for saved in (None, None, 4, None, None, 8, None):  # a step saved in between counts anew
        assert Turn(tmp_path, saved).run().action == "requeue"
    with pytest.raises(KeyboardInterrupt):
        Killed(tmp_path).run()
    (tmp_path / "checkpoints" / "step-00000012").mkdir()  # without state.json: never finished
    decision = Turn(tmp_path).run()
    assert (decision.action, decision.exit_code) == ("fail", 137)
    assert decision.reason.startswith("3 turns in a row saved no step after 8: give a turn more")
    assert decision.reason.endswith("the last: exit code 137")


def test_turns_that_are_all_killed_with_their_supervisor_end_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            Killed(tmp_path).run()
    with (tmp_path / "turns.jsonl").open("a") as file:
        file.write('{"job": "pro')  # torn by the last kill
    decision = Turn(tmp_path, 4).run()
    assert (decision.action, decision.exit_code) == ("fail", 75)
    assert decision.reason.endswith("the last: killed")
    # who submits it again, as another job, wants it tried
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    assert Turn(tmp_path).run().action == "requeue"


def test_turns_that_began_at_a_checkpoint_which_is_damaged_by_now_were_in_vain_too(
    tmp_path: Path,
) -> None:
    Turn(tmp_path, 8).run()
    for _ in range(2):
        turns.note(tmp_path, "job")
    newest = tmp_path / "checkpoints" / "step-00000008"
    newest.rename(newest.with_name("damaged-step-00000008"))
    turns.note(tmp_path, "job")
    assert turns.in_vain(tmp_path, "job") == 3


def test_a_wish_to_stop_that_is_repeated_gives_ranks_no_more_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[int] = []
    monkeypatch.setattr(supervisor, "tell_ranks", lambda pid, number: told.append(number))
    monkeypatch.delenv("DISTSEG_STOP_SECONDS", raising=False)
    waiting, process = Supervisor("nothing", [], with_srun=False), subprocess.Popen(["true"])
    process.wait()
    for now in (100.0, 200.0, 339.0, 345.0):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        waiting.stop()
        waiting._tell_ranks(process)
    assert told == [*[signal.SIGUSR1] * 3, signal.SIGKILL]


def test_who_is_told_to_stop_before_it_starts_starts_nothing(tmp_path: Path) -> None:
    early = Killed(tmp_path)
    early.stop()
    assert early.run() == Decision("requeue", "told to stop before the nodes were started")
    # which was a turn all the same
    assert [Turn(tmp_path).run().action for _ in range(2)] == ["requeue", "fail"]


def test_what_has_no_run_is_not_begun_anew_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Turn(None).run().action == "requeue"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert Turn(None).run().reason.startswith("3 turns did not finish this")


@pytest.mark.parametrize("action", ["requeue", "done", "fail"])
def test_a_submitit_job_comes_back_unless_its_run_would_fail_again(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = Decision(action, "why", 1 if action == "fail" else 0)
    monkeypatch.setattr(Supervisor, "decision", lambda _: decision)
    job = Job((), "run", str(tmp_path), with_srun=False)
    monkeypatch.setattr(
        "launchers.job._supervisors", {"run": Supervisor("distseg.train", [], with_srun=False)}
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        if action == "fail":
            with pytest.raises(RunError, match=r"run: why \(exit code 1\)"):
                job.checkpoint()
        else:
            assert job.checkpoint().function is job
            # which SLURM sends to scontrol too
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_failures_that_may_be_a_machines_are_waited_for() -> None:
    assert may_be_the_machines(None) and may_be_the_machines(attempt("killed"))
    assert may_be_the_machines(attempt("failed", "", (75,))) and may_be_the_machines(
        attempt("failed", "", (1, -9))
    )
    assert not may_be_the_machines(attempt("failed", "RuntimeError: a mistake", (1, 1)))


def test_a_start_is_judged_by_its_own_note_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LABEL_VARIABLE, "job 7, restart 0, try 1")
    Note(tmp_path, ["here"], 0).finish(9, "done")
    run = Supervisor("distseg.train", [], tmp_path, with_srun=False)
    noted = run._noted("job 7, restart 0, try 1")
    assert noted is not None and noted.outcome == "done"
    assert run._noted("job 7, restart 0, try 2") is None  # it was killed before it noted anything


def test_a_death_by_a_signal_has_the_exit_code_of_shells() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process.kill()
    process.wait()
    assert supervisor._exit_code(process) == 137


def test_the_exit_code_of_a_rank_comes_through_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves.py").write_text("import os, sys\nsys.exit(7 * int(os.environ['RANK']))\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent}")
    monkeypatch.setenv("DISTSEG_RANKS_PER_NODE", "2")
    run = Supervisor("leaves", [], with_srun=False)
    assert run.run() == Decision("again", "exit code 7", 7)


def test_a_step_of_srun_gives_node_port_and_ranks() -> None:
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    step |= {
        "SLURM_JOB_ID": "100",
        "SLURM_RESTART_COUNT": "3",
        "SLURM_GPUS_ON_NODE": "4",
        "DISTSEG_TRY": "2",
    }
    assert Place.of_step(step) == Place(2, 1, 4, "gpu07", 26126)  # 20000 + 61 * 100 + 8 * 3 + 2
    assert Place.of_step(step | {"SLURM_JOB_ID": "101"}).port != Place.of_step(step).port
    with pytest.raises(InputError, match="SLURM_NODEID"):
        Place.of_step({key: value for key, value in step.items() if key != "SLURM_NODEID"})


def test_ranks_of_a_node() -> None:
    assert ranks_per_node({}) == 1
    assert ranks_per_node({"SLURM_GPUS_ON_NODE": "8"}) == 8
    assert ranks_per_node({"SLURM_GPUS_ON_NODE": "8", "DISTSEG_RANKS_PER_NODE": "2"}) == 2
    with pytest.raises(InputError, match="DISTSEG_RANKS_PER_NODE=two"):
        ranks_per_node({"DISTSEG_RANKS_PER_NODE": "two"})


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that are found before SLURM's; this process is in job 5."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    return folder


def write_command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("state", "answer"), [("CANCELLED", 143), ("COMPLETING", 143), ("", 143)])
def test_only_a_running_job_is_requeued(
    state: str, answer: int, commands: Path, capsys: pytest.CaptureFixture
) -> None:
    write_command(commands, "squeue", f"echo {state}")
    write_command(commands, "scontrol", f"touch {commands}/called")
    assert batch_job.requeue() == answer
    assert not (commands / "called").exists() and "not requeued" in capsys.readouterr().out


def test_a_controller_that_does_not_answer_has_cancelled_no_job(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_command(commands, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    write_command(commands, "scontrol", f"touch {commands}/called")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # SLURM would end this process
    assert batch_job.requeue() == 75 and (commands / "called").exists()


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("echo 5", "5_3"),  # the last task of the array, whose number is the array's
        ("echo 4", "5"),  # a job that task 3 of array 5 has submitted inherits its variables
        ("true", "5"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "5"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "5_3"),
    ],
)
def test_a_task_of_an_array_is_addressed_alone(
    answer: str, job: str, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_command(commands, "squeue", answer)
    assert batch_job.job_id() == "5"  # no array
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert batch_job.job_id() == job


@pytest.mark.parametrize(
    ("says", "action"),
    [
        ("srun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE are mutually exclusive.", "fail"),
        (
            "srun: error: Unable to create step for job 5: Invalid generic resource (gres) spec",
            "fail",
        ),
        ("srun: error: Unable to create step for job 5: Requested nodes are busy", "again"),
        ("an epoch: srun: fatal: is no word of srun", "again"),
    ],
)
def test_a_fatal_srun_is_not_tried_again(
    says: str,
    action: str,
    commands: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    write_command(commands, "srun", f"printf '%s\\n' '{says}' >&2; exit 1")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    decision = Supervisor("nothing", []).run()
    assert decision.action == action and says in capfd.readouterr().err
    if action == "fail":
        assert decision == Decision("fail", says, 2)


def test_the_nodes_enter_a_container_where_the_site_says_so(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what srun and, in its place, the container's engine are called with
    write_command(commands, "srun", f'printf "%s\\n" "$@" > {commands}/srun.txt')
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    Supervisor("distseg.evaluate", ["runs/x"]).run()
    plain = (commands / "srun.txt").read_text().splitlines()
    monkeypatch.setenv("DISTSEG_NODE_PYTHON", "apptainer exec --nv --bind '/a b' image.sif python")
    Supervisor("distseg.evaluate", ["runs/x"]).run()
    contained = (commands / "srun.txt").read_text().splitlines()
    here = plain.index(sys.executable)
    words = ["apptainer", "exec", "--nv", "--bind", "/a b", "image.sif", "python"]
    assert contained == plain[:here] + words + plain[here + 1 :]
    assert plain[here + 1 :] == ["-u", "-m", "launchers.agent", "distseg.evaluate", "runs/x"]
    with pytest.raises(InputError, match="DISTSEG_NODE_PYTHON"):
        python_on_nodes({"DISTSEG_NODE_PYTHON": "apptainer 'exec"})


def test_without_torch_the_ranks_in_the_container_look_at_the_networks(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["preset=toy", f"data.shards={toy_shards}", f"run_dir={tmp_path / 'run'}"]
    # of an options' name that only the network knows
    overrides += ["segmentor.options.nothing=1"]
    monkeypatch.setenv("DISTSEG_NODE_PYTHON", "apptainer exec image.sif python")
    with pytest.raises(InputError, match="nothing"):
        check.check_run(overrides, 1)
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    assert check.check_run(overrides, 1).segmentor.options == {"nothing": 1}
    # each of several sets is looked for, and what is scored
    for word in (f"shards=[{toy_shards},{tmp_path}]", f"val_shards={tmp_path}"):
        with pytest.raises(InputError, match="packed shards"):
            check.check_run([*overrides, f"data.{word}"], 1)
    # torch that is missing without a container is not passed over
    monkeypatch.delenv("DISTSEG_NODE_PYTHON")
    with pytest.raises(InputError, match="nothing"):
        check.check_run(overrides, 1)


def test_who_reads_srun_reads_on_where_its_own_output_has_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the pipe would fill up, and srun with all ranks wait in a write
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stderr.write('srun: fatal: x\\n' * 100000)"],
        stderr=subprocess.PIPE,
    )
    monkeypatch.setattr(os, "write", full)
    assert process.stderr is not None
    errors = batch_job.Errors(process.stderr)
    assert process.wait(30) == 0
    errors.join(30)
    assert errors.fatal == "srun: fatal: x"


def test_a_disk_that_does_not_answer_does_not_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns.note(tmp_path, "job")
    Note(tmp_path, ["here"], 0)
    monkeypatch.setenv("DISTSEG_STORAGE_SECONDS", "0.1")

    def failing(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("open", "stat", "mkdir", "glob"):
        monkeypatch.setattr(Path, name, failing)
    assert Supervisor("nothing", [], tmp_path)._noted("") is None
    assert turns.in_vain(tmp_path, "job") == 0
    turns.note(tmp_path, "job")


def test_a_submission_from_within_an_allocation_leaves_it_behind() -> None:
    before = {"SLURM_JOB_ID": "5", "SLURM_MEM_PER_CPU": "50", "SLURM_CONF": "/x", "HOME": "/"}
    environment = dict(before)
    with batch_job.outside(environment):
        assert environment == {"SLURM_CONF": "/x", "HOME": "/"}
    assert environment == before
    # on a login node such a variable is a wish
    with batch_job.outside(wish := {"SLURM_CPU_BIND": "cores"}):
        assert wish == {"SLURM_CPU_BIND": "cores"}
