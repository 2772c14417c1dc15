"""Raw data sets into HDF5 maps: one module per data set, each giving its classes and samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.maps import write_maps
from shards.prepare import stanford, toy
from shards.sample import ClassSet, Sample

PREPARERS: dict[str, Callable[..., tuple[ClassSet, Iterable[Sample], int]]] = {
    "stanford": stanford.samples,
    "toy": toy.samples,
}


def prepare(name: str, root: Path | None, out: Path, **options: str) -> Path:
    """Write the maps of a data set; returns `out`.

    root: the unpacked data set (not for generated ones); options: the preparer's keyword arguments, as text. Raises
    InputError for an unknown name or option, a folder that is not the data set, or anything in it that is missing.
    """
    if name not in PREPARERS:
        raise InputError(f"data set {name!r}", f"one of: {', '.join(PREPARERS)}", "choose one of them")
    preparer = PREPARERS[name]
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


def _parse(name: str, key: str, value: str, parameters: Any) -> int:
    options = [option for option in parameters if option != "root"]
    if key not in options:
        raise InputError(f"option {key!r} of {name}", f"one of: {', '.join(options) or 'none'}", "correct the option")
    try:
        return int(value)  # every option so far is a whole number
    except ValueError:
        raise InputError(f"{key}={value}", "a whole number", f"correct {key}") from None
