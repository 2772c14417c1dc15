"""A checkpoint on the disk: finding it, and reading what it says without the run that wrote it.

A checkpoint is a folder checkpoints/step-00000500 of a run with safetensors files and state.json:
{"version", "state": {"step", ...}, "identity": {key: value}, "parts": {learner: [part, ...]},
"files": {name: sha256}, "sha256": of all this}. Those of earlier versions have neither "files" nor
"sha256". See distseg/runs/checkpointer.py for how it gets there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distseg.runs.lease import leased
from distseg.runs.sealed import unseal
from distseg.runs.tensor_files import SUFFIX, DamagedCheckpoint, check_readable, read
from shards.errors import InputError
from shards.manifest import sha256_of
from shards.storage import is_file, listed, read_bytes, retried

VERSION = 1  # of the layout; another one is refused, not guessed at
FOLDER = "checkpoints"
STATE_FILE, BEST_FILE = "state.json", "best.json"
_KEYS = {"version", "state", "identity", "parts"}
_BEST = {"step", "mean_iou", "chosen_by", "view"}  # keys of best.json
_CHOSEN_BY = {"data", "split", "domain"}
# domains of a validation set: one of the data sets whose labels are trained on; another one; the
# one that is adapted to, whose labels nobody has who needs that
OWN, OTHER, TARGET = "own", "other", "target"
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NAME = re.compile(r"[A-Za-z0-9_]+")  # of learners and parts, which become names of files


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself, read once: its folder may be pruned at any time.

    identity: what it must agree on with the run that loads it. parts: of each learner. files: the
    sha256 of each; None: of an earlier version, which kept none. sha256: of state.json, which names
    these.
    """

    path: Path
    state: dict[str, Any]
    identity: dict[str, Any]
    parts: dict[str, list[str]]
    files: dict[str, str] | None
    sha256: str = ""

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state["step"])

    @property
    def caveat(self) -> str:
        """What a user should know of it; "" where all is well."""
        if self.files is not None:
            return ""
        return f"{self.path}: of an earlier version, without checksums, so not verified"


def published(directory: Path) -> list[Path]:
    """The checkpoints in a run's checkpoints/, oldest first."""
    # no looser pattern: a user may keep a copy beside them, which is not ours to count or remove
    # Path.glob would take a disk that does not answer for an empty folder, and the run begin anew
    names = sorted(name for name in listed(directory) if re.fullmatch(r"step-\d{8}", name))
    # the name comes last, so that whatever has it was complete once
    return [directory / name for name in names if (directory / name).is_dir()]


def find(run_dir: Path, which: str) -> Path:
    """The checkpoint "last" or "best" of a run, or one by its step.

    Raises InputError when there is none.
    """
    directory = run_dir / FOLDER
    by_name = {path.name: path for path in published(directory)}
    if which == "last" and by_name:
        # by name: with eight digits that is by step
        return by_name[max(by_name)]
    # "best" before any was scored stays the word, which the error then shows
    wanted = str(read_best(directory).get("step", which)) if which == "best" else which
    name = f"step-{int(wanted):08d}" if wanted.isdecimal() else wanted
    if name in by_name:
        return by_name[name]
    steps = [str(int(name.removeprefix("step-"))) for name in by_name]
    got, there = f"no checkpoint {wanted!r} in {directory}", ", ".join(steps) or "none"
    # "best" is no way out of where nothing was scored
    action = f"name one of these steps, or last: {there}" if steps else "train first"
    raise InputError(got, f"last, best or a step (there: {there})", action)


@contextmanager
def opened(run_dir: Path, which: str) -> Iterator[Checkpoint]:
    """A checkpoint of a run, verified; a training beside leaves it in place until the block ends.

    which: as `find` takes it. Raises InputError where there is none, and DamagedCheckpoint.
    """
    path = find(run_dir, which)
    with leased(path):
        yield verified(path)


def verified(
    path: Path, rank: int = 0, world_size: int = 1, moved: Callable[[], None] = lambda: None
) -> Checkpoint:
    """A checkpoint whose files are as they were written; of one that kept no checksums, readable.

    Of several ranks, each verifies the files that it reads, and together they verify all. `moved`
    is called as bytes of them arrive. Raises DamagedCheckpoint with the file's name, and
    StorageError for a disk that cannot be read now.
    """
    try:
        return retried(path, lambda: _verified(path, rank, world_size, moved))
    except PermissionError as error:
        got = f"{error.filename}: {error.strerror}"
        raise InputError(got, "files that can be read", "ask their owner") from None
    except _NO_FILE as error:
        raise _damaged(path, f"{Path(error.filename).name} is missing") from None


def _verified(path: Path, rank: int, world_size: int, moved: Callable[[], None]) -> Checkpoint:
    found = read_state(path)
    if found.files is None:
        for learner, parts in found.parts.items():
            for part in parts:
                check_readable(path, f"{learner}.{part}")
        return found
    # by one rank for all: a list of a thousand ranks' files takes time of its own
    there = {name for name in listed(path) if name.endswith(SUFFIX)} if rank == 0 else found.files
    # one too many, too: it could be read in the place of another
    for name in sorted(there ^ found.files.keys()):
        what = "is missing" if name in found.files else "is none of its files"
        raise _damaged(path, f"{name} {what}")
    for name in sorted(there):
        if not _is_read_by(name, rank, world_size):
            continue
        if sha256_of(path / name, moved) != found.files[name]:
            raise _damaged(path, f"{name} is not as it was written (sha256)")
    return found


def _is_read_by(name: str, rank: int, world_size: int) -> bool:
    """Whether a rank has to verify a file: one with full tensors is read by every one."""
    sharded = re.search(r"\.(\d+)-of-(\d+)" + re.escape(SUFFIX) + "$", name)
    if sharded is None:
        return True
    # Shard k of n is read by ranks k, k + n, ...; of another number of ranks by others too, whose
    # rows are sound when some rank has found the file so.
    index, count = int(sharded[1]) - 1, int(sharded[2])
    return (index - rank) % min(count, world_size) == 0


def _damaged(path: Path, what: str) -> DamagedCheckpoint:
    others = [other.name for other in published(path.parent) if other != path]
    needed = "a whole checkpoint"
    if not others:
        return DamagedCheckpoint(f"{path}: {what}", needed, "restore it")
    steps = ", ".join(str(int(name.removeprefix("step-"))) for name in others)
    return DamagedCheckpoint(f"{path}: {what}", needed, f"choose another one by its step: {steps}")


def read_best(directory: Path) -> dict[str, Any]:
    """{"step", "mean_iou", "chosen_by", "view"} of the best one in a run's checkpoints/, {} when
    none was scored yet. chosen_by: {"data", "split", "domain"} of the labels that it was scored by,
    the domain being OWN, OTHER or TARGET; view: how images were looked at. Both are {} of an
    earlier version.

    Raises InputError when the file is damaged.
    """
    path = directory / BEST_FILE
    if not is_file(path):
        return {}
    try:
        best, _ = unseal(read_bytes(path))
        # what chose it, and how, was not noted by earlier versions
        best = {"chosen_by": {}, "view": {}} | best
        by = best["chosen_by"]
        if best.keys() != _BEST or (by and by.keys() != _CHOSEN_BY):
            raise ValueError(f"keys {sorted(best)}")
        return best | {"step": int(best["step"]), "mean_iou": float(best["mean_iou"])}
    # not passed over as "none yet": the next score would then replace a better one
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: damaged ({error})", "the file that training wrote", "remove it"
        ) from None


def target_of_best(run_dir: Path) -> str:
    """Whose labels chose a run's best checkpoint, where they are those of the domain that the run
    adapted to; "" elsewhere, and where it is not known.

    Raises InputError as `read_best`.
    """
    by = read_best(run_dir / FOLDER).get("chosen_by", {})
    is_target = by.get("domain") == TARGET
    return f"labels of the target ({by['data']}, {by['split']})" if is_target else ""


def read_state(path: Path) -> Checkpoint:
    """What the state.json of a checkpoint says; its files are not looked at.

    Raises DamagedCheckpoint, and InputError for another version.
    """
    file = path / STATE_FILE
    try:
        data = read_bytes(file)
        content, is_sealed = unseal(data)
        # exactly: a sealed one whose seal has lost its name must not pass for an old one
        keys = _KEYS | {"files"} if is_sealed else _KEYS
        # one of another version may have other keys, and is not damaged
        if content.get("version") == VERSION and content.keys() != keys:
            raise ValueError(f"keys {sorted(content)}")
        if "version" not in content:
            raise ValueError("no version")
        if content["version"] == VERSION:
            return _checked(path, content, hashlib.sha256(data).hexdigest())
    except _NO_FILE:
        raise _damaged(path, f"{STATE_FILE} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{STATE_FILE}: damaged ({error})") from None
    got = f"{path}: version {content['version']!r}"
    raise InputError(got, f"version {VERSION}", "use the distseg that wrote it")


def _checked(path: Path, content: dict[str, Any], sha256: str) -> Checkpoint:
    """Raises ValueError where the content is not that of a checkpoint in this folder."""
    parts, files = content["parts"], content.get("files")
    found = Checkpoint(path, content["state"], content["identity"], parts, files, sha256)
    if not isinstance(found.identity, dict):
        raise ValueError(f"an identity that is a {type(found.identity).__name__}")
    # a file of another checkpoint, whole in itself
    if re.fullmatch(r"step-\d{8}", path.name) and int(path.name[5:]) != found.step:
        raise ValueError(f"it is of step {found.step}")
    for learner, parts in found.parts.items():
        for name in (learner, *parts):
            # it becomes part of a path
            if not _NAME.fullmatch(name):
                raise ValueError(f"a part called {name!r}")
    return found


def read_network(
    found: Checkpoint, network: str, instead: str = ""
) -> tuple[str, dict[str, Tensor]]:
    """The part of a checkpoint that stands for a network, and its tensors.

    network: "segmentor", of which the EMA weights ("ema") are taken where there are any, or
    "discriminator". instead: what the user may write who has no such run. Raises InputError where
    the run had none.
    """
    # EMA weights are what the run was evaluated with
    part = "ema" if network == "segmentor" and "ema" in found.parts else network
    if part not in found.parts:
        action = f"{f'write {instead}, or ' if instead else ''}name a run that had one"
        raise InputError(f"{found.path} has no {network}", f"a run with a {network}", action)
    return part, retried(found.path, lambda: read(found.path, f"{part}.network"))


def load_segmentor(found: Checkpoint, network: torch.nn.Module) -> str:
    """Copy a checkpoint's segmentor into a network.

    Its EMA weights where there are any. Returns which: "ema" or "segmentor". Raises InputError when
    the network is another than the checkpoint's.
    """
    which, tensors = read_network(found, "segmentor")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        got = f"{found.path}: {str(error).splitlines()[-1].strip()}"
        raise InputError(
            got, "the network that the run's config.yaml names", "restore config.yaml"
        ) from None
    return which
