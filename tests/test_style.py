"""The measures of tests/style.py, on a source that is counted by hand; and what distseg keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.style import circles, measure

# what is reached is kept; the rest of the table is on its way
KEPT = (
    "modules outside of rooms",
    "import circles",
    "longest function, lines",
    "functions above 40 lines",
    "lines above 100 columns",
    "nested comprehensions in 100 statements",
    "comment lines in 100 of code",
)

COUNTED = '''"""Of a module,
over two lines."""

import distseg.one.b  # why

# alone


class Something:
    """Of a class."""

    def method(self, a, b, c, d, e):
        return [x for row in a for x in row]  # noqa: E501

    @staticmethod
    def loose(a, b, c, d, e, f):
        return [sorted(x for x in row) for row in a]

    def named(self, a, b, c, d, e, *, f, g):
        return "# no comment", [x for x in a]
'''


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, float]:
    room = tmp_path / "distseg" / "one"
    room.mkdir(parents=True)
    (tmp_path / "distseg" / "__init__.py").touch()
    (tmp_path / "distseg" / "cli.py").write_text("from distseg.one import a\n")
    (room / "__init__.py").touch()
    (room / "a.py").write_text(COUNTED)
    long = "\n".join(f"    x = {index}" for index in range(40))
    (room / "b.py").write_text(f"def long():\n{long}\n\n\nfrom distseg import cli\n{'y' * 101}\n")
    return {figure.name: figure.value for figure in measure(tmp_path, ["distseg"])}


def test_figures_are_those_counted_by_hand(figures: dict[str, float]) -> None:
    assert figures == {
        "modules outside of rooms": 2,
        "import circles": 1,  # cli -> one.a -> one.b -> cli
        "imports between rooms": 2,  # cli -> one, one -> cli
        "longest function, lines": 41,
        "functions above 40 lines": 1,
        "lines above 100 columns": 1,
        # the import, class, three functions, three returns; 1 of cli; def, 40, import, name
        "nested comprehensions in 100 statements": pytest.approx(100 * 2 / (8 + 1 + 43)),
        "comment lines in 100 of code": pytest.approx(100 * 2 / (9 + 1 + 43)),
        "more than 5 parameters": 1,  # of `loose`
        "lines of code": 9 + 1 + 43,
    }


def test_circles_are_groups_that_reach_each_other() -> None:
    graph = {
        "a": {"b"},
        "b": {"c"},
        "c": {"a", "d"},
        "d": set(),
        "e": {"f"},
        "f": {"e"},
        "g": {"a"},
    }
    assert sorted(sorted(circle) for circle in circles(graph)) == [["a", "b", "c"], ["e", "f"]]


def test_what_is_reached_is_kept() -> None:
    table = {figure.name: figure for figure in measure()}
    for name in KEPT:
        figure = table[name]
        assert figure.within, f"{name}: {figure.value:g}: {', '.join(map(str, figure.places))}"
