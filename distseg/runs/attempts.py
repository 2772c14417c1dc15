"""attempts.jsonl: how often a run was started, where, from which step, and how each attempt ended.

One JSON object a line, only ever appended. The main rank writes "start", "mark" (how far it is and
where its time has gone, at every checkpoint and once a minute) and "end"; the launcher of a
machine writes "failure" for a rank that ended badly, since a killed rank cannot say so itself. What
a kill tore is skipped.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distseg.runs.ledger import Ledger
from shards.errors import InputError, TemporaryError
from shards.storage import is_file, read_bytes, retried

FILE_NAME = "attempts.jsonl"
# set by a launcher that wants to find its attempt again: "job 12, restart 1, try 2"
LABEL_VARIABLE = "DISTSEG_ATTEMPT"
_BAD_INPUT = 2  # the command's exit code for an InputError
ENDED_WELL = ("done", "stopped")  # outcomes after which nothing is done again
MARK_SECONDS = 60.0  # between two marks beside those of checkpoints


@dataclass(frozen=True)
class Mark:
    """How far an attempt was at a time (Unix seconds), and its seconds by part of ledger.py."""

    step: int
    time: float
    seconds: dict[str, float]


@dataclass
class Attempt:
    """One start of a run. Steps are steps done.

    None: not known, for example because all ranks were killed.
    """

    label: str
    hosts: list[str] = field(default_factory=list)
    world_size: int = 0
    started: float = 0.0  # Unix seconds: when it was noted
    began: float | None = None  # when its process began; None: of an earlier version
    ended: float | None = None
    first_step: int | None = None  # None: it did not get as far as to know
    last_step: int | None = None
    outcome: str = "killed"  # or done, stopped, refused (bad input), failed
    reason: str = ""
    # of ranks that ended badly; -9: killed by signal 9
    exit_codes: list[int] = field(default_factory=list)
    # in order, the first made at the start; an end without an error makes the last
    marks: list[Mark] = field(default_factory=list)


class Note:
    """The main rank's notes on the attempt that it is part of.

    With run_dir None, on the other ranks, nothing.
    """

    def __init__(
        self, run_dir: Path | None, hosts: list[str], step: int, ledger: Ledger | None = None
    ):
        """Note that it goes on from `step`. hosts: of every rank, in order. ledger: of this
        process; None: it begins now.
        """
        self._run_dir, self._ledger = run_dir, ledger or Ledger()
        self._ending, self._is_ended = threading.Lock(), False
        self._marked_at = time.monotonic()
        about = {"hosts": list(dict.fromkeys(hosts)), "world_size": len(hosts)}
        self._write("start", True, **self._mark(step), **about, began=round(self._ledger.began, 3))

    def mark(self, step: int, *, is_saved: bool) -> None:
        """Note how far it is; where nothing was saved not more often than once a minute."""
        # what is saved may be gone on from, so that the time before and after is told apart there
        if is_saved or time.monotonic() - self._marked_at >= MARK_SECONDS:
            self._marked_at = time.monotonic()
            self._write("mark", **self._mark(step))

    def _mark(self, step: int) -> dict[str, Any]:
        return {"step": step, "seconds": self._ledger.seconds()}

    def finish(self, step: int, outcome: str, reason: str = "") -> None:
        """Note how it ended, as in Attempt; of several calls the first counts."""
        # the watchdog's thread notes a lost rank while the main thread fails by the same loss
        with self._ending:
            if not self._is_ended:
                self._is_ended = True
                self._write("end", **self._mark(step), outcome=outcome, reason=reason)

    def fail(self, step: int, error: Exception) -> None:
        """Note that it ended by an exception."""
        if isinstance(error, InputError):
            outcome, text = "refused", error.got
        else:
            outcome, text = "failed", f"{type(error).__name__}: {error}"
        self.finish(step, outcome, (text.splitlines() or [""])[0])

    def _write(self, event: str, makes_folder: bool = False, **values: Any) -> None:
        if self._run_dir is not None:
            _append(self._run_dir, event, makes_folder, **values)


def note_failure(run_dir: Path, host: str, rank: int, exit_code: int) -> None:
    """Note that a rank ended badly; on its machine's launcher."""
    # of bad input the code says all; and a run directory that was moved away is not made anew
    makes_folder = exit_code != _BAD_INPUT
    _append(run_dir, "failure", makes_folder, host=host, rank=rank, exit_code=exit_code)


def read(run_dir: Path) -> list[Attempt]:
    """All attempts in order; [] where there were none."""
    path = run_dir / FILE_NAME
    if not is_file(path):
        return []
    found: list[Attempt] = []
    # a kill can tear a line within a character
    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # torn by a kill
            _add_event(found, json.loads(line))
    return found


def _add_event(found: list[Attempt], line: dict[str, Any]) -> None:
    """Note a line of the file in the attempt that it belongs to, at its end where it is new."""
    label, event = line["label"], line["event"]
    # another start may have come between, of a job that was refused
    # without a label (no launcher set one) the last attempt is meant
    of_label = [attempt for attempt in found if attempt.label == label or not label]
    # a rank can fail before the main one has noted any start
    if event == "start" or not of_label:
        of_label = [Attempt(label, started=line["time"])]
        found += of_label
    attempt = of_label[-1]
    if event == "start":
        attempt.hosts = line["hosts"]
        attempt.world_size = line["world_size"]
        attempt.first_step, attempt.began = line["step"], line.get("began")
    elif event == "end":
        attempt.ended, attempt.last_step = line["time"], line["step"]
        attempt.outcome, attempt.reason = line["outcome"], line["reason"]
    elif event == "failure":
        attempt.exit_codes.append(line["exit_code"])
        # the first rank's failure is the cause, and the main rank's own words say more than a code
        if attempt.ended is None:
            attempt.ended = line["time"]
            attempt.outcome, attempt.reason = "failed", _failure(line)
    # none of an end by an error, before which a rank may have waited long for one that is lost
    if "seconds" in line and line.get("outcome", "done") in ENDED_WELL:
        attempt.marks.append(Mark(line["step"], line["time"], line["seconds"]))


def _failure(line: dict[str, Any]) -> str:
    # as subprocess gives it: below 0 for a signal
    code = line["exit_code"]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"rank {line['rank']} on {line['host']}: {how}"


def _append(run_dir: Path, event: str, makes_folder: bool = False, **values: Any) -> None:
    line = {
        "event": event,
        "time": round(time.time(), 3),
        "label": os.environ.get(LABEL_VARIABLE, ""),
        **values,
    }

    def append() -> None:
        # appended in one piece: the launchers of several machines write here at the same time
        with (run_dir / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # a note never ends a run that could go on
    with suppress(OSError, TemporaryError):  # a full disk was told by what could not be saved
        if makes_folder:
            run_dir.mkdir(parents=True, exist_ok=True)
        retried(run_dir / FILE_NAME, append, expected=run_dir.is_dir)
