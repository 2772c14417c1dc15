"""The progress line: its numbers, how often it appears in a log, and its silence on other ranks."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from distseg.tracking import progress as progress_module
from distseg.tracking.progress import Progress
from shards import files


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def log_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=80, highlight=False), out


def test_time_left_follows_the_recent_speed(clock: Clock) -> None:
    console, _ = log_console()
    progress = Progress(1000, 100, True, console)
    assert math.isnan(progress.seconds_left())
    for step in range(110, 210, 10):  # slow: 3 s a step
        clock.seconds += 30
        progress.update(step, {})
    assert progress.seconds_left() == pytest.approx(3 * 800)
    for step in range(210, 610, 10):  # then 0.5 s a step: the slow start is forgotten
        clock.seconds += 5
        progress.update(step, {})
    assert progress.seconds_left() == pytest.approx(0.5 * 400)


def test_a_log_gets_a_line_every_ten_seconds_with_all_numbers_uncut(clock: Clock) -> None:
    console, out = log_console()
    progress = Progress(12000, 0, True, console)
    metrics = {"images_per_second": 84.25, "loss/segmentor": 0.8125, "loss/cross_entropy": 0.75}
    metrics |= {
        "loss/adversarial": 0.0625,
        "loss/discriminator_real": 0.5,
        "loss/discriminator_fake": 0.375,
    }
    progress.evaluation(0, {"val/mean_iou": 0.712})
    for step in range(1, 301):
        clock.seconds += 0.1
        progress.update(step, metrics)
    lines = [
        line
        for line in out.getvalue().splitlines()
        if line.startswith("step") and "/12,000" in line
    ]
    assert len(lines) == 3  # 30 seconds
    numbers = r"step 201/12,000    1.7%  84.2 img/s  left 0:19:40 \(ends \d\d:\d\d( \+1d)?\)  "
    numbers += r"mIoU 71.2%  loss 0.812  ce 0.750  adv 0.062  D real 0.500  D fake 0.375"
    assert re.fullmatch(numbers, lines[2].rstrip()), lines[2]
    progress.close()
    assert out.getvalue().splitlines()[-1].startswith("step 300/12,000")


def test_metrics_that_a_run_does_not_have_are_left_out(clock: Clock) -> None:
    console, out = log_console()
    progress = Progress(10, 0, True, console)
    clock.seconds += 1
    progress.update(1, {"loss/cross_entropy": 0.5})
    assert "ce 0.500" in out.getvalue()
    assert not any(word in out.getvalue() for word in ("adv", "D real", "mIoU", "img/s", "nan"))


def test_a_terminal_shows_one_line_that_is_renewed_and_taken_away(clock: Clock) -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, color_system=None, highlight=False)
    progress = Progress(100, 0, True, console)
    for step in range(1, 101):
        progress.update(step, {"loss/segmentor": 1.0})
    progress.message("saved [bold]here[/bold]")
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "saved [bold]here[/bold]" in text  # text is not markup
    assert text.rstrip().splitlines()[-1].startswith("step 100/100  100.0%")
    assert all(len(line) <= 60 for line in re.split(r"[\r\n]", text))


@pytest.mark.parametrize("num_classes", [2, 8, 10, 11, 21, 150])
def test_the_table_holds_every_class_once_with_its_iou(num_classes: int) -> None:
    console, out = log_console()
    scores = {"val/mean_iou": 0.5, "val/pixel_accuracy": 0.875, "val/frequency_weighted_iou": 0.7}
    scores |= {f"val/iou/name_{c:03}": c / 1000 for c in range(num_classes)}
    scores["val/iou/[odd] name"] = math.nan
    Progress(10, 0, True, console).evaluation(4, scores)
    text = out.getvalue()
    assert "step 4  mIoU 50.0%  pixel accuracy 87.5%" in text
    for c in range(num_classes):
        assert len(re.findall(rf"name_{c:03} +. +{c / 10:.1f}%", text)) == 1
    assert re.search(r"\[odd\] name +. +absent", text)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_warning_is_one_whole_line_of_a_log(clock: Clock) -> None:
    console, out = log_console()
    progress = Progress(10, 0, True, console)
    text = "health: the [mask] is empty, since step 40. " + "What it means and what to try. " * 6
    progress.warning(text)
    assert out.getvalue().splitlines() == [text]


def test_other_ranks_are_silent() -> None:
    out = io.StringIO()
    progress = Progress(10, 0, False, Console(file=out, force_terminal=True))
    progress.update(1, {"loss/segmentor": 1.0})
    progress.evaluation(1, {"val/mean_iou": 0.5})
    progress.message("text")
    progress.warning("text")
    progress.close()
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("width", "noun"), [(60, "step"), (60, "image"), (40, "step"), (100, "step")]
)
def test_the_live_line_of_a_narrow_terminal_neither_wraps_nor_scrolls(
    clock: Clock, width: int, noun: str
) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    progress = Progress(123_456, 0, True, console, noun=noun, brief=noun == "image")
    metrics = {"images_per_second": 1084.25} | {
        f"loss/{name}": 123.4
        for name in ("segmentor", "cross_entropy", "adversarial", "discriminator_real", "dice")
    }
    for step in range(1_000, 90_000, 1_000):
        clock.seconds += 977
        progress.update(step, metrics)
        progress._bar.refresh()
    text = out.getvalue()
    # a line that is renewed in its place moves no cursor up and begins no new line
    assert "\x1b[1A" not in text and "\n" not in text
    lines = re.split(r"\r", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert max(map(len, lines)) <= width and "…" not in text
    last = lines[-1].strip()
    assert f"{noun} 89,000/123,456" in last and ("left" in last or width < 60)
    progress.close()
    # behind what takes the live line away
    assert (f"{noun} 89,000" in out.getvalue().rpartition("\x1b[2K")[2]) == (noun == "step")


def test_an_evaluation_that_is_over_soon_leaves_no_line_in_a_log_and_a_long_one_some(
    clock: Clock,
) -> None:
    for seconds, expected in ((0.5, 0), (5.0, 2)):
        console, out = log_console()
        progress = Progress(5, 0, True, console, noun="image", brief=True)
        for number in range(1, 6):
            clock.seconds += seconds
            progress.update(number, {"images_per_second": 1 / seconds})
        progress.close()
        assert out.getvalue().count("img/s") == expected


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_of_commands_show_any_name(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bar, piece = io.StringIO(), io.StringIO()
    name = "{a} [red].h5"
    monkeypatch.setattr(files, "PLAIN_SECONDS", 0)

    def write_to(out: io.StringIO) -> None:
        console = Console(file=out, width=100, force_terminal=is_terminal, color_system=None)
        monkeypatch.setattr(files, "Console", lambda **_: console)

    write_to(bar)
    assert list(files.tracked("ab", 2, f"writing {name}")) == ["a", "b"]
    write_to(piece)
    with files.working(f"tracing {name}"):
        assert is_terminal or piece.getvalue() == f"tracing {name} ...\n"
    assert f"tracing {name}" in piece.getvalue()
    if is_terminal:
        assert f"writing {name}" in bar.getvalue()
    else:
        assert bar.getvalue().splitlines()[0].startswith(f"writing {name}: 1 of 2, ")
