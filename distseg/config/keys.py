"""What is known of a configuration key, written beside its field: `key()` makes the field.

Plain dataclasses, so that `--help` and reports can read them without OmegaConf. From what stands
there come the checks of values (`loading`), what may change when a run is resumed, evaluated or
used for predictions (`loading`), which runs are averaged (`compare`), `distseg train --help KEY`
and the reference in Markdown (`reference`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

_METADATA = "distseg"  # of a dataclass field

# How a key counts where runs are compared, their means over seeds taken:
# setting: runs that differ in it are different settings
# view: it changes how a trained network is scored, not the network
# none: runs that differ in it alone are one setting, whose scores are averaged
Grouping = Literal["setting", "view", "none"]

Choices = tuple[str, ...] | dict[str, str]
Bound = float | None


@dataclass(frozen=True)
class Key:
    """A key of the configuration, or a section of keys.

    name: its dotted name; type: as annotated; default: a section's is None. choices: the accepted
    words, each with its meaning or ""; told: what stands in place of their list, where they are
    many; own_code: besides them a reference to code of the user's own
    (see shards.user_code). low, high: inclusive bounds of the number, or of each number
    of a list; None: open. unit: of the value. source: where the value or the method is from.
    on_resume, at_evaluation, at_prediction: whether it may differ from the run that is resumed,
    evaluated or used. modes: the values of `mode` in which it is used; (): in all.
    """

    meaning: str
    name: str = ""
    type: str = ""
    default: Any = None
    choices: Mapping[str, str] = field(default_factory=dict)
    told: str = ""
    own_code: bool = False
    low: Bound = None
    high: Bound = None
    unit: str = ""
    source: str = ""
    on_resume: bool = False
    at_evaluation: bool = False
    at_prediction: bool = False
    grouping: Grouping | None = None
    modes: tuple[str, ...] = ()

    @property
    def is_bounded(self) -> bool:
        """Whether the value is a number within bounds, or a list of them."""
        return self.low is not None or self.high is not None

    @property
    def range(self) -> str:
        """The bounds in words; "" where there are none."""
        if self.low is None:
            return "" if self.high is None else f"up to {self.high}"
        return f"from {self.low} on" if self.high is None else f"from {self.low} to {self.high}"

    @property
    def section(self) -> str:
        """The name of the section that it stands in; "" for the top."""
        return self.name.rpartition(".")[0]


def key(default: Any, meaning: str, *, choices: Choices = (), **about: Any) -> Any:
    """A dataclass field with its default value and what `Key` says of it.

    A mutable default is copied for every configuration. choices: words, or words with meanings. The
    grouping, unless it is given, is "none" for what may change on resuming, else "setting".
    """
    # one form for all readers: words without meanings get empty ones
    words = choices if isinstance(choices, dict) else dict.fromkeys(choices, "")
    metadata = {_METADATA: Key(meaning, default=default, choices=words, **about)}
    if isinstance(default, (list, dict)):
        # a copy each: configurations that share a list would change together
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, **about: Any) -> Any:
    """A dataclass field that holds a section of keys; what is said of it holds for each of them.

    kind: the section's class, whose docstring begins with its meaning. on_resume, at_evaluation,
    at_prediction and modes are handed down; a key can add to them, and has its own grouping.
    """
    # the docstring's first paragraph, so that the meaning stands in one place
    meaning = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
    return field(default_factory=kind, metadata={_METADATA: Key(meaning, **about)})


# walked once: checks, help and comparisons all ask again and again
@cache
def keys_of(kind: type) -> dict[str, Key]:
    """All keys of a configuration class, by dotted name, in the order of its fields."""
    return {name: found for name, found in _walk(kind, Key("")) if found.type != "section"}


@cache
def sections_of(kind: type) -> dict[str, Key]:
    """The sections of a configuration class, by name."""
    return {name: found for name, found in _walk(kind, Key("")) if found.type == "section"}


def _walk(kind: type, above: Key) -> list[tuple[str, Key]]:
    found: list[tuple[str, Key]] = []
    for entry in dataclasses.fields(kind):
        name = f"{above.name}.{entry.name}" if above.name else entry.name
        if _METADATA not in entry.metadata:
            # a field without meaning would be missing from --help, from checks and from comparisons
            raise TypeError(f"{kind.__name__}.{entry.name} is not made by key() or section()")
        own = _handed_down(replace(entry.metadata[_METADATA], name=name), above)
        # a section is a field whose default is made by a dataclass
        if dataclasses.is_dataclass(entry.default_factory):
            found.append((name, replace(own, type="section")))
            found.extend(_walk(entry.default_factory, own))
        else:
            found.append((name, replace(own, type=str(entry.type))))
    return found


def _handed_down(own: Key, above: Key) -> Key:
    """A key with what its section says of all its keys."""
    on_resume = own.on_resume or above.on_resume
    return replace(
        own,
        on_resume=on_resume,
        at_evaluation=own.at_evaluation or above.at_evaluation,
        at_prediction=own.at_prediction or above.at_prediction,
        # what may change while a run goes on cannot be what tells two settings apart
        grouping=own.grouping or ("none" if on_resume else "setting"),
        # a key's own are narrower than its section's
        modes=own.modes or above.modes,
    )
