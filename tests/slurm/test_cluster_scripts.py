"""slurm/train_voc.sh on real clusters.

Whatever hits a job, the run comes back, to the bits of one left alone.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from tests.slurm.scenarios import SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scripts(scenario: str, outcomes: dict[str, Future[Any]]) -> None:
    outcomes[scenario].result()
