"""What a run ran on and with: versions, devices and the scheduler's job, of a few named facts and
nothing else.

The environment is never dumped: it holds tokens. Each variable that is read is named here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from distseg.distributed.ranks import Ranks

PACKAGES = ("distseg", "torch", "numpy", "deepspeed", "wandb", "webdataset")
SLURM_FACTS = (
    *(
        "JOB_ID",
        "JOB_NAME",
        "JOB_PARTITION",
        "JOB_NODELIST",
        "JOB_NUM_NODES",
        "NTASKS",
        "RESTART_COUNT",
    ),
    *("ARRAY_JOB_ID", "ARRAY_TASK_ID", "CLUSTER_NAME"),
)
_GIT_SECONDS = 5.0


def facts(ranks: Ranks) -> dict[str, Any]:
    """Plain values for environment.json and W&B."""
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    found: dict[str, Any] = {
        "versions": versions,
        "python": platform.python_version(),
        "host": platform.node(),
    }
    found |= {
        "system": platform.platform(),
        "world_size": ranks.world_size,
        "device": str(ranks.device.type),
    }
    found |= {
        "code": code_version(Path(__file__).parent.parent),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    if ranks.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(ranks.device)
    slurm = {
        name.lower(): os.environ[f"SLURM_{name}"]
        for name in SLURM_FACTS
        if f"SLURM_{name}" in os.environ
    }
    return found | ({"slurm": slurm} if slurm else {})


def code_version(folder: Path) -> str | None:
    """The commit that a checkout is at, with "-dirty" where files differ from it.

    None where there is no checkout.
    """
    command = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
