"""What a rank makes of the beats of all, with clocks and ranks of the test's own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distseg.distributed import beats
from distseg.distributed.beats import Beat, Beats
from distseg.distributed.ranks import Ranks

PATIENCE = 23.0  # seconds, and an interval of one


def job(num_ranks: int) -> list[Beats]:
    """Of each rank, over one store."""
    store: Any = dist.HashStore()
    ranks = [Ranks(rank, num_ranks, 0, torch.device("cpu")) for rank in range(num_ranks)]
    return [Beats(each, store, 1.0, PATIENCE) for each in ranks]


def beat(number: int) -> Beat:
    return Beat(number, 1, "step 7", "host", is_done=False, has_left=False)


def test_ranks_one_behind_the_other_are_named_together_and_those_that_live_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, clock = job(5), [0.0]
    said: dict[int, int] = {}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for second in range(40):
        clock[0] = float(second)
        for rank in {0, 3, 4} if second >= 5 else range(5):
            members[rank].publish(beat(second))
        for rank in (0, 3, 4):
            diagnosis = members[rank].diagnosis("step 7", 0.0)
            if diagnosis:
                said.setdefault(rank, second)
                assert "rank 2" in diagnosis and "rank 1 " in diagnosis
                assert "rank 0" not in diagnosis and "have not answered for 23 s" in diagnosis
    # by the one that looks after rank 2, after `PATIENCE` since its last beat
    assert said == {3: 28}


def test_a_rank_that_is_late_behind_a_silent_one_is_not_accused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, clock, diagnosis = job(4), [0.0], ""
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for clock[0] in map(float, range(25)):
        for rank, last in ((0, 24), (1, 20), (2, 0)):
            if clock[0] <= last:
                members[rank].publish(beat(int(clock[0])))
        diagnosis = members[3].diagnosis("step 7", 0.0)
    assert diagnosis == "rank 2 on host (last heard of at step 7) has not answered for 23 s"


def test_of_a_stall_and_of_a_broken_collective_one_rank_reads_all_beats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(beats, "MIN_LISTENING_SECONDS", 0.2)
    members, read = job(8), Beats.of_all
    readers: list[int] = []
    for member in members:
        member._interval = 0.0
        member.publish(beat(0))
        member.count(is_active=True)
    for member in members:
        member.count(is_active=False)

    def counted(self: Beats) -> Any:
        readers.append(self._ranks.rank)
        return read(self)

    monkeypatch.setattr(Beats, "of_all", counted)
    assert [bool(member.stall("step 7")) for member in members] == [True] + 7 * [False]
    assert members[0].stall("step 7") and readers == [0, 0], "as long as the stall lasts"
    members[3].count(is_active=True)
    for member in members:
        member.count(is_active=False)
    assert members[5].stall("step 7") and readers[-1] == 5, "another stall, another reader"
    readers.clear()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(Beats.silent, members))
    assert len(set(readers)) == 1 and len(readers) == 2, "before and after"
    assert all(answer == found[0] for answer in found) and len(found[0] or ()) == 7
