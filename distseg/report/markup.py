"""Pieces of HTML of which the page is made; all text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from distseg.report.curves import Entry

Collected = dict[str, Any]  # of content.collect_all


@dataclass(frozen=True)
class Section:
    """content: HTML. id: of its heading."""

    id: str
    title: str
    note: str
    content: str

    def to_html(self) -> str:
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        heading = f'<h2 id="{self.id}">{escape(self.title)}</h2>'
        return f"<section>{heading}{note}{self.content}</section>"


@dataclass(frozen=True)
class Cell:
    """A table's cell: text, or HTML that is made here. kind: its CSS class."""

    text: str = ""
    kind: str = ""
    html: str = ""
    style: str = ""
    title: str = ""

    def to_html(self) -> str:
        pairs = {"class": self.kind, "style": self.style, "title": self.title}
        # values are escaped too: names of runs and classes are whatever users chose
        attributes = [f' {key}="{escape(value)}"' for key, value in pairs.items() if value]
        # `html` is what this package made itself; everything from files comes as `text`
        return f"<td{''.join(attributes)}>{self.html or escape(self.text)}</td>"


def number(text: str, **more: str) -> Cell:
    """A cell whose text stands at the right."""
    return Cell(text, "number", **more)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    kind: str = "",
    head_kinds: Sequence[str] = (),
) -> str:
    """A table that scrolls by itself where the window is narrow.

    head_kinds: CSS classes of the first titles; those over numbers stand at the right, as these do.
    """
    rows = list(rows)
    kinds = [*head_kinds, *[""] * (len(head) - len(head_kinds))]
    for place, cells in enumerate(zip(*rows, strict=True)):
        # of some rows there may be none
        if any("number" in cell.kind.split() for cell in cells):
            kinds[place] = f"{kinds[place]} number".strip()
    titles = "".join(
        f'<th class="{css}">{escape(title)}</th>' for css, title in zip(kinds, head, strict=True)
    )
    lines = []
    for row in rows:
        lines.append(f"<tr>{''.join(cell.to_html() for cell in row)}</tr>")
    body = f'<table class="{kind}"><tr>{titles}</tr>{"".join(lines)}</table>'
    # a wide table would make the whole page scroll sideways
    return f'<div class="scroll">{body}</div>'


def swatch(entry: Entry) -> str:
    """The mark of an entry's colour."""
    return f'<i class="swatch" style="border-top-color: {entry.css_color}"></i>'


def named(entry: Entry, note: str = "") -> Cell:
    """An entry's mark and name."""
    small = f" <small>{escape(note)}</small>" if note else ""
    text = f"<span>{escape(entry.name)}{small}</span>"
    return Cell(html=f'<span class="run">{swatch(entry)}{text}</span>')


def or_dash(value: Any) -> str:
    # a dash and not None, which readers who do not program take for a value
    return "–" if value is None else str(value)


def details(title: str, content: str, entry: Entry, is_open: bool = False) -> str:
    mark = " open" if is_open else ""
    label = f"<summary>{swatch(entry)} {escape(title)}</summary>"
    return f"<details{mark}>{label}{content}</details>"
