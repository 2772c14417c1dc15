"""Which version of this package it is, and at which commit; imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from contextlib import suppress
from pathlib import Path

# of a clone; of a package that was installed, the folder that packages are in
CLONE = Path(__file__).parents[2]
_GIT_SECONDS = 5.0  # the checkout may lie on a file system that has stopped answering


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
    version = _version_of_clone()
    # as a local version is written, PEP 440
    commit = code_version(CLONE) if version is not None else None
    return (version or "unknown") + (f"+{commit}" if commit else "")


def described() -> str:
    """What `distseg --version` prints: the version, and of a clone the commit."""
    # what lies in a clone is the clone's, whatever was installed in this place before
    version = _version_of_clone() or package_version()
    # an installed package may lie in a checkout of something else
    commit = code_version(CLONE) if (CLONE / ".git").exists() else None
    return f"distseg {version}" + (f" (commit {commit})" if commit else "")


def _version_of_clone() -> str | None:
    try:
        text = (CLONE / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:  # installed, or copied without it
        return None
    # without a parser: Python 3.10 has none for TOML
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found.group(1) if found else "unknown"
