"""Raw data sets into HDF5 maps.

One module per data set, each giving its classes and samples still to be read.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shards import user_code
from shards.errors import InputError
from shards.image_files import PASSED_OVER
from shards.maps import MapsReader
from shards.prepare import own
from shards.prepare.dataset import DataSet, absent
from shards.prepare.masks import UnknownValues, with_other_masks
from shards.prepare.parts import Prepared, write_dataset
from shards.processes import check_workers
from shards.words import closest, nearest

NAMES = (
    *("toy", "stanford", "voc", "cityscapes", "gta5", "synthia", "camvid", "kitti_road", "ade20k"),
    *("folder", "ohe"),
)
OF_THE_USER = ("folder", "ohe")  # forms of data, where the others are names of sets
Preparer = Callable[..., DataSet]


def preparer_of(name: str) -> Preparer:
    """`samples` of the data set's module, or the user's own (see shards.user_code).

    Raises InputError for an unknown name.
    """
    if user_code.is_reference(name):
        return user_code.load(name, own.KEY).value
    if name not in NAMES:
        user_code.check_complete(own.KEY, name)
        needed = f"one of: {', '.join(NAMES)}; or your own, as {user_code.FORMS}"
        raise InputError(f"data set {name!r}", needed, nearest(name, NAMES))
    # imported here, so that a data set's own dependencies are paid for by those who use it
    # by name, with one function of one form in each module: a new data set is a file and a word in
    # NAMES
    return importlib.import_module(f"shards.prepare.{name}").samples


SUFFIXES = (".h5", ".hdf5")  # of the maps


def prepare(
    name: str,
    root: Path | None,
    out: Path,
    /,
    *,
    workers: int = 0,
    skip_bad: bool = False,
    **options: str | int,
) -> Prepared:
    """Write the maps of a data set to `out`; returns what was written and what was left out.

    name: one of NAMES, or a function of the user's own (see shards.user_code) of the same form as
    their `samples`. It may be a generator of samples instead, beside a ClassSet CLASSES in its
    module, which is read in one go, in this process. root: the unpacked data set (None for a
    generated one); workers: processes (0: this one), which change nothing in `out`; skip_bad: leave
    out samples that are missing or unreadable instead of failing; options: the preparer's keyword
    arguments, also as text. Raises InputError for an unknown name or option, a folder that is not
    the data set, anything in it that is missing or bad, or an `out` that holds something else.
    """
    preparer = preparer_of(name)
    check_workers(workers)
    arguments = _arguments(name, root, options, inspect.signature(preparer).parameters)
    is_own = user_code.is_reference(name)
    dataset = own.called(name, arguments) if is_own else preparer(**arguments)
    if isinstance(dataset, own.Generated):
        if workers or skip_bad:
            needed = "a preparer that returns a DataSet, whose samples can be read apart"
            raise InputError(f"--workers or --skip-bad for {name}", needed, "leave them out")
        _check_out(out, own.name_of(name))
        return dataset.write(out, own.name_of(name))
    name = dataset.name or (own.name_of(name) if is_own else name)
    _check_out(out, name)
    if not skip_bad:
        _check_whole(dataset)
    try:
        return write_dataset(out, name, dataset, workers, skip_bad)
    except UnknownValues as error:
        raise with_other_masks(error, dataset.tasks) from None


def _arguments(
    name: str,
    root: Path | None,
    options: Mapping[str, str | int],
    parameters: Mapping[str, inspect.Parameter],
) -> dict[str, Any]:
    """The preparer's arguments by name; InputError for what it does not take, or lacks."""
    arguments: dict[str, Any] = {}
    for key, value in options.items():
        arguments[key] = _parse(name, key, value, parameters)
    if "root" in parameters:
        if root is None or not root.is_dir():
            raise _no_root(name, root)
        arguments["root"] = root
    elif root is not None:
        raise InputError(f"--root {root}", f"no --root: {name} is generated", "leave it out")
    _check_given(name, arguments, parameters)
    return arguments


def _no_root(name: str, root: Path | None) -> InputError:
    """The error of a folder that is not named, or not there."""
    action = f"write --root DIR, the folder that {name} was unpacked to"
    if name in OF_THE_USER or user_code.is_reference(name):
        action = "write --root DIR, the folder that your images and masks are in"
    if root is None:
        return InputError("no --root", "the folder of the data set", action)
    got = f"--root {root}, which is a file" if root.exists() else f"--root {root}: no such folder"
    if root.parent.is_dir():
        beside = [path.name for path in root.parent.iterdir() if path.is_dir()]
        near = closest(root.name, beside, 0.6)
        action = f"did you mean {near}? {action}" if near else action
    return InputError(got, "the folder of the data set", action)


def _check_given(
    name: str, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            # before the call, where Python would say it as a TypeError with a function's name
            raise InputError(f"{name} without {key}", "a value for it", f"write {key}=VALUE")


def _check_whole(dataset: DataSet) -> None:
    """Raise the InputError of missing files, before time is spent on those that are there."""
    # all of them are counted: one missing file is a typo, thousands an archive that was not
    # unpacked
    lost = [task for task in dataset.tasks if task.read is absent]
    try:
        for task in lost:
            task.run()
    except InputError as error:
        got = f"{len(lost)} of {len(dataset.tasks)} samples are not whole, the first: {error.got}"
        # what seems lost may be there in a format that is not read
        passed = [note for note in dataset.notes if note.startswith(PASSED_OVER)]
        got = "\n  ".join([got, *passed])
        raise InputError(got, error.needed, error.action) from None


def _check_out(out: Path, name: str) -> None:
    """Only maps of the same data set are replaced, and only when the new ones are complete."""
    # a file of hours of work must not be lost to a mistyped --out
    if not out.exists():
        # `pack` takes any name, but a folder of shards is easily taken for it: raw, raw/
        if out.suffix not in SUFFIXES:
            got, action = f"--out {out}", f"write --out {out}{SUFFIXES[0]}"
            raise InputError(got, f"a file that ends in {' or '.join(SUFFIXES)}", action)
        return
    try:
        there = f"the data set {MapsReader(out).name!r}"
    except InputError as error:
        there = error.got
    if there != f"the data set {name!r}":
        raise InputError(
            f"{out} exists: {there}", f"a new file, or one of {name!r}", "choose another --out"
        )


def _parse(
    name: str, key: str, value: str | int, parameters: Mapping[str, inspect.Parameter]
) -> str | int | float:
    # root has a flag of its own, which is checked as a folder
    options = [option for option in parameters if option != "root"]
    if key not in options:
        raise InputError(
            f"option {key!r} of {name}",
            f"one of: {', '.join(options) or 'none'}",
            "correct the option",
        )
    # the command line knows text only: the default's type says what is meant
    default = parameters[key].default
    if isinstance(default, str) or default is inspect.Parameter.empty:
        return str(value)
    try:
        return float(value) if isinstance(default, float) else int(value)
    except ValueError:
        needed = "a number" if isinstance(default, float) else "a whole number"
        raise InputError(f"{key}={value}", needed, f"correct {key}") from None
