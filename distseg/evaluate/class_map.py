"""Scores on data whose classes are spelt, ordered or divided otherwise than the run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from shards.errors import InputError
from shards.sample import IGNORE_INDEX
from shards.storage import is_file, read_text
from shards.words import closest, counted, nearest, same_name

# the run's class -> the data's; None: it has none there. Under the key None: those of the data that
# are none of the run's.
Wanted = Mapping[str | None, str | Sequence[str] | None]
HOW = (
    "--map 'car=vehicle,truck=vehicle', 'sky=' for none in the data, '=tunnel' for none in the run"
)


@dataclass(frozen=True)
class ClassMap:
    """Which class of the data each class of a network is.

    trained: the network's classes; names: the data's; targets: for each of the network's its index
    in `names`, or None: the data have no such class. void: indices in `names` of those that no
    class of the network is.
    """

    trained: tuple[str, ...]
    names: tuple[str, ...]
    targets: tuple[int | None, ...]
    void: tuple[int, ...]

    def probabilities(self, of_network: Tensor) -> Tensor:
        """(C, H, W) of the network -> (D, H, W) of the data's classes, summing to 1 over D.

        The classes that are one in the data add up. A class without counterpart cannot be chosen:
        the others' probabilities are divided by their sum.
        """
        kept = [index for index, target in enumerate(self.targets) if target is not None]
        places = [target for target in self.targets if target is not None]
        mapped = of_network.new_zeros(len(self.names), *of_network.shape[1:])
        where = torch.tensor(places, device=of_network.device)
        mapped.index_add_(0, where, of_network[kept])
        if len(kept) == len(self.targets):
            return mapped  # not divided: a mere change of order keeps every bit
        return mapped / mapped.sum(0).clamp(min=torch.finfo(mapped.dtype).tiny)

    def label(self, label: Tensor) -> Tensor:
        """(H, W) uint8 with the pixels void of the classes that the network has none for."""
        if not self.void:
            return label
        is_void = torch.isin(label, torch.tensor(self.void, dtype=label.dtype, device=label.device))
        return label.masked_fill(is_void, IGNORE_INDEX)

    def to_dict(self) -> dict[str, Any]:
        """As --map takes it from a file: the run's names to the data's, "" for none."""
        named: dict[str, Any] = {
            name: None if target is None else self.names[target]
            for name, target in zip(self.trained, self.targets, strict=True)
        }
        return named | ({"": [self.names[index] for index in self.void]} if self.void else {})

    def changes(self) -> list[str]:
        """What is mapped by another name, for people."""
        named = [(name, target) for name, target in self.to_dict().items() if name != target]
        return [f"{name} -> {target or 'none'}" for name, target in named if name] + [
            f"{self.names[index]}: void" for index in self.void
        ]


def parsed(text: str) -> Wanted:
    """--map as it is written: pairs MODEL=DATA with commas between, or the path of a YAML file.

    Raises InputError for anything else.
    """
    if text.endswith((".yaml", ".yml")):
        return _from_file(Path(text))
    found: dict[str | None, Any] = {None: []}
    for pair in text.split(","):
        name, separator, target = (part.strip() for part in pair.partition("="))
        if not separator or not (name or target) or (name and name in found):
            got = f"--map {text}: {pair!r}"
            raise InputError(
                got, "RUN'S CLASS=DATA'S CLASS, each of the run's once", f"write {HOW}"
            )
        if name:
            found[name] = target or None
        else:
            found[None].append(target)
    return found


def _from_file(path: Path) -> Wanted:
    if not is_file(path):
        raise InputError(f"no {path}", "a YAML file of classes", f"check the path, or write {HOW}")
    try:
        read = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}", "YAML", "correct it") from None
    if not isinstance(read, dict):
        needed = "the run's classes with the data's, as `car: vehicle`; `\"\": [tunnel]` for none"
        raise InputError(f"{path}: no mapping", needed, "correct it")
    found: dict[str | None, Any] = {None: []}
    for name, target in read.items():
        if name is None or name == "":
            found[None] += [str(it) for it in (target if isinstance(target, list) else [target])]
        else:
            found[str(name)] = None if target in (None, "") else str(target)
    return found


def class_map(
    trained: Sequence[str], names: Sequence[str], wanted: Wanted | None = None
) -> ClassMap | None:
    """Which of the data's classes each of a network's is; None where they are the same, in order.

    As wanted; else of the same name; else of a name with the same letters and digits, whatever
    their case and what is between them. Raises InputError for names that are not there, and for
    classes on either side that are left without a counterpart.
    """
    if wanted is None and list(trained) == list(names):
        return None
    wanted = wanted or {}
    given = _given(wanted, trained)
    none_of_ours = wanted.get(None) or ()
    none_of_ours = [none_of_ours] if isinstance(none_of_ours, str) else none_of_ours
    void = [_found(str(name), names, "the data's") for name in none_of_ours]
    targets: list[int | None] = []
    unmapped = []
    for name in trained:
        if name in given:
            target = given[name]
            found = None if target is None else _found(str(target), names, "the data's")
        else:
            found = same_name(name, names)
            if found is None:
                unmapped.append(name)
        targets.append(None if found is None else names.index(found))
    chosen = {names[target] for target in targets if target is not None}
    covered = chosen | {*void}
    _check_whole(trained, names, unmapped, [name for name in names if name not in covered])
    _check_void(chosen, void)
    places = tuple(names.index(name) for name in void)
    return ClassMap(tuple(trained), tuple(names), tuple(targets), places)


def _given(wanted: Wanted, trained: Sequence[str]) -> dict[str, str | Sequence[str] | None]:
    """What is wanted, by the run's own names. Raises InputError for a class that is named twice."""
    given: dict[str, str | Sequence[str] | None] = {}
    for name, target in wanted.items():
        if name is None:  # see Wanted
            continue
        ours = _found(str(name), trained, "the run's")
        if ours in given:
            # spelt in two ways; the last would count in silence
            got = f"--map with the class {ours!r} twice"
            raise InputError(got, "each of the run's once", f"write {HOW}")
        given[ours] = target
    return given


def _found(name: str, names: Sequence[str], whose: str) -> str:
    found = same_name(name, names)
    if found is None:
        needed = f"one of {whose}: {', '.join(names)}"
        raise InputError(f"--map with the class {name!r}", needed, nearest(name, names))
    return found


def _check_void(targets: set[str], void: list[str]) -> None:
    """Raise InputError for a class of the data that is one of the run's, and none of them too; and
    where none is left to be told.
    """
    both = [name for name in void if name in targets]
    if both:
        got = f"--map with the data's {both[0]} as none of the run's, and as one of them"
        raise InputError(got, "one or the other", f"write {HOW}")
    if not targets:
        raise InputError("--map with none of the data's classes", "one at least", f"write {HOW}")


def _check_whole(
    trained: Sequence[str], names: Sequence[str], unmapped: list[str], uncovered: list[str]
) -> None:
    """Raise InputError for classes without a counterpart, each with the nearest names."""
    if not unmapped and not uncovered:
        return
    parts = [_listed("the run's", unmapped, names)] if unmapped else []
    parts += [_listed("the data's", uncovered, trained)] if uncovered else []
    ours = counted(len(trained), "class", "classes")
    theirs = counted(len(names), "class", "classes")
    got = f"a run that was trained on {ours}, and data of {theirs}: {'; '.join(parts)}"
    needed = "for each class one of the other side, or that it has none"
    raise InputError(got, needed, f"write {HOW}; or choose other shards with data.shards=DIR")


def _listed(whose: str, without: list[str], others: Sequence[str]) -> str:
    named = []
    for name in without:
        like = closest(name, others, 0.6)
        named.append(f"{name} (near: {like})" if like else name)
    return f"no counterpart of {whose} {', '.join(named)}"
