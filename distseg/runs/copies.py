"""Copies of a run's checkpoints behind a URL, made beside training; and fetched on a fresh node.

What lies there is laid out as a run directory: checkpoints/step-00000500/ and the files beside it
that a resume reads. No bucket can rename a folder, so what makes a checkpoint whole is its
state.json, which names all others with their sha256 and is written last: an upload that is ended in
the middle leaves a folder without it, which nothing reads and the next upload clears away.

One thread of the main rank does it all, since all ranks share the run directory. What fails is told
and tried again; it never ends a run.
"""

from __future__ import annotations

import errno
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from distseg.runs.attempts import FILE_NAME as ATTEMPTS_FILE
from distseg.runs.bucket import Bucket
from distseg.runs.checkpoint import (
    BEST_FILE,
    FOLDER,
    STATE_FILE,
    published,
    verified,
)
from distseg.runs.checkpointer import hidden
from distseg.runs.lease import leased
from distseg.runs.sealed import unseal
from distseg.runs.tensor_files import SUFFIX, DamagedCheckpoint
from shards import files
from shards.files import disk_full, say
from shards.storage import is_file, listed, read_bytes
from shards.words import counted

BEST = f"{FOLDER}/{BEST_FILE}"
# seconds from a try that has failed to the next, twice as long each time
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 15.0, 300.0
SAID_SECONDS = 5.0  # between two lines while the end of training waits


class _Ended(Exception):
    """The run does not wait for this copy any more."""


class Copies:
    """The copying of one run; of a run without a bucket, and on the other ranks, nothing.

    records: the files of the run directory that go along, by name. damaged: checkpoints that are
    there and were found to be, by name. It copies one checkpoint at a time, the newest: those that
    were published meanwhile are left out, and told. What run_dir keeps is kept there: the last
    `keep_last`, and the best.
    """

    def __init__(
        self,
        run_dir: Path,
        bucket: Bucket | None = None,
        keep_last: int = 1,
        records: Sequence[str] = (),
        damaged: Iterable[str] = (),
    ):
        self._run_dir, self._bucket = run_dir, bucket
        self._keep_last, self._records, self._damaged = keep_last, records, {*damaged}
        self._changed = threading.Condition()  # guards all below
        # numbers of what was asked for: each turn does all that was asked for before it began
        self._num_asked = self._tried = self._done = 0
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._num_failures = 0  # turns in a row
        self._lines: list[str] = []
        self._progress = ""
        self._newest = -1  # the step that is whole there, as far as this run has seen to it
        self._published: set[int] = set()  # steps since then
        # what was sent of the checkpoint that was begun last, by its state.json: a connection that
        # breaks again and again gets it there all the same
        self._begun, self._sent = b"", set[str]()

    def ask(self, path: Path | None = None) -> None:
        """Have copied what is new; returns at once. path: a checkpoint that was just published.

        From any thread.
        """
        if self._bucket is None:
            return
        with self._changed:
            self._num_asked += 1
            if path is not None:
                self._published.add(_step(path.name))
            self._changed.notify_all()
            if self._thread is None:
                # a daemon: a bucket that does not answer must not keep the process
                self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
                self._thread.start()

    def told(self) -> list[str]:
        """What there is to tell since it was asked last, a line each."""
        with self._changed:
            lines, self._lines = self._lines, []
        return lines

    @property
    def num_failures(self) -> int | None:
        """How often in a row copying has failed; None where nothing is copied."""
        return None if self._bucket is None else self._num_failures

    def finish(self, seconds: float, message: Callable[[str], None]) -> None:
        """Copy what is left, and end; waits for at most so many seconds, and says for what."""
        if self._bucket is None:
            return
        self.ask()  # the scores, and how the attempt ended
        until = time.monotonic() + seconds
        said = time.monotonic()
        while time.monotonic() < until:
            with self._changed:
                if self._done == self._num_asked:
                    break
                self._changed.wait(min(0.2, max(0.0, until - time.monotonic())))
                progress = self._progress
            for line in self.told():
                message(line)
            if progress and time.monotonic() - said >= SAID_SECONDS:
                said = time.monotonic()
                message(f"waiting for copies: {progress}, for at most {until - said:.0f} s more")
        for line in self.told():
            message(line)
        if self._done < self._num_asked:
            there = f"step {self._newest}" if self._newest >= 0 else "no checkpoint"
            message(
                f"copies: not all was copied to {self._bucket.url} within {seconds:.0f} s "
                f"(checkpoint.copy_wait_seconds); {there} is whole there. The same command copies "
                f"the rest from {self._run_dir}"
            )
        self.close()

    def close(self) -> None:
        """End without waiting: what is being copied stays incomplete."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while self._is_wanted():
            try:
                self._turn()
            except _Ended:
                return
            # whatever a library raises: training goes on, and so does this
            except Exception as error:
                self._note_failure(error)
            else:
                self._note_success()

    def _is_wanted(self) -> bool:
        """Wait for something to do; False: there is nothing any more."""
        with self._changed:
            pause = None
            if self._done < self._tried:
                pause = FIRST_PAUSE_SECONDS * 2 ** min(self._num_failures - 1, 10)
                pause = min(pause, LONGEST_PAUSE_SECONDS)
            # a new checkpoint ends the pause: something may have changed
            self._changed.wait_for(lambda: self._is_closed or self._num_asked > self._tried, pause)
            self._tried = self._num_asked
            return not self._is_closed

    def _turn(self) -> None:
        """Copy the newest checkpoint with all that belongs to it."""
        directory = self._run_dir / FOLDER
        paths = published(directory)
        if not paths:
            self._bring_records()
            return
        newest, step = paths[-1], _step(paths[-1].name)
        try:
            with leased(newest):
                # the records before what makes it whole: of their steps nothing may be missing
                self._bring(newest, self._bring_records)
        except FileNotFoundError:
            # pruned before it was leased: a newer one has been asked for
            if newest.is_dir() or self._num_asked == self._tried:
                raise
            return
        self._note_copied(step)
        self._prune(step, self._bring_best(directory))

    def _bring(self, path: Path, before_whole: Callable[[], None] = lambda: None) -> None:
        """Copy a checkpoint, where it is not there as it is here."""
        assert self._bucket is not None
        folder, state = f"{FOLDER}/{path.name}", read_bytes(path / STATE_FILE)
        marker = f"{folder}/{STATE_FILE}"
        if path.name not in self._damaged and self._bucket.read(marker) == state:
            before_whole()
            return
        if self._begun != state:
            # of the same step, from another course of the run: from here on it is not whole
            _remove(self._bucket, path.name)
            self._begun, self._sent = state, set()
        # those of earlier versions do not name their files
        names = unseal(state)[0].get("files") or _tensor_files(listed(path))
        # raises where one is not here, before what names it is there
        sizes = {name: (path / name).stat().st_size for name in names}
        for name in sorted(sizes.keys() - self._sent):
            self._check_open()
            sent, total = sum(sizes[name] for name in self._sent), sum(sizes.values())
            self._progress = (
                f"step {_step(path.name)} to {self._bucket.url}, {sent / 1e6:.0f} of "
                f"{total / 1e6:.0f} MB"
            )
            self._bucket.upload(path / name, f"{folder}/{name}")
            self._sent.add(name)
        before_whole()
        self._check_open()
        self._bucket.write(marker, state)
        self._damaged.discard(path.name)
        self._begun, self._progress = b"", ""

    def _bring_records(self) -> None:
        assert self._bucket is not None
        for name in self._records:
            self._check_open()
            if is_file(self._run_dir / name):
                self._bucket.write(name, read_bytes(self._run_dir / name))

    def _bring_best(self, directory: Path) -> int | None:
        """The best checkpoint, and last the file that names it: never one that is not there.

        Returns its step.
        """
        assert self._bucket is not None
        file = directory / BEST_FILE
        # read once: an evaluation may name another one meanwhile
        content = read_bytes(file) if is_file(file) else b""
        step = _step_of_best(content)
        path = directory / f"step-{step:08d}" if step is not None else None
        if path is not None and path.is_dir():
            with leased(path):
                self._bring(path)
            self._bucket.write(BEST, content)
        return step

    def _prune(self, newest: int, best: int | None) -> None:
        """Remove all but the newest and the best, as in the run directory."""
        assert self._bucket is not None
        names = _checkpoints(self._bucket)
        whole = [name for name in names if name not in self._damaged and self._is_whole(name)]
        # later ones were damaged in the run directory, which went on from before them: here they
        # may be the only sound ones
        kept = {name for name in whole if _step(name) > newest or _step(name) == best}
        kept |= {*[name for name in whole if _step(name) <= newest][-self._keep_last :]}
        for name in names:
            if name not in kept:
                self._check_open()
                _remove(self._bucket, name)

    def _is_whole(self, name: str) -> bool:
        assert self._bucket is not None
        return STATE_FILE in self._bucket.names(f"{FOLDER}/{name}")

    def _check_open(self) -> None:
        if self._is_closed:
            raise _Ended

    def _note_copied(self, step: int) -> None:
        assert self._bucket is not None
        with self._changed:
            self._newest = step
            late = sorted(other for other in self._published if other < step)
            self._published = {other for other in self._published if other > step}
            if late:
                what = counted(len(late), "checkpoint")
                self._lines.append(
                    f"copies: {what} up to step {late[-1]} left out: step {step} was written "
                    f"before {self._bucket.url} had taken the one before"
                )

    def _note_success(self) -> None:
        assert self._bucket is not None
        with self._changed:
            if self._num_failures:
                self._lines.append(f"copies: {self._bucket.url} takes them again")
            self._num_failures, self._done = 0, self._tried
            self._changed.notify_all()

    def _note_failure(self, error: Exception) -> None:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        with self._changed:
            # once: it is tried again and again, and the health check says whether it still is so
            if not self._num_failures:
                there = f"from step {self._newest}" if self._newest >= 0 else "from none"
                self._lines.append(
                    f"copies: {text}. Training goes on, and it is tried again; until then a fresh "
                    f"node would go on {there}"
                )
            self._num_failures += 1


@dataclass(frozen=True)
class Fetched:
    """What came from a bucket: what is now in run_dir and was not; the bytes of the records, which
    are not yet; and what there is to tell.
    """

    paths: list[Path] = field(default_factory=list)
    records: dict[str, bytes] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)  # names
    lines: list[str] = field(default_factory=list)

    def remove(self) -> None:
        """Leave the run directory as it was."""
        for path in self.paths:
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                path.parent.rmdir()  # where it is empty now


def fetch(run_dir: Path, bucket: Bucket, records: Sequence[str]) -> Fetched:
    """Bring the newest whole checkpoint of a bucket, and the best one, where run_dir has none as
    new.

    One that is not as it was written is passed over, and told. What has come goes again where the
    rest cannot. Raises InputError for a full disk.
    """
    found = Fetched()
    try:
        _fetch(run_dir, bucket, records, found)
    except BaseException:
        found.remove()
        raise
    return found


def _fetch(run_dir: Path, bucket: Bucket, records: Sequence[str], found: Fetched) -> None:
    newest = max((path.name for path in published(run_dir / FOLDER)), default="")
    for name in reversed(_checkpoints(bucket)):
        if name < newest:
            return
        if name == newest:
            # a fetch that was killed may have left it without what belongs to it
            records = [record for record in records if not is_file(run_dir / record)]
            break
        if _bring_here(run_dir, bucket, name, found):
            found.lines.append(f"fetched step {_step(name)} from {bucket.url}")
            break
    else:
        return
    for record in records:
        content = bucket.read(record)
        if content is not None:
            found.records[record] = content
    if name != newest or not is_file(run_dir / BEST):
        _fetch_best(run_dir, bucket, found)


def _fetch_best(run_dir: Path, bucket: Bucket, found: Fetched) -> None:
    content = bucket.read(BEST)
    step = None if content is None else _step_of_best(content)
    if content is None or step is None:
        return  # damaged: the next evaluation decides
    name = f"step-{step:08d}"
    if (run_dir / FOLDER / name).is_dir() or _bring_here(run_dir, bucket, name, found):
        found.records[BEST] = content


def _step_of_best(content: bytes) -> int | None:
    """The step that a best.json names; None of one that is damaged."""
    try:
        return int(unseal(content)[0]["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _bring_here(run_dir: Path, bucket: Bucket, name: str, found: Fetched) -> bool:
    """Whether a checkpoint of a bucket is whole; it is then in run_dir."""
    folder, target = f"{FOLDER}/{name}", run_dir / FOLDER / name
    there = bucket.names(folder)
    if STATE_FILE not in there:
        return False  # its upload was ended in the middle
    say(f"fetching step {_step(name)} from {bucket.url}")
    partial = hidden(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for file in (*_tensor_files(there), STATE_FILE):
            bucket.download(f"{folder}/{file}", partial / file)
        if verified(partial).step != _step(name):
            raise DamagedCheckpoint(f"{name} is of another step", "a whole checkpoint", "none")
        target.parent.mkdir(exist_ok=True)
        partial.rename(target)
    except DamagedCheckpoint as error:
        what = error.got.replace(str(partial), f"{bucket.url}/{folder}")
        found.damaged.append(name)
        found.lines.append(f"copies: passed over, as damaged: {what}")
        return False
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(target) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found.paths.append(target)
    return True


def write_records(run_dir: Path, records: dict[str, bytes]) -> None:
    """Put what was fetched into the run directory."""
    for name, content in records.items():
        path = run_dir / name
        if name == ATTEMPTS_FILE and is_file(path):
            # what was noted here since, by launchers too
            kept = [line for line in read_bytes(path).splitlines(True) if line not in content]
            content += b"".join(kept)
        with files.published(path) as partial:
            partial.write_bytes(content)


def _remove(bucket: Bucket, name: str) -> None:
    """Remove a checkpoint from a bucket, or what is there of it."""
    # first what makes it whole: a kill in the middle leaves nothing that looks so
    bucket.remove(f"{FOLDER}/{name}/{STATE_FILE}")
    bucket.remove(f"{FOLDER}/{name}")


def _checkpoints(bucket: Bucket) -> list[str]:
    """The names of a bucket's checkpoints, whole or not, oldest first."""
    return [name for name in bucket.names(FOLDER) if re.fullmatch(r"step-\d{8}", name)]


def _tensor_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(SUFFIX)]


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
