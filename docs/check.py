"""Runs what the pages say, in the order of each page: `make docs-check`.

    python -m docs.check                    every page
    python -m docs.check training losses    these pages
    python -m docs.check --list             what is run, and what is not, with the reason

A block is run by bash, in a scratch folder that holds what the quickstart leaves. A comment before
a block in the page's source says where that is not what is wanted:

    <!-- check: no REASON -->       is not run
    <!-- check: file NAME -->       is written to that file
    <!-- check: python -->          is Python; those of a page are one program, run at its end
    <!-- check: keys WORD ... -->   lines of key=value, each read as by `distseg train WORD ...`
    <!-- check: exit CODE -->       the block's last command has to end so
    <!-- check: replace A with B -->   in what is run, so that it takes seconds
    <!-- check: before
    COMMAND ...                     what the reader has already, such as pictures of his own
    -->

Sizes: `distseg prepare toy` makes 32 scenes for training and 8 for validation, and `distseg train`
takes 2 steps of 4 images where the command names no `steps=`, unless it only explains. W&B is
disabled. Blocks that are fenced as text or YAML are no commands.

Of a block whose commands begin with "$ " the other lines are output, and are compared: in that
order, and the same but for spaces, paths, times and speeds; other numbers within a quarter. "..."
stands for anything.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
FIRST = "docs/quickstart.md"  # the others begin with what it leaves
TRAINED = "steps=2 batch_size=4"
PREPARED = "num_train=32 num_val=8"
# longer where tests wait longer
LIMIT_SECONDS = 300 * float(os.environ.get("DISTSEG_TEST_PATIENCE", "1"))
MARK = re.compile(r"<!-- check: (\w+)[ \n]?(.*?)\s*-->", re.S)
VERBS = ("no", "file", "python", "keys", "exit", "replace", "before")
SHELLS = ("", "bash", "sh", "console")
DATA = ("text", "yaml")
# links in the scratch folder, as in a clone
CLONE = ("distseg", "shards", "launchers", "examples", "slurm", "tests", "benchmarks", "docs")
LEFT_AS_THEY_ARE = re.compile(r"\bsteps=|--dry-run|--help|sbatch|submit")
# all lines of a block in one process
READ_KEYS = """
import shlex, sys
from distseg.config.loading import load
for line in sys.argv[1:]:
    load(shlex.split(line, comments=True))
"""
NUMBER = r"\d+(?:[.,]\d+)*"
# what differs from machine to machine: 0:15:39, 12:04, 4.2 img/s, 3 s, /any/path
VARIES = re.compile(rf"\d+:\d\d(?::\d\d)?|{NUMBER} ?(?:img/s|ms|s|min|MB/s|GB/s)\b|/[\w./-]+")


@dataclass
class Block:
    """A block of code of a page, and what the comments before it say."""

    line: int  # of the page, from 1
    first: int  # the line of its text
    language: str  # of a fence; "" without one
    text: str
    marks: list[tuple[str, str]] = field(default_factory=list)  # verb, the rest

    def mark(self, verb: str) -> str | None:
        """What follows a verb; None where the block has no such mark."""
        return next((rest for name, rest in self.marks if name == verb), None)

    @property
    def what(self) -> str:
        """no, file, python, keys, console or shell: how the block is treated; "" for data."""
        for verb in ("no", "file", "python", "keys"):
            if self.mark(verb) is not None:
                return verb
        if self.language not in SHELLS:
            return ""
        return "console" if re.search(r"^\$ ", self.text, re.M) else "shell"


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page's source. Raises ValueError for a mark that says nothing."""
    found, marks = [], []
    for token in MarkdownIt().parse(page):
        if token.type == "html_block":
            marks += [(verb, rest) for verb, rest in MARK.findall(token.content)]
        # {directives} are Sphinx's, and no code
        elif token.type in ("fence", "code_block") and not token.info.startswith("{"):
            line = (token.map or [0])[0] + 1
            first = line + (token.type == "fence")
            found.append(Block(line, first, token.info.strip(), token.content, marks))
            marks = []
    for block in found:
        for verb, rest in block.marks:
            if verb not in VERBS or not (rest or verb in ("python", "keys")):
                raise ValueError(f"line {block.line}: no meaning in <!-- check: {verb} {rest} -->")
        if not block.what and block.language not in DATA:
            raise ValueError(f"line {block.line}: {block.language}, and no mark how to check it")
    if marks:
        raise ValueError(f"no block after <!-- check: {marks[0][0]} {marks[0][1]} -->")
    return found


def small(command: str) -> str:
    """A command with the sizes that a check takes."""
    if re.search(r"distseg prepare toy\b", command):
        added = PREPARED
    elif re.search(r"distseg[ .]train\b", command) and not LEFT_AS_THEY_ARE.search(command):
        added = TRAINED
    else:
        return command
    words, comment = re.split(r"(\s+#.*|\s*$)", command, maxsplit=1)[:2]
    return f"{words} {added}{comment.rstrip()}\n"


def commands(text: str) -> Iterator[str]:
    """The lines of a script, those that end in a backslash with the ones after them."""
    whole = ""
    for line in text.splitlines(keepends=True):
        whole += line
        if not line.endswith("\\\n"):
            yield whole
            whole = ""


def exchanges(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a console and the lines that are shown after each."""
    found: list[tuple[str, list[str]]] = []
    continued = False
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:] + "\n", []))
        elif continued:
            found[-1] = (found[-1][0] + line + "\n", [])
        elif found:
            found[-1][1].append(line)
        continued = bool(found) and not found[-1][1] and found[-1][0].endswith("\\\n")
    return found


def same(shown: str, got: str) -> bool:
    """Whether a line of output is the one that the page shows."""
    pattern, last = "", 0
    shown, got = (" ".join(VARIES.sub("~", line).split()) for line in (shown, got))
    for number in re.finditer(rf"{NUMBER}|\.\.\.", shown):
        held = rf"({NUMBER})" if number[0] != "..." else ".*"
        pattern += re.escape(shown[last : number.start()]) + held
        last = number.end()
    there = re.fullmatch(pattern + re.escape(shown[last:]), got)
    expected = [float(word.replace(",", "")) for word in re.findall(NUMBER, shown)]
    if there is None:
        return False
    pairs = zip(expected, (float(word.replace(",", "")) for word in there.groups()), strict=True)
    return all(abs(a - b) <= 0.25 * max(abs(a), abs(b)) for a, b in pairs)


def missing(shown: list[str], got: str) -> str | None:
    """The first line that is shown and does not come, in that order; None where all do."""
    rest = iter(got.splitlines())
    for line in shown:
        if line.strip() not in ("", "...") and not any(same(line, there) for there in rest):
            return line
    return None


class Scratch:
    """A folder in which the blocks of one page are run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._program: list[str] = []  # lines, each where the page has it, so that errors name it
        for name in CLONE:
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        self._environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "COLUMNS": "120",
        }

    def bash(self, script: str, exit_code: int = 0) -> str:
        """What a script prints. Raises ValueError where it ends otherwise than it has to."""
        try:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"no end after {LIMIT_SECONDS:.0f} s") from error
        if done.returncode != exit_code:
            raise ValueError(f"exit code {done.returncode}\n{done.stdout[-3000:]}")
        return done.stdout

    def run(self, block: Block) -> None:
        """Run a block. Raises ValueError with what came instead of what the page says."""
        self.bash(block.mark("before") or "")
        text = block.text
        for old, new in (rest.split(" with ") for verb, rest in block.marks if verb == "replace"):
            if old not in text:
                raise ValueError(f"nothing to replace: {old}")
            text = text.replace(old, new)
        if block.what == "file":
            file = self.folder / (block.mark("file") or "")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        elif block.what == "python":
            self._program += [""] * (block.first - 1 - len(self._program)) + text.splitlines()
        elif block.what == "keys":
            # shlex, unlike a shell, keeps the end of a line that goes on
            whole = [line.replace("\\\n", " ") for line in commands(text)]
            lines = [f"{block.mark('keys')} {line}" for line in whole]
            self.bash(shlex.join(["python", "-c", READ_KEYS, *lines]))
        elif block.what == "console":
            self._console(text, int(block.mark("exit") or 0))
        elif block.what == "shell":
            self.bash("".join(map(small, commands(text))), int(block.mark("exit") or 0))

    def _console(self, text: str, exit_code: int) -> None:
        found = exchanges(text)
        for number, (command, shown) in enumerate(found, start=1):
            got = self.bash(small(command), exit_code if number == len(found) else 0)
            line = missing(shown, got)
            if line is not None:
                raise ValueError(f"not in its output: {line}\n{got[-3000:]}")

    def end(self) -> None:
        """Run the page's program, if it has one. Raises ValueError."""
        if self._program:
            (self.folder / "page.py").write_text("\n".join(self._program) + "\n", encoding="utf-8")
            self.bash("python page.py")


def pages() -> list[str]:
    """Every page by its path in the repository, the one that the others go on from first."""
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
    return [FIRST, *sorted({"README.md", "CONTRIBUTING.md", *found} - {FIRST})]


def check(page: str, folder: Path) -> int:
    """Run a page's blocks in a folder, and say how each ended; how many failed."""
    scratch, num_failed = Scratch(folder), 0
    steps = [(block.line, partial(scratch.run, block)) for block in page_blocks(page)]
    for line, step in [*steps, ("end", scratch.end)]:
        since = time.monotonic()
        try:
            step()
        except ValueError as error:
            num_failed += 1
            print(f"{page}:{line}: {error}", flush=True)
        if time.monotonic() - since > 1:
            print(f"{page}:{line}: {time.monotonic() - since:.0f} s", flush=True)
    return num_failed


def page_blocks(page: str) -> list[Block]:
    """The blocks of a page that is named by its path in the repository."""
    return blocks((ROOT / page).read_text(encoding="utf-8"))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.check", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PAGE", help="training, for docs/training.md")
    parser.add_argument("--list", action="store_true", help="what is run, and what is not")
    options = parser.parse_args()
    chosen = [page for page in pages() if not options.names or Path(page).stem in options.names]
    if options.list:
        for page in chosen:
            for block in page_blocks(page):
                print(f"{page}:{block.line}: {block.what or 'data'} {block.mark('no') or ''}")
        return 0
    with tempfile.TemporaryDirectory(prefix="distseg-docs-") as name:
        start = Path(name) / "start"
        start.mkdir()
        num_failed = check(FIRST, start)
        for page in chosen:
            if page != FIRST and any(block.what not in ("", "no") for block in page_blocks(page)):
                folder = Path(name) / Path(page).stem
                shutil.copytree(start, folder, symlinks=True)
                num_failed += check(page, folder)
    print(f"{num_failed} blocks failed" if num_failed else "every block does what its page says")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
