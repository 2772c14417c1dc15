"""Goodput against histories whose truth is known: every second of a run is booked once, whatever
ended its attempts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distseg.report import content, sections
from distseg.report.curves import entries_of
from distseg.runs import attempts, goodput, ledger
from distseg.runs.attempts import LABEL_VARIABLE, Note
from distseg.runs.ledger import Ledger
from tests.test_report import write_run

START, DATA, STEP, SAVE, EVALUATE, END = 10.0, 1.0, 4.0, 3.0, 5.0, 7.0  # seconds


@dataclass
class Clock:
    """Of the modules that look at one."""

    now: float = 1e9

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    monkeypatch.delenv(LABEL_VARIABLE, raising=False)
    clock = Clock()
    for module in (attempts, ledger):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=clock.time, monotonic=clock.time))
    yield clock


class Process:
    """One that trains by the clock, as Trainer.fit does, a checkpoint every second step."""

    def __init__(self, run_dir: Path, clock: Clock, step: int):
        self.clock, self.step = clock, step
        self.ledger = Ledger(clock.now)
        clock.now += START
        self.note = Note(run_dir, ["a", "b"], step, self.ledger)
        self.ledger.enter("steps")

    def take(self, num_steps: int, *, evaluate_at: int = 0) -> None:
        for _ in range(num_steps):
            with self.ledger.within("data"):
                self.clock.now += DATA
            self.clock.now += STEP
            self.step += 1
            self.note.mark(self.step, is_saved=False)
            if self.step % 2 == 0:
                self.save()
            if self.step == evaluate_at:
                with self.ledger.within("evaluation"):
                    self.clock.now += EVALUATE
                self.note.mark(self.step, is_saved=True)

    def save(self) -> None:
        with self.ledger.within("checkpoints"):
            self.clock.now += SAVE
        self.note.mark(self.step, is_saved=True)

    def end(self, outcome: str) -> None:
        self.ledger.enter("other")
        self.clock.now += END
        self.note.finish(self.step, outcome)


def booked(run_dir: Path) -> dict[str, float]:
    """The parts that took time."""
    found = goodput.of_run(run_dir)
    assert found is not None
    return {part: round(value, 2) for part, value in found.seconds.items() if abs(value) > 1e-2}


def test_a_run_that_was_killed_stopped_and_done(tmp_path: Path, clock: Clock) -> None:
    begin = clock.now
    first = Process(tmp_path, clock, 0)
    first.take(3, evaluate_at=2)
    clock.now += 60  # it hangs, until its launcher finds it dead
    attempts.note_failure(tmp_path, "b", 1, -9)
    clock.now += 20
    second = Process(tmp_path, clock, 2)
    second.take(3)
    second.save()
    second.end("stopped")
    clock.now += 30
    third = Process(tmp_path, clock, 5)
    third.take(3)
    third.end("done")
    assert booked(tmp_path) == {
        "steps": 8 * STEP,
        "data": 8 * DATA,
        "start": 3 * START,
        # at 2, 4, 5, 6 and 8; the evaluation after the checkpoint at 2 was not done again
        "checkpoints": 5 * SAVE,
        "evaluation": EVALUATE,
        "other": 2 * END,
        "repeated": DATA + STEP + 60,
        "between": 50,
    }
    found = goodput.of_run(tmp_path)
    assert found is not None and found.wall_seconds == pytest.approx(clock.now - begin, abs=0.01)
    assert found.named()["goodput"] == found.share() == pytest.approx(32 / (clock.now - begin))
    assert sum(found.share(part) for part in goodput.PARTS) == pytest.approx(1)
    assert found.text().startswith("goodput 14.6% of 0:03:39 in 3 attempts; lost to a failure")


def test_every_second_of_any_history_is_booked_once(tmp_path: Path, clock: Clock) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        run_dir, begin, saved = tmp_path / str(number), clock.now, 0
        for _ in range(int(rng.integers(1, 5))):
            process = Process(run_dir, clock, saved)
            process.take(int(rng.integers(0, 6)))
            saved = process.step // 2 * 2 if process.step > saved else saved
            clock.now += float(rng.uniform(0, 100))
            how = rng.choice(["failure", "lost rank", "stopped"])
            if how == "failure":
                attempts.note_failure(run_dir, "b", 1, 1)
            elif how == "lost rank":
                process.note.finish(process.step, "failed", "rank 1 has not answered")
            else:
                process.ledger.move(1e9, "steps", "other")  # as it stood still
                process.save()
                saved = process.step
                process.end("stopped")
            clock.now += float(rng.uniform(0, 50))
        # from a checkpoint before it, as the newest was damaged
        saved = max(0, saved - int(rng.integers(0, 4)))
        process = Process(run_dir, clock, saved)
        process.take(8)
        process.end("done")
        found = goodput.of_run(run_dir)
        assert found is not None
        assert found.wall_seconds == pytest.approx(clock.now - begin, abs=0.1)
        assert abs(found.seconds["unknown"]) < 0.1
        # a step that was damaged with its checkpoint cannot be told from its neighbours
        assert found.seconds["steps"] <= process.step * STEP + 0.1


def test_what_is_no_time_of_the_run_is_not_booked(tmp_path: Path, clock: Clock) -> None:
    first = Process(tmp_path, clock, 0)
    first.take(1)
    attempts.note_failure(tmp_path, "c", 0, 2)  # a second start, refused as this one is there
    first.take(1)
    first.end("done")
    alone = booked(tmp_path)
    clock.now += 1e6  # extended after eleven days
    second = Process(tmp_path, clock, 2)
    second.take(2)
    second.end("done")
    assert "between" not in booked(tmp_path)
    assert booked(tmp_path) == {part: 2 * value for part, value in alone.items()}


def test_a_run_that_goes_on_is_told_of_up_to_its_last_mark(tmp_path: Path, clock: Clock) -> None:
    process = Process(tmp_path, clock, 0)
    for _ in range(50):
        clock.now += 1
        process.note.mark(1, is_saved=False)
    assert booked(tmp_path) == {"start": START}, "not oftener than once a minute"
    clock.now += 15
    process.note.mark(2, is_saved=False)
    assert booked(tmp_path) == {"start": START, "steps": 65}
    assert len((tmp_path / attempts.FILE_NAME).read_text().splitlines()) == 2


def test_of_a_version_that_booked_nothing_nothing_is_told(tmp_path: Path) -> None:
    line = '{"event": "%s", "time": %d, "label": "", "step": %d, '
    about = line % ("start", 5, 0) + '"hosts": ["a"], "world_size": 1}\n'
    about += line % ("end", 9, 4) + '"outcome": "stopped", "reason": ""}\n'
    (tmp_path / attempts.FILE_NAME).write_text(about)
    assert goodput.of_run(tmp_path) is None
    assert goodput.of_run(tmp_path / "nothing") is None
    Note(tmp_path, ["a"], 4, Ledger(10.0)).finish(5, "done")
    found = goodput.of_run(tmp_path)
    assert found is not None and found.seconds["unknown"] >= 4, "the time before is not lost"


def test_time_is_moved_only_where_there_is_some(clock: Clock) -> None:
    own = Ledger(clock.now)
    own.enter("steps")
    clock.now += 5
    own.move(2, "steps", "data")
    own.move(-1, "steps", "data")  # of a rank that waits less than this one
    own.move(9, "steps", "data")
    assert own.seconds() == dict.fromkeys(ledger.OWN_PARTS, 0.0) | {"data": 5.0}


def test_a_process_knows_when_it_began() -> None:
    code = "import time; time.sleep(0.3); from distseg.runs.ledger import process_began as b; "
    before = time.time()
    said = subprocess.run(
        [sys.executable, "-c", code + "print(b())"], capture_output=True, text=True, check=True
    )
    # a clock tick, and the boot's own hundredth
    assert before - 0.05 < float(said.stdout) < time.time() - 0.3


def test_the_report_draws_each_part_as_wide_as_its_share(tmp_path: Path, clock: Clock) -> None:
    runs = [write_run(tmp_path / name, 0) for name in ("booked", "of_an_earlier_version")]
    process = Process(runs[0], clock, 0)
    process.take(4)
    process.end("done")
    collected = content.collect_all(runs)
    section = sections.goodput_section(collected, entries_of(collected))
    assert section is not None and section.content.count("stacked") == 1
    # 16 of 43 seconds
    assert "width: 37.21%; background: var(--run-2)" in section.content
    assert ">37.2%<" in section.content and 'title="16 s"' in section.content
    assert ">between attempts<" not in section.content, "a column of zeros"
    (collected["runs"][0],) = [run for run in collected["runs"] if run["goodput"] is None]
    assert sections.goodput_section({"runs": collected["runs"][:1]}, []) is None
