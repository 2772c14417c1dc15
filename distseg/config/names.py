"""Names of keys: which there are, and what they were once called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distseg.config.keys import Key, keys_of, sections_of
from distseg.config.schema import Config

# by dotted names, which are what users, overrides and saved files have in common
KEYS = keys_of(Config)
SECTIONS = sections_of(Config)

# Understood in this version, with a note; in a saved config.yaml without one.
OLD_NAMES = {
    "data.mirror": "data.horizontal_flip",
    "evaluate.mirror": "evaluate.horizontal_flip",
    "accumulate_steps": "gradient_accumulation_steps",
}


def full_name(name: str) -> str:
    """A key's present name, of an old one or of the short form of a section that has a name.

    `segmentor` -> `segmentor.name`; every other word comes back as it is.
    """
    name = OLD_NAMES.get(name, name)
    # so that `segmentor=NAME` can be written, though a section has no value
    return f"{name}.name" if f"{name}.name" in KEYS else name


def find(name: str) -> Key | None:
    """The key of that present name, or the dictionary that it lies in; None: there is none.

    `segmentor.options.dropout` is found as `segmentor.options`.
    """
    while name:
        # from the full name up: what lies in a dictionary is found as the dictionary
        found = KEYS.get(name)
        if found is not None:
            return found
        name = name.rpartition(".")[0]
        # a plain value has nothing inside of it: steps.foo is no key
        if name in KEYS and not KEYS[name].type.startswith("dict"):
            return None
    return None


def abbreviated(chosen: Callable[[Key], bool]) -> list[str]:
    """The names of all chosen keys, with `evaluate.*` for a section that is chosen as a whole."""
    names: list[str] = []
    for name, entry in KEYS.items():
        of_section = [other for other in KEYS.values() if other.section == entry.section]
        # one word for a section, or a message would list dozens of keys
        if entry.section in SECTIONS and all(chosen(other) for other in of_section):
            name = f"{entry.section}.*"
        if chosen(entry) and name not in names:
            names.append(name)
    return names


def with_full_names(values: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of a saved configuration, with old names of keys replaced."""
    renamed = dict(values)
    for old, new in OLD_NAMES.items():
        section, _, name = old.rpartition(".")
        inside = renamed.get(section) if section else renamed
        if isinstance(inside, dict) and name in inside:
            # copies: the caller's dictionaries stay as they were read
            inside = dict(inside)
            inside[new.rpartition(".")[2]] = inside.pop(name)
            renamed = renamed | {section: inside} if section else inside
    return renamed


def with_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of a saved configuration, with a list of one for a word where a key has
    become a list.
    """
    made = dict(values)
    for name, entry in KEYS.items():
        section, _, last = name.rpartition(".")
        inside = made.get(section) if section else made
        if isinstance(inside, dict) and entry.type.startswith("list"):
            word = inside.get(last)
            if isinstance(word, str):
                inside = inside | {last: [word] if word else []}
                made = made | {section: inside} if section else inside
    return made


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keyed by dotted names; empty dictionaries are kept as values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        # an empty one is a value: options={} differs from options that were never named
        if isinstance(value, dict) and value:
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def without_empty(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values to compare with others: what one has where the other's dictionary is empty is
    named by itself.
    """
    return {name: value for name, value in flat.items() if value != {}}
