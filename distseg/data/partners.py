"""Which class of a run each class of a further data set is: by name, or as data.class_map says."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from distseg.config.schema import DataConfig
from shards.errors import InputError
from shards.sample import IGNORE_INDEX, ClassSet
from shards.words import closest, nearest, same_name

VOID = "void"  # in data.class_map, of either side: the other has no such class


def mapped_classes(
    run: ClassSet, theirs: ClassSet, options: DataConfig, name: str
) -> tuple[ClassSet, np.ndarray | None]:
    """The classes of a run, and the table of `partners` for a further data set, as configured: in
    training, and when it is scored afterwards.

    name: of the set, as data.class_map has it. Raises InputError as `partners`.
    """
    asked, has_other = options.class_map.get(name, {}), bool(options.keep_classes)
    return run, partners(run.names, theirs.names, asked, name=name, has_other=has_other)


def partners(
    run: Sequence[str],
    names: Sequence[str],
    asked: Mapping[str, Any],
    *,
    name: str,
    has_other: bool = False,
) -> np.ndarray | None:
    """(256,) uint8: which class of the run each class index of a data set is, 255 for void. None
    where they are the same.

    run, names: the classes of both. asked: what data.class_map says of this set: {class of the run:
    class of the set, or several; "void": it has none there; "void": those of the set that are none
    of the run's}. The others are found by name, whatever their case and what is between the
    letters. name: of the set, for messages. has_other: the run's first class takes all those
    without a partner. Raises InputError for a class on either side that is left without one, with
    what to write.
    """
    # the usual case costs nothing when labels are decoded
    if not asked and list(run) == list(names):
        return None
    found = _found(run, names, asked, name, has_other)
    if set(found.values()) == {IGNORE_INDEX}:
        got = f"data.class_map.{name}: every class of {name} is void"
        raise InputError(got, "one class of the run's at least", "correct data.class_map")
    # 256 entries: void itself, and any value that the set's labels cannot have, are void
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for theirs, index in found.items():
        table[names.index(theirs)] = index
    return table


def _found(
    run: Sequence[str], names: Sequence[str], asked: Mapping[str, Any], name: str, has_other: bool
) -> dict[str, int]:
    """The run's class index, or 255, of each class of the set; InputError where one has none."""
    found, lonely = _asked(run, names, asked, name), []
    for ours in run[has_other:]:
        # spelt as the user likes, as for the others
        if any(same_name(ours, [word]) for word in asked):
            continue
        # what is named already is not found again: one pixel has one class
        theirs = same_name(ours, [word for word in names if word not in found])
        if theirs is None:
            lonely.append(ours)
        else:
            found[theirs] = run.index(ours)
    rest = [theirs for theirs in names if theirs not in found]
    # not taken for void in silence: a class that is spelt otherwise would train nothing
    if lonely or (rest and not has_other):
        raise _without_partner(run, names, asked, (lonely, [] if has_other else rest), name)
    found |= dict.fromkeys(rest, 0)
    return found


def _asked(
    run: Sequence[str], names: Sequence[str], asked: Mapping[str, Any], name: str
) -> dict[str, int]:
    """The run's class index, or 255, of each class of the set that data.class_map names."""
    found: dict[str, int] = {}
    for ours, value in asked.items():
        index = IGNORE_INDEX
        if ours != VOID:
            index = run.index(_named(str(ours), run, "the run", name))
            if value in (VOID, None):
                continue  # the set has none of it
        # several of the set may be one of the run's; never the other way round
        for word in value if isinstance(value, list) else [value]:
            theirs = _named(str(word), names, name, name)
            if theirs in found:
                got = f"data.class_map.{name} with the class {theirs!r} of {name} twice"
                raise InputError(got, "each class of the set once", "correct data.class_map")
            found[theirs] = index
    return found


def _named(word: str, classes: Sequence[str], whose: str, name: str) -> str:
    found = same_name(word, classes)
    if found is None:
        got = f"data.class_map.{name} with the class {word!r}"
        needed = f"a class of {whose}: {', '.join(classes)}"
        raise InputError(got, needed, nearest(word, classes))
    return found


def _without_partner(
    run: Sequence[str],
    names: Sequence[str],
    asked: Mapping[str, Any],
    lonely: tuple[list[str], list[str]],
    name: str,
) -> InputError:
    """The error that lists both sides, and what to write, as far as it can be guessed."""
    ours, rest = lonely
    # what looks like a pair is offered as one; the rest as void, which is the user's to decide
    words: dict[str, Any] = dict(asked)
    left = list(rest)
    for one in ours:
        words[one] = closest(one, left, 0.6) or VOID
        left = [other for other in left if other != words[one]]
    if left:
        before = words.get(VOID, [])
        words[VOID] = [*(before if isinstance(before, list) else [before]), *left]
    parts = [f"the run's {', '.join(ours)}"] if ours else []
    parts += [f"{name}'s {', '.join(rest)}"] if rest else []
    got = f"the run's classes are {', '.join(run)}, those of {name} {', '.join(names)}: "
    got += f"no partner of {' and of '.join(parts)}"
    # on one line and quoted, so that it can be copied as it stands
    spelt = yaml.safe_dump({name: words}, default_flow_style=True, sort_keys=False, width=10**6)
    action = f"write data.class_map={shlex.quote(spelt.strip())}, with the right names for void"
    return InputError(got, "for each class one of the other side, or that it is void", action)
