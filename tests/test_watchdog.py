"""A rank that is killed, stopped or stuck ends the job on all ranks within the timeout, and is
named.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from distseg.distributed.ranks import Ranks, setup
from distseg.distributed.watchdog import BAD_INPUT_EXIT_CODE, LOST_RANK_EXIT_CODE, Watchdog
from distseg.runs import attempts
from distseg.train.replicas import check_equal
from distseg.train.step import Pair
from shards.errors import InputError
from tests.ranks import CONTEXT, PATIENCE, environments, run_ranks
from tests.test_train import start, wait_for

TIMEOUT = 16 * PATIENCE  # seconds; starting takes several where the machine is busy
SHORT = 2.0 * min(PATIENCE, 5)


def test_a_killed_rank_ends_the_job_and_is_named(toy_shards: Path, tmp_path: Path) -> None:
    settings = [f"parallel.timeout_seconds={TIMEOUT}", "steps=100000", "checkpoint.every_steps=3"]
    job = start(
        3, toy_shards, tmp_path / "run", *settings, "batch_size=6", "evaluate.every_steps=0"
    )
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000006", job)
    processes = job.ranks
    processes[1].send_signal(signal.SIGKILL)
    before = time.monotonic()
    outputs = [processes[rank].communicate()[0] for rank in (0, 2)]
    assert time.monotonic() - before < TIMEOUT
    for rank, output in zip((0, 2), outputs, strict=True):
        assert processes[rank].returncode == LOST_RANK_EXIT_CODE, output
        assert (
            f"error on rank {rank}: rank 1 on " in output and "(last heard of at step " in output
        ), output
        assert "Traceback" not in output
    (attempt,) = attempts.read(tmp_path / "run")
    assert (
        attempt.outcome == "failed"
        and "rank 1 on " in attempt.reason
        and (attempt.last_step or 0) >= 6
    )
    (hang,) = (tmp_path / "run" / "hangs").iterdir()
    content = json.loads((hang / "summary.json").read_text())
    assert content["silent"] == [1] and sorted(content["at"]) == ["0", "2"]
    assert "rank 1 on " in content["diagnosis"] and "distseg/" in content["at"]["0"][-1]
    said = (hang / "summary.txt").read_text()
    assert sum(said in output for output in outputs) == 1


def watch(environment: dict[str, str], who_stops: tuple[int, ...], when: str, out: Path) -> None:
    """One rank of three, of which some stop for good: no rank waits for another, and all others
    give signs of life, so that nothing but the missing beats tells.
    """
    os.environ.update(environment)
    with out.open("w") as file:
        os.dup2(file.fileno(), 2)
    ranks = setup("cpu", 60 * PATIENCE)
    with Watchdog(ranks, SHORT) as watchdog:
        watchdog.report("step 7")
        # every rank has been heard of
        end = time.monotonic() + SHORT / 2
        while time.monotonic() < end:
            watchdog.keep_alive()
            time.sleep(0.02)
        if when == "at the end" and ranks.rank != 0:
            return
        if ranks.rank in who_stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        end = time.monotonic() + 10 * SHORT
        while time.monotonic() < end:
            watchdog.keep_alive()
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("who_stops", "when"), [((0,), "step"), ((0, 1), "step"), ((0,), "at the end")]
)
def test_stopped_ranks_are_named_whoever_keeps_the_store(
    who_stops: tuple[int, ...], when: str, tmp_path: Path
) -> None:
    processes = []
    for rank, environment in enumerate(environments(3)):
        target = (environment, who_stops, when, tmp_path / str(rank))
        processes.append(CONTEXT.Process(target=watch, args=target))
        processes[-1].start()
    for rank in {0, 1, 2} - set(who_stops):
        processes[rank].join(60 * PATIENCE)
    for process in processes:
        process.kill()
    for rank in {0, 1, 2} - set(who_stops):
        said = (tmp_path / str(rank)).read_text()
        assert processes[rank].exitcode == LOST_RANK_EXIT_CODE, said
        # the keeper of the store is what a rank without it can name
        first = f"rank {who_stops[0]} on {socket.gethostname()} (last heard of at step 7)"
        assert f"error on rank {rank}: {first}" in said and "not answered for" in said


def wait_in_vain(ranks: Ranks, case: str) -> tuple[list[int], str, float]:
    """All wait for rank 1, which is busy, stuck or fails.

    How they leave, what is said, and after how many seconds.
    """
    # as a collective's limit would be
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=SHORT))
    left, said, start = [], io.StringIO(), time.monotonic()
    quiet = contextlib.redirect_stderr(said), contextlib.suppress(InputError)
    with quiet[0], quiet[1], Watchdog(ranks, SHORT, left.append) as watchdog:
        watchdog.report("step 7")
        while ranks.rank == 1 and case == "busy" and time.monotonic() < start + 3 * SHORT:
            watchdog.keep_alive()  # as a download's chunks do
            time.sleep(0.05)
        if case == "busy":
            torch.distributed.all_reduce(torch.zeros(1))
        if case == "fails" and ranks.rank == 1:
            raise InputError("damaged", "a whole one", "copy it again")
        if ranks.rank != 1:
            watchdog.report("step 8")
        while case != "busy" and not left and time.monotonic() < start + 8 * SHORT:
            time.sleep(0.01)
    seconds = time.monotonic() - start
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=60 * PATIENCE))
    torch.distributed.barrier()  # none goes before all have heard
    return left, said.getvalue(), seconds


def wait_for_rank_1(ranks: Ranks) -> dict[str, Any]:
    return {case: wait_in_vain(ranks, case) for case in ("busy", "stuck", "fails")}


def test_a_rank_that_downloads_for_long_is_no_stall_and_one_that_fails_or_hangs_is() -> None:
    found = run_ranks(3, wait_for_rank_1)
    for rank, of_rank in enumerate(found):
        left, said, seconds = of_rank["busy"]
        assert (left, said) == ([], "") and seconds > 3 * SHORT
        left, said, seconds = of_rank["stuck"]
        assert (
            left == [LOST_RANK_EXIT_CODE]
            and "rank 1 on " in said
            and "has not moved on for" in said
        )
        assert SHORT / 2 < seconds < 2 * SHORT
        left, said, seconds = of_rank["fails"]
        # with its code, by which a launcher knows bad input; that rank prints its own error
        assert left == ([] if rank == 1 else [BAD_INPUT_EXIT_CODE])
        assert seconds < SHORT and (rank == 1 or "(at step 7) has failed: damaged" in said)


def differ(ranks: Ranks) -> dict[str, str]:
    return {wrong: differ_in(ranks, wrong) for wrong in ("segmentor", "discriminator", "")}


def differ_in(ranks: Ranks, wrong: str) -> str:
    class Learner:
        def __init__(self, network: torch.nn.Module):
            self.network = network

    networks = {name: torch.nn.Linear(3, 2) for name in ("segmentor", "discriminator")}
    for network in networks.values():
        torch.nn.init.constant_(network.weight, 0.5)
        torch.nn.init.zeros_(network.bias)
    if ranks.rank == 2 and wrong:
        networks[wrong].bias.data[1] = 1e-30
    pair: Any = Pair(Learner(networks["segmentor"]), Learner(networks["discriminator"]), None)
    try:
        check_equal(ranks, pair, 7)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_hold_different_networks_are_found() -> None:
    for found in run_ranks(3, differ):
        assert found.pop("") == ""
        for wrong, text in found.items():
            assert f"step 7: the {wrong} of rank 2 differs" in text
