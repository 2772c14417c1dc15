"""attempts.jsonl: what is read is what happened, also after kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from distseg.runs import attempts
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
