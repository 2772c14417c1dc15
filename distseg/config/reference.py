"""The reference of all keys, as text for `--help KEY` and as Markdown.

`python -m distseg.config.reference` prints the Markdown, which docs/configuration.md holds.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

from distseg.config.keys import Key
from distseg.config.names import KEYS, SECTIONS, find, full_name
from shards.errors import InputError
from shards.words import nearest

WIDTH = 96  # of the text, columns
COMMAND = "python -m distseg.config.reference > docs/configuration.md"


def help_text(name: str) -> str:
    """What is known of a key; of a section, one line for each of its keys.

    Old names and `segmentor` for `segmentor.name` are understood, but a section goes first. Raises
    InputError for an unknown name, with the nearest one.
    """
    # `segmentor` is both: the section's overview leads on to segmentor.name
    if name in SECTIONS:
        return section_text(SECTIONS[name])
    found = find(full_name(name))
    if found is None:
        action = nearest(name, [*KEYS, *SECTIONS])
        raise InputError(f"unknown key {name!r}", "a key or a section of keys", action)
    return key_text(found)


def key_text(entry: Key) -> str:
    """A key's type, default, meaning, accepted values, unit, source and where it may change."""
    title = f"{entry.name}: {entry.type} = {_as_written(entry.default)}"
    lines = [title, *_wrapped(entry.meaning)]
    lines += _wrapped(entry.told, indent=4)
    if entry.name == "preset":
        # inside: it reads configurations, which `--help` alone need not wait for
        from distseg.config import presets

        lines += [f"    {line}" for line in presets.text()]
    choices = {} if entry.told else entry.choices
    # so that meanings begin in one column
    width = max(map(len, choices), default=0)
    for word, meaning in choices.items():
        lines += _wrapped(f"{word:{width}}  {meaning}".rstrip(), indent=4)
    about = {
        "unit": entry.unit,
        "range": entry.range,
        "used with": "" if not entry.modes else f"mode={' or '.join(entry.modes)}",
        "source": entry.source,
        "may change": ", ".join(_changes(entry)) or "never: another value is another run",
    }
    lines += [f"  {title + ':':12}{text}" for title, text in about.items() if text]
    return "\n".join(lines)


def section_text(section: Key) -> str:
    """A section's meaning and its keys with default and meaning."""
    inside = [entry for entry in KEYS.values() if entry.section == section.name]
    lines = [*textwrap.wrap(f"{section.name}: {section.meaning}", WIDTH), ""]
    for entry in inside:
        lines.append(f"{entry.name} = {_as_written(entry.default)}")
        lines += _wrapped(entry.meaning, indent=4)
    return "\n".join([*lines, "", f"More of one of them: --help {inside[0].name}"])


def markdown() -> str:
    """The whole reference: a table for the top and for each section."""
    how = "Set keys as `key=value`; `distseg train --help KEY` explains one."
    origin = f"This page is generated from `distseg/config/schema/`: `{COMMAND}`."
    lines = ["# Configuration", "", origin, how]
    for name, meaning in [("", ""), *((s.name, s.meaning) for s in SECTIONS.values())]:
        lines += ["", f"## {name}", "", meaning] if name else []
        lines += ["", "| key | default | values | meaning | may change |", "|---|---|---|---|---|"]
        lines += [_row(entry) for entry in KEYS.values() if entry.section == name]
    return "\n".join(lines) + "\n"


def _row(entry: Key) -> str:
    words = "" if entry.told else ", ".join(f"`{word}`" for word in entry.choices)
    values = entry.told or words or entry.range or entry.type
    meaning = entry.meaning
    if any(entry.choices.values()):
        explained = (f"`{word}`: {text}" for word, text in entry.choices.items() if text)
        meaning += f". {'; '.join(explained)}"
    if entry.source:
        meaning += f" ({entry.source})"
    unit = f", {entry.unit}" if entry.unit else ""
    cells = (f"`{entry.name}`", f"`{_as_written(entry.default)}`", f"{values}{unit}", meaning)
    return "| " + " | ".join(_escaped(cell) for cell in (*cells, ", ".join(_changes(entry)))) + " |"


def _changes(entry: Key) -> list[str]:
    places = {
        "on resuming": entry.on_resume,
        "at evaluation": entry.at_evaluation,
        "at prediction": entry.at_prediction,
    }
    return [place for place, may in places.items() if may]


def _as_written(value: Any) -> str:
    """A default as it stands in YAML."""
    # an empty string as "", which can be seen
    return value if isinstance(value, str) and value else json.dumps(value)


def _escaped(cell: str) -> str:
    # or it would end the cell
    return cell.replace("|", "\\|")


def _wrapped(text: str, indent: int = 2) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space)


if __name__ == "__main__":
    print(markdown(), end="")
