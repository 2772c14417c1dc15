"""Goodput: the share of a run's time in steps that counted, and where the rest went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.runs import attempts
from distseg.runs.attempts import ENDED_WELL, Attempt, Mark

# in the order of pictures and tables
PARTS = {
    "steps": "steps that counted",
    "start": "starting",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "checkpoints": "saving checkpoints",
    "other": "pictures and the end",
    "repeated": "lost to a failure, and done again",
    "between": "between attempts",
    "unknown": "not accounted for",
}


@dataclass(frozen=True)
class Goodput:
    """seconds: for all of PARTS; together they are the time from the first attempt's begin to the
    last one's end, without breaks after an attempt that was done (the run was extended later).
    """

    seconds: dict[str, float]
    num_attempts: int

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())

    def share(self, part: str = "steps") -> float:
        """Of the wall time, in [0, 1]; of "steps" it is the goodput."""
        return self.seconds[part] / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def named(self) -> dict[str, float]:
        """By their names in W&B's summary: shares, and the wall time in seconds."""
        # shares, as the seconds of runs of different lengths say nothing beside one another
        shares = {f"goodput/{part}": self.share(part) for part in PARTS}
        return {"goodput": self.share(), "goodput/wall_seconds": self.wall_seconds, **shares}

    def text(self) -> str:
        """One line for people, with the parts that took a thousandth of the time or more."""
        attempts = f"{self.num_attempts} attempt{'s' if self.num_attempts > 1 else ''}"
        minutes, seconds = divmod(round(self.wall_seconds), 60)
        of = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} in {attempts}"
        lost = [part for part in PARTS if part != "steps" and self.share(part) >= 0.001]
        # the largest first, as it is what is worth a look
        lost.sort(key=self.share, reverse=True)
        named = [f"{PARTS[part]} {self.share(part):.1%}" for part in lost]
        return f"goodput {self.share():.1%} of {of}" + "".join(f"; {one}" for one in named)


def of_run(run_dir: Path) -> Goodput | None:
    """Of a run so far; None where nothing was booked, as in earlier versions."""
    return of_attempts(attempts.read(run_dir))


def of_attempts(found: Sequence[Attempt]) -> Goodput | None:
    """Of a run's attempts, in order; None where nothing was booked in any."""
    spans = list(_spans(found))
    if not any(span.attempt.marks for span in spans):
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    for index, span in enumerate(spans):
        # the earliest of all, not the next one's: a damaged checkpoint sets a run back further
        later = [other.attempt.first_step for other in spans[index + 1 :]]
        steps = [step for step in later if step is not None]
        for part, of_part in _booked(span, min(steps, default=None)).items():
            seconds[part] += of_part
        # a run that was done and is extended next week has lost no week
        if index and spans[index - 1].attempt.outcome != "done":
            seconds["between"] += span.begin - spans[index - 1].end
    return Goodput(seconds, len(spans))


@dataclass(frozen=True)
class _Span:
    attempt: Attempt
    begin: float  # Unix seconds
    end: float  # the last that is known of it


def _spans(found: Sequence[Attempt]) -> Iterator[_Span]:
    """Attempts that came as far as to note their start, none of which overlaps another."""
    end = 0.0
    for attempt in found:
        # machines' clocks differ: a second is booked under one attempt, and never under two
        begin = max(attempt.started if attempt.began is None else attempt.began, end)
        signs = [attempt.started, attempt.ended or 0.0, *(mark.time for mark in attempt.marks)]
        # of two starts at once the second is refused, and takes no time of the run's
        if attempt.first_step is None or max(signs) < begin:
            continue
        end = max(signs)
        yield _Span(attempt, begin, end)


def _booked(span: _Span, resumed_at: int | None) -> dict[str, float]:
    """The seconds of an attempt by part. resumed_at: the earliest step that a later attempt has
    begun from: what came after it was in vain; None: there was no later one.
    """
    attempt, duration = span.attempt, span.end - span.begin
    sound = [one for one in attempt.marks if resumed_at is None or one.step <= resumed_at]
    # of an attempt of an earlier version nobody knows more than how long it was
    if not attempt.marks:
        return {"unknown": duration}
    # the first mark is made at the start, which has been whatever came of the steps
    kept = (sound or attempt.marks[:1])[-1]
    is_whole = kept is attempt.marks[-1] and attempt.outcome in ENDED_WELL
    until = span.end if is_whole else kept.time
    booked = _within(kept, until - span.begin)
    return booked | {"repeated": span.end - until}


def _within(mark: Mark, duration: float) -> dict[str, float]:
    """A mark's seconds, and what is missing of so many, of which none is known."""
    return mark.seconds | {"unknown": duration - sum(mark.seconds.values())}
