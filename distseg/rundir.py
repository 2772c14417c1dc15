"""The run directory: one run, one configuration."""

from __future__ import annotations

from pathlib import Path

from distseg import config as configuration
from distseg.config import Config
from distseg.distributed import Ranks, on_main
from shards.errors import InputError
from shards.files import published

CONFIG_FILE = "config.yaml"


def claim(run_dir: Path, config: Config, ranks: Ranks) -> None:
    """Make the run directory and save the configuration in it, or check that it is the one saved there.

    Raises InputError, on every rank, when the directory holds a run of another configuration or cannot be made.
    """
    on_main(ranks, lambda: _claim(run_dir, config))


def _claim(run_dir: Path, config: Config) -> None:
    path = run_dir / CONFIG_FILE
    if path.exists():
        changed = configuration.differences(configuration.from_file(path), config)
        if changed:
            got = ", ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items())
            raise InputError(
                f"{run_dir} holds a run of another configuration ({got})",
                "the same configuration to resume it, or another directory",
                f"write run_dir=DIR to start a new run, or remove {run_dir}",
            )
    with published(path) as partial:
        partial.write_text(configuration.to_yaml(config))
