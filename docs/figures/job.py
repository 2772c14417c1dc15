"""The life of a job on a cluster: a rank is lost, the time limit comes, the run is done.

The rules are those of launchers/supervisor.py; the steps and times of this life are invented.
"""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Circle

from docs.figures.style import BLUE, BLUE_LINE, GREEN, INK, ORANGE, PAPER, PURPLE, SLATE, Canvas

# x of what happens, in px; the steps of the run are drawn upwards from FLOOR
QUEUED, STARTED, LOST, AGAIN, TOLD, REQUEUED, BACK, DONE = 66, 130, 242, 286, 372, 384, 466, 580
FLOOR, STEPS = 236, 300
SAVED = 50  # steps between checkpoints
LANE = 25
# how the ranks end; the supervisor's word and its colour; what happens then
RULES = (
    (("all steps are done",), ("done", GREEN), ("exit code 0: COMPLETED",)),
    (
        ("told to stop: USR1, SIGTERM",),
        ("requeue", BLUE),
        ("PENDING again; goes on at the step it saved",),
    ),
    (
        ("a rank is lost or killed (75),", "or any other error"),
        ("again", ORANGE),
        (
            "the nodes start again inside the job, from the",
            "last checkpoint; FAILED after three in a row",
            "that got no step further",
        ),
    ),
    (
        ("bad input, full disk (2)",),
        ("fail", SLATE),
        ("FAILED, not tried again; checkpoints stay",),
    ),
    (
        ("a node is not fit, or is gone",),
        ("requeue", BLUE),
        (
            "PENDING again, for other nodes; or the others",
            "go on at once, where DISTSEG_MIN_NODES lets them",
        ),
    ),
    (
        ("a node or its slurmd dies",),
        ("(SLURM)", PURPLE),
        ("SLURM requeues the job, on other nodes",),
    ),
)


def draw() -> Figure:
    canvas = Canvas(640, 610)
    _axes(canvas)
    _steps(canvas)
    _lanes(canvas)
    _rules(canvas)
    return canvas.figure


def _y(step: float) -> float:
    return FLOOR - 0.62 * step


def _axes(canvas: Canvas) -> None:
    canvas.text(8, 14, "step", align="left", weight="bold")
    canvas.arrow((QUEUED, FLOOR), (QUEUED, 16))
    canvas.arrow((QUEUED, FLOOR), (632, FLOOR))
    canvas.text(632, FLOOR - 12, "time", align="right", weight="bold")
    canvas.arrow((QUEUED, _y(STEPS)), (DONE, _y(STEPS)), head=False, dashed=True)
    canvas.text(QUEUED - 6, _y(STEPS), "steps", align="right", mono=True, size=11)


def _steps(canvas: Canvas) -> None:
    """Steps done over time, three times started, and the checkpoints."""
    # the same speed each time: a step a pixel
    told = 100 + TOLD - AGAIN
    climbs = ((STARTED, LOST, 0), (AGAIN, TOLD, 100), (BACK, DONE, told))
    for start, end, first in climbs:
        last = min(first + (end - start), STEPS)
        canvas.arrow((start, _y(first)), (end, _y(last)), color=BLUE_LINE, head=False, width=3)
        for step in range(first - first % SAVED + SAVED, int(last) + 1, SAVED):
            _checkpoint(canvas, start + step - first, step)
    _checkpoint(canvas, TOLD, told)
    _cross(canvas, LOST, _y(LOST - STARTED))
    # back to the last checkpoint; from a checkpoint of its own nothing is lost
    canvas.arrow((LOST + 9, _y(112) + 2), (AGAIN, _y(100)), dashed=True)
    canvas.arrow((TOLD, _y(told)), (BACK, _y(told)), dashed=True)
    _notes(canvas, told)


def _notes(canvas: Canvas, told: float) -> None:
    y = _y(LOST - STARTED)
    canvas.text(LOST - 10, y - 30, "a rank is lost:", align="right", size=11.5)
    canvas.text(LOST - 10, y - 15, "the others leave with 75", align="right", size=11.5)
    canvas.text(AGAIN + 8, _y(100) + 16, "from the last", align="left", size=11.5)
    canvas.text(AGAIN + 8, _y(100) + 31, "checkpoint", align="left", size=11.5)
    canvas.text(TOLD - 8, _y(told) - 34, "USR1, 300 s before", align="right", size=11.5)
    canvas.text(TOLD - 8, _y(told) - 19, "the limit: all save", align="right", size=11.5)
    canvas.text(BACK + 4, _y(told) + 16, "no step is lost,", align="left", size=11.5)
    canvas.text(BACK + 4, _y(told) + 31, "no bit differs", align="left", size=11.5)
    _checkpoint(canvas, BACK + 8, 40)
    canvas.text(BACK + 18, _y(40), "checkpoint", align="left", size=11.5)


def _checkpoint(canvas: Canvas, x: float, step: float) -> None:
    canvas.axes.add_patch(Circle((x, _y(step)), 4.5, facecolor=PAPER, edgecolor=BLUE_LINE, lw=1.8))


def _cross(canvas: Canvas, x: float, y: float) -> None:
    for sign in (1, -1):
        canvas.arrow(
            (x - 6, y - 6 * sign), (x + 6, y + 6 * sign), color=ORANGE, head=False, width=3
        )


def _lanes(canvas: Canvas) -> None:
    """What SLURM, the supervisor and attempts.jsonl say meanwhile."""
    rows = (
        (
            "SLURM",
            (
                (QUEUED, STARTED, "PENDING", SLATE),
                (STARTED, REQUEUED, "RUNNING", GREEN),
                (REQUEUED, BACK, "PENDING", SLATE),
                (BACK, DONE + 52, "RUNNING", GREEN),
            ),
        ),
        (
            "attempt",
            (
                (STARTED, LOST, "restart 0, try 1", BLUE),
                (AGAIN, REQUEUED, "0, try 2", BLUE),
                (BACK, DONE, "restart 1, try 1", BLUE),
            ),
        ),
        (
            "decision",
            (
                (LOST, AGAIN, "again", ORANGE),
                (TOLD - 12, TOLD + 52, "requeue", BLUE),
                (DONE - 2, DONE + 52, "done", GREEN),
            ),
        ),
    )
    for row, (name, spans) in enumerate(rows):
        y = FLOOR + 14 + row * (LANE + 6)
        canvas.text(8, y + LANE / 2, name, align="left", size=11.5)
        for start, end, text, color in spans:
            canvas.box((start + 1, y, end - start - 2, LANE), "", color=color)
            canvas.text((start + end) / 2, y + LANE / 2, text, color=PAPER, size=11)


def _rules(canvas: Canvas) -> None:
    """The supervisor's decisions as a table."""
    top = FLOOR + 136
    heads = ((8, "how the ranks end"), (216, "decision"), (300, "what happens then"))
    for x, text in heads:
        canvas.text(x, top, text, align="left", weight="bold")
    canvas.axes.axhline(top + 12, color=INK, lw=0.6, xmin=0.0125, xmax=0.9875)
    y = top + 29
    for ending, (word, color), then in RULES:
        for x, lines in ((8, ending), (300, then)):
            for row, line in enumerate(lines):
                canvas.text(x, y + 17 * row, line, align="left")
        canvas.box((216, y - 11, 68, 22), "", color=color)
        canvas.text(250, y, word, color=PAPER, size=11.5)
        y += 27 + 17 * (len(then) - 1)
