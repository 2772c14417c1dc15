"""Nodes of a job that are not fit, or gone: found before a start, left out or named."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distseg.config import loading
from distseg.doctor import node
from distseg.runs import attempts
from launchers import batch_job, check, supervisor
from launchers.agent import tell_ranks
from launchers.nodes import JobNodes, UnfitError, counts_of_job
from launchers.submission import Resources, prepare
from launchers.supervisor import Decision, Supervisor
from shards.errors import InputError
from tests.ranks import CONTEXT, TIMEOUT_SECONDS, Job, Program, agent_of_node, bare
from tests.test_train import SMALL

# answers for nodes of --nodelist, or of all: one that is dead has srun end all others' tasks
SRUN = """#!{python}
import json, sys, time
from pathlib import Path
folder = Path({folder!r})
with (folder / "srun.txt").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
lists = [word.partition("=")[2] for word in sys.argv if word.startswith("--nodelist=")]
nodes = lists[0].split(",") if lists else (folder / "nodes").read_text().split()
dead = [node for node in nodes if (folder / f"dead-{{node}}").exists()]
for node in dead:
    said = f"Task launch for StepId=5.0 failed on node {{node}}: Communication connection failure"
    print(f"srun: error: {{said}}", file=sys.stderr)
print('distseg-node {{"node": "a", "ti', flush=True)  # torn by srun; those after it count
for node in nodes:
    path = folder / f"answer-{{node}}"
    results = json.loads(path.read_text()) if path.exists() else []
    if not dead and results is not None:
        answer = dict(node=node, time=time.time() - 9 * (node == "late"), results=results)
        print("distseg-node " + json.dumps(answer), flush=True)
"""


def result(level: str, name: str, text: str = "bad") -> dict[str, str]:
    return {"level": level, "name": name, "text": text, "action": "mend it"}


class FakeSlurm:
    """Commands of SLURM that are found before the real ones, in a job of some nodes."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, nodes: list[str]):
        self.folder, self.patch = folder, patch
        folder.mkdir()
        self.command("squeue", f"cat {folder}/nodes")
        self.command(
            "scontrol", f'[ "$1" = show ] && cat {folder}/$2 || echo "$@" >> {folder}/said'
        )
        (folder / "config").write_text("KillWait                = 1 sec\n")
        (folder / "srun").write_text(SRUN.format(python=sys.executable, folder=str(folder)))
        (folder / "srun").chmod(0o755)
        for name in ("nodes", "hostnames"):
            (folder / name).write_text("\n".join(nodes))
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setenv("SLURM_JOB_ID", str(os.getpid()))
        patch.setenv("SLURM_JOB_NUM_NODES", str(len(nodes)))
        settings = ("DISTSEG_MIN_NODES", "DISTSEG_HEALTH_SECONDS")
        for name in ("SLURM_ARRAY_JOB_ID", "SLURMD_NODENAME", *settings):
            patch.delenv(name, raising=False)

    def command(self, name: str, text: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / name).chmod(0o755)

    def answer(self, node: str, *results: dict[str, str] | None) -> None:
        words = None if results == (None,) else results
        (self.folder / f"answer-{node}").write_text(json.dumps(words))

    def chosen(self, min_nodes: str = "") -> list[str]:
        """The options of srun for the next start, behind its own name."""
        if min_nodes:
            self.patch.setenv("DISTSEG_MIN_NODES", min_nodes)
        nodes = JobNodes(None)
        nodes.choose()
        return nodes.srun()[1:]

    def said(self, file: str = "said") -> str:
        path = self.folder / file
        return path.read_text() if path.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch, ["a", "b", "late"])


def test_sound_nodes_are_started_all_together(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture
) -> None:
    slurm.answer("a", result("warning", "device memory"))
    assert slurm.chosen() == ["--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--input=none"]
    said = capsys.readouterr().out
    assert "warning: a: device memory: bad (to do: mend it)" in said
    assert "warning: late: clock: 9 s behind" in said and not slurm.said()


def test_a_node_that_is_not_fit_is_left_out_and_given_back(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture
) -> None:
    slurm.answer("b", result("error", "device", "GPU 3 does not answer"))
    assert "--nodelist=a,late" in slurm.chosen("2")
    assert slurm.said() == f"update JobId={os.getpid()} NodeList=a,late\n"
    said = capsys.readouterr().out
    assert "b is not fit: device: GPU 3 does not answer (to do: mend it)" in said
    assert "takes 2 of 3 nodes: a, late" in said


def test_without_leave_for_fewer_nodes_the_job_ends_by_name(slurm: FakeSlurm) -> None:
    slurm.answer("b", result("error", "device"))
    with pytest.raises(
        UnfitError, match=r"b: device: bad .*2 are fit, and the job takes 3 \("
    ) as e:
        slurm.chosen()
    assert e.value.nodes == ("b",)
    assert Supervisor("nothing", []).run() == Decision("requeue", str(e.value), without=("b",))
    # a requeued job would wait until SLURM had noticed that one of its nodes is dead
    assert slurm.said().endswith(f"update JobId={os.getpid()} NodeList=a,late\n")


def test_a_dead_node_is_left_out_and_a_silent_one_too(slurm: FakeSlurm) -> None:
    (slurm.folder / "dead-b").touch()
    assert "--nodelist=a,late" in slurm.chosen("1"), "the others are asked again, without it"
    slurm.answer("late", None)
    assert "--nodelist=a" in slurm.chosen("1")
    # the first is where the supervisor runs: it is not given back, whatever it is fit for
    slurm.answer("a", result("error", "open files"))
    slurm.answer("late", result("warning", "open files"))
    assert "--nodelist=late" in slurm.chosen("1")
    assert slurm.said().splitlines()[-1].endswith("NodeList=a,late")


def test_what_all_nodes_share_is_no_fault_of_one(slurm: FakeSlurm) -> None:
    for name in ("a", "b", "late"):
        slurm.answer(name, result("error", "shards"))
    assert "--nodes=3" in slurm.chosen(), "the run says what is wrong, by its own rules"
    slurm.answer("b")
    with pytest.raises(UnfitError, match=r"a: shards: bad.*late: shards: bad.*1 is fit"):
        slurm.chosen()
    for name in ("a", "b", "late"):
        slurm.answer(name, result("error", "open files", "12 a process"))
    assert Supervisor("nothing", []).run() == Decision(
        "fail", "on all 3 nodes: open files: 12 a process", 2
    )


def test_nodes_that_cannot_be_asked_are_started(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture
) -> None:
    slurm.command("srun", "echo 'srun: unrecognized option --overlap' >&2; exit 1")
    assert "--nodes=3" in slurm.chosen()
    assert "could not be looked at" in capsys.readouterr().out
    slurm.patch.setenv("DISTSEG_HEALTH_SECONDS", "0")
    slurm.command("srun", f"touch {slurm.folder}/called")
    assert "--nodes=3" in slurm.chosen() and not (slurm.folder / "called").exists()


def test_numbers_of_nodes_that_divide_the_batch(slurm: FakeSlurm) -> None:
    config = loading.load(["data.shards=unused", "batch_size=12", "discriminator=two_branch"])
    assert check.node_counts(config, 2, 1, 6) == [6, 3, 2, 1]
    assert check.node_counts(None, 2, 3, 5) == [5, 4, 3]
    with pytest.raises(InputError, match=r"batch_size=12 for 10 ranks[\s\S]*there are 1, 2, 3, 6"):
        check.node_counts(config, 2, 4, 6)
    with pytest.raises(InputError, match=r"4 to 5 nodes of 2 ranks: batch_size=12 for 10 ranks"):
        check.node_counts(config, 2, 4, 5)
    slurm.patch.setenv("DISTSEG_RANKS_PER_NODE", "4")
    for text, message in (
        ("0", "a number from 1 to 3"),
        ("4", "from 1 to 3"),
        ("x", "MIN_NODES=x"),
    ):
        slurm.patch.setenv("DISTSEG_MIN_NODES", text)
        with pytest.raises(InputError, match=message):
            counts_of_job(config)
    slurm.patch.setenv("DISTSEG_MIN_NODES", "1")
    assert counts_of_job(config) == [3, 1]
    slurm.patch.setenv("DISTSEG_HEALTH_SECONDS", "0")
    with pytest.raises(InputError, match="a look at the nodes"):
        counts_of_job(config)
    with pytest.raises(InputError, match="min_nodes=3 of 2 nodes"):
        Resources(nodes=2, min_nodes=3)


def test_a_run_that_leaves_a_spare_node_is_accepted_at_submission(
    slurm: FakeSlurm, toy_shards: Path, tmp_path: Path
) -> None:
    slurm.command("sbatch", "exit 1")
    overrides = [*SMALL, f"data.shards={toy_shards}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(InputError, match="batch_size=4 for 3 ranks"):
        prepare([overrides], Resources(nodes=3, ranks_per_node=1))
    (job,) = prepare([overrides], Resources(nodes=3, min_nodes=2, ranks_per_node=1))
    slurm.patch.setattr(Supervisor, "run", lambda self: Decision("done", "done"))
    job()
    assert os.environ["DISTSEG_MIN_NODES"] == "2"
    for name in ("DISTSEG_MIN_NODES", "DISTSEG_RANKS_PER_NODE"):  # which the job has set
        del os.environ[name]


def test_a_step_that_waits_for_a_node_that_is_gone_is_ended(slurm: FakeSlurm) -> None:
    slurm.patch.setattr(batch_job, "TERMINATION_SECONDS", 0.2)
    said = "echo 'srun: error: a: task 0: Exited with exit code 75' >&2"
    look = 'case "$*" in *launchers.examine*) exit 1;; esac'
    slurm.command("srun", f"{look}; {said}; exec sleep 600")
    run, began = Supervisor("nothing", []), time.monotonic()
    assert run.run().action == "again" and time.monotonic() - began < 60
    # with what SLURM believes to be running there
    assert "--overlap" in run._nodes.srun()


def test_a_requeued_job_is_kept_away_from_a_node(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    slurm.command("squeue", "echo RUNNING")
    slurm.patch.setattr(time, "sleep", lambda seconds: None)  # SLURM would end this process
    try:
        (slurm.folder / "job").write_text("ReqNodeList=(null) ExcNodeList=x[1-2]\n")
        batch_job.requeue(["b"])
        assert f"update JobId={os.getpid()} ExcNodeList=x[1-2],b" in slurm.said()
        assert "comes back without b" in capsys.readouterr().out
        # of what the user has asked for by name there is no other
        (slurm.folder / "job").write_text("ReqNodeList=b ExcNodeList=(null)\n")
        batch_job.requeue(["b"])
        assert "--exclude=b" in capsys.readouterr().out and "ExcNodeList=b" not in slurm.said()
    finally:
        signal.signal(signal.SIGTERM, before)


def examined(plant: Callable[[], None], num_ranks: int, seconds: float, connection: Any) -> None:
    plant()
    connection.send(node.examine_node(None, num_ranks, seconds))


def found_on_node(plant: Callable[[], None], num_ranks: int = 2, seconds: float = 60) -> list[str]:
    """What a node says of itself, in a process that has used no thread of torch's before."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=examined, args=(plant, num_ranks, seconds, theirs))
    process.start()
    assert ours.poll(TIMEOUT_SECONDS)
    found = [f"{each.level} {each.name}: {each.text}" for each in ours.recv()]
    process.kill()
    return found


def nothing() -> None:
    """A sound machine."""


def wrong_product() -> None:
    right = torch.matmul
    torch.matmul = lambda *of: right(*of).clamp(max=20)  # type: ignore[assignment]


def hanging_product() -> None:
    torch.matmul = lambda *of: time.sleep(600)  # type: ignore[assignment]


def killed_in_product() -> None:
    torch.matmul = lambda *of: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def wrong_sum() -> None:
    node.dist.all_reduce = lambda numbers: numbers.mul_(5)  # type: ignore[assignment]


def full_disk() -> None:
    node.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1e6))  # type: ignore[assignment]


def no_gpu_left() -> None:
    os.environ[node.GPUS_VARIABLE] = "2"
    torch.version.cuda = "13.0"
    node.torch.cuda.device_count = lambda: 1


@pytest.mark.parametrize(
    ("plant", "level_and_text"),
    [
        (wrong_product, "error device: local rank 1: cpu multiplies wrongly: "),
        (killed_in_product, "error device: local rank 0: has died (exit code -9)"),
        (wrong_sum, "error all-reduce: local rank 0: gloo adds wrongly: 262144 of 262144"),
        (full_disk, "error temporary files: "),
        (no_gpu_left, "error device: local rank 1: RuntimeError: 1 CUDA devices for 2 ranks"),
    ],
)
def test_what_is_planted_on_a_node_is_found(plant: Any, level_and_text: str) -> None:
    found = found_on_node(plant)
    assert any(text.startswith(level_and_text) for text in found), found


def test_a_sound_node_is_fit_and_one_that_hangs_answers_in_time() -> None:
    assert not [text for text in found_on_node(nothing, 3) if text.startswith("error")]
    assert "error device: local rank 1: does not answer" in found_on_node(hanging_product, 2, 0.5)


@pytest.mark.parametrize("key", ["data.shards", "run_dir"])
def test_what_a_run_reads_and_writes_is_looked_at(
    key: str, toy_shards: Path, tmp_path: Path
) -> None:
    words = [f"data.shards={toy_shards}", f"run_dir={tmp_path / 'run'}"]
    assert node.shards(loading.load(words)).level == "ok"
    config = loading.load([*words, f"{key}=/proc/nothing"])
    checks = {"data.shards": lambda: node.shards(config)}
    checks["run_dir"] = lambda: node.run_directory(Path(config.run_dir), 1 << 12)
    assert node._bounded("it", checks[key], time.monotonic() + 30).level == "error"


class TwoNodes(Supervisor):
    """A supervisor whose nodes are two addresses of this machine, with an agent on each; the second
    loses its power once.
    """

    def __init__(self, run_dir: Path, arguments: list[str], slurm: FakeSlurm):
        super().__init__("distseg.train", arguments, run_dir)
        self.run_dir, self.slurm = run_dir, slurm

    def _run_nodes(self, label: str, number: int) -> int:
        command = self._command()
        (nodes,) = [word.partition("=")[2] for word in command if "--nodelist=" in word] or [""]
        names = nodes.split(",") if nodes else self.slurm.said("nodes").split()
        words = command[command.index("launchers.agent") + 1 :]
        step = {"SLURM_STEP_NUM_NODES": str(len(names)), "SLURM_STEP_NODELIST": ",".join(names)}
        step |= {attempts.LABEL_VARIABLE: label, supervisor.TRY_VARIABLE: str(number)}
        agents = [
            Program(words, step | {"SLURM_NODEID": str(place)}, agent_of_node)
            for place in range(len(names))
        ]
        if len(agents) == 2:
            self._cut_power(agents[1], names[1])
        output = agents[0].communicate()[0]
        self.last_output = output
        return agents[0].returncode or 0

    def _cut_power(self, agent: Program, name: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (self.run_dir / "checkpoints" / "step-00000003").exists():
            assert agent.poll() is None and time.monotonic() < deadline, agent.communicate(1)
            time.sleep(0.02)
        (self.slurm.folder / f"dead-{name}").touch()
        os.kill(agent.pid, signal.SIGSTOP)  # it notes nothing of its rank
        tell_ranks(agent.pid, signal.SIGKILL)
        agent.kill()


# tests/slurm has it on a real cluster
@pytest.mark.slow
def test_a_run_goes_on_without_a_node_that_is_gone_for_good(
    toy_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["127.0.0.1", "127.0.0.2"]
    slurm = FakeSlurm(tmp_path / "bin", monkeypatch, names)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.1)
    for name, value in (("DISTSEG_MIN_NODES", "1"), ("DISTSEG_RANKS_PER_NODE", "1")):
        monkeypatch.setenv(name, value)
    overrides = [*SMALL, f"data.shards={toy_shards}", "segmentor.batch_norm=synchronised"]
    overrides += ["evaluate.every_steps=0", "data.crop_px=32", "parallel.timeout_seconds=40"]
    for network in ("segmentor", "discriminator"):  # AdamW makes much of rounding
        overrides += [f"{network}_optimizer.name=sgd", f"{network}_optimizer.lr=0.03"]
    alone = Job(1, ["train", *overrides, f"run_dir={tmp_path / 'alone'}"], bare)
    run_dir = tmp_path / "run"
    run = TwoNodes(run_dir, [*overrides, f"run_dir={run_dir}"], slurm)
    assert run.run() == Decision("done", "done"), run.last_output
    first, second = attempts.read(run_dir)
    assert (first.outcome, first.world_size) == ("failed", 2)
    assert (second.outcome, second.world_size, second.last_step) == ("done", 1, 12)
    assert second.first_step is not None and 3 <= second.first_step < 12
    assert slurm.said() == f"update JobId={os.getpid()} NodeList={names[0]}\n"
    assert alone.communicate() and alone.returncode == 0
    for path in (run_dir / "checkpoints" / "step-00000012").glob("*.network.safetensors"):
        expected = load_file(tmp_path / "alone" / path.relative_to(run_dir))
        for name, tensor in load_file(path).items():
            far = (tensor.double() - expected[name].double()).abs().max()
            assert far < 1e-4, (path.name, name, far)
