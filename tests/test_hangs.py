"""Of a job that hangs, the summary names the collective, who waits in it, who has not come, and the
line of code at which each rank is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import re
import signal
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distseg.distributed import beats
from distseg.distributed import watchdog as watchdog_module
from distseg.distributed.bounded import in_time
from distseg.distributed.compat import flight_record
from distseg.distributed.hangs import (
    Collective,
    Record,
    lines_of,
    record,
    summary,
    tell_crashes,
)
from distseg.distributed.ranks import Ranks, all_reduce_sum, setup
from distseg.distributed.watchdog import LOST_RANK_EXIT_CODE, Watchdog
from tests.ranks import CONTEXT, PATIENCE, environments, run_ranks

SHORT = 2.0 * min(PATIENCE, 5)
CASES = ("skips a collective", "loops", "its disk blocks")


def loop_until(left: list[int]) -> None:
    """In Python, until the watchdog has ended the job."""
    while not left:
        pass


def read_slowly(path: Path) -> None:
    """Of a file whose storage answers no more: a FIFO that nobody writes to."""
    path.read_bytes()


def skip(left: list[int]) -> None:
    """Do not take part, and wait as at the end of a run."""
    while not left:
        time.sleep(0.01)


def hang(ranks: Ranks, case: str, folder: Path) -> dict[str, Any]:
    """All wait for rank 1 in a sum of three numbers; what is said."""
    # no record is waited for in vain
    watchdog_module._MIN_EVIDENCE_SECONDS = 30 * PATIENCE
    left, said = [], io.StringIO()
    fifo = folder / "fifo"

    def leave(code: int) -> None:
        left.append(code)
        # lets rank 1's main thread go on
        if ranks.rank == 1 and case == "its disk blocks":
            os.close(os.open(fifo, os.O_WRONLY))

    with contextlib.redirect_stderr(said), Watchdog(ranks, SHORT, leave) as watchdog:
        watchdog.leave_evidence_in(folder / case)
        watchdog.report("step 7")
        all_reduce_sum(torch.zeros(2))
        number = flight_record()[-1]["collective_seq_id"] + 1
        if ranks.rank == 1:
            # the others are waiting by now
            time.sleep(0.1)
            if case == "loops":
                loop_until(left)
            elif case == "its disk blocks":
                read_slowly(fifo)
            else:
                skip(left)
            # or the others would be somewhere else as they write down where they are
            while not all((folder / case / f"rank-{rank}.json").exists() for rank in range(3)):
                time.sleep(0.01)
        all_reduce_sum(torch.zeros(3))
        while not left:
            time.sleep(0.01)
    return {"number": number, "said": said.getvalue(), "left": left}


def hang_in_each_way(ranks: Ranks, folder: Path) -> dict[str, Any]:
    found = {}
    for case in CASES:
        found[case] = hang(ranks, case, folder)
        dist.barrier()  # none begins the next before all have left
    return found


def line_of(word: str) -> int:
    """The line of this file that has a word."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if word in line)


def test_the_summary_names_the_rank_and_the_place_of_each_kind_of_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    found = run_ranks(3, hang_in_each_way, tmp_path)
    functions = {"loops": "loop_until", "its disk blocks": "read_slowly"}
    for case in CASES:
        for of_rank in found:
            assert of_rank[case]["left"] == [LOST_RANK_EXIT_CODE]
        folder = tmp_path / case
        content = json.loads((folder / "summary.json").read_text())
        assert "moved on for" in content["diagnosis"] and content["silent"] == []
        (wait,) = content["waits"]
        assert wait["number"] == found[0][case]["number"]
        (way,) = wait["entered"]
        assert way["what"] == "all_reduce of Float [3]" and way["ranks"] == [0, 2]
        line = line_of("all_reduce_sum(torch.zeros(3))")
        assert f"tests/test_hangs.py:{line} in hang" in way["at"]
        assert wait["not_entered"] == [1]
        name = functions.get(case, "skip")
        assert re.fullmatch(rf"tests/test_hangs.py:\d+ in {name}", content["at"]["1"][0])
        text = (folder / "summary.txt").read_text()
        assert f"collective {wait['number']} of group 0 default_pg gloo\n" in text
        assert "not entered by rank 1\n" in text and "rank 1 at tests/test_hangs.py:" in text
        # one of the ranks has printed it, for the job's log
        assert [text in of_rank[case]["said"] for of_rank in found].count(True) == 1
        for rank in range(3):
            stacks = (folder / f"rank-{rank}.stacks.txt").read_text()
            assert f"in {name if rank == 1 else 'all_reduce_sum'}\n" in stacks
            entered = json.loads((folder / f"rank-{rank}.collectives.json").read_text())
            assert entered[-1]["collective_seq_id"] >= wait["number"] - 1


def lose(environment: dict[str, str], number: signal.Signals, folder: Path, lost: int) -> None:
    """One rank of three, which all wait for each other when one is lost."""
    os.environ.update(environment)
    with (folder / f"said-{environment['RANK']}").open("w") as file:
        os.dup2(file.fileno(), 2)
    # the error of a lost connection is looked into before the stall is seen
    beats.MIN_LISTENING_SECONDS = 0.2
    watchdog_module._MIN_EVIDENCE_SECONDS = 4 * PATIENCE
    ranks = setup("cpu", 60 * PATIENCE)
    with Watchdog(ranks, SHORT) as watchdog:
        watchdog.leave_evidence_in(folder / "hang")
        watchdog.report("step 7")
        all_reduce_sum(torch.zeros(2))
        if ranks.rank == lost:
            # every rank has been heard of, and the others are waiting
            time.sleep(SHORT / 10)
            os.kill(os.getpid(), number)
        all_reduce_sum(torch.zeros(3))


@pytest.mark.parametrize(
    ("number", "lost"), [(signal.SIGSTOP, 1), (signal.SIGSTOP, 0), (signal.SIGKILL, 1)]
)
def test_of_a_rank_that_is_lost_the_others_say_where_they_wait_for_it(
    number: signal.Signals, lost: int, tmp_path: Path
) -> None:
    processes = []
    for environment in environments(3):
        target = (environment, number, tmp_path, lost)
        processes.append(CONTEXT.Process(target=lose, args=target))
        processes[-1].start()
    others = [rank for rank in range(3) if rank != lost]
    for rank in others:
        processes[rank].join(60 * PATIENCE)
    for process in processes:
        process.kill()
    content = json.loads((tmp_path / "hang" / "summary.json").read_text())
    # the verdict may be that nobody gets further; the summary names the rank all the same
    assert content["diagnosis"] and content["silent"] == [lost]
    (wait,) = content["waits"]
    (way,) = wait["entered"]
    assert way["ranks"] == others and way["what"] == "all_reduce of Float [3]"
    assert " in lose" in way["at"] and wait["not_entered"] == []
    for rank in others:
        assert any(" in lose" in place for place in content["at"][str(rank)])
    text = (tmp_path / "hang" / "summary.txt").read_text()
    assert f"nothing was left by rank {lost}: killed, stopped" in text


def differ(environment: dict[str, str], out: Path) -> None:
    """One of two ranks, which sum up different numbers of numbers."""
    os.environ.update(environment)
    # as a process that was not forked from one of tests has it
    faulthandler.disable()
    with out.open("w") as file:
        os.dup2(file.fileno(), 2)
    ranks = setup("cpu", 60 * PATIENCE)
    tell_crashes()
    all_reduce_sum(torch.zeros(1 if ranks.rank else 1000))


def test_a_rank_that_gloo_ends_says_where_it_was(tmp_path: Path) -> None:
    processes = []
    for environment in environments(2):
        out = tmp_path / environment["RANK"]
        processes.append(CONTEXT.Process(target=differ, args=(environment, out)))
        processes[-1].start()
    # which of the two depends on whose numbers come first, and on how many there are
    connection.wait([process.sentinel for process in processes], 60 * PATIENCE)
    ended = [rank for rank in range(2) if processes[rank].exitcode == -signal.SIGABRT]
    for process in processes:
        process.kill()
    assert ended
    for rank in ended:
        said = (tmp_path / str(rank)).read_text()
        assert "Fatal Python error: Aborted" in said and "test_hangs.py" in said
        assert " in differ\n" in said


def test_where_nothing_can_be_written_the_log_has_the_place(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    alone = Watchdog(Ranks(0, 1, 0, torch.device("cpu")), SHORT)
    alone.leave_evidence_in(tmp_path / "file" / "hang")
    alone._leave_evidence("rank 1 is gone")
    said = capsys.readouterr().err
    assert said.startswith("rank 0: where it is could not be written (")
    assert "in test_where_nothing_can_be_written" in said


def of_rank(rank: int, *entered: tuple[int, str, bool]) -> Record:
    collectives = [
        Collective(number, what, is_open, "a.py:1 in f") for number, what, is_open in entered
    ]
    return Record(rank, "host", "step 7", ["b.py:2 in g"], {"0 default_pg gloo": collectives})


def test_ranks_that_are_at_different_collectives_are_told_apart() -> None:
    sum_, gather = "all_reduce of Float [3]", "all_gather of Long [1]"
    records = {
        0: of_rank(0, (4, sum_, False), (5, sum_, True)),
        1: of_rank(1, (4, sum_, False), (5, gather, True)),
        2: of_rank(2, (5, sum_, True)),
    }
    (wait,) = summary(records, 3, "stall")["waits"]
    assert wait["number"] == 5 and wait["not_entered"] == []
    assert [(way["what"], way["ranks"]) for way in wait["entered"]] == [
        (sum_, [0, 2]),
        (gather, [1]),
    ]
    # of one that skipped several, the first that it did not enter
    records[1] = of_rank(1, (3, sum_, False))
    (wait,) = summary(records, 3, "stall")["waits"]
    assert wait["number"] == 4 and wait["not_entered"] == [1]
    # of one that has not come to the first of all
    (wait,) = summary({0: records[0], 3: Record(3, "a", "start", [])}, 4, "stall")["waits"]
    assert wait["not_entered"] == [3]
    # where none waits for another, the places alone tell
    quiet = {rank: of_rank(rank, (4, sum_, False)) for rank in range(3)}
    found = summary(quiet, 5, "stall")
    assert found["waits"] == [] and found["silent"] == [3, 4]
    text = "\n".join(lines_of(found))
    assert "no rank is known to wait" in text and "3 ranks (0-2) at b.py:2 in g" in text
    assert "nothing was left by 2 ranks (3-4)" in text


def test_a_record_is_sent_as_it_is_and_knows_where_an_error_came_from() -> None:
    def fails() -> None:
        raise RuntimeError("gloo: connection closed")

    with pytest.raises(RuntimeError) as raised:
        fails()
    own = record(3, "step 7", raised.value)
    assert own.places[0].endswith(" in fails") and "test_hangs.py" in own.places[1]
    assert Record.of_json(own.to_json()) == own
    elsewhere = in_time(10, record, 3, "step 7").places
    assert elsewhere[0].startswith("distseg/distributed/bounded.py:")
    assert "in test_a_record_is_sent" in elsewhere[1]
    sent = of_rank(1, (4, "all_reduce of Float [3]", True))
    assert Record.of_json(sent.to_json()) == sent
