"""Code of the user's own, by reference: `package.module:name` or `path/to/file.py:name`.

A module comes from Python's import path, with the current directory on it as `python -m` has it. A
file is imported under a name made from its path, so that two files of one name do not meet. Nothing
is ever taken from a run directory: those are passed on, and to open one must run nothing in it.
"""

from __future__ import annotations

import difflib
import dis
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shards.errors import InputError

SUFFIX = ".py"
# said in every message about a reference, so that the two forms are learned from the first mistake
FORMS = "package.module:name or path/to/file.py:name"


@dataclass(frozen=True)
class UserCode:
    """What a reference stands for: a callable, the file that defines it, and that file's sha256."""

    reference: str
    value: Callable[..., Any]
    path: Path
    # recorded with the run: code that has changed since is said when the run is resumed or
    # evaluated
    sha256: str

    @property
    def name(self) -> str:
        """Its name in that file."""
        return self.reference.rpartition(":")[2]


def is_reference(text: str) -> bool:
    """Whether a value names code, and not one of the choices that the package has."""
    # no name of the package's own choices has a colon
    return ":" in text


def check_complete(key: str, value: str) -> None:
    """Raise InputError for a file alone, FILE.py, which does not say what in it is meant."""
    if value.endswith(SUFFIX):
        action = f"write {value}:NAME, with the name of your class or function"
        raise InputError(f"{key}={value}", FORMS, action)


def absolute(reference: str) -> str:
    """The reference with the absolute path of its file; that of a module as it is."""
    place, _, name = reference.rpartition(":")
    if not place.endswith(SUFFIX):
        return reference
    # not resolved: a link to the newest version of a file is meant to be followed anew
    return f"{Path(place).expanduser().absolute()}:{name}"


def short(reference: str) -> str:
    """The reference without its file's folder, for people and for files that are passed on."""
    place, _, name = reference.rpartition(":")
    return f"{Path(place).name}:{name}" if place.endswith(SUFFIX) else reference


def load(reference: str, key: str) -> UserCode:
    """Import what a reference stands for; once, unless its file has changed since.

    key: of the configuration, for messages. A file's own folder is searched first while it is
    imported, and last from then on. Raises InputError, key and reference named, for another form, a
    file or module that is not there or lies in a run directory, what goes wrong in the import (with
    its line), and a name that is not there or cannot be called.
    """
    # at the last colon, since folders may have colons in their names
    place, _, name = reference.rpartition(":")
    said = f"{key}={reference}"
    if not name.isidentifier() or not place or place != place.strip():
        raise InputError(said, FORMS, f"correct {key}")
    # the suffix decides, not whether there is such a file: a misspelt path must not be looked for
    # as a module
    module = _file(place, said) if place.endswith(SUFFIX) else _module(place, said)
    value = getattr(module, name, None)
    if not hasattr(module, name):
        there = [each for each, it in vars(module).items() if callable(it) and each[0] != "_"]
        # a cutoff below difflib's 0.6: names of one file are few, and a far guess is better than
        # none
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.3)
        action = f"did you mean {near[0]}?" if near else f"correct {key}"
        raise InputError(f"{said}: no {name} in {place}", "the name of a class or function", action)
    if not callable(value):
        got = f"{said}: {name} is of type {type(value).__name__}"
        raise InputError(got, "a class or a function", f"correct {key}")
    path = _defining_file(value, module)
    # again for what a module takes from elsewhere: a name may be re-exported from a file in a run
    _check_place(path, said)
    return UserCode(reference, value, path, hashlib.sha256(path.read_bytes()).hexdigest())


def call(
    code: UserCode, key: str, options: Mapping[str, Any], /, options_key: str, **given: Any
) -> Any:
    """`code.value(**given, **options)`, a constructor for example.

    Raises InputError for what it does not take, what it needs besides, and what goes wrong in it.
    """
    said = f"{key}={code.reference}"
    taken = parameters(code.value)
    for name in given:  # by its own name: **options would swallow what it does not know
        if name not in taken:
            action = f"give it a parameter {name}: def {code.name}(..., {name})"
            raise InputError(f"{said} does not take {name}", f"a parameter {name}", action)
    check_options(code, options, options_key, tuple(given))
    try:
        return code.value(**given, **options)
    except InputError:
        raise
    # whatever it is: the frames of ours above it would hide the user's own line
    except BaseException as error:
        if not is_own(error):
            raise
        got = f"{said}: {told(error, code.path)}"
        raise InputError(got, "a call that comes to its end", f"correct {code.name}") from error


def check_options(
    code: UserCode, options: Mapping[str, Any], options_key: str, given: tuple[str, ...]
) -> None:
    """Raise InputError for options that a callable does not take, or needs besides.

    given: names of the parameters that it gets otherwise.
    """
    taken = parameters(code.value)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    # what the package gives by itself is no option, even where the name is known
    free = [name for name in taken if name not in given]
    unknown = [name for name in options if name not in free and not takes_any]
    if unknown:
        got = f"{options_key}.{unknown[0]}, which {code.name} does not have"
        choices = f"among: {', '.join(free) or 'none'}"
        raise InputError(got, choices, f"remove {options_key}.{unknown[0]}")
    # now: else it would be Python's own error in the middle of a start on many ranks
    missing = [name for name in free if _is_required(taken[name]) and name not in options]
    if missing:
        example = f"write {options_key}.{missing[0]}=..."
        raise InputError(f"{code.reference} without {missing[0]}", "a value for it", example)


def parameters(value: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable by name; none where Python does not know them."""
    try:
        # classes of C extensions and some builtins have no signature
        return inspect.signature(value).parameters
    except (TypeError, ValueError):
        return {}


def told(error: BaseException, path: Path | None = None) -> str:
    """An error in one line, with the last line of `path` that it went through; None: of all that is
    no installed package.
    """
    # its traceback ends in our own compile(): the place is in the error
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and frame.filename == str(path)]
    # the user's own line rather than the library's that it called
    others = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    last = (own or others or frames)[-1:]
    return f"{text} ({last[0].filename}, line {last[0].lineno})" if last else text


def is_own(error: BaseException) -> bool:
    """Whether code has raised an error itself; False: Ctrl-C has interrupted it.

    SystemExit is its own: who calls it means to use it, and not to end by it.
    """
    if not isinstance(error, KeyboardInterrupt):
        return not isinstance(error, GeneratorExit)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # a signal interrupts at any instruction, the code's own at its `raise`
    return trace is not None and trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE


_RAISE = dis.opmap["RAISE_VARARGS"]


class ImportedFiles:
    """The files imported so far. Unpickled in another process, it imports them there too.

    So whatever comes after it may be an object of theirs.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[list[str]]]:
        # by reference of a function: pickle would else look for module user_code_..., which a new
        # process does not have
        return _import_again, ([str(path) for path in _imported],)


# process-wide, as sys.modules is: both say what has been run
_imported: dict[Path, str] = {}  # file -> sha256 of what was run


def _import_again(paths: list[str]) -> ImportedFiles:
    for path in paths:
        # one that is gone by now may be of other work that this process has done: what does need
        # it fails when it is unpickled
        with suppress(InputError):
            _file(path, path)
    return ImportedFiles()


def _file(place: str, said: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        action = "put the file there, or correct the path; a relative one starts in "
        raise InputError(f"{said}: no file {path}", "a Python file", action + str(Path.cwd()))
    _check_place(path, said)
    name = module_name(path)
    # read once, hashed and compiled: what is recorded is what runs, even if the file is saved
    # meanwhile
    source = path.read_bytes()
    sha256 = hashlib.sha256(source).hexdigest()
    # the same classes for the same file: imported twice, isinstance and pickle would tell them
    # apart
    if _imported.get(path) == sha256:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look for it there
    try:
        with _searched(path.parent), _errors_told(said, path, f"`python {path}`"):
            # compiled under the file's path, so that tracebacks show its lines; no .pyc, which
            # could be stale
            exec(compile(source, str(path), "exec"), vars(module))
    except InputError:
        # half-imported, it would be found by the next try, and by pickle
        del sys.modules[name]
        raise
    _imported[path] = sha256
    return module


def module_name(path: Path) -> str:
    """The name that a file is imported under: its own, and a digest of where it lies."""
    stem = re.sub(r"\W", "_", path.stem)
    return f"user_code_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def _module(name: str, said: str) -> ModuleType:
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise InputError(said, FORMS, "correct it; a file's name ends in .py")
    # as `python -m` has it, unless that would take code out of a run directory
    folder = Path.cwd()
    with _searched(folder if run_directory_of(folder) is None else None):
        # finders remember a folder's listing: a file written a moment ago would not be found
        importlib.invalidate_caches()
        for number in range(1, len(parts) + 1):  # to find a module imports what it lies in
            if not _imported_module(".".join(parts[:number]), said):
                needed = "a module that Python finds, or a file: path/to/file.py:name"
                action = f"correct it, install it, or start where it lies; here is {folder}"
                got = f"{said}: no module {'.'.join(parts[:number])}"
                raise InputError(got, needed, action)
    return sys.modules[name]


def _imported_module(name: str, said: str) -> bool:
    """Import a module whose package is imported; False where there is none."""
    package = name.rpartition(".")[0]
    # a plain module has nothing inside: find_spec would raise
    if package and not hasattr(sys.modules[package], "__path__"):
        return False
    with _errors_told(said, None, f'`python -c "import {name}"`'):
        # looked for before it is imported, so that nothing of a run directory runs before it is
        # refused
        spec = importlib.util.find_spec(name)
        if spec is None:
            return False
        for place in (spec.origin, *(spec.submodule_search_locations or ())):
            if place is not None:
                _check_place(Path(place), said)
        importlib.import_module(name)
    return True


def _defining_file(value: Any, module: ModuleType) -> Path:
    """Of a name that a package takes from one of its modules: that module's."""
    # the sha256 is to be of the code itself, not of the __init__.py that passes its name on
    defining = sys.modules.get(getattr(value, "__module__", None) or "", module)
    file = getattr(defining, "__file__", None) or getattr(module, "__file__", None)
    if file is None:
        raise InputError(
            f"{module.__name__}: built into Python", "code in a file", "write a function of yours"
        )
    return Path(file)


def run_directory_of(path: Path) -> Path | None:
    """The run directory that a path lies in: a folder with config.yaml and checkpoints/."""
    # links followed: a link out of a run directory, or into one, is where it leads
    real = path.resolve()
    for folder in (real, *real.parents):
        # both, since a project of the user's own may well have a config.yaml
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def _check_place(path: Path, said: str) -> None:
    run_directory = run_directory_of(path)
    if run_directory is not None:
        got = f"{said}: {path} lies in the run directory {run_directory}"
        needed = "code outside of it: to open a run must run nothing that lies in it"
        raise InputError(got, needed, "move the file elsewhere")


@contextmanager
def _searched(folder: Path | None) -> Iterator[None]:
    """`folder` first on the import path, and last from then on, for what is imported later."""
    if folder is None:
        yield
        return
    # first, for this import: as with `python file.py`, the file's neighbours are its own
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        # last from then on, for imports inside of functions: in front, a neighbour called e.g.
        # yaml.py would replace a library for all of the program
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


@contextmanager
def _errors_told(said: str, path: Path | None, command: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # SystemExit too: of a script, which parses its arguments
        if not is_own(error):
            raise
        got = f"{said} cannot be imported: {told(error, path)}"
        action = f"correct it; {command} shows the whole error"
        raise InputError(got, "a file that can be imported", action) from error


def _is_required(parameter: inspect.Parameter) -> bool:
    # *args and **kwargs have no default, and need nothing
    many = (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind not in many
