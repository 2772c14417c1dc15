"""Raw data sets into HDF5 maps: one module per data set, each giving its classes and samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.maps import MapsReader, write_maps
from shards.sample import ClassSet, Sample

Preparer = Callable[..., tuple[ClassSet, Iterable[Sample], int]]


def _toy() -> Preparer:
    from shards.prepare.toy import samples

    return samples


def _stanford() -> Preparer:
    from shards.prepare.stanford import samples

    return samples


def _voc() -> Preparer:
    from shards.prepare.voc import samples

    return samples


def _ohe() -> Preparer:
    from shards.prepare.ohe import samples

    return samples


# functions that import, so that a data set's own dependencies are paid for by those who use it
PREPARERS: dict[str, Callable[[], Preparer]] = {"toy": _toy, "stanford": _stanford, "voc": _voc, "ohe": _ohe}


def prepare(name: str, root: Path | None, out: Path, /, **options: str | int) -> Path:
    """Write the maps of a data set; returns `out`.

    root: the unpacked data set (None for a generated one); options: the preparer's keyword arguments, also as text.
    Raises InputError for an unknown name or option, a folder that is not the data set, anything in it that is missing,
    or an `out` that holds something else.
    """
    if name not in PREPARERS:
        raise InputError(f"data set {name!r}", f"one of: {', '.join(PREPARERS)}", "choose one of them")
    _check_out(out, name)
    preparer = PREPARERS[name]()
    parameters = inspect.signature(preparer).parameters
    arguments: dict[str, Any] = {key: _parse(name, key, value, parameters) for key, value in options.items()}
    if "root" in parameters:
        if root is None or not root.is_dir():
            action = f"write --root DIR, the folder that {name} was unpacked to"
            raise InputError(f"--root {root}" if root else "no --root", "the folder of the data set", action)
        arguments["root"] = root
    elif root is not None:
        raise InputError(f"--root {root}", f"no --root: {name} is generated", "leave it out")
    classes, samples, total = preparer(**arguments)
    write_maps(out, name, classes, samples, total)
    return out


def _check_out(out: Path, name: str) -> None:
    """Only maps of the same data set are replaced, and only when the new ones are complete."""
    if not out.exists():
        return
    try:
        there = f"the data set {MapsReader(out).name!r}"
    except InputError as error:
        there = error.got
    if there != f"the data set {name!r}":
        raise InputError(f"{out} exists: {there}", f"a new file, or one of {name!r}", "choose another --out")


def _parse(name: str, key: str, value: str | int, parameters: Mapping[str, inspect.Parameter]) -> str | int:
    options = [option for option in parameters if option != "root"]
    if key not in options:
        raise InputError(f"option {key!r} of {name}", f"one of: {', '.join(options) or 'none'}", "correct the option")
    if isinstance(parameters[key].default, str):
        return str(value)
    try:
        return int(value)
    except ValueError:
        raise InputError(f"{key}={value}", "a whole number", f"correct {key}") from None
