"""What can happen to a job of slurm/train_voc.sh, each on a cluster of its own.

The run comes back from all of it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

from distseg.runs import goodput
from tests.slurm.cluster import Cluster
from tests.slurm.runs import STEPS, Run, wait_until

Scenario = Callable[[Run, Cluster], object]
# They begin in this order, some at a time. Those with most starts and longest waits come first, or
# the last of them would be waited for alone.
SCENARIOS: dict[str, Scenario] = {}
# The cluster of one of them, where it is not as usual: the fields of Cluster
CLUSTERS: dict[str, dict[str, int]] = {}
LOOK = {"DISTSEG_HEALTH_SECONDS": "120"}  # at the nodes, before each start


def scenario(function: Scenario) -> Scenario:
    """Enter a function under its name. It is called with a new run on a new cluster."""
    SCENARIOS[function.__name__] = function
    return function


@scenario
def left_alone(run: Run, cluster: Cluster) -> dict[str, bytes]:
    run.sbatch()
    assert run.wait()["Restarts"] == "0"
    assert [attempt.outcome for attempt in run.attempts()] == ["done"]
    return run.parameters()  # what all others must end with


@scenario
def the_time_limit_twice(run: Run, cluster: Cluster) -> None:
    # the limit is moved near once the run is where it should be hit: how fast that is depends on
    # the machine
    steps = (4, 8)
    for step in steps:
        run.hold(step)
    # the limit is then 60 to 120 s away, and SLURM looks every 30 s: with so long a warning the
    # next look is the signal, and at least 30 s are left to save
    run.sbatch(options=("--time=60", "--signal=B:USR1@110"))
    for count, step in enumerate(steps, 1):
        run.wait_at(step)
        minutes = run.show()["RunTime"].split(":")[-2]
        cluster.run("scontrol", "update", f"job={run.job}", f"TimeLimit={int(minutes) + 2}")
        wait_until(lambda count=count: run.output().count("told to stop") == count, run.describe)
        run.release(step)
        wait_until(lambda count=count: run.show().get("Restarts") == str(count), run.describe)
        cluster.run("scontrol", "update", f"job={run.job}", "TimeLimit=60")
    run.wait()
    assert [attempt.outcome for attempt in run.attempts()] == ["stopped", "stopped", "done"]
    found = goodput.of_run(run.run_dir)
    assert found is not None and found.num_attempts == 3
    first, *_, last = run.attempts()
    # the parts add up to the time that the job was there, to 2 %
    assert first.began is not None and last.ended is not None
    assert abs(found.wall_seconds - (last.ended - first.began)) < 0.02 * found.wall_seconds
    assert abs(found.share("unknown")) < 0.02 and found.share("repeated") == 0, found.text()
    assert min(found.share("start"), found.share("between"), found.share()) > 0, found.text()
    run.check_finished()


@scenario
def a_node_that_is_not_fit_and_one_that_is_gone_for_good(run: Run, cluster: Cluster) -> None:
    (run.folder / "wrong-node1").touch()
    run.hold(5)
    # of which two divide the batch of four
    run.sbatch(options=("--nodes=3",), variables=LOOK | {"DISTSEG_MIN_NODES": "1"})
    run.wait_at(5)
    assert run.said("node1 is not fit: device: local rank 0: cpu multiplies wrongly: 1 of 65536")
    assert run.attempts()[0].hosts == ["node2", "node3"]
    cluster.cut_power("node3")
    run.release(5)
    assert run.wait()["Restarts"] == "0", "SLURM has not noticed, or does not mind"
    first, second = run.attempts()
    assert first.outcome == "failed" and second.outcome == "done", run.describe()
    assert second.hosts == ["node2"] and second.world_size == 1 and second.first_step == 3
    assert second.last_step == STEPS and run.said("node3 is not fit: ")


CLUSTERS["a_node_that_is_not_fit_and_one_that_is_gone_for_good"] = {"slurmd_timeout": 300}


@scenario
def a_power_cut(run: Run, cluster: Cluster) -> None:
    run.hold(5)
    run.sbatch()
    run.wait_at(5)
    node = run.attempts()[0].hosts[-1]
    cluster.cut_power(node)
    run.release(5)
    run.wait()
    assert node not in run.attempts()[-1].hosts and run.attempts()[-1].first_step in (3, 4, 5)
    cluster.boot(node)
    run.check_finished()


@scenario
def a_dead_slurmd(run: Run, cluster: Cluster) -> None:
    run.hold(5)
    run.sbatch()
    run.wait_at(5)
    node = run.attempts()[0].hosts[-1]
    cluster.kill_daemon(node)
    wait_until(
        lambda: run.show()["JobState"] != "RUNNING" or run.show()["Restarts"] != "0", run.describe
    )
    run.release(5)
    run.wait()
    cluster.boot(node)
    run.check_finished()


@scenario
def turns_in_which_no_step_is_saved_come_to_an_end(run: Run, cluster: Cluster) -> None:
    # ranks that are still starting do not hear a signal, and are killed a second after it
    run.sbatch(options=("--nodes=1",), variables={"DISTSEG_STOP_SECONDS": "1"})
    for turn in range(1, 4):
        wait_until(lambda turn=turn: run.turns() == turn, run.describe)
        cluster.run("scancel", "--batch", "--signal=USR1", run.job)
        wait_until(lambda turn=turn: run.output().count("told to stop") >= turn, run.describe)
    assert run.wait("FAILED")["Restarts"] == "2"
    assert run.said("3 turns in a row saved no step after 0: give a turn more time")


@scenario
def what_fails_at_the_same_step_again_and_again_ends(run: Run, cluster: Cluster) -> None:
    (run.folder / "crash-5").touch()
    run.sbatch(options=("--nodes=1",))
    assert run.wait("FAILED")["ExitCode"] == "1:0"
    assert [attempt.first_step for attempt in run.attempts()] == [0, 3, 3, 3]
    assert run.attempts()[-1].reason == "RuntimeError: this step is to fail: 5"
    assert run.show()["Restarts"] == "0" and run.said("3 failures in a row at step 3")


@scenario
def whole_nodes_with_a_rank_for_each_gpu_train_and_evaluate(run: Run, cluster: Cluster) -> None:
    run.sbatch(options=("--exclusive", "--mem=0"), variables={"DISTSEG_RANKS_PER_NODE": ""})
    assert run.wait()["ExitCode"] == "0:0"
    (attempt,) = run.attempts()
    assert attempt.world_size == 4 and attempt.hosts == ["node1", "node2"]
    scores = json.loads((run.run_dir / "evaluation.json").read_text())
    assert scores["step"] == STEPS and scores["num_images"] == 4


@scenario
def a_rank_that_is_killed(run: Run, cluster: Cluster) -> None:
    run.hold(5)
    run.sbatch()
    run.wait_at(5)
    (node, *_) = run.attempts()[0].hosts[::-1]
    os.kill(cluster.ranks(node)[0], signal.SIGKILL)
    run.release(5)
    assert run.wait()["Restarts"] == "0", "it has its nodes still, and starts them again"
    first, second = run.attempts()
    assert first.outcome == "failed" and -signal.SIGKILL in first.exit_codes
    assert second.first_step == 3, "the last checkpoint"
    run.check_finished()


@scenario
def preemption_with_a_grace_time(run: Run, cluster: Cluster) -> None:
    run.hold(5)
    run.sbatch()
    run.wait_at(5)
    urgent = cluster.run(
        *(
            "sbatch",
            "--parsable",
            "--partition=urgent",
            "--nodes=4",
            "--exclusive",
            "--output=/dev/null",
        ),
        *("--wrap", "sleep 1"),
    ).strip()
    wait_until(lambda: run.show().get("PreemptTime", "None") != "None", run.describe)
    time.sleep(1)  # the ranks alone are told, by SIGTERM
    run.release(5)
    run.wait()
    assert run.show()["Restarts"] == "1" and "COMPLETED" in cluster.run(
        "scontrol", "show", "job", urgent
    )
    assert run.attempts()[0].outcome == "stopped" and run.attempts()[0].last_step in (5, 6)
    run.check_finished()


@scenario
def a_node_that_is_not_fit_and_a_requeue_by_an_administrator(run: Run, cluster: Cluster) -> None:
    (run.folder / "wrong-node1").touch()
    run.hold(5)
    run.sbatch(variables=LOOK)
    run.wait_at(5)
    # it came back by itself, on other nodes, before any rank was started
    assert run.show()["Restarts"] == "1" and run.show()["ExcNodeList"] == "node1"
    assert [attempt.hosts for attempt in run.attempts()] == [["node2", "node3"]]
    cluster.run("scontrol", "requeue", run.job)
    run.release(5)
    run.wait()
    assert run.show()["Restarts"] == "2"
    run.check_finished()


@scenario
def a_signal_by_hand_and_a_cancelled_job(run: Run, cluster: Cluster) -> None:
    run.hold(5)
    run.hold(8)
    run.sbatch()
    run.wait_at(5)
    cluster.run("scancel", "--signal=USR1", run.job)
    time.sleep(1)
    run.release(5)
    run.wait_at(8)
    assert run.show()["Restarts"] == "1" and run.attempts()[0].outcome == "stopped"
    cluster.run("scancel", run.job)
    run.release(8)
    run.wait("CANCELLED")
    time.sleep(2)
    assert run.show()["Restarts"] == "1", "what a user cancels stays cancelled"


@scenario
def bad_input_is_not_tried_again(run: Run, cluster: Cluster) -> None:
    run.sbatch("batch_size=5")
    assert run.wait("FAILED")["ExitCode"] == "2:0"
    assert run.show()["Restarts"] == "0" and run.said("error: batch_size=5 for 2 ranks")
    assert not run.attempts()


@scenario
def two_jobs_on_a_node_one_of_them_from_within_an_allocation(run: Run, cluster: Cluster) -> None:
    # whose options of steps exclude the job's --mem, and ask for GPUs that it has not
    within = ("salloc", "--ntasks=1", "--mem-per-cpu=50", "--gpus-per-node=1", "srun")
    runs = [run, run.another()]
    for run, before in zip(runs, ((), within), strict=True):
        run.hold(2)
        run.sbatch(
            options=("--nodes=1", "--nodelist=node1"),
            variables={"DISTSEG_RANKS_PER_NODE": "2"},
            before=before,
        )
    for run in runs:
        run.wait_at(2)  # both are there at once
    for run in runs:
        run.release(2)
    for run in runs:
        run.wait()
        assert run.attempts()[0].hosts == ["node1"] and run.attempts()[0].world_size == 2
