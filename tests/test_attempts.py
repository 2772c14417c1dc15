"""attempts.jsonl: what is read is what happened, also after kills."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from distseg.distributed.ranks import Ranks
from distseg.distributed.watchdog import LostRankError, Watchdog
from distseg.runs import attempts
from distseg.runs.ledger import Ledger
from distseg.train.attempt import noted
from shards.errors import InputError


def test_attempts_that_were_stopped_killed_refused_and_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(attempts.LABEL_VARIABLE, "job 7, restart 0, try 1")
    attempts.Note(tmp_path, ["a", "a", "b"], 0).finish(5, "stopped", "SIGUSR1 here")
    monkeypatch.setenv(attempts.LABEL_VARIABLE, "job 7, restart 1, try 1")
    attempts.Note(tmp_path, ["a", "b"], 5)
    attempts.note_failure(tmp_path, "b", 1, -9)
    attempts.note_failure(tmp_path, "a", 0, 75)
    with (tmp_path / attempts.FILE_NAME).open("a") as file:
        file.write('{"event": "end", "ste\n')  # a kill's
    monkeypatch.setenv(attempts.LABEL_VARIABLE, "job 7, restart 1, try 2")
    attempts.note_failure(tmp_path, "b", 1, 1)  # before it had begun
    monkeypatch.delenv(attempts.LABEL_VARIABLE)  # two by hand
    attempts.Note(tmp_path, ["a"], 5).fail(6, InputError("a full disk", "room", "make some"))
    attempts.Note(tmp_path, ["a"], 5)
    stopped, lost, early, refused, killed = attempts.read(tmp_path)
    assert (stopped.hosts, stopped.world_size, stopped.first_step, stopped.last_step) == (
        ["a", "b"],
        3,
        0,
        5,
    )
    assert (stopped.outcome, stopped.reason) == ("stopped", "SIGUSR1 here")
    assert (lost.outcome, lost.reason) == (
        "failed",
        "rank 1 on b: killed by signal 9",
    ) and lost.exit_codes == [-9, 75]
    assert early.first_step is None and early.exit_codes == [1]
    assert (refused.outcome, refused.reason, refused.last_step) == ("refused", "a full disk", 6)
    assert (killed.outcome, killed.ended) == ("killed", None)


def test_an_end_belongs_to_the_start_of_its_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(attempts.LABEL_VARIABLE, "job 7")
    note = attempts.Note(tmp_path, ["a"], 0)
    monkeypatch.setenv(attempts.LABEL_VARIABLE, "job 8")  # refused, as the run is being trained
    attempts.note_failure(tmp_path, "b", 0, 2)
    monkeypatch.setenv(attempts.LABEL_VARIABLE, "job 7")
    note.finish(9, "done")
    first, second = attempts.read(tmp_path)
    assert (first.label, first.outcome, first.last_step) == ("job 7", "done", 9)
    assert (second.label, second.outcome, second.exit_codes) == ("job 8", "failed", [2])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    attempts.Note(None, ["a"], 0).finish(1, "done")
    assert attempts.read(tmp_path) == [] and not list(tmp_path.iterdir())


def test_an_attempt_has_one_end(tmp_path: Path) -> None:
    note = attempts.Note(tmp_path, ["a", "b"], 0)
    # as when a rank is lost: its collective fails, and the watchdog's thread has found out
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda step: note.finish(step, "failed", "rank 1 is gone"), range(8)))
    note.fail(9, RuntimeError("Connection closed by peer"))
    lines = (tmp_path / attempts.FILE_NAME).read_text().splitlines()
    assert ["end" in line for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (RuntimeError("[gloo] Connection closed by peer"), "failed", "rank 1 on b has failed: x"),
        (InputError("bad", "good", "mend"), "refused", "bad"),
        (KeyboardInterrupt(), "killed", ""),
        (SystemExit(0), "failed", "RuntimeError: SystemExit: 0"),
    ],
)
def test_of_a_lost_rank_the_watchdogs_words_are_noted(
    error: BaseException, outcome: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = Watchdog(Ranks(0, 1, 0, torch.device("cpu")), 5.0)
    lost = LostRankError("rank 1 on b has failed: x")
    monkeypatch.setattr(watchdog, "explain", lambda e: lost if isinstance(e, RuntimeError) else e)
    trainer = MagicMock(
        ranks=watchdog._ranks,
        watchdog=watchdog,
        config=SimpleNamespace(run_dir=str(tmp_path)),
        ledger=Ledger(),
    )
    trainer.state.step = 4
    ends = pytest.raises((LostRankError, InputError, KeyboardInterrupt))
    with ends, watchdog, noted(trainer, MagicMock()):
        raise error
    text = (tmp_path / attempts.FILE_NAME).read_text()
    assert text.count('"end"') == (outcome != "killed")
    (attempt,) = attempts.read(tmp_path)
    assert (attempt.outcome, attempt.reason) == (outcome, reason)
