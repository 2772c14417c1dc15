"""What can be known to be wrong with a run before it waits in a queue.

Needs no GPU and starts none.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from distseg.config import code, loading
from distseg.config.schema import Config
from distseg.config.world_size import check_world_size
from launchers.places import PYTHON_VARIABLE
from shards.errors import InputError
from shards.files import nearest_existing
from shards.manifest import FILE_NAME as MANIFEST
from shards.prepare import NAMES
from shards.words import counted


def check_run(overrides: list[str], world_size: int) -> Config:
    """The configuration of a run on so many ranks. Raises InputError for what training would
    refuse.

    Looked at: keys and values, code of the user's own, the shards' manifest, the networks (they are
    built, on the CPU), the batch size, and whether the run directory can be written and is this
    run's.
    """
    # from the cheapest check to the dearest
    config = code.recorded(loading.load(overrides))
    _check_run_dir(config)
    data = config.data
    for shards in (*data.shards, *data.unlabelled_shards, *filter(None, [data.val_shards])):
        _check_shards(shards)
    check_world_size(config, world_size)
    # where a container brings torch, the ranks look at the rest: they refuse it in the same words
    if os.environ.get(PYTHON_VARIABLE) and find_spec("torch") is None:
        return config
    # imports torch, which takes seconds; most mistakes are found by now
    from distseg.train.run import check

    check(config, world_size)
    return config


def node_counts(config: Config | None, ranks_per_node: int, least: int, most: int) -> list[int]:
    """The numbers of nodes from least to most that a run can be trained on, the largest first.

    config: None for what may have any number of ranks. Raises InputError where there is none, and
    where `most` is the only one although fewer were allowed.
    """
    if config is None:
        return list(range(most, least - 1, -1))
    refused: dict[int, str] = {}  # number of nodes -> why
    # from one on, also where fewer are not allowed: the error names all that go
    for number in range(1, most + 1):
        try:
            check_world_size(config, number * ranks_per_node)
        except InputError as error:
            refused[number] = error.got
    counts = [number for number in range(most, least - 1, -1) if number not in refused]
    if counts and (counts[-1] < most or least == most):
        return counts
    possible = [str(number) for number in range(1, most + 1) if number not in refused]
    why = refused[most if not counts else most - 1]
    got = f"{least} to {most} nodes of {counted(ranks_per_node, 'rank')}: {why}"
    needed = f"numbers of nodes that go: of up to {most} there are {', '.join(possible) or 'none'}"
    raise InputError(got, needed, "allow fewer nodes, or change the batch size")


def _check_run_dir(config: Config) -> None:
    path = Path(config.run_dir).absolute()
    # a run directory is gone on with only by the run that began it: another one's checkpoints would
    # load, or fail halfway
    loading.check_same(path, config)
    # nothing is made here: a job that is never started leaves no empty folder behind
    there = nearest_existing(path)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        got = f"run_dir={config.run_dir}: {there} cannot be written"
        raise InputError(got, "a directory that can be written", "write run_dir=DIR")


def _check_shards(shards: str) -> None:
    """Raise InputError, with the commands that make them, for shards that are not there."""
    folder = Path(shards)
    # a bucket is left to the job: a login node may not have its credentials, or the network to it
    if "://" in shards or (folder / MANIFEST).is_file():
        return
    name = folder.name if folder.name in NAMES else "NAME"
    root = "" if name == "toy" else " --root ROOT"
    prepare = f"distseg prepare {name}{root} --out {folder}.h5"
    action = f"`{prepare} && distseg pack {folder}.h5 --out {folder}`, or as a job: "
    action += f"`sbatch slurm/pack_shards.sh {name}{root} --out {folder}.h5`"
    if root:
        action += "; ROOT is the unpacked data set" + (
            ", NAME one of: " + ", ".join(NAMES) if name == "NAME" else ""
        )
    raise InputError(f"no {folder / MANIFEST}", "packed shards", action)
