"""The doctor finds faults that are put in its way, says where they are, and finds none where there
are none.
"""

from __future__ import annotations

import http.server
import io
import resource
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from distseg.cli import main
from distseg.distributed.ranks import Ranks
from distseg.doctor import checkup
from distseg.doctor import run as command
from distseg.doctor.checkup import CheckResult, Checkup
from tests.ranks import free_port, run_ranks

HOSTS = ("here", "there", "yonder")


def level_of(found: list[CheckResult], name: str) -> tuple[str, str]:
    (result,) = (result for result in found if result.name == name)
    return result.level, result.text


def three_ranks(ranks: Ranks, run_dir: Path, faults: bool) -> list[CheckResult]:
    """examine() on machines told apart by name; with faults, rank 1 and rank 2 have some."""
    work, clock, versions = 0.01, time.time, checkup.versions
    checkup.compute_seconds = lambda device: work * (3 if faults and ranks.rank == 1 else 1)
    if faults and ranks.rank == 1:
        command.time = SimpleNamespace(time=lambda: clock() + 5, perf_counter=time.perf_counter)
        run_dir = run_dir / "elsewhere"
        command.Path = lambda path: Path("/proc")  # a file system that rank 0's file is not on
        checkup.tracking = checkup.open_files
        checkup.open_files = lambda: 1 / 0
    if faults and ranks.rank == 2:
        checkup.versions = lambda device: versions(device) | {"torch": "1.0"}
    return command.examine(ranks, HOSTS, run_dir, None, "train")


def test_three_sound_ranks_are_fit(tmp_path: Path) -> None:
    first, *others = run_ranks(3, three_ranks, tmp_path / "new" / "run", False)
    assert others == [first, first], "every rank comes to the same exit code"
    assert not [finding for finding in first if finding.level == "error"]
    assert level_of(first, "slow ranks")[0] == level_of(first, "clocks")[0] == "ok"
    text = level_of(first, "all-reduce")[1]
    assert text.startswith("gloo: ") and "GB/s per rank (16 MiB in" in text
    assert level_of(first, "shared directory") == ("ok", "all ranks see it")
    assert not (tmp_path / "new").exists() and not list(tmp_path.iterdir()), (
        "nothing is left behind"
    )


def test_faults_of_single_ranks_are_found_and_named(tmp_path: Path) -> None:
    found, *others = run_ranks(3, three_ranks, tmp_path, True)
    assert others == [found, found]
    level, text = level_of(found, "slow ranks")
    assert level == "warning" and "rank 1 on there (3.0 times the median)" in text
    level, text = level_of(found, "clocks")
    assert level == "warning" and text.startswith("differ by 5.") and "there" in text
    level, text = level_of(found, "versions")
    assert level == "error" and "rank 2 on" in text and "torch 1.0" in text
    level, text = level_of(found, "shared directory")
    assert level == "error" and "rank 1 on there" in text
    assert any(f.level == "error" and "ZeroDivisionError" in f.text for f in found), (
        "and nobody waited for rank 1"
    )


def test_the_whole_command(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(checkup, "_SECONDS", 0.1)
    sound = ["doctor", "--run-dir", str(tmp_path / "run"), "--device", "cpu", "--shards"]
    assert main([*sound, str(toy_shards)]) == 0
    shown = capsys.readouterr().out
    assert (
        "8 samples in train" in shown
        and "0 errors" in shown
        and "disabled (WANDB_MODE=disabled)" in shown
    )
    assert main([*sound, str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    # the table folds long paths anywhere
    assert "manifest.json" in "".join(shown.split())
    assert "to do: " in shown and "1 error, " in shown
    damaged = shutil.copytree(toy_shards, tmp_path / "damaged")
    for path in damaged.glob("train*.tar"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert main([*sound, str(damaged)]) == 1


@pytest.mark.parametrize("place", ["/proc", "/proc/new/run", "file", "file/run"])
def test_a_run_directory_that_cannot_be_written_is_an_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = checkup.run_directory(tmp_path / place)
    assert (
        found.level == "error" and "cannot be written" in found.text and "--run-dir" in found.action
    )


@pytest.mark.parametrize(
    ("free", "level"), [(50 << 20, "error"), (1 << 30, "warning"), (50 << 30, "ok")]
)
def test_little_space_is_found(
    free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=1 << 40)
    )
    monkeypatch.setattr(checkup, "_SECONDS", 0.05)
    assert checkup.run_directory(tmp_path).level == level and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "level"), [(200, "error"), (512, "warning"), (4096, "ok")])
def test_a_low_limit_of_open_files_is_found(limit: int, level: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, before[1]), before[1]))
    try:
        found = checkup.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found.level == level and f"{limit} a process" in found.text


def test_a_tiny_shared_memory_matters_where_gpus_need_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checkup, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=32 << 20, total=64 << 20)
    )
    assert checkup.shared_memory(is_needed=True).level == "error"
    assert checkup.shared_memory(is_needed=False).level == "warning"
    assert "--shm-size" in checkup.shared_memory(is_needed=True).action
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=8 << 30, total=8 << 30)
    )
    assert checkup.shared_memory(is_needed=True).level == "ok"
    monkeypatch.setattr(checkup, "SHARED_MEMORY", tmp_path / "none")
    assert checkup.shared_memory(is_needed=True).level == "error"


def test_more_ranks_or_threads_than_cores_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkup.os, "sched_getaffinity", lambda process: set(range(4)), raising=False
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [checkup.cores(ranks).level for ranks in (1, 2, 3, 5)] == [
        "ok",
        "ok",
        "warning",
        "warning",
    ]
    assert "OMP_NUM_THREADS=1" in checkup.cores(3).action


def test_whether_wandb_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "choose_mode", lambda wanted: "online")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # 501 to all: an answer
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    assert checkup.tracking().level == "ok"
    server.shutdown()
    server.server_close()
    for url in (f"http://127.0.0.1:{free_port()}", "nonsense"):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        found = checkup.tracking()
        assert (
            found.level == "warning"
            and "does not answer" in found.text
            and "WANDB_MODE=offline" in found.action
        )
    monkeypatch.setattr(checkup, "choose_mode", lambda wanted: "offline")
    assert checkup.tracking().level == "ok"


def test_what_several_ranks_find_alike_is_said_once() -> None:
    low, high = (
        CheckResult("warning", "open files", "512 a process", "more"),
        CheckResult("ok", "open files", "4096 a process"),
    )
    everyone = [
        Checkup(0, "a", [high]),
        Checkup(1, "a", [low]),
        Checkup(2, "b", [high]),
        Checkup(3, "b", [low]),
    ]
    assert [(f.level, f.text) for f in command.of_ranks(everyone)] == [
        ("ok", "a, b: 4096 a process"),
        ("warning", "a, b: 512 a process"),
    ]
    alike = [Checkup(rank, "a", [high]) for rank in range(8)]
    assert [f.text for f in command.of_ranks(alike)] == ["4096 a process"]


def test_one_screen_of_eighty_columns_cuts_nothing_off() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    found = [
        CheckResult("ok", "shared directory", "word " * 40),
        CheckResult("error", "x", "y", "do this [now]"),
    ]
    command.show(found, "8 ranks", 3.0, console)
    text = console.export_text()
    assert (
        text.count("word") == 40
        and "do this [now]" in text
        and max(map(len, text.splitlines())) <= 80
    )
    assert "1 error, 0 warnings: a run would break" in text
