"""Files that appear whole or not at all, and progress that says when it will end."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shards.errors import InputError
from shards.storage import retried

Item = TypeVar("Item")
PLAIN_SECONDS = 5.0  # between two lines where there is no terminal
# neither as the column's format nor as markup: names of files may have braces and brackets
_DESCRIPTION = TextColumn("{task.description}", markup=False)


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; moved to `path` when the block ends without an
    error.

    Raises InputError for a full disk or a folder that cannot be written, and StorageError for
    storage that has failed for long (see shards.storage); `path` is then as it was.
    """
    # beside `path`, since os.replace is atomic within one file system only; hidden, so that a
    # shell's *.tar passes it by; with the process id, so that two writers do not mix their bytes
    partial = path.with_name(f".partial-{os.getpid()}-{_short(path.name)}")
    try:
        retried(path, lambda: _prepare(path))
        yield partial
        retried(path, lambda: _move(partial, path))
    except OSError as error:
        # EDQUOT: full for this user alone, by quota
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise InputError(
                f"{path}: {error.strerror}", "a folder that can be written", "choose another place"
            ) from None
        # another process took it for the leftover of a killed writer, see below
        if error.errno == errno.ENOENT and not partial.exists():
            got = f"{path} is being written by another process too"
            raise InputError(
                got, "one writer at a time", "wait for it, or choose another place"
            ) from None
        raise
    finally:
        with suppress(OSError):  # it may have no folder to be in
            partial.unlink(missing_ok=True)


@contextmanager
def cleaned_up_after_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the program as Ctrl-C does, through what removes unfinished files.

    Only for commands that run alone: a training has its own answer to signals.
    """
    # Python lets no other thread set handlers
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> None:
    # no Exception, which libraries catch; the exit code is the one that shells give for it
    raise SystemExit(128 + number)


def _short(name: str) -> str:
    # file systems take 255 bytes, and the temporary name is the longer one
    content = os.fsencode(name)
    return name if len(content) <= 200 else hashlib.sha256(content).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 whole or not at all; errors as of `published`."""
    with published(path) as partial:
        write = functools.partial(partial.write_text, text, encoding="utf-8")
        retried(path, write, expected=path.parent.is_dir)


def _move(partial: Path, path: Path) -> None:
    """Give a file that has been written its name, for good."""
    # a move whose answer got lost has been done all the same
    if partial.exists() or not path.exists():
        # synced before: after a power cut some file systems have the new name, but not the bytes
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    sync_folder(path.parent)


def _prepare(path: Path) -> None:
    """The folder for `path`, without the temporary files of writers that were killed.

    One that is alive after all fails, loudly.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = re.compile(rf"\.partial-\d+-{re.escape(_short(path.name))}")
    for other in path.parent.iterdir():
        if name.fullmatch(other.name):
            other.unlink(missing_ok=True)


class LineFile:
    """A file that lines are appended to by this process alone, each whole and at once.

    To the system at each line, which survives a kill of the process. fsync would survive one of the
    machine too, and hold up the caller for a network disk.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: BinaryIO | None = None
        self._num_bytes: int | None = None  # of whole lines; None: all that is there
        retried(path, self._open)

    def write(self, line: str) -> None:
        """Append a line. Raises OSError, and StorageError as `retried` does."""
        retried(self._path, lambda: self._append((line + "\n").encode()))

    def close(self) -> None:
        """Close it; without effect where it is closed."""
        if self._file is not None:
            with suppress(OSError):  # nothing is buffered that could be lost
                self._file.close()
            self._file = None

    def _append(self, content: bytes) -> None:
        try:
            file = self._file or self._open()
            written = 0
            while written < len(content):
                written += file.write(content[written:])
        except OSError:
            # opened anew, since its handle may be stale, and without what was written of the line
            self.close()
            raise
        assert self._num_bytes is not None
        self._num_bytes += len(content)

    def _open(self) -> BinaryIO:
        # unbuffered: what could not be written must not be written by and by
        self._file = self._path.open("ab", buffering=0)
        if self._num_bytes is None:
            self._num_bytes = self._file.seek(0, os.SEEK_END)
        self._file.truncate(self._num_bytes)
        return self._file


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    # a rename changes the folder, which a sync of the file does not write
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full(path: Path) -> InputError:
    """The error for a full disk at `path`."""
    free = shutil.disk_usage(nearest_existing(path)).free
    return InputError(
        f"disk full at {path} ({free / 1e6:.0f} MB free)",
        "more space",
        "free some, then run the same command again",
    )


def check_writable(folder: Path, action: str) -> None:
    """Raise InputError for a folder in which no file can be made."""
    # tried, since what rights say does not hold on every file system
    probe = folder / f".partial-{os.getpid()}-probe"
    try:
        retried(folder, probe.touch, expected=folder.is_dir)
        probe.unlink()
    except OSError as error:
        got = f"{folder}: {error.strerror}"
        raise InputError(got, "a folder that can be written", action) from None


def check_space(
    path: Path, num_bytes: int, action: str = "free some space or choose another --out"
) -> None:
    """Raise InputError when the disk that `path` will be on has less than `num_bytes` free."""
    free = shutil.disk_usage(nearest_existing(path)).free
    if free < num_bytes:
        got = f"{free / 1e6:.1f} MB free for {path}"
        raise InputError(got, f"{num_bytes / 1e6:.1f} MB", action)


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest above it that exists: on its disk, and with its rights, `path` would
    be made.
    """
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def say(text: str) -> None:
    """A line for the person at the terminal, beside the bars of `tracked`."""
    # brackets in paths and keys are no markup; unwrapped, a message can be grepped in a log
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def tracked(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, with a bar and the time left on a terminal, elsewhere a line every few seconds.

    The bar is rich's. Where there is no terminal rich prints nothing until the end, and the log of
    a job would be silent for hours: the lines are our own.
    """
    # stderr: what a command prints may be piped
    console = Console(stderr=True)
    if console.is_terminal:
        # transient below: the bar is gone at the end, and the terminal holds messages only
        columns = (
            _DESCRIPTION,
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(items, total=total, description=what)
        return
    start = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= PLAIN_SECONDS:
            said = now
            left = (now - start) / done * (total - done)
            say(f"{what}: {done} of {total}, {left:.0f} s left")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what takes a while in one piece: on a terminal with the time so far, elsewhere a line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        say(f"{what} ...")
        yield
        return
    columns = (SpinnerColumn(), _DESCRIPTION, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield
