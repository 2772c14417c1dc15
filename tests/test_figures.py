"""The documentation's figures are those that their code draws now, and say what the source does."""

from __future__ import annotations

import re

import matplotlib as mpl
import pytest

from distseg.distributed.watchdog import LOST_RANK_EXIT_CODE
from docs.figures import rooms
from docs.figures.__main__ import FIGURES, committed, drawn
from launchers.supervisor import BAD_INPUT, MAX_FAILURES, decide
from tests.test_imports import ROOMS, ROOT


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


# not those with pictures in them, whose bytes depend on a compressor's version too
@pytest.mark.parametrize("name", ["data_flow", "step", "rooms", "job", "curves", "palette"])
def test_a_committed_figure_is_the_one_that_its_code_draws(name: str) -> None:
    there, now = committed(name).read_text(encoding="utf-8"), drawn(name).decode()
    assert len(texts(there)) > 5
    assert texts(there) == texts(now), f"python -m docs.figures {name}"
    # other versions of matplotlib write the same drawing with other bytes
    if f"Matplotlib v{mpl.__version__}," in there:
        assert there == now, f"python -m docs.figures {name}"


def test_the_rooms_and_their_imports_are_those_of_the_source() -> None:
    names = [name for name in texts(committed("rooms").read_text()) if name in ROOMS]
    assert [*dict.fromkeys(names)] == [*ROOMS]
    found = rooms.imports()
    by_lines = set()
    for path in (ROOT / "distseg").glob("*/*.py"):
        if path.name != "__main__.py":
            others = re.findall(r"^ *(?:from|import) distseg\.(\w+)", path.read_text(), re.M)
            by_lines |= {(path.parent.name, other) for other in others if other in ROOMS}
    among = {(one, other) for one, other in found if {one, other} <= {*ROOMS}}
    assert among == {(one, other) for one, other in by_lines if one != other}
    for one, other in found:
        assert rooms.ORDER.index(other) < rooms.ORDER.index(one)


def test_the_life_of_a_job_has_the_supervisors_words_and_numbers() -> None:
    said = texts(committed("job").read_text())
    starts = ((0, False), (BAD_INPUT, False), (LOST_RANK_EXIT_CODE, False), (0, True))
    actions = {decide(code, None, stopping).action for code, stopping in starts}
    assert actions == {"done", "fail", "again", "requeue"}
    assert actions <= {*said}
    whole = " ".join(said)
    assert f"leave with {LOST_RANK_EXIT_CODE}" in whole
    assert f"full disk ({BAD_INPUT})" in whole
    assert MAX_FAILURES == 3 and "FAILED after three in a row" in whole
    script = (ROOT / "slurm" / "train_voc.sh").read_text()
    before = re.search(r"--signal=B:USR1@(\d+)", script)
    assert before and f"USR1, {before[1]} s before" in whole


def test_every_figure_is_shown_with_words_for_those_who_cannot_see_it() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown: dict[str, str] = {}
    for page in pages:
        for words, file in re.findall(
            r"!\[([^\]]*)\]\((?:docs/)?figures/([^)]+)\)", page.read_text()
        ):
            assert len(words.split()) > 5, f"{page.name}: {file}"
            shown[file] = words
    assert {*shown} == {committed(name).name for name in FIGURES}
