"""The run directory: one job at a time, and the same for every rank."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distseg.config import loading
from distseg.distributed.ranks import Ranks
from distseg.runs import lock
from distseg.runs.lock import HELD_FILE, LOCK_FILE, DirectoryLock, holder
from distseg.runs.rundir import RunDirectory
from shards.errors import InputError
from tests.ranks import Program, bare, run_ranks
from tests.test_train import wait_for
from tests.tiny import SETTINGS, contents

CONFIG = loading.load(["data.shards=unused"])
PATIENCE = 2.0  # seconds


def open_elsewhere(ranks: Ranks, folder: Path) -> dict[str, tuple[str, float]]:
    """What every rank says, and for how long it takes, when rank 1 sees the folder late, never, or
    another one.
    """
    found, read_text = {}, Path.read_text
    for case, seconds in (("at once", 0.0), ("late", 0.7), ("never", 1e9), ("another", 0.0)):
        path, start = folder / case, time.monotonic()
        path.mkdir(exist_ok=True)

        def read(file: Path, after: float = start + seconds, case: str = case) -> str:
            if ranks.rank == 1 and file.name == LOCK_FILE and case == "another":
                return "process 7 on another machine, which has a folder of that name too"
            if ranks.rank == 1 and file.name == LOCK_FILE and time.monotonic() < after:
                raise FileNotFoundError(file)  # as NFS's cache has it
            return read_text(file)

        Path.read_text = read  # type: ignore[method-assign,assignment]
        try:
            RunDirectory(path, CONFIG, ranks, visible_seconds=PATIENCE)
            said = ""
        except InputError as error:
            said = str(error)
        found[case] = (said, time.monotonic() - start)
    return found


def test_a_folder_that_a_rank_sees_late_is_waited_for_and_one_that_is_not_shared_is_refused(
    tmp_path: Path,
) -> None:
    for found in run_ranks(2, open_elsewhere, tmp_path):
        assert found["at once"][0] == found["late"][0] == ""
        assert found["late"][1] > 0.7
        for case in ("never", "another"):
            said, seconds = found[case]
            assert "rank 1 does not see" in said and "shared file system" in said
            assert PATIENCE < seconds < 20 * PATIENCE


def test_a_second_job_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    first = RunDirectory(tmp_path / "run", CONFIG, alone)
    held = (tmp_path / "run" / LOCK_FILE).read_text()
    with pytest.raises(InputError, match=r"another job is training in .*\(process \d+ on "):
        RunDirectory(tmp_path / "run", CONFIG, alone)
    assert (tmp_path / "run" / LOCK_FILE).read_text() == held
    del first  # the lock goes with its file
    RunDirectory(tmp_path / "run", CONFIG, alone)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.1)
    monkeypatch.setattr(lock, "EXPIRES_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.05)


def test_without_locks_of_the_kernel_a_file_that_is_renewed_stands_for_one(
    without_flock: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = DirectoryLock(tmp_path)
    assert "no locks on this file system (Function not implemented)" in caplog.text
    start = time.monotonic()
    with pytest.raises(InputError, match=r"another job is training in .*\(process \d+ on "):
        DirectoryLock(tmp_path)
    assert time.monotonic() - start < 1.0  # seen to live by its next renewal
    first.check()
    assert holder(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
    first.release(is_accepted=True)
    assert holder(tmp_path) == ""
    assert not (tmp_path / HELD_FILE).exists()
    DirectoryLock(tmp_path).release(is_accepted=True)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_file_of_a_job_that_was_killed_is_taken_over_by_one_job(
    where: str, without_flock: None, tmp_path: Path
) -> None:
    # no process has this number: it is above what Linux gives
    host = socket.gethostname() if where == "here" else "another-machine"
    (tmp_path / HELD_FILE).write_text(f"process {2**22 + 1} on {host} 0123")
    start = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(DirectoryLock, tmp_path) for _ in range(4)]
        errors = [future.exception() for future in found]
    assert sum(error is None for error in errors) == 1
    assert all(isinstance(error, InputError) for error in errors if error is not None)
    assert (time.monotonic() - start > 1.0) == (where == "elsewhere")
    next(future.result() for future in found if not future.exception()).release(True)


def test_a_lock_that_could_not_be_written_stands_in_nobodys_way(
    without_flock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_FILE).write_bytes(b"\xff of a broken disk")

    def failing(self: DirectoryLock, owner: str) -> None:
        monkeypatch.undo()  # flock too, which this machine has
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(DirectoryLock, "_write", failing)
    with pytest.raises(OSError, match="Input/output error"):
        DirectoryLock(tmp_path)
    assert not (tmp_path / HELD_FILE).exists()
    assert "lock" not in [thread.name for thread in threading.enumerate()]


def test_who_died_on_another_machine_holds_nothing_for_ever(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    held = tmp_path / HELD_FILE
    held.write_text("process 5 on another-machine 0123")
    assert holder(tmp_path) == "process 5 on another-machine"
    os.utime(held, (held.stat().st_mtime - 11 * lock.EXPIRES_SECONDS,) * 2)
    assert holder(tmp_path) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, HELD_FILE]


def test_a_directory_that_was_moved_or_taken_is_not_the_runs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    held = DirectoryLock(folder)
    held.check()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is not there any more: the run directory was moved"):
        held.check()
    folder.mkdir()
    other = DirectoryLock(folder)
    with pytest.raises(InputError, match=r"is another job's now \(process"):
        held.check()
    other.release(is_accepted=True)
    held.release(is_accepted=True)


def test_a_run_whose_directory_is_moved_ends_and_begins_no_second_half(
    toy_shards: Path, tmp_path: Path
) -> None:
    path, moved = tmp_path / "run", tmp_path / "moved"
    keys = SETTINGS | {"steps": 100000, "checkpoint": {"every_steps": 2}, "run_dir": path}
    run = Program(["train", *loading.arguments(keys | {"data.shards": toy_shards})], how=bare)
    wait_for(path / "checkpoints" / "step-00000004", run)
    path.rename(moved)
    said, _ = run.communicate()
    assert run.returncode == 2, said
    assert "is not there any more: the run directory was moved" in said and "Traceback" not in said
    assert not path.exists()
    last = max(moved.glob("checkpoints/step-*"))
    assert contents(last) and not list(moved.glob("checkpoints/.partial-*"))
