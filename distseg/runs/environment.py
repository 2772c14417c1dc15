"""What a run ran on and with: versions, devices and the scheduler's job, of a few named facts and
nothing else.

The environment is never dumped: it holds tokens. Each variable that is read is named here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from distseg.distributed.ranks import Ranks
from distseg.runs.version import code_version, package_version

PACKAGES = ("torch", "numpy", "deepspeed", "wandb", "webdataset")
SLURM_FACTS = (
    "JOB_ID",
    "JOB_NAME",
    "JOB_PARTITION",
    "JOB_NODELIST",
    "JOB_NUM_NODES",
    "NTASKS",
    "RESTART_COUNT",
    "ARRAY_JOB_ID",
    "ARRAY_TASK_ID",
    "CLUSTER_NAME",
)


def facts(ranks: Ranks) -> dict[str, Any]:
    """Plain values for environment.json and W&B."""
    found: dict[str, Any] = {
        "versions": _versions(),
        "python": platform.python_version(),
        "host": platform.node(),
        "system": platform.platform(),
        "world_size": ranks.world_size,
        "device": str(ranks.device.type),
        # a package that was installed has no checkout; it is known by its version
        "code": code_version(Path(__file__).parent.parent),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    # the rank's own: a machine may have several kinds
    if ranks.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(ranks.device)
    slurm = _slurm_facts()
    if slurm:
        found["slurm"] = slurm
    return found


def _versions() -> dict[str, str]:
    """Of those packages that are installed."""
    versions = {"distseg": package_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    # with its build (+cpu, +cu130), which the metadata of a CUDA wheel leave out
    return versions | {"torch": torch.__version__}


def _slurm_facts() -> dict[str, str]:
    facts = {}
    for name in SLURM_FACTS:
        # absent outside of SLURM, and some of them in every job
        value = os.environ.get(f"SLURM_{name}")
        if value is not None:
            facts[name.lower()] = value
    return facts
