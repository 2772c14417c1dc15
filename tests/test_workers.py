"""Worker processes give the pixels of threads, end with whoever started them, and leave nothing
behind.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import pytest
import torch

from distseg.data.plan import Plan
from distseg.data.samples import SampleSet
from distseg.data.stream import Batch, TrainStream
from distseg.data.transforms import TrainView
from distseg.data.workers import PASSED_ON
from shards.errors import InputError
from shards.reader import ShardReader


def stream(shards: Path, *, worker_type: str, num_workers: int = 2, **options: int) -> TrainStream:
    samples, view = (
        SampleSet(ShardReader(shards, "train")),
        TrainView(48, 0.5, 1.5, color_jitter=0.4),
    )
    options = {"batch_size": 6, "rank": 0, "world_size": 1} | options
    return TrainStream(
        samples, Plan(8, 5), view, num_threads=num_workers, worker_type=worker_type, **options
    )


def workers_of(source: TrainStream) -> list[int]:
    return list(source._workers._pool._processes)


def is_alive(pid: int) -> bool:
    """Running: not gone, and not a zombie that nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def shared_memory() -> list[str]:
    """Descriptors and mappings of this process that it shares with others.

    A stream's memory, semaphores of a pool.
    """
    gc.collect()  # the pool's own are in cycles
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(path))
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted(name for name in links + maps if "distseg-data" in name or "/dev/shm" in name)


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.step == other.step
        assert torch.equal(one.image, other.image) and torch.equal(one.label, other.label)


def test_pixels_are_those_of_threads_and_nothing_is_left_behind(toy_shards: Path) -> None:
    """On one rank and on the second of three, from the start and from the middle; a scheduler's
    signals change nothing.

    More batches than the shared memory has blocks, and all of them kept, so that none is handed out
    twice.
    """
    before = shared_memory()
    for options in (
        {"num_workers": 3},
        {"num_workers": 1, "rank": 1, "world_size": 3, "start_step": 5},
    ):
        with closing(stream(toy_shards, worker_type="thread", **options)) as source:
            expected = list(islice(source, 9))
        with closing(stream(toy_shards, worker_type="process", **options)) as source:
            found = list(islice(source, 2))
            pids = workers_of(source)
            assert 1 <= len(pids) <= options["num_workers"]
            for number in PASSED_ON:
                [os.kill(pid, number) for pid in pids]
            found += islice(source, 7)
            assert workers_of(source) == pids
            assert_equal(found, expected)
        assert gone(pids)
        source.close()
    assert shared_memory() == before


def test_a_killed_worker_is_an_error_that_says_so(toy_shards: Path) -> None:
    before = shared_memory()
    source = stream(toy_shards, worker_type="process")
    next(source)
    pids = workers_of(source)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(
        InputError, match=r"(?s)a data worker process was killed.*data\.worker_type=thread"
    ):
        list(islice(source, 10_000))  # until it is noticed: the other worker goes on meanwhile
    assert gone(pids)
    assert shared_memory() == before


def test_a_bad_sample_is_named_at_its_step(toy_shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    damaged.mkdir()
    for path in toy_shards.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    bad = Plan(8, 5).sample_index(7)
    reader = ShardReader(damaged, "train")
    path = damaged / f"train-{bad // 3:06d}.tar"
    content = bytearray(path.read_bytes())
    content[content.index(reader.read(bad).image) + 50] ^= 1
    path.write_bytes(content)
    with closing(stream(damaged, worker_type="process", num_workers=1)) as source:
        assert next(source).step == 0  # positions 0 to 5
        with pytest.raises(InputError, match=rf"sample toy_{bad:02d} in .*{path.name}"):
            next(source)


PARENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_workers import stream, workers_of
if __name__ == "__main__":
    source = stream(Path(sys.argv[1]), worker_type="process")
    next(source)
    print(*workers_of(source), flush=True)
    time.sleep(60)
"""


def test_workers_end_with_a_parent_that_is_killed(toy_shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(toy_shards), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids and all(map(is_alive, pids))
        parent.kill()
    assert gone(pids)
