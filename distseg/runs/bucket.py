"""A place behind a URL that files are copied to: a bucket, or a folder of another file system."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from distseg.distributed.bounded import LateError, in_time, while_it_moves
from shards.errors import InputError, TemporaryError
from shards.remote import check_installed, described, filesystem, is_final
from shards.storage import StorageError

Result = TypeVar("Result")

# seconds between two attempts at a request
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
STALL_SECONDS = 60.0  # without a byte: the request has failed
# for a small request, with all that a library tries; of a download, without a byte. A file system
# that hangs knows no limit of its own.
HUNG_SECONDS = 300.0
# they show an object when all of it is there; elsewhere a file is seen while it is written
OBJECT_STORES = ("s3", "gs", "gcs", "az", "abfs")


class Bucket:
    """The files below a URL, by their names there ("checkpoints/step-00000500/state.json").

    Each request is tried again after each of PAUSES, unless the answer is final. Raises InputError
    for an answer that is, and StorageError for a place that does not answer, or not within
    HUNG_SECONDS (an upload, which nothing waits for, may take any time); at construction InputError
    for a missing package.
    """

    def __init__(self, url: str):
        check_installed(url)
        self.url, self._scheme = url.rstrip("/"), urlsplit(url).scheme
        self._opened: Any = None

    def check(self) -> None:
        """Raise InputError for a place that cannot be listed, written, read and cleared."""
        # tried, since rights to write often come without those to list or to remove
        name = f".probe-{uuid.uuid4().hex}"
        self.write(name, b"probe")
        if name not in self.names("") or self.read(name) != b"probe":
            raise self._refused(name, "what was written there does not come back")
        self.remove(name)

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder, sorted; [] where there is none."""

        def request() -> list[str]:
            try:
                found = self._files().ls(self._place(folder), detail=False)
            except FileNotFoundError:  # an answer, not a failure
                return []
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

        return self._insist(folder, lambda: in_time(HUNG_SECONDS, request))

    def read(self, name: str) -> bytes | None:
        """All of a small file; None where there is none."""

        def request() -> bytes | None:
            try:
                return self._files().cat_file(self._place(name))
            except FileNotFoundError:
                return None

        return self._insist(name, lambda: in_time(HUNG_SECONDS, request))

    def write(self, name: str, content: bytes) -> None:
        """A small file, which appears whole or not at all."""

        def request() -> None:
            place = self._place(name)
            if self._scheme in OBJECT_STORES:
                self._files().pipe_file(place, content)
                return
            self._files().pipe_file(f"{place}.partial", content)
            self._files().mv(f"{place}.partial", place)

        self._insist(name, lambda: in_time(HUNG_SECONDS, request))

    def upload(self, path: Path, name: str) -> None:
        """A file of any size. One that is cut off in the middle may be seen."""
        self._insist(name, lambda: self._files().put_file(str(path), self._place(name)))

    def download(self, name: str, path: Path) -> None:
        """A file of any size, to a path whose folder is there."""

        # whatever library it is: its bytes arrive in this file
        def size() -> int:
            return path.stat().st_size if path.exists() else 0

        def request() -> None:
            self._files().get_file(self._place(name), str(path))

        self._insist(name, lambda: while_it_moves(HUNG_SECONDS, size, request))

    def remove(self, name: str) -> None:
        """A file or a folder, where it is there."""

        def request() -> None:
            try:
                self._files().rm(self._place(name), recursive=True)
            except FileNotFoundError:
                return

        self._insist(name, lambda: in_time(HUNG_SECONDS, request))

    def _place(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _insist(self, name: str, request: Callable[[], Result]) -> Result:
        for pause in (*PAUSES, None):
            try:
                return request()
            # not again: each try would leave a thread behind
            except LateError as error:
                there = "the same command goes on once it answers"
                raise StorageError(
                    f"checkpoint.copy_to: {self._place(name)}: {error}; {there}"
                ) from None
            # each library has its own kinds; a read-only file system says that it has no such call
            except Exception as error:
                if is_final(error) or isinstance(error, NotImplementedError):
                    raise self._refused(name, described(error)) from None
                if pause is None:
                    raise self._unanswered(name, error) from None
            # many runs that failed together do not come back together
            time.sleep(pause * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _refused(self, name: str, what: str) -> InputError:
        needed = "a place that can be listed, written, read and cleared"
        action = "check the address and this machine's credentials, or leave out checkpoint.copy_to"
        return InputError(f"checkpoint.copy_to: {self._place(name)}: {what}", needed, action)

    def _unanswered(self, name: str, error: Exception) -> TemporaryError:
        tries = len(PAUSES) + 1
        return StorageError(
            f"checkpoint.copy_to: {self._place(name)}: {described(error)}, {tries} times in a row; "
            "the same command goes on once it answers"
        )

    def _files(self) -> Any:
        """fsspec's file system, made at the first request: to connect may fail, and come back."""
        if self._opened is None:
            self._opened = filesystem(self._scheme, STALL_SECONDS)
        return self._opened
