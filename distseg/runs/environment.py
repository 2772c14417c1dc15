"""What a run ran on and with: versions, devices and the scheduler's job, of a few named facts and
nothing else.

The environment is never dumped: it holds tokens. Each variable that is read is named here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from distseg.distributed.ranks import Ranks

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
_GIT_SECONDS = 5.0  # the checkout may lie on a file system that has stopped answering


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


def code_version(folder: Path) -> str | None:
    """The commit that a checkout is at, with "-dirty" where files differ from it.

    None where there is no checkout.
    """
    # --exclude: the commit itself, whatever tags there are
    what = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *what],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def package_version() -> str:
    """The version of distseg: of the package, or of a clone that is not installed; "unknown"."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("distseg")
    clone = Path(__file__).parents[2]
    try:
        text = (clone / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:  # copied without it
        return "unknown"
    # without a parser: Python 3.10 has none for TOML
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    # as a local version is written, PEP 440
    commit = code_version(clone)
    return (found.group(1) if found else "unknown") + (f"+{commit}" if commit else "")


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
