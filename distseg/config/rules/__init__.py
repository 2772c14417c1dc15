"""Every check of a configuration that needs no data: of each value alone, then of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distseg.config.keys import Key
from distseg.config.names import KEYS
from distseg.config.rules import data, losses, networks, running, unlabelled
from distseg.config.schema import Config
from shards.errors import InputError
from shards.user_code import FORMS as REFERENCES
from shards.user_code import check_complete, is_reference
from shards.words import closest, nearest

# the first one broken is told alone: of images and networks before what is made of both
TRAINING = (*losses.RULES, *unlabelled.RULES)
RULES = (*data.RULES, *networks.RULES, *TRAINING, *running.RULES)


def check(config: Config, values: Mapping[str, Any], is_trained: bool = False) -> None:
    """Raise InputError for the first value or combination that no run can have.

    values: the same configuration by dotted names. is_trained: of a run that has been, perhaps
    before there was some rule of training; it is only to be scored or used.
    """
    for entry in KEYS.values():
        if entry.choices:
            check_choice(entry, values[entry.name])
    for entry in KEYS.values():
        if entry.is_bounded:
            check_bounds(entry, values[entry.name])
    # last, so that rules can rely on each value by itself
    for rule in RULES:
        if not (is_trained and rule in TRAINING):
            rule(config)


def check_choice(entry: Key, value: Any) -> None:
    """Raise InputError for a word that the key does not accept."""
    if entry.own_code and is_reference(str(value)):
        return
    if value not in entry.choices:
        if entry.own_code:
            check_complete(entry.name, str(value))
        needed = f"one of: {entry.told or ', '.join(entry.choices)}"
        needed += f"; or your own, as {REFERENCES}" if entry.own_code else ""
        # of many names some one has half of any word's letters
        action = nearest(str(value), entry.choices)
        if entry.own_code:
            found = closest(str(value), entry.choices, 0.5)
            own = "choose one of them, or write your own (docs/own_code.md)"
            action = f"did you mean {found}?" if found else own
        raise InputError(f"{entry.name}={value}", needed, action)


def check_bounds(entry: Key, value: Any) -> None:
    """Raise InputError for a number outside the key's bounds, NaN and infinity included.

    None is a default that is filled in later; of a list every number is checked.
    """
    numbers = value if isinstance(value, list) else [value]
    if not all(number is None or _is_within(entry, number) for number in numbers):
        number = "a number" if entry.high is not None else "a finite number"
        kind = "numbers" if isinstance(value, list) else number
        raise InputError(f"{entry.name}={value}", f"{kind} {entry.range}", f"correct {entry.name}")


def _is_within(entry: Key, number: float) -> bool:
    # NaN fails every comparison, so it is refused where there is any bound
    above = entry.low is None or number >= entry.low
    return above and (entry.high is None or number <= entry.high) and number < math.inf
