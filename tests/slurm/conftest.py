"""A cluster for all tests here, and runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.slurm.runs import Run


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of four nodes, each with 4 CPUs and 2 GPUs that are none."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def new_run(cluster: Cluster, toy_shards: Path, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    """Makes runs; their jobs are cancelled at the end, whatever happened."""
    made: list[Run] = []

    def make() -> Run:
        folder = tmp_path / f"run{len(made)}"
        folder.mkdir()
        made.append(Run(cluster, folder, toy_shards))
        return made[-1]

    yield make
    for run in made:
        for file in run.folder.glob("hold-*"):
            file.unlink()
        cluster.run("scancel", "--full", run.job, check=False)


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The last checkpoint of a run on two nodes that nothing happened to."""
    run = Run(cluster, tmp_path_factory.mktemp("uninterrupted"), toy_shards)
    run.sbatch()
    assert run.wait()["Restarts"] == "0"
    assert [attempt.outcome for attempt in run.attempts()] == ["done"]
    return run.parameters()


@pytest.fixture
def run(new_run: Callable[[], Run]) -> Run:
    return new_run()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These take longest: they come after all others."""
    items.sort(key=lambda item: Path(__file__).parent in item.path.parents)
