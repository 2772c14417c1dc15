"""Jobs on a cluster or here: one run, a sweep of runs, and what brings a run back that was stopped.

from launchers import submit, sweep
job = submit("preset=voc", "seed=1", nodes=2)
job.result()["val/mean_iou"]
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {"submit": "submission"} | dict.fromkeys(
    ("sweep", "status", "table", "resubmit"), "sweeps"
)
__all__ = ["resubmit", "status", "submit", "sweep", "table"]


def __getattr__(name: str) -> Any:
    """A function of the package, its module imported when it is asked for.

    A job's own processes need no submitit.
    """
    if name not in _PLACES:
        raise AttributeError(f"module 'launchers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"launchers.{_PLACES[name]}"), name)
