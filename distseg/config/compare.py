"""Which runs are one setting, so that their scores are averaged: those that differ in the seed, and
in what changes neither the trained networks nor their scores.

Takes plain dictionaries by dotted names, as they stand in a config.yaml of any version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distseg.config.names import find

Values = Mapping[str, Any]


def setting(values: Values) -> dict[str, Any]:
    """Of a run's configuration what must be equal in the runs that it is averaged with.

    The view of the evaluation is in it. Without keys that the run's mode does not use.
    """
    mode = values.get("mode")
    return {
        name: value
        for name, value in values.items()
        if _grouping(name) != "none" and _is_used(name, mode)
    }


def differing(one: Values, other: Values) -> list[str]:
    """The keys that made the networks of two runs different, apart from the seed.

    How they were evaluated makes none. A key that the mode of one of the two does not use says
    nothing of the pair: that they differ in mode is in the list.
    """
    modes = (one.get("mode"), other.get("mode"))
    return [
        name
        for name in {**one, **other}
        if one.get(name) != other.get(name)
        and _grouping(name) == "setting"
        and all(_is_used(name, mode) for mode in modes)
    ]


def _grouping(name: str) -> str:
    found = find(name)
    # what this version does not know may have made a difference
    return "setting" if found is None else str(found.grouping)


def _is_used(name: str, mode: Any) -> bool:
    found = find(name)
    return found is None or not found.modes or mode in found.modes
