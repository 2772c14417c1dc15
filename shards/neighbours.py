"""Files of the user's own that a file of his own imports: its neighbours.

Found in the source by its import statements, so that what is only taken as a number counts too, and
looked up among what has been imported.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType

from shards.user_code import UserCode

_OURS = ("shards", "distseg", "launchers")  # of a clone that the user's file may lie in
_INSTALLED = ("site-packages", "dist-packages")  # of an environment that may lie beside it


def neighbours(code: UserCode) -> dict[str, str]:
    """The sha256 of each file in the folder of the user's code, or below it, that it imports.

    By their paths in that folder; those that these import too, and not the file itself.
    """
    root, files = code.path.parent.resolve(), {code.path.resolve()}
    waiting = [sys.modules[code.value.__module__]]
    while waiting:
        for module in _imported_by(waiting.pop()):
            path = Path(module.__file__ or "").resolve()
            if path not in files and _is_users(path, root, module):
                files.add(path)
                waiting.append(module)
    named = {path.relative_to(root).as_posix(): path for path in files - {code.path.resolve()}}
    return {name: hashlib.sha256(named[name].read_bytes()).hexdigest() for name in sorted(named)}


def _is_users(path: Path, root: Path, module: ModuleType) -> bool:
    is_below = path.suffix == ".py" and path.is_relative_to(root)
    is_installed = any(folder in path.parts for folder in _INSTALLED)
    return is_below and not is_installed and module.__name__.partition(".")[0] not in _OURS


def _imported_by(module: ModuleType) -> Iterator[ModuleType]:
    """The modules that a module's source names in its import statements, and that are there."""
    file = module.__file__
    source = Path(file).read_bytes() if file and file.endswith(".py") else b""
    for statement in ast.walk(ast.parse(source)):
        names = []
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            base = "." * statement.level + (statement.module or "")
            if statement.level and not module.__package__:
                continue  # a file by itself has no package
            base = resolve_name(base, module.__package__)
            # a name may be a module of the package, too
            names = [base, *(f"{base}.{alias.name}" for alias in statement.names)]
        for name in names:
            found = sys.modules.get(name)
            if getattr(found, "__file__", None):
                yield found  # type: ignore[misc]
