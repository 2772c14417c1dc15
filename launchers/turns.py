"""turns.jsonl: where each turn of a job began, so that one whose turns get nowhere comes to an end.

One JSON object a line, appended before a turn's nodes are started: whatever kills it, it counts.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

FILE_NAME = "turns.jsonl"
MAX_TURNS = 3  # of one job in a row, that saved no step
UNFINISHED = f"{MAX_TURNS} turns did not finish this, and nothing is kept of one: give it more time"


def note(run_dir: Path, job: str) -> None:
    """Note that a turn of this job begins now."""
    # a note never ends a run that could go on: a full disk is told by what could not be saved
    with suppress(OSError):
        line = {"job": job, "time": round(time.time(), 3), "step": saved_step(run_dir)}
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def in_vain(run_dir: Path, job: str) -> int:
    """How many turns of this job, the last in a row, began at the step that is saved now or after
    it. Another job's count for nothing: who submits a run again wants it tried.
    """
    path, lines, reached, count = run_dir / FILE_NAME, [], 0, 0
    with suppress(OSError):  # a disk that does not answer says nothing against the job
        reached = saved_step(run_dir)
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            turn = json.loads(line)
            # after it: of the checkpoints that there were, the newest may have been damaged since
            if turn["job"] != job or turn["step"] < reached:
                break
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
        count += 1
    return count


def reason(run_dir: Path) -> str:
    """Why a job ends whose turns were in vain."""
    return (
        f"{MAX_TURNS} turns in a row saved no step after {saved_step(run_dir)}: give a turn more "
        "time (--time well above the seconds of --signal), or save more often "
        "(checkpoint.every_steps), then submit it again"
    )


def saved_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint, by the names of folders; 0 where there is none.

    Needs no torch, which takes seconds to import.
    """
    complete = (run_dir / "checkpoints").glob("step-*/state.json")
    names = [path.parent.name.removeprefix("step-") for path in complete]
    return max((int(name) for name in names if name.isdecimal()), default=0)
