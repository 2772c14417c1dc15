"""The run directory: one job at a time, and the same for every rank."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from distseg.config import loading
from distseg.distributed.ranks import Ranks
from distseg.runs.rundir import LOCK_FILE, RunDirectory
from shards.errors import InputError
from tests.ranks import run_ranks

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
