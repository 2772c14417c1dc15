"""Files behind a URL: fetched in ranges, with patience, and verified."""

from __future__ import annotations

import importlib
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from shards.errors import InputError
from shards.files import say
from shards.manifest import ShardInfo, hashed
from shards.words import counted

Result = TypeVar("Result")
# scheme: (module that fsspec needs, extra that brings it)
PACKAGES = {
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
}

CHUNK_BYTES = 8 << 20  # one request: long enough to fill a line, short enough to lose
STALL_SECONDS = 20.0  # without a byte: the request has failed
# seconds between attempts; all in all below a rank's time limit of 300 s
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
# after a request that failed for good, how long all others are tried once only
GIVEN_UP_SECONDS = 60.0
SAID_PAUSE = 2.0  # seconds: a pause as long is said
MAX_DAMAGED = 3  # whole transfers that end in another sha256


def check_url(url: str) -> None:
    """Raise InputError, not repeating it, for a URL that holds credentials or cannot be used."""
    parts = urlsplit(url)
    if parts.scheme not in PACKAGES:
        known = ", ".join(f"{scheme}://" for scheme in PACKAGES)
        action = "choose one of these, or copy the shards to a local folder"
        raise InputError(
            f"data.shards with {parts.scheme}://", f"a local folder, or {known}", action
        )
    check_plain(url, "data.shards")
    if not parts.netloc:
        raise InputError(
            f"data.shards={url}", "a host or a bucket after ://", "correct data.shards"
        )


def check_plain(url: str, key: str) -> None:
    """Raise InputError, not repeating it, for the URL of a key that holds credentials."""
    parts = urlsplit(url)
    # user:password@host, and the signature of a pre-signed URL
    if "@" in parts.netloc or parts.query or parts.fragment:
        needed = "a plain URL: this one would be written to config.yaml, logs and W&B"
        action = (
            "put the credentials where the tools of the store look: ~/.netrc, AWS_* variables, "
            "gcloud's login"
        )
        raise InputError(f"{key} with credentials or a query ({parts.scheme}://)", needed, action)


def check_installed(url: str) -> None:
    """Raise InputError, with the extra that brings it, for a package that a URL needs."""
    scheme = urlsplit(url).scheme
    module, extra = PACKAGES.get(scheme, ("fsspec", "http"))
    try:
        # now, not at the first request: on a cluster that may be hours in the queue later
        importlib.import_module(module)
    except ImportError:
        action = f"pip install -e '.[{extra}]' in the repository"
        raise InputError(
            f"{scheme}:// without the package {module}", "it, to read that", action
        ) from None
    if scheme not in PACKAGES:
        _check_known(scheme)


def _check_known(scheme: str) -> None:
    """Raise InputError for a scheme that fsspec has no file system for, or not its package."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        action = "install what it asks for, or write a URL of s3://, gs:// or file://"
        raise InputError(f"{scheme}://: {error}", "a scheme of fsspec's", action) from None


class Remote:
    """The files below a URL. A request is tried again after each of PAUSES, unless the answer is
    final.

    Raises InputError at construction for a URL that cannot be used or a missing package; the
    requests raise it when they fail for good, naming the URL.
    """

    _filesystem: Any
    _owner: int
    _gave_up: float  # when, by time.monotonic(), a request last failed for good

    def __init__(self, url: str):
        check_url(url)
        self._url, self._scheme = url.rstrip("/"), urlsplit(url).scheme
        check_installed(url)
        self._forget()

    def url(self, name: str) -> str:
        """Of one file."""
        return f"{self._url}/{name}"

    def read(self, name: str) -> bytes:
        """All of a small file."""
        # `_files` inside of the attempt: to connect may fail, and come back, as a request does
        return self._insist(name, lambda: self._files().cat_file(self.url(name)))

    def find(self, name: str) -> bytes | None:
        """All of a small file, where there is one."""

        def request() -> bytes | None:
            try:
                return self._files().cat_file(self.url(name))
            except FileNotFoundError:  # an answer, not a failure
                return None

        return self._insist(name, request)

    def download(
        self, shard: ShardInfo, descriptor: int, moved: Callable[[], None] = lambda: None
    ) -> None:
        """Append to the file behind a descriptor what is missing of a shard, and verify it; `moved`
        hears of each part.

        What is there already is not asked for again. A file that is not as packed is fetched anew,
        at most MAX_DAMAGED times, since a transfer may damage it too. Raises OSError where the disk
        does.
        """
        name, num_bytes = shard.file, shard.num_bytes
        for _ in range(MAX_DAMAGED):
            os.lseek(descriptor, 0, os.SEEK_SET)
            # the descriptor stays open: it is the cache's, and so is the lock that goes with it
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                # what is here already is read once more: a running sha256 cannot be kept beside the
                # file
                digest = hashed(file)
            position = os.lseek(descriptor, 0, os.SEEK_END)
            while position < num_bytes:
                chunk = self._insist(name, partial(self._chunk, name, position, num_bytes))
                # on the disk chunk by chunk: a kill costs the one that is under way
                _write(descriptor, chunk)
                digest.update(chunk)
                position += len(chunk)
                moved()
            if digest.hexdigest() == shard.sha256:
                return
            # from the beginning: the sha256 is of the whole, and does not say which chunk is wrong
            os.ftruncate(descriptor, 0)
        got = f"{self.url(name)}: its sha256 is not the manifest's, {MAX_DAMAGED} times in a row"
        raise InputError(
            got, "the bytes as packed", "copy the shard there again, and manifest.json last"
        )

    def _chunk(self, name: str, start: int, num_bytes: int) -> bytes:
        # by the manifest's length: of a file that has grown since the rest is not asked for, and
        # its sha256 tells
        stop = min(start + CHUNK_BYTES, num_bytes)
        content = self._files().cat_file(self.url(name), start=start, end=stop)
        if len(content) == num_bytes:  # from a server that knows no ranges
            return content[start:]
        # nothing at all would be asked for again and again without a pause
        if not 0 < len(content) <= stop - start:
            raise OSError(f"{len(content)} bytes came for {stop - start} asked")
        return content  # fewer are fine: the rest is asked for next

    def _insist(self, name: str, request: Callable[[], Result]) -> Result:
        # else each thread would wait anew for a server that is gone, one after the other, before
        # the run hears of it
        has_given_up = time.monotonic() - self._gave_up < GIVEN_UP_SECONDS
        pauses = () if has_given_up else PAUSES
        for pause in (*pauses, None):
            try:
                return request()
            # each library has its own kinds; none of them is known without it
            except Exception as error:
                if pause is None or is_final(error):
                    if not is_final(error):
                        self._gave_up = time.monotonic()
                    raise self._failure(name, error, len(pauses) + 1) from None
                if pause >= SAID_PAUSE:
                    say(f"{self.url(name)}: {described(error)}; again in {pause:.0f} s")
            # ranks that failed together do not come back together
            time.sleep(pause * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _failure(self, name: str, error: Exception, num_attempts: int) -> InputError:
        # most often a folder that was copied in part, or another path: said apart from a server's
        # trouble
        if isinstance(error, FileNotFoundError):
            action = (
                "correct data.shards, or copy all of the packed folder there, manifest.json last"
            )
            return InputError(f"no {self.url(name)}", "packed shards with their manifest", action)
        times = "" if is_final(error) else f" ({counted(num_attempts, 'attempt')})"
        if _is_forbidden(error):
            times += (
                "; S3 says so of a file that is not there, too, to those who may not list the "
                "bucket"
            )
        needed = f"the file, with no more than {STALL_SECONDS:g} s between two bytes"
        action = (
            "check the address, the network and this machine's credentials, "
            "then run the same command again"
        )
        return InputError(f"{self.url(name)}: {described(error)}{times}", needed, action)

    def _files(self) -> Any:
        """fsspec's file system for this scheme, one a process.

        Its event loop does not survive a fork.
        """
        with self._lock:
            # made at the first request of a process, so that forked workers each have their own
            if self._filesystem is None or self._owner != os.getpid():
                self._owner, self._filesystem = (
                    os.getpid(),
                    filesystem(self._scheme, STALL_SECONDS),
                )
            return self._filesystem

    def _forget(self) -> None:
        self._filesystem, self._gave_up = None, -math.inf
        self._owner, self._lock = os.getpid(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            # connections and locks are this process's; what it has learned of a server that is gone
            # goes along
            if name not in ("_filesystem", "_owner", "_lock")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def filesystem(scheme: str, stall_seconds: float) -> Any:
    """fsspec's file system for a scheme, whose requests are tried once, and fail after so many
    seconds without a byte where it knows limits.
    """
    import fsspec

    # an instance of our own, since the one for s3 is changed below; no listings from memory: a
    # shard that is copied there while the run waits must be seen
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        # botocore's own attempts off: two layers of patience would multiply
        limits = {"connect_timeout": stall_seconds, "read_timeout": stall_seconds}
        options |= {"config_kwargs": {**limits, "retries": {"total_max_attempts": 1}}}
        # parts of a large file, 50 MB each, that are in memory at a time
        options |= {"max_concurrency": 2}
        files = fsspec.filesystem("s3", **options)
        files.retries = 1  # attempts are counted here, not three times over
        return files
    if scheme not in PACKAGES:
        # auto_mkdir: a folder is made with the first file in it, as in a bucket
        local = {"auto_mkdir": True} if scheme in ("file", "local") else {}
        return fsspec.filesystem(scheme, **options, **local)
    import aiohttp

    # no limit for the whole: over a slow line a chunk may take minutes, as long as bytes keep
    # coming
    limit = aiohttp.ClientTimeout(total=None, sock_connect=stall_seconds, sock_read=stall_seconds)
    if scheme == "gs":
        return fsspec.filesystem("gs", requests_timeout=limit, **options)
    # trust_env: proxies and ~/.netrc
    return fsspec.filesystem("http", client_kwargs={"timeout": limit, "trust_env": True}, **options)


def is_final(error: Exception) -> bool:
    """Whether another attempt would get the same answer."""
    # aiohttp says status, gcsfs code; 408, 425 and 429 ask to come again later
    status = getattr(error, "status", None) or getattr(error, "code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return (
        refused
        or isinstance(error, FileNotFoundError | PermissionError)
        # botocore's NoCredentialsError and its kin, by name: without s3:// it need not be installed
        or "Credentials" in type(error).__name__
    )


def _is_forbidden(error: Exception) -> bool:
    return isinstance(error, PermissionError) or getattr(error, "status", None) == 403


def described(error: Exception) -> str:
    """Kind and text of an error without its URLs, since redirects may carry signatures."""
    # the first line only: some libraries put a whole HTML page into the text
    text = re.sub(r"\w+://[^\s'\"]*", "(URL)", str(error).partition("\n")[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        # os.write may take less than it was given, near the end of a disk above all
        view = view[os.write(descriptor, view) :]
