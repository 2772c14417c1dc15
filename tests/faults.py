"""Random faults in packed shards: `python -m tests.faults [COUNT]` prints who noticed them.

Each fault is made in a copy of the toy shards: a flipped bit or a cut anywhere in a shard, a member
index or the manifest; two members of a shard, two lines of an index or two files exchanged; the
manifest of another pack; a file that is gone. Then `distseg inspect` looks, and everything that
training reads is read, without regard to what inspect found.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from distseg.config.schema import Config, DataConfig
from distseg.train.inputs import open_data
from shards.errors import InputError
from shards.inspect import inspect
from shards.maps import write_maps
from shards.pack import pack
from shards.sample import STANFORD
from tests.conftest import toy_samples

Samples = dict[str, tuple[np.ndarray, np.ndarray]]


def flip(folder: Path, rng: np.random.Generator) -> None:
    """A bit of any file."""
    path = _any(folder, "*[rn]", rng)
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def cut(folder: Path, rng: np.random.Generator) -> None:
    """Any file, anywhere."""
    path = _any(folder, "*[rn]", rng)
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(len(content)))])


def swap_members(folder: Path, rng: np.random.Generator) -> None:
    """Two images or two labels change places, and the tar is written anew around them."""
    path = _any(folder, "train-*.tar", rng)
    with tarfile.open(path) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    kind = str(rng.choice([".jpg", ".png"]))
    one, other = rng.choice([name for name in content if name.endswith(kind)], 2, replace=False)
    content[one], content[other] = content[other], content[one]
    shutil.copy(path, folder.parent / "before.tar")
    with tarfile.open(folder.parent / "before.tar") as tar, tarfile.open(path, "w") as new:
        for member in tar:
            member.size = len(content[member.name])
            new.addfile(member, io.BytesIO(content[member.name]))


def swap_lines(folder: Path, rng: np.random.Generator) -> None:
    """Two samples of an index change their places in the tar."""
    path = _any(folder, "train-*.json", rng)
    lines = json.loads(path.read_text())
    one, other = rng.choice(len(lines), 2, replace=False)
    lines[one]["members"], lines[other]["members"] = lines[other]["members"], lines[one]["members"]
    path.write_text(json.dumps(lines, indent=0, sort_keys=True) + "\n")


def swap_files(folder: Path, rng: np.random.Generator) -> None:
    """Two shards, or two shards with their indices, change names."""
    one, other = rng.choice(sorted(folder.glob("*.tar")), 2, replace=False)
    both = [".tar", ".index.json"] if rng.integers(2) else [".tar"]
    for suffix in both:
        first, second = Path(one).with_suffix(suffix), Path(other).with_suffix(suffix)
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)


def other_manifest(folder: Path, rng: np.random.Generator) -> None:
    """That of a pack of other labels, or of the same samples in other shards."""
    place = folder.parent / "other"
    samples = toy_samples()
    if rng.integers(2):
        samples = [replace(s, label=np.minimum(s.label, 5)) for s in samples]
    write_maps(place / "maps.h5", "toy", STANFORD, samples, len(samples))
    pack(place / "maps.h5", place / "shards", samples_per_shard=int(rng.integers(4, 7)))
    shutil.copy(place / "shards" / "manifest.json", folder)
    if rng.integers(2):
        shutil.copy(place / "shards" / "verified.json", folder)


def remove(folder: Path, rng: np.random.Generator) -> None:
    """Any file."""
    _any(folder, "*[rn]", rng).unlink()


FAULTS: tuple[Callable[[Path, np.random.Generator], None], ...]
FAULTS = (flip, flip, flip, cut, cut, swap_members, swap_lines, swap_files, other_manifest, remove)


def _any(folder: Path, pattern: str, rng: np.random.Generator) -> Path:
    """A shard half of the time, since there is most to hit; else any other file of the pattern."""
    files = sorted(folder.glob(pattern))
    tars = [path for path in files if path.suffix == ".tar"]
    others = [path for path in files if path.suffix != ".tar" and path.name != "verified.json"]
    chosen = tars if tars and (not others or rng.integers(2)) else others
    return chosen[int(rng.integers(len(chosen)))]


def samples_of(folder: Path) -> Samples:
    """Everything that training and its evaluation read, decoded."""
    data = open_data(Config(run_dir=str(folder.parent), data=DataConfig(shards=str(folder))), 1)
    found: Samples = {}
    for samples in (data.train, data.val):
        for index in range(len(samples)):
            key, *arrays = samples.load(index)
            found[key] = (arrays[0], arrays[1])
    return found


def notice(folder: Path, sound: Samples) -> tuple[bool, str]:
    """(whether inspect finds it, what training does)."""
    try:
        found = bool(inspect(folder, num_threads=1).errors)
    except InputError:
        found = True
    try:
        read = samples_of(folder)
    except InputError:
        return found, "refused"
    same = read.keys() == sound.keys() and all(
        all(map(np.array_equal, read[key], sound[key])) for key in sound
    )
    return found, "not read by it" if same else "TRAINED ON"


def trial(shards: Path, place: Path, seed: int, sound: Samples) -> tuple[str, bool, str]:
    """(the fault's name, and what `notice` says) of the fault with this number."""
    rng = np.random.default_rng(seed)
    fault = FAULTS[seed % len(FAULTS)]
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(shards, place / "shards")
    fault(place / "shards", rng)
    return (fault.__name__, *notice(place / "shards", sound))


def main() -> int:
    """Make COUNT faults in shards of our own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=200)
    count = parser.parse_args().count
    told: Counter[tuple[str, bool, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        place, samples = Path(folder), toy_samples()
        write_maps(place / "maps.h5", "toy", STANFORD, samples, len(samples))
        pack(place / "maps.h5", place / "shards", samples_per_shard=3)
        sound = samples_of(place / "shards")
        for seed in range(count):
            told[trial(place / "shards", place / "copy", seed, sound)] += 1
    for (fault, found, training), times in sorted(told.items()):
        print(f"{fault:15} inspect {'finds' if found else 'MISSES'}, {training:15} {times:4}")
    return int(any(not found or "TRAINED" in training for _, found, training in told))


if __name__ == "__main__":
    sys.exit(main())
