"""The samples that a run trains or is scored on.

Which of a split, with or without labels, and which classes.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np

from distseg.config.schema import DataConfig
from distseg.data.plan import BalancedPlan, BlockPlan, Plan
from shards.errors import InputError
from shards.reader import RawSample, ShardReader
from shards.sample import IGNORE_INDEX, ClassSet, decode_image
from shards.storage import is_file, read_text
from shards.words import counted, nearest

# in a run directory: whose labels were used, where that is a choice; and which of these no step saw
LABELLED_FILE, HELD_OUT_FILE = "labelled.txt", "held_out.txt"
# key, image (H, W, 3) uint8 RGB, label (H, W) uint8 (255 = void)
Decoded = tuple[str, np.ndarray, np.ndarray]
# classes, and which of them each class index of a reader is: (256,) uint8, or None for the same
Mapped = tuple[ClassSet, np.ndarray | None]
# the one that is less like the classes that stay
MAX_COUNTED = 1000  # of a choice of samples: larger ones are never all void by chance
OTHER, OTHER_COLORS = "other", ((70, 70, 70), (200, 200, 200))  # two grays


def open_reader(
    options: DataConfig, split: str, shards: str = "", verify: bool = True
) -> ShardReader:
    """The reader of a split as configured, of the first data set where none is named.

    verify: as of ShardReader, which raises InputError.
    """
    return ShardReader(
        shards or options.shards[0],
        split,
        cache_dir=options.cache_dir,
        cache_bytes=options.cache_bytes,
        verify=verify,
    )


class DecodedSamples:
    """Samples that stay in memory decoded, at most max_bytes of them, instead of being decoded anew
    whenever they come.

    Safe to share between threads. What is sent to another process arrives empty and stays so: each
    would hold copies of its own. None makes way for another: of samples that come once an epoch
    each, no choice would be found more often.
    """

    def __init__(self, max_bytes: float):
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._samples: dict[int, Decoded] = {}
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        # without the lock: to look up one key is atomic, and at worst a sample is decoded once more
        return index in self._samples

    def find(self, index: int) -> Decoded | None:
        """The sample that was added under this index, its arrays read-only.

        None where it is not here.
        """
        return self._samples.get(index)

    def add(self, index: int, sample: Decoded) -> None:
        """Keep a sample where there is room; its arrays become read-only."""
        _, *arrays = sample
        num_bytes = sum(array.nbytes for array in arrays)
        with self._lock:
            if index in self._samples or self._num_bytes + num_bytes > self._max_bytes:
                return
            # it will be in several batches: who writes to it is
            # told, instead of spoiling the next epoch
            for array in arrays:
                array.flags.writeable = False
            self._num_bytes += num_bytes
            self._samples[index] = sample

    def __reduce__(self) -> tuple[type[DecodedSamples], tuple[int]]:
        return DecodedSamples, (0,)


class SampleSet:
    """Some samples of a split as arrays, addressed by 0, 1, 2, ...; safe to share between threads.

    indices: which of the reader's samples, in their order (None: all). labelled: False leaves their
    labels unread; `load` then gives 0 for every pixel, so that what a view fills in around the
    image still reads as void. keep: class names that stay apart; all the others become one class
    "other" with index 0 (none: the classes as they are). keep_decoded_bytes: memory for samples
    that stay decoded, as many as fit, for when they come again. Raises InputError for a class that
    is not there and, when labels are wanted, for a sample that has none.
    """

    def __init__(
        self,
        reader: ShardReader,
        indices: Sequence[int] | None = None,
        *,
        labelled: bool = True,
        keep: Sequence[str] = (),
        mapped: Mapped | None = None,
        keep_decoded_bytes: float = 0,
    ):
        self.reader, self.labelled = reader, labelled
        self._decoded = DecodedSamples(keep_decoded_bytes)
        # a range: a list of all indices of a large set would be memory for nothing
        self._indices = range(len(reader)) if indices is None else indices
        self.classes, self.table = mapped or kept(reader.classes, keep)
        unlabelled = set(reader.unlabelled) if labelled else set()
        # at the start, and not at the step hours later that meets the first of them
        without = {reader.key(i) for i in self._indices} & unlabelled if unlabelled else set()
        if without:
            some = f"{counted(len(without), 'sample')}, {min(without)} for one"
            action = (
                "prepare and pack the data with labels, or list the labelled ones: "
                "data.labelled=FILE"
            )
            raise InputError(
                f"no label in {some} of the split {reader.split}",
                "a label for every sample",
                action,
            )

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def keys(self) -> list[str]:
        """Names of the samples, in order."""
        return [self.reader.key(index) for index in self._indices]

    def original(self, index: int) -> bytes:
        """The image file of a sample, as it was prepared."""
        return self.reader.read(self._indices[index], with_label=False).image

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a sample in px, without reading it."""
        return self.reader.size(self._indices[index])

    def fingerprint(self, index: int) -> tuple[str, int, int]:
        """Key of a sample, and bytes and crc32 of its image's file, without reading it."""
        return self.reader.fingerprint(self._indices[index])

    def shard_sizes(self) -> list[int]:
        """How many of the samples lie in each of the shards that hold any, in packed order."""
        if len(self) == len(self.reader):
            return self.reader.shard_sizes
        return np.unique(self.reader.shard_of(self._indices), return_counts=True)[1].tolist()

    def decoded_bytes(self, at_most: float) -> float:
        """Memory that all of them take decoded, or at_most where that is less. Reads none."""
        total = 0
        for index in self._indices:
            if total >= at_most:
                return at_most
            height, width = self.reader.size(index)
            # bytes: three of colour and one of label for each pixel
            total += 4 * height * width
        return min(total, at_most)

    def class_pixels(self) -> np.ndarray:
        """(samples, classes) int64.

        Pixels of each class in each sample. Reads no label; InputError as the reader's.
        """
        counts = self.reader.class_pixels()[list(self._indices)]
        if self.table is None:
            return counts
        num_classes = self.classes.num_classes
        # the last column takes those that are void here: 255
        mapped = np.zeros((len(counts), num_classes + 1), np.int64)
        # add.at, as several old classes fall on one new: += would keep one of them
        np.add.at(mapped.T, np.minimum(self.table, num_classes)[: counts.shape[1]], counts.T)
        return mapped[:, :num_classes]

    def expect(self, indices: Sequence[int]) -> None:
        """Say which samples will be loaded soon, in this order."""
        # those in memory need no download
        self.reader.expect(
            [self._indices[index] for index in indices if index not in self._decoded]
        )

    def used(self, indices: Sequence[int]) -> None:
        """Say which of the expected samples need not be read any more."""
        self.reader.used([self._indices[index] for index in indices])

    def load(self, index: int) -> Decoded:
        """One sample, in arrays of its own.

        Raises InputError, naming sample and shard, when it cannot be used.
        """
        key, image, label = self.peek(index)
        # torch cannot wrap views that are read-only
        return key, np.require(image, None, ["C", "W"]), np.require(label, None, ["C", "W"])

    def peek(self, index: int) -> Decoded:
        """As load, without a copy: the arrays may be shared, and read-only."""
        where = self._indices[index]
        found = self._decoded.find(index)
        if found is not None:
            # it may have been expected before it was here, and now must not be waited for
            self.reader.used([where])
            return found
        raw = self.reader.read(where, with_label=self.labelled)
        try:
            sample = (raw.key, *self._decode(raw))
        except InputError as error:
            raise InputError(
                f"{self.reader.place(where)}: {error.got}", error.needed, error.action
            ) from None
        self._decoded.add(index, sample)
        return sample

    def _decode(self, raw: RawSample) -> tuple[np.ndarray, np.ndarray]:
        action = "correct the maps and run `distseg pack` again"
        image = decode_image(raw.image)
        if not self.labelled:
            # class 0, not void: it is how the view tells the image from the fill around it
            return image, np.zeros(image.shape[:2], np.uint8)
        if raw.label is None:
            raise InputError(
                "no label", "a label for every sample of this split", "choose a labelled split"
            )
        label = self.reader.manifest.decode_label(raw.label)
        # JPEGs carry a size of their own, so this is only known when both are decoded
        if image.shape[:2] != label.shape:
            got = f"image of {image.shape[:2]} and label of {label.shape} pixels"
            raise InputError(got, "the same height and width", action)
        # 255 + 1 wraps to 0, so one maximum finds any other index that is too large
        highest = int((label + np.uint8(1)).max()) - 1
        num_classes = self.reader.classes.num_classes
        if highest >= num_classes:
            raise InputError(
                f"class index {highest}",
                f"0 to {num_classes - 1}, or {IGNORE_INDEX} for void",
                action,
            )
        return image, label if self.table is None else self.table[label]


def check_not_void(samples: SampleSet, purpose: str) -> None:
    """Raise InputError where the labels are void everywhere; purpose: what they cannot be used for.

    By the counts of the manifest and the indices: no label is read.
    """
    reader = samples.reader
    split = reader.manifest.splits[reader.split]
    pixels = np.asarray(split.class_pixels)
    if samples.table is not None:
        pixels = pixels[samples.table[: len(pixels)] != IGNORE_INDEX]
    is_void = not pixels.any()
    # a short list may have void labels only; older packs did not count pixels by sample
    if not is_void and len(samples) < min(len(reader), MAX_COUNTED):
        with suppress(InputError):
            is_void = not samples.class_pixels().any()
    if is_void:
        got = f"{reader.location}: all {len(samples)} labels of {reader.split} are void everywhere"
        action = (
            "choose another split, or correct the masks and what they call void, then prepare and "
            "pack again"
        )
        raise InputError(got, f"pixels of a class, {purpose}", action)


def plan_for(samples: SampleSet, options: DataConfig, seed: int) -> Plan:
    """The order of training samples as configured; unlabelled ones have no classes to balance: each
    comes once.

    Raises InputError as SampleSet.class_pixels does.
    """
    # drawn with replacement, so shards in blocks would not help; see config/rules
    if options.sampling != "each_once" and samples.labelled:
        temperature = options.rare_class_temperature if options.sampling == "rare_class" else None
        return BalancedPlan(samples.class_pixels(), seed, temperature)
    if options.shuffle_block:
        return BlockPlan(samples.shard_sizes(), options.shuffle_block, seed)
    return Plan(len(samples), seed)


def split_labelled(
    reader: ShardReader, labelled: str, seed: int, keys: Sequence[str] | None = None
) -> tuple[Sequence[int], Sequence[int]]:
    """(indices of the samples whose labels are used, of all the others), each in packed order.

    labelled: "all"; a share of the samples that have a label, as "1/8" or "0.125", drawn by `seed`
    (the first of the same random order for every share, so that a larger share contains a smaller
    one); or a file with one key a line. keys: those of its keys that are this reader's, where it
    names samples of several. Raises InputError for anything else, unknown keys, and when no sample
    is left.
    """
    without = set(reader.unlabelled)
    if labelled == "all" and not without and len(reader):
        return range(len(reader)), []
    candidates = [index for index in range(len(reader)) if reader.key(index) not in without]
    if labelled == "all":
        chosen = set(candidates)
    elif is_file(Path(labelled)):
        listed = listed_keys(Path(labelled)) if keys is None else keys
        chosen = _chosen(reader, listed, labelled, set(candidates))
    else:
        share = _share(labelled)
        # max: a plan refuses 0 samples, and the error below says more
        order = Plan(max(1, len(candidates)), seed)
        # int of an exact fraction: as floats 0.29 of 100 samples are 28
        chosen = {candidates[order.sample_index(p)] for p in range(int(share * len(candidates)))}
    if not chosen:
        got = (
            f"data.labelled={labelled} leaves none of the {len(candidates)} labelled samples of "
            f"{reader.split}"
        )
        raise InputError(got, "at least one labelled sample", "ask for a larger share")
    # in packed order: neighbours lie in one shard
    return sorted(chosen), sorted(set(range(len(reader))) - chosen)


def hold_out(
    reader: ShardReader, labelled: Sequence[int], count: int, seed: int
) -> tuple[list[int], list[int]]:
    """(the labelled samples that are trained on, `count` that are not), each in packed order.

    labelled: of `split_labelled`. Those that its random order, by the same seed, draws last: they
    follow from seed and list alone, and a smaller count holds out some of the same. Raises
    InputError where none would be left to train on.
    """
    if count >= len(labelled):
        got = f"consistency.held_out={count} of {counted(len(labelled), 'labelled sample')}"
        needed = "one at least to train on"
        raise InputError(got, needed, "hold out fewer, or label more: data.labelled")
    without = set(reader.unlabelled)
    candidates = [index for index in range(len(reader)) if reader.key(index) not in without]
    # the order of `split_labelled` again, of all that it could draw: a list in a file has none
    order = Plan(len(candidates), seed)
    drawn_at = {candidates[order.sample_index(p)]: p for p in range(len(candidates))}
    last = sorted(labelled, key=lambda index: drawn_at[index])[len(labelled) - count :]
    return sorted(set(labelled) - set(last)), sorted(last)


def sha256_of_keys(keys: Sequence[str]) -> str:
    """Identity of a list of samples."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _share(text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        needed = "all, a share above 0 and at most 1 (1/8 or 0.125), or a file with one key a line"
        is_number = share > 1 and share.denominator == 1
        action = f"write {text}/N, of N images in all" if is_number else "correct data.labelled"
        raise InputError(f"data.labelled={text}", needed, action)
    return share


def listed_keys(path: Path) -> list[str]:
    """The keys in a file with one a line."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _chosen(reader: ShardReader, keys: Sequence[str], path: str, candidates: set[int]) -> set[int]:
    index_of = {reader.key(index): index for index in range(len(reader))}
    # all of them are looked for first, so that the error says how many
    unknown = [key for key in keys if key not in index_of]
    if unknown:
        got = (
            f"{path}: {counted(len(unknown), 'key')} not in the split {reader.split}, "
            f"{unknown[0]!r} for one"
        )
        raise InputError(got, f"keys such as {reader.key(0)!r}, one a line", "correct the list")
    without = [key for key in keys if index_of[key] not in candidates]
    if without:
        got = f"{path}: no label for {counted(len(without), 'sample')}, such as {without[0]!r}"
        raise InputError(got, "samples with a label", "take them out of the list")
    return {index_of[key] for key in keys}


def kept(classes: ClassSet, keep: Sequence[str]) -> Mapped:
    """The classes that stay, and a table from old to new index (None: nothing changes)."""
    if not keep:
        return classes, None
    unknown = [name for name in keep if name not in classes.names]
    if unknown or len(set(keep)) != len(keep):
        needed = f"some of: {', '.join(classes.names)}, each once"
        action = nearest(unknown[0], classes.names) if unknown else "name each class once"
        raise InputError(f"data.keep_classes={list(keep)}", needed, action)
    # 0, "other", is where all classes go that are not named below
    table = np.zeros(256, np.uint8)
    table[IGNORE_INDEX] = IGNORE_INDEX
    for new, name in enumerate(keep, start=1):
        table[classes.names.index(name)] = new
    colors = [classes.palette[classes.names.index(name)] for name in keep]
    other = max(
        OTHER_COLORS, key=lambda candidate: min(math.dist(candidate, color) for color in colors)
    )
    return ClassSet((OTHER, *keep), (other, *colors)), table
