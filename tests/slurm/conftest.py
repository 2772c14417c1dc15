"""Clusters for the tests here. They are skipped, with the reason, where none can be started."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.slurm.runs import Run
from tests.slurm.scenarios import CLUSTERS, SCENARIOS

AT_A_TIME = 4  # scenarios mostly wait: for SLURM's clocks, and for what is held


@pytest.fixture(scope="session", autouse=True)
def possible() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest,
    possible: None,
    toy_shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Any]]]:
    """The scenarios that were selected, each begun as soon as another is over, and left_alone
    before them.
    """
    wanted = {
        item.callspec.params.get("scenario")
        for item in request.session.items
        if hasattr(item, "callspec")
    }
    names = ["left_alone", *(name for name in SCENARIOS if name in wanted - {"left_alone"})]
    begun: dict[str, Future[Any]] = {}

    def play(name: str) -> Any:
        cluster = Cluster(**CLUSTERS.get(name, {}))
        try:
            cluster.start()
            run = Run(
                cluster,
                tmp_path_factory.mktemp(name),
                toy_shards,
                lambda: begun["left_alone"].result(),
            )
            return SCENARIOS[name](run, cluster)
        finally:
            cluster.stop()

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for name in names:
            begun[name] = pool.submit(play, name)
        yield begun
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def run(outcomes: dict[str, Future[Any]], toy_shards: Path, tmp_path: Path) -> Iterator[Run]:
    """A run on a cluster of its own, for one test."""
    cluster = Cluster()
    cluster.start()
    yield Run(cluster, tmp_path, toy_shards, lambda: outcomes["left_alone"].result())
    cluster.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These take longest: they come after all others."""
    items.sort(key=lambda item: Path(__file__).parent in item.path.parents)
