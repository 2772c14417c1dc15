"""Under which conditions a figure was measured, for the line above every table."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch


def conditions(threads: int) -> str:
    """Date, commit, machine, versions and load.

    A figure without them means nothing. threads: of each rank.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{_processor()}, {cores} cores"
    )
    busy = f"{os.getloadavg()[0]:.1f} processes on average in the minute before"
    when = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    return (
        f"{when}, commit {_commit()}, torch {torch.__version__}\n"
        f"{device}, {threads} threads a rank, {busy}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
