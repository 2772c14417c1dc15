"""Several data sets as one: their samples side by side, in an order that gives each its share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from distseg.config.schema import DataConfig
from distseg.data.plan import MixedPlan
from distseg.data.samples import Decoded, SampleSet, listed_keys, plan_for
from shards.errors import InputError
from shards.index import MAX_INDEXED
from shards.reader import ShardReader
from shards.words import counted

# between the seeds of the sets: beyond every seed that a user can choose, and beyond that of the
# unlabelled images
NEXT_SEED = 2**33
MAX_SIZES = 1000  # samples whose sizes are looked up, evenly from the first to the last


class Mixture:
    """Sample sets as one, addressed by 0, 1, 2, ...: those of the first, then of the second, ...;
    safe to share between threads.

    names: of the sets, each once. Their classes are the same. One set is a mixture too.
    """

    def __init__(self, sets: Sequence[SampleSet], names: Sequence[str]):
        self.sets, self.names = tuple(sets), tuple(names)
        self.classes, self.labelled = sets[0].classes, sets[0].labelled
        # of each set and the end: the number of its first sample
        self._starts = np.cumsum([0, *map(len, sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def keys(self) -> list[str]:
        """Names of the samples, in order; of several sets as SET/KEY."""
        if len(self.sets) == 1:
            return self.sets[0].keys  # as checkpoints and lists of older runs have them
        named = zip(self.names, self.sets, strict=True)
        return [f"{name}/{key}" for name, samples in named for key in samples.keys]

    @property
    def readers(self) -> list[ShardReader]:
        """One of each set."""
        return [samples.reader for samples in self.sets]

    def class_pixels(self, asked: Sequence[float] = ()) -> np.ndarray:
        """(samples, classes): as SampleSet; with weights asked for, as of `mixed_plan`, float64,
        each set's as much more or less as its share in a batch is than in the samples.
        """
        pixels = [samples.class_pixels() for samples in self.sets]
        if asked:
            weights = weights_of(self, asked)
            factors = [float(w * len(self) / len(p)) for w, p in zip(weights, pixels, strict=True)]
            pixels = [factor * own for factor, own in zip(factors, pixels, strict=True)]
        return np.concatenate(pixels)

    def decoded_bytes(self, at_most: float) -> float:
        """Memory that all of them take decoded, or at_most where that is less. Reads none."""
        return min(sum(samples.decoded_bytes(at_most) for samples in self.sets), at_most)

    def expect(self, indices: Sequence[int]) -> None:
        """Say which samples will be loaded soon, in this order."""
        for samples, own in self._by_set(indices):
            samples.expect(own)

    def used(self, indices: Sequence[int]) -> None:
        """Say which of the expected samples need not be read any more."""
        for samples, own in self._by_set(indices):
            samples.used(own)

    def load(self, index: int) -> Decoded:
        """One sample, in arrays of its own; InputError as SampleSet."""
        number = self._set_of(index)
        return self.sets[number].load(index - int(self._starts[number]))

    def peek(self, index: int) -> Decoded:
        """As load, without a copy: the arrays may be shared, and read-only."""
        number = self._set_of(index)
        return self.sets[number].peek(index - int(self._starts[number]))

    def _set_of(self, index: int) -> int:
        # right: the first sample of a set belongs to it, and not to the one before
        return int(self._starts.searchsorted(index, side="right")) - 1

    def _by_set(self, indices: Sequence[int]) -> Iterator[tuple[SampleSet, list[int]]]:
        """Each set with those of the samples that are its own, by its own numbers."""
        numbers = self._starts.searchsorted(indices, side="right") - 1
        for number, samples in enumerate(self.sets):
            # in their order, by which shards are fetched ahead
            own = np.asarray(indices)[numbers == number] - self._starts[number]
            # a set that is not asked hears nothing: its reader has nothing to plan
            if len(own):
                yield samples, own.tolist()


def names_of(readers: Sequence[ShardReader]) -> list[str]:
    """A name for each data set: that of its manifest, with a number where it is not the first."""
    names: list[str] = []
    for reader in readers:
        # a part of the names of metrics
        name = base = re.sub(r"\s", "_", reader.manifest.name)
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def weights_of(samples: Mixture, asked: Sequence[float]) -> list[Fraction]:
    """The share of each set, adding up to 1: as asked, or as many as it has samples."""
    # by its decimal digits: as a float, 0.1 is another number
    weights = [Fraction(str(weight)) for weight in asked] or [
        Fraction(len(one)) for one in samples.sets
    ]
    return [weight / sum(weights) for weight in weights]


def mixed_plan(
    samples: Mixture, options: DataConfig, asked: Sequence[float], *, batch_size: int, seed: int
) -> MixedPlan:
    """The order of training samples: each set in its own, as configured, and every batch with each
    set's share.

    asked: the weights of the sets; []: by their numbers of samples. Raises InputError as plan_for.
    """
    # of one seed, sets of equal length would show images of the same numbers at the same time
    plans = [
        plan_for(one, options, seed + number * NEXT_SEED) for number, one in enumerate(samples.sets)
    ]
    return MixedPlan(plans, weights_of(samples, asked), batch_size, seed)


def median_size(samples: SampleSet) -> tuple[int, int]:
    """(height, width) in px, of some of a large set. Reads no sample."""
    some = np.linspace(0, len(samples) - 1, min(len(samples), MAX_SIZES)).astype(int).tolist()
    height, width = np.median([samples.size(index) for index in some], axis=0).astype(int).tolist()
    return height, width


def check_apart(mixtures: Sequence[Mixture]) -> None:
    """Raise InputError where two of the sets, of one mixture or of two, hold the same images.

    By key, length and checksum of their files: no image is read.
    """
    sets = [
        (name, samples)
        for mixture in mixtures
        for name, samples in zip(mixture.names, mixture.sets, strict=True)
    ]
    # what a share of the labels leaves is apart by itself; indices of large sets are not all held
    if len({samples.reader for _, samples in sets}) < 2:
        return
    seen: dict[tuple[str, int, int], SampleSet] = {}
    for _, samples in sets:
        for found in _fingerprints(samples):
            other = seen.setdefault(found, samples)
            if other is not samples:
                raise _twice(samples, other, found[0])


def _fingerprints(samples: SampleSet) -> Iterator[tuple[str, int, int]]:
    # of a set whose indices are not held, enough to know the same one again
    is_held = len(samples.reader) <= MAX_INDEXED
    for index in range(len(samples) if is_held else min(len(samples), MAX_SIZES)):
        yield samples.fingerprint(index)


def shared_with(samples: SampleSet, mixture: Mixture) -> list[str]:
    """Keys of the images of a split that are in the mixture too, found as by `check_apart`."""
    found: list[str] = []
    scored: set[tuple[str, int, int]] = set()
    for one in mixture.sets:
        # the splits of one data set are apart by themselves: no index is read for nothing
        is_same = one.reader.manifest.sha256 == samples.reader.manifest.sha256
        if is_same and one.reader.split != samples.reader.split:
            continue
        scored = scored or {*_fingerprints(samples)}
        found += [fingerprint[0] for fingerprint in _fingerprints(one) if fingerprint in scored]
    return found


def check_not_scored(mixture: Mixture, samples: SampleSet) -> None:
    """Raise InputError where images of a validation split are trained on with their labels.

    samples: the split. One that is trained on itself (data.val_split=train) is no slip.
    """
    sums = {it.reader.manifest.sha256: it.reader.split for it in mixture.sets}
    if sums.get(samples.reader.manifest.sha256) == samples.reader.split:
        return
    keys = shared_with(samples, mixture)
    if keys:
        reader = samples.reader
        places = ", ".join(str(it.location) for it in mixture.readers)
        got = f"{counted(len(keys), 'image')} of {reader.split} of {reader.location}, which is "
        got += f"scored, also among the labelled ones of {places}, {keys[0]!r} for one"
        action = "leave them out of one, or name other images by data.val_shards and data.val_split"
        raise InputError(got, "images for validation that are not trained on", action)


def _twice(samples: SampleSet, other: SampleSet, key: str) -> InputError:
    places = f"{other.reader.location} and {samples.reader.location}"
    got = f"the same images in {places}, {key!r} for one"
    action = "leave one of them out"
    if not samples.labelled and other.labelled:
        action = "leave out data.unlabelled_shards: data.labelled=1/8 alone takes the other images"
        action += " of data.shards as unlabelled ones"
    return InputError(got, "each image in one data set", action)


def check_shares(samples: Mixture, asked: Sequence[float], batch_size: int, key: str) -> None:
    """Raise InputError where a set has fewer samples than its share of a batch.

    asked: as for mixed_plan; key: of it, for messages.
    """
    if len(samples.sets) == 1:
        return  # of a tiny one all images are in every batch, more than once
    weights = weights_of(samples, asked)
    for name, one, weight in zip(samples.names, samples.sets, weights, strict=True):
        # most often a slip: two sets of very different size, and weights that were meant the other
        # way round
        if weight * batch_size > len(one):
            got = f"{counted(len(one), 'sample')} of {name}, whose share is "
            got += f"{float(weight * batch_size):.3g} of the {batch_size} images of a step"
            most = [round(float(other), 3) for other in weights]
            action = f"give it less than in {key}={most}, or take a smaller batch"
            # where an epoch ends within a step, an image may still be in it twice
            raise InputError(got, "as many samples at least as its share of a step", action)


def listed_by_set(
    path: Path, readers: Sequence[ShardReader], names: Sequence[str]
) -> list[list[str]]:
    """The keys that a file lists, by data set: SET/KEY, or KEY where one set alone has it.

    Raises InputError for one that none has, or several.
    """
    # once: a list may be as long as the sets
    there = [set(reader.keys) for reader in readers]
    listed: list[list[str]] = [[] for _ in readers]
    for line in listed_keys(path):
        # no key has a slash
        name, _, key = line.rpartition("/")
        of = [
            number
            for number, keys in enumerate(there)
            if key in keys and name in ("", names[number])
        ]
        # of two sets with a key in common, a guess would train on the wrong image
        if len(of) != 1:
            which = "no data set" if not of else " and ".join(names[number] for number in of)
            got, needed = f"{path}: {line!r} of {which}", "a key of one of the data sets"
            raise InputError(got, needed, f"write SET/KEY; the sets are {', '.join(names)}")
        listed[of[0]].append(key)
    return listed
