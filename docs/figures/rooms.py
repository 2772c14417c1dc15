"""Which room imports which, read from the source: nothing of it stands here."""

from __future__ import annotations

import ast
import functools
import textwrap
from collections import Counter

from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from docs.figures.style import BLUE, GREEN, INK, ORANGE, PURPLE, Canvas
from tests.test_imports import ROOMS, ROOT, imported

# the modules of distseg/ outside of rooms, which are the top of it
TOP = "distseg"
ORDER = ("shards", *ROOMS, "launchers", TOP)
ROW, CELL, HEAD = 31, 17, 86  # px: height of a row, width of a column, of the names above
_MATRIX = 432  # its left edge
_LINE = 56  # letters in a line of what a room is for


def draw() -> Figure:
    canvas = Canvas(_MATRIX + CELL * len(ORDER) + 12, HEAD + ROW * len(ORDER) + 12)
    needed = imports()
    for row, room in enumerate(ORDER):
        _row(canvas, row, room, needed)
    canvas.text(8, 22, "Each room imports only those above it:", align="left", weight="bold")
    text = "a dot, the larger for more modules that do. Read from the source."
    canvas.text(8, 40, text, align="left")
    return canvas.figure


def _row(canvas: Canvas, row: int, room: str, needed: Counter[tuple[str, str]]) -> None:
    """A room: its name, what it is for, and a dot for each other that it imports."""
    y = HEAD + ROW * (row + 0.5)
    color = color_of(room)
    canvas.text(8, y, title(room), align="left", mono=True, weight="bold")
    lines = textwrap.wrap(purpose(room), _LINE)
    for place, line in enumerate(lines):
        middle = y + 13 * (place - (len(lines) - 1) / 2)
        canvas.text(112, middle, line, align="left", size=10.5)
    x = _MATRIX + CELL * row
    # the triangle that may hold dots; its edge is the room itself
    canvas.axes.add_patch(
        Rectangle((_MATRIX, y - ROW / 2), CELL * row, ROW - 2, color=INK, alpha=0.13, lw=0)
    )
    canvas.axes.add_patch(Rectangle((x, y - ROW / 2), CELL - 1, ROW - 2, color=color, lw=0))
    canvas.text(
        x + CELL / 2 + 4, y - ROW / 2 - 6, title(room), mono=True, size=10.5, angle=90, align="left"
    )
    for column, other in enumerate(ORDER):
        number = needed[room, other]
        if number:
            # areas, not widths, are compared by eye
            radius = min(2.0 + 1.1 * number**0.5, CELL / 2 - 1)
            place = (_MATRIX + CELL * (column + 0.5), y - 1)
            canvas.axes.add_patch(Circle(place, radius, color=color, lw=0))


def title(room: str) -> str:
    return "api, cli, ..." if room == TOP else room


def color_of(room: str) -> str:
    kinds = {"shards": GREEN, "launchers": ORANGE, TOP: PURPLE}
    return kinds.get(room, BLUE)


def purpose(room: str) -> str:
    """The first paragraph of a room's docstring."""
    if room == "shards":  # it has none
        return "From raw data sets to one-hot HDF5 maps to WebDataset shards"
    if room == TOP:
        return ", ".join(sorted(path.name for path in (ROOT / TOP).glob("[!_]*.py")))
    folder = ROOT / room if room == "launchers" else ROOT / TOP / room
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    sentence = " ".join(text.split("\n\n")[0].split())
    return sentence.rstrip(".").replace("`", "")


@functools.cache  # it reads every file
def imports() -> Counter[tuple[str, str]]:
    """(room, other room) -> how many modules of the one import of the other."""
    found: Counter[tuple[str, str]] = Counter()
    for package in ("shards", "launchers", "distseg"):
        paths = (ROOT / package).rglob("*.py")
        # those only hand over to the command line
        for path in sorted(path for path in paths if path.name != "__main__.py"):
            own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            others = {room_of(name) for name in imported(path)} & {*ORDER}
            found.update((own, other) for other in others - {own})
    return found


def room_of(name: str) -> str:
    """Of a module by its dotted name; "" where it is none of this repository's."""
    package, *rest = name.split(".")
    if package != "distseg":
        return package
    # the bare name comes along with every import of a room
    if not rest or rest[0] == "__init__":
        return ""
    return rest[0] if rest[0] in ROOMS else TOP
