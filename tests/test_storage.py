"""Storage that fails for a while: tried again, then left with a temporary exit code."""

from __future__ import annotations

import errno
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distseg.config import loading
from shards import files, storage
from shards.errors import InputError, TemporaryError
from shards.reader import ShardReader
from shards.storage import StorageError, exists, listed, read_bytes, retried
from tests.killed_processes import build_layer
from tests.ranks import TIMEOUT_SECONDS, Program, bare
from tests.tiny import SETTINGS, contents

SECONDS = float(os.environ.get("DISTSEG_FAILING_SECONDS", "0.7"))  # 5 were recorded


class Failing:
    """A function of the system's that fails for some seconds, on paths with a word in them."""

    def __init__(self, function: Any, number: int, word: str, seconds: float = 0.3):
        self._function, self._number, self._word = function, number, word
        self._seconds, self._since = seconds, 0.0

    def __call__(self, path: Any, *arguments: Any, **keywords: Any) -> Any:
        place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if self._word in place:
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since < self._seconds:
                raise OSError(self._number, os.strerror(self._number), str(path))
        return self._function(path, *arguments, **keywords)


def let_opening_fail(monkeypatch: pytest.MonkeyPatch, failing: Failing) -> None:
    """Also where paths keep the function that they open with: Python 3.10."""
    monkeypatch.setattr("io.open", failing)
    accessor = getattr(pathlib, "_NormalAccessor", None)
    if accessor is not None:
        monkeypatch.setattr(accessor, "open", staticmethod(failing))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOENT])
def test_a_file_that_was_there_is_read_once_its_storage_is_back(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    # what tells a file that is away from one that never was: its folder lists it
    let_opening_fail(monkeypatch, Failing(open, number, "file"))
    assert read_bytes(tmp_path / "file") == b"content"
    monkeypatch.setattr(os, "stat", Failing(os.stat, number, "file"))
    assert exists(tmp_path / "file")
    monkeypatch.setattr(os, "listdir", Failing(os.listdir, number, str(tmp_path)))
    if number != errno.ENOENT:
        assert listed(tmp_path) == ["file"]


def test_what_does_not_pass_is_raised_at_once_and_what_lasts_is_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "missing")
    with pytest.raises(PermissionError):
        retried(tmp_path, functools.partial(Failing(open, errno.EACCES, "", 9), tmp_path))
    assert not exists(tmp_path / "missing") and listed(tmp_path / "missing") == []
    # the same storage is asked whether its folder is there
    gone, stale = FileNotFoundError(errno.ENOENT, "gone"), Failing(open, errno.ESTALE, "", 9)
    assert storage.is_passing(gone, tmp_path, functools.partial(stale, tmp_path))
    # listed by its folder, but no more to come back than its target is
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "file")
    assert not exists(tmp_path / "link")
    assert time.monotonic() - start < 0.5
    monkeypatch.setenv(storage.SECONDS_VARIABLE, "0.4")
    (tmp_path / "file").touch()
    let_opening_fail(monkeypatch, Failing(open, errno.ESTALE, "file", 60))
    with pytest.raises(StorageError, match=r"file: Stale file handle, for 0 s: its storage") as why:
        read_bytes(tmp_path / "file")
    assert 0.4 < time.monotonic() - start < 5
    assert isinstance(why.value, TemporaryError) and why.value.exit_code == 75
    assert not isinstance(why.value, InputError)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOENT])
def test_samples_are_read_from_shards_whose_handles_became_stale(
    number: int, toy_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(toy_shards, "train")
    expected = [reader.read(index) for index in range(len(reader))]
    monkeypatch.setattr(os, "pread", Failing(os.pread, number, "train"))
    monkeypatch.setattr(os, "open", Failing(os.open, number, "train"))
    assert [reader.read(index) for index in range(len(reader))] == expected


def test_lines_are_whole_and_once_in_a_file_whose_writing_failed_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = files.LineFile(tmp_path / "lines")
    lines.write("one")
    raw = lines._file
    assert raw is not None

    class Torn:
        """Writes half of what it is given, then fails."""

        def write(self, content: bytes) -> int:
            if len(content) < 8:
                raise OSError(errno.EIO, "Input/output error")
            return raw.write(content[:3])

        close = raw.close

    lines._file = Torn()  # type: ignore[assignment]
    lines.write("two, three")
    lines.write("four")
    lines.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo, three\nfour\n"
    again = files.LineFile(tmp_path / "lines")
    again.write("five")
    assert (tmp_path / "lines").read_text() == "one\ntwo, three\nfour\nfive\n"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the layer that fails is written in C")
def test_a_run_whose_storage_fails_in_all_places_goes_on_with_the_same_bits(
    toy_shards: Path, tmp_path: Path
) -> None:
    layer = build_layer(tmp_path)
    keys = SETTINGS | {"checkpoint": {"every_steps": 1}, "data.shards": toy_shards}
    other = loading.arguments(keys | {"run_dir": tmp_path / "other"})
    undisturbed = Program(["train", *other], how=bare)
    faults = [
        f"/shards/train-:{errno.ESTALE}:20:{SECONDS}",
        f"/run/checkpoints/.partial-step-00000001:{errno.EIO}:4:{SECONDS}",
        f"/run/checkpoints/step-00000001:{errno.ENOENT}:1:{SECONDS}",
        f"/run/metrics.jsonl:{errno.ESTALE}:8:{SECONDS}",
        f"/run/config.yaml:{errno.EIO}:1:{SECONDS}",
        f"/manifest.json:{errno.ENOENT}:1:{SECONDS}",
    ]
    environment = {"LD_PRELOAD": str(layer), "FAILING_STORAGE": ";".join(faults)}
    arguments = loading.arguments(keys | {"run_dir": tmp_path / "run"})
    command = [sys.executable, "-m", "distseg.train", *arguments]
    done = subprocess.run(
        command,
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("storage fails: ") == len(faults), done.stderr
    assert undisturbed.communicate()[0] and undisturbed.returncode == 0
    last = "checkpoints/step-00000002"
    assert contents(tmp_path / "run" / last) == contents(tmp_path / "other" / last)
