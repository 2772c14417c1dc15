"""How the source reads, in figures: `python -m tests.style [FOLDER ...]` prints the table.

Of all Python files of distseg/, shards/ and launchers/ (or of the named folders), from their syntax
trees and tokens alone:

modules outside of rooms     files directly in distseg/, `__init__.py` included
import circles               groups of modules of distseg that import each other, over any number
                             of steps; imports inside of functions count
imports between rooms        ordered pairs (room, room) of distseg of which one imports the other;
                             a room is a folder of distseg/, and each module outside one of its own
longest function             lines from `def` to the last, decorators left out, docstring included
functions above 40 lines     those whose lines, counted so, are more than 40
lines above 100 columns      lines of more than 100 characters, of whatever kind
nested comprehensions        comprehensions with more than one `for`, or with another comprehension
                             inside, in 100 statements; a docstring is none
comment lines                lines with a `#` comment, alone or behind code, in 100 lines of code;
                             `noqa` and `type:` are no comments
lines of code                neither blank, nor a comment alone, nor of a docstring
more than 5 parameters       functions and methods that take more than five by position; `self` and
                             `cls` do not count, nor what must be named
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("distseg", "shards", "launchers")
MAX_LINES = 40
MAX_COLUMNS = 100
MAX_PARAMETERS = 5

Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Place:
    """Something of the source that a figure counts, and the figure's value there."""

    file: str  # relative to the root
    line: int  # from 1
    value: int = 1
    name: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.name} {self.value}".replace("  ", " ")


class Source:
    """One file: its text, its syntax tree, the lines of its docstrings and of its comments."""

    def __init__(self, path: Path, root: Path = ROOT):
        self.name = str(path.relative_to(root))
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.docstrings = _docstrings(self.tree)
        self.comments = _comments(self.text)

    def code_lines(self) -> int:
        """Lines that are neither blank, nor a comment alone, nor of a docstring."""
        of_docstrings: set[int] = set()
        for node in self.docstrings:
            of_docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        count = 0
        for number, line in enumerate(self.text.splitlines(), start=1):
            alone = number in self.comments and line.lstrip().startswith("#")
            count += bool(line.strip()) and not alone and number not in of_docstrings
        return count

    def statements(self) -> int:
        found = sum(isinstance(node, ast.stmt) for node in ast.walk(self.tree))
        return found - len(self.docstrings)

    def place(self, node: ast.AST, value: int = 1, name: str = "") -> Place:
        return Place(self.name, getattr(node, "lineno", 1), value, name)

    def long_lines(self) -> list[Place]:
        lines = enumerate(self.text.splitlines(), start=1)
        return [Place(self.name, at, len(line)) for at, line in lines if len(line) > MAX_COLUMNS]

    def functions(self) -> list[Place]:
        """Every function, with the number of its lines."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append(self.place(node, lines, node.name))
        return found

    def nested_comprehensions(self) -> list[Place]:
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, COMPREHENSIONS):
                inside = sum(isinstance(part, COMPREHENSIONS) for part in ast.walk(node)) - 1
                if len(node.generators) > 1 or inside:
                    found.append(self.place(node))
        return found

    def parameters(self) -> list[Place]:
        """Every function, with the number of its positional parameters."""
        found = [
            self.place(node, _num_positional(node, method), node.name)
            for node, method in _functions(self.tree, in_class=False)
        ]
        return sorted(found, key=lambda place: place.line)


def _docstrings(tree: ast.AST) -> list[ast.Expr]:
    found: list[ast.Expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and ast.get_docstring(node, clean=False) is not None:
                found.append(first)
    return found


def _comments(text: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    # what linters are told explains nothing to a reader
    return {
        token.start[0]
        for token in tokens
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:"))
    }


def _functions(node: ast.AST, in_class: bool) -> Iterator[tuple[Function, bool]]:
    """Every function below a node, and whether its first argument is the object or the class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            static = any(getattr(mark, "id", "") == "staticmethod" for mark in child.decorator_list)
            yield child, in_class and not static
        yield from _functions(child, isinstance(child, ast.ClassDef))


def _num_positional(function: Function, method: bool) -> int:
    return len(function.args.posonlyargs) + len(function.args.args) - method


def sources(root: Path, folders: Sequence[str]) -> list[Source]:
    found = []
    for folder in folders:
        found += [Source(path, root) for path in sorted((root / folder).rglob("*.py"))]
    return found


def imports(files: list[Source]) -> dict[str, set[str]]:
    """Which modules of distseg each of its modules imports, by dotted names."""
    modules = {}
    for file in files:
        name = file.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if name.split(".")[0] == "distseg":
            modules[name] = file
    graph = {}
    for name, file in modules.items():
        named: set[str] = set()
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                named.add(str(node.module))
                named |= {f"{node.module}.{alias.name}" for alias in node.names}
        # the package itself is imported along with each of its modules
        graph[name] = (named & modules.keys()) - {name, "distseg"}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that reach each other."""
    reached = {name: set(needed) for name, needed in graph.items()}
    for through in graph:  # Warshall's closure
        for name in graph:
            if through in reached[name]:
                reached[name] |= reached[through]
    found: list[set[str]] = []
    for name in graph:
        if name in reached[name] and not any(name in circle for circle in found):
            found.append({other for other in graph[name] | reached[name] if name in reached[other]})
    return found


def room_pairs(graph: dict[str, set[str]], files: list[Source]) -> set[tuple[str, str]]:
    """(room that imports, room that is imported); a module of distseg/ itself is its own room."""
    rooms = {file.name.split("/")[1] for file in files if file.name.count("/") > 1}

    def room(name: str) -> str:
        first = name.split(".")[1] if "." in name else ""
        return first if first in rooms else name

    pairs = {(room(name), room(other)) for name, needed in graph.items() for other in needed}
    return {(one, other) for one, other in pairs if one != other}


@dataclass(frozen=True)
class Figure:
    """A line of the table. places: what is counted, worst first; for `--places`."""

    name: str
    value: float
    low: float = 0
    high: float = float("inf")
    places: tuple[Place, ...] = ()

    @property
    def within(self) -> bool:
        return self.low <= self.value <= self.high


def measure(root: Path = ROOT, folders: Sequence[str] = PACKAGES) -> list[Figure]:
    files = sources(root, folders)
    graph = imports(files)
    return [*_structure(graph, files), *_reading(files)]


def _structure(graph: dict[str, set[str]], files: list[Source]) -> list[Figure]:
    outside = [file for file in files if Path(file.name).parent == Path("distseg")]
    return [
        Figure("modules outside of rooms", len(outside), high=6),
        Figure("import circles", len(circles(graph)), high=0),
        Figure("imports between rooms", len(room_pairs(graph, files))),
    ]


def _reading(files: list[Source]) -> list[Figure]:
    def places(of: Callable[[Source], list[Place]], above: int = 0) -> tuple[Place, ...]:
        found = [place for file in files for place in of(file) if place.value > above]
        return tuple(sorted(found, key=lambda place: -place.value))

    lengths = places(Source.functions)
    long = places(Source.functions, MAX_LINES)
    wide = places(Source.long_lines)
    nested = places(Source.nested_comprehensions)
    many = places(Source.parameters, MAX_PARAMETERS)
    code = sum(file.code_lines() for file in files)
    comments = sum(len(file.comments) for file in files)
    statements = sum(file.statements() for file in files)
    return [
        Figure("longest function, lines", lengths[0].value, high=MAX_LINES, places=lengths[:1]),
        Figure(f"functions above {MAX_LINES} lines", len(long), high=0, places=long),
        Figure(f"lines above {MAX_COLUMNS} columns", len(wide), high=0, places=wide),
        Figure(
            "nested comprehensions in 100 statements",
            100 * len(nested) / statements,
            high=0.15,
            places=nested,
        ),
        Figure("comment lines in 100 of code", 100 * comments / code, low=12, high=25),
        Figure(f"more than {MAX_PARAMETERS} parameters", len(many), high=0, places=many),
        Figure("lines of code", code),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="How the source reads, in figures.")
    parser.add_argument("--places", action="store_true", help="also where each figure comes from")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=f"default: {PACKAGES}")
    options = parser.parse_args()
    for figure in measure(folders=options.folders or PACKAGES):
        bounds = f"{figure.low:g} to {figure.high:g}" if figure.high < float("inf") else ""
        beyond = "" if figure.within else "  <- beyond"
        print(f"{figure.name:42}{figure.value:>8.6g}  {bounds}{beyond}")
        for place in figure.places if options.places else ():
            print(f"    {place}")


if __name__ == "__main__":
    main()
