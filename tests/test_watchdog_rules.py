"""The watchdog's rules, each by itself: ranks of one process that share a store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distseg.distributed import beats
from distseg.distributed import watchdog as module
from distseg.distributed.ranks import Ranks, shared_error
from distseg.distributed.watchdog import (
    LOST_RANK_EXIT_CODE,
    Diagnosis,
    Watchdog,
    is_of_lost_peer,
)
from tests.ranks import PATIENCE

SECONDS = 2.0 * PATIENCE  # the timeout
WAITED = f"for {23 / 32 * SECONDS:.0f} s"  # less nine intervals of a 32nd


class Job:
    """Ranks in threads of one process, and what each said and left with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.store = dist.HashStore()
        self.left: dict[int, int] = {}
        self.said: dict[int, str] = {}
        self._members: list[Watchdog] = []
        monkeypatch.setattr(module, "own_store", lambda ranks, seconds: self.store)
        monkeypatch.setattr(module, "set_collective_timeout", lambda seconds: None)

    def rank(self, number: int, of: int = 3) -> Watchdog:
        ranks = Ranks(number, of, 0, torch.device("cpu"))
        member = Watchdog(ranks, SECONDS, lambda code: self.left.update({number: code}))
        member.last_words = lambda diagnosis: self.said.update({number: diagnosis})
        self._members.append(member)
        return member

    def wait(self, number: int) -> float:
        """Seconds until a rank has left."""
        start = time.monotonic()
        while number not in self.left and time.monotonic() < start + 3 * SECONDS:
            time.sleep(0.01)
        return time.monotonic() - start

    def close(self) -> None:
        for member in self._members:
            member._closed.set()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    job = Job(monkeypatch)
    yield job
    job.close()


def busy(*members: Watchdog, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for member in members:
            member.keep_alive()
        time.sleep(0.02)


def test_a_neighbour_without_beats_is_named_though_the_others_move_on(job: Job) -> None:
    """Nothing stalls, so only the search for a silent neighbour can find it."""
    first, second, third = (job.rank(number) for number in range(3))
    second.report("step 4")
    busy(first, second, third, seconds=0.15 * SECONDS)
    second._closed.set()  # its thread ends as that of a process that was stopped
    busy(first, third, seconds=0.95 * SECONDS)
    assert job.left.get(2) == LOST_RANK_EXIT_CODE
    assert job.said[2].startswith("rank 1 on ")
    assert f"(last heard of at step 4) has not answered {WAITED}" in job.said[2]


def test_one_that_is_done_may_be_silent(job: Job) -> None:
    first, second, third = (job.rank(number) for number in range(3))
    second.close()
    busy(first, third, seconds=0.95 * SECONDS)
    assert not job.left


def test_the_rank_that_has_begun_the_least_is_the_one_that_stalls(job: Job) -> None:
    members = [job.rank(number) for number in range(3)]
    for member in members:
        member.report("step 7")
    for member in members[:2]:
        member.report("step 8")
    seconds = job.wait(0)
    assert 0.6 * SECONDS < seconds < 1.5 * SECONDS and job.left[0] == LOST_RANK_EXIT_CODE
    assert job.said[0].startswith("rank 2 on ") and "at step 7) has not moved on" in job.said[0]


def test_where_all_are_as_far_none_is_accused(job: Job) -> None:
    members = [job.rank(number) for number in range(3)]
    for member in members:
        member.report("step 7")
    job.wait(1)
    assert job.said[1] == f"no rank has moved on {WAITED}; all are at step 7"


def test_whom_those_that_are_done_wait_for_is_named(job: Job) -> None:
    first, others = job.rank(0), [job.rank(number) for number in (1, 2)]
    for member in (first, *others):
        member.report("step 7")
    for member in others:
        member.report("evaluation")
        member.done()
    first.report("pictures")
    job.wait(1)
    assert job.said[1].startswith("rank 0 on ") and "at pictures) has not moved on" in job.said[1]


def test_a_job_that_was_stopped_as_a_whole_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [job.rank(number) for number in range(3)]
    busy(*members, seconds=0.3 * SECONDS)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 10 * SECONDS)
    until = now() + 0.5 * SECONDS
    while now() < until:
        members[0].keep_alive()
        time.sleep(0.02)
    assert not job.left


def test_who_has_stood_still_for_so_long_that_others_could_seem_silent_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    member = Watchdog(Ranks(1, 1, 0, torch.device("cpu")), 320.0)  # waits for 275 s, looks every 5
    now = [member._looked_at]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for seconds, expected in ((5.0, False), (255.0, False), (265.0, True), (5.0, False)):
        now[0] += seconds
        assert member._was_stopped() == expected


def test_who_waits_long_for_the_others_at_the_end_asks_less_often(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Watchdog(Ranks(1, 1, 0, torch.device("cpu")), 320.0)  # intervals of 5 s
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    # often at first, so that a rank that is lost in the first seconds can be named
    for member._num_beats, seconds in ((0, 0.0), (3, 1.5), (100, 5.0)):
        assert member._pause() == seconds
    member._wait_for_all()
    pauses = []
    for now[0] in (100.0, 100.5, 120.0, 140.0, 1000.0):
        pauses.append(member._pause())
    assert pauses == [0.1, 0.1, 2.0, 4.0, 5.0]


def test_the_first_diagnosis_is_everybodys(job: Job) -> None:
    job.rank(1)
    job.store.set("diagnosis", json.dumps(asdict(Diagnosis("rank 9 is gone"))))
    assert job.wait(1) < SECONDS / 2 and job.said[1] == "rank 9 is gone"


def test_of_an_error_of_ones_own_the_others_are_told(job: Job) -> None:
    member = job.rank(1)
    member.report("step 3")
    error = ValueError("no such file\nand more")
    assert member.explain(error) is error
    told = json.loads(job.store.get("diagnosis"))["text"]
    assert told.startswith("rank 1 on ") and told.endswith("(at step 3) has failed: no such file")


def test_of_an_error_that_every_rank_raises_nobody_is_told(job: Job) -> None:
    member, error = job.rank(1), shared_error(ValueError("no such file"))
    assert member.explain(error) is error
    assert not job.store.check(["diagnosis"])


def test_rank_0_leaves_when_the_others_know_that_all_are_done(job: Job) -> None:
    main = job.rank(0)
    main._stop_thread()
    main._is_leaving = True
    job.store.add("ranks that are done", 1)
    assert not main._may_leave()  # and tells that it is done itself
    job.store.add("ranks that are done", 1)
    assert not main._may_leave()
    job.store.add("ranks that have left", 1)
    assert not main._may_leave()
    job.store.add("ranks that have left", 1)
    assert main._may_leave() and not job.left


def test_an_error_that_follows_from_a_diagnosis_does_not_replace_it(job: Job) -> None:
    member = job.rank(1)
    member.report("step 3")
    first = json.dumps(asdict(Diagnosis("rank 9 is gone")))
    job.store.set("diagnosis", first)
    member._tell_own_failure(ValueError("no such file"))
    assert job.store.get("diagnosis").decode() == first


def test_a_rank_that_leaves_waits_for_no_keeper_of_the_store_that_is_stopped(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(module, "end_stopped_torchrun", lambda: ended.append(1))
    monkeypatch.setattr(module, "_MIN_CALL_SECONDS", 0.2)
    member, stopped = job.rank(1), threading.Event()
    member._stop_thread()
    silent: Any = SimpleNamespace(
        check=lambda keys: stopped.wait(60), set=lambda key, value: stopped.wait(60)
    )
    member._store = member._beats._store = silent
    start = time.monotonic()
    member._closed.clear()  # as before its error
    with pytest.raises(ValueError, match="no such file"), member:
        raise ValueError("no such file")
    assert time.monotonic() - start < SECONDS and ended
    stopped.set()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("connection string"), False),
    ],
)
def test_errors_of_a_lost_peer_are_told_by_their_words(error: Exception, expected: bool) -> None:
    assert is_of_lost_peer(error) is expected


@pytest.mark.parametrize("was_heard", [True, False])
def test_a_lost_peers_error_names_who_is_silent(
    job: Job, monkeypatch: pytest.MonkeyPatch, was_heard: bool
) -> None:
    monkeypatch.setattr(beats, "MIN_LISTENING_SECONDS", 0.2)
    member, living = job.rank(1), job.rank(2)
    if was_heard:
        lost = job.rank(0)
        lost.report("step 4")
        lost.close()
        lost._publish_beat()  # its last: not that it is done
    found: Any = member.explain(RuntimeError("gloo: connection reset by peer"))
    assert isinstance(found, module.LostRankError) and living is not None
    assert str(found).startswith("rank 0 on " if was_heard else "rank 0 is gone")
    assert str(found).endswith("(last heard of at step 4) is gone" if was_heard else "is gone")
    assert json.loads(job.store.get("diagnosis"))["text"] == str(found)


def test_a_beat_says_where_a_rank_was(job: Job) -> None:
    member = job.rank(0)
    member.report("step 1")
    member.report("step 2")
    member._publish_beat()
    beat = member._beats.of(0)
    assert beat is not None and beat.activity == "step 2" and beat.num_activities == 2
