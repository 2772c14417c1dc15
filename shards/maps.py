"""HDF5 maps: original image bytes and compressed one-hot label maps, one group per sample."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from shards.errors import InputError
from shards.files import published, tracked
from shards.holders import open_to_read
from shards.images import MAX_PX
from shards.names import check_name
from shards.sample import IGNORE_INDEX, ClassSet, Sample, check_sample, from_one_hot, to_one_hot
from shards.words import making, place_for_shards

VERSION = 1
# bytes of a label map; HDF5's chunks end below 4 GiB, and larger maps have a chunk for each class
MAX_CHUNK = 2**30
# what attributes of other kinds than ours end in
_NOT_OURS = (KeyError, TypeError, ValueError, AttributeError)
OLDER_ACTION = "convert it with `distseg prepare ohe --root FOLDER --out FILE.h5`"


def write_maps(
    path: Path, name: str, classes: ClassSet, samples: Iterable[Sample], total: int
) -> int:
    """Write samples into one HDF5 file, which appears when it is complete; returns how many there
    were.

    Group <key>: `image`, the original file's bytes; `label_map`, one-hot (C, H, W) uint8, void =
    all-zero column, one chunk, Zstd; absent for an unlabelled image. HDF5 keeps a checksum of both.
    Raises InputError for a sample that does not fit the classes, a key given twice, no sample at
    all, or a full disk.
    """
    with MapsWriter.publishing(path, name, classes) as writer:
        for sample in tracked(samples, total, f"writing {path.name}"):
            writer.add(sample)
        if not writer.splits:
            raise InputError(
                f"no samples for {path}", "at least one image", "check the data set's folder"
            )
    return sum(len(keys) for keys in writer.splits.values())


class MapsWriter:
    """A file of HDF5 maps while it is written: `add` and `copy` samples, all errors as in
    `write_maps`.

    left_out: why, for each sample that was not written because it is bad; kept in the file.
    """

    def __init__(self, file: h5py.File, output: _Output, classes: ClassSet):
        self._file, self._output, self._classes = file, output, classes
        self.splits: dict[str, list[str]] = {}
        self.left_out: dict[str, str] = {}
        self.pixels = np.zeros(256, np.int64)  # of all labels, by index
        self.notes: Counter[str] = Counter()  # of samples, and how many have each

    @staticmethod
    @contextmanager
    def publishing(path: Path, name: str, classes: ClassSet) -> Iterator[MapsWriter]:
        """A writer for `path`, which appears, whole, when the block ends without an error."""
        # before hours of work: readers would refuse it
        check_name(name, "the data set's name", "give it another name")
        # left in reverse: HDF5 writes its rest, _Output says whether all of it has reached the
        # disk, and only then the file gets its name
        with published(path) as partial, _Output(partial) as output, h5py.File(output, "w") as file:
            writer = MapsWriter(file, output, classes)
            file.attrs.update(version=VERSION, name=name)
            file.attrs["class_names"] = list(classes.names)
            file.attrs["palette"] = np.array(classes.palette, np.uint8)
            yield writer
            # as text: HDF5 keeps a string of variable length on its heap, while an attribute that
            # is an array of keys must be below 64 kB
            file.attrs["splits"] = json.dumps(writer.splits)
            file.attrs["pixels"] = writer.pixels
            file.attrs["left_out"] = json.dumps(writer.left_out)
            # where there are any: maps without are the same bytes as ever
            if writer.notes:
                file.attrs["notes"] = json.dumps(dict(sorted(writer.notes.items())))

    def add(self, sample: Sample) -> None:
        """Write a sample."""
        # before HDF5 has a group for it: what fails here leaves nothing half-written
        check_sample(sample, self._classes.num_classes)
        _write_sample(self._new(sample.key, sample.split), sample, self._classes.num_classes)
        if sample.label is not None:
            self.pixels += np.bincount(sample.label.ravel(), minlength=256)
        self.notes.update(sample.notes)
        # after each sample, since HDF5 was not told: else it would go on for hours on a full disk
        self._output.check()

    def copy(self, maps: MapsReader) -> None:
        """Write all samples of other maps of the same classes, as they are stored.

        What they left out comes along.
        """
        for split, keys in maps.splits.items():
            for key in keys:
                maps.copy_to(self._new(key, split), key)
                self._output.check()
        self.pixels += maps.pixels
        self.left_out |= maps.left_out
        self.notes.update(maps.notes)

    def _new(self, key: str, split: str) -> h5py.Group:
        if key in self._file:
            raise InputError(
                f"two samples with the key {key!r}", "unique keys", "rename one of them"
            )
        self.splits.setdefault(split, []).append(key)
        return self._file.create_group(key)


def _write_sample(group: h5py.Group, sample: Sample, num_classes: int) -> None:
    group.attrs.update(split=sample.split, source_id=sample.source_id)
    # where there is any: maps without are the same bytes as ever
    if sample.origin:
        group.attrs["origin"] = json.dumps(sample.origin)
    # HDF5's filters, the checksum among them, work on chunks only: one for the whole image
    image = np.frombuffer(sample.image, np.uint8)
    group.create_dataset("image", data=image, chunks=image.shape, fletcher32=True)
    if sample.label is not None:
        shape = (num_classes, *sample.label.shape)
        # one chunk a sample: every other chunking reads 8 to 24 times slower
        whole = math.prod(shape) <= MAX_CHUNK
        chunks = shape if whole else (1, *shape[1:])
        zstd = hdf5plugin.Zstd(clevel=3)
        stored = group.create_dataset(
            "label_map", shape, np.uint8, chunks=chunks, fletcher32=True, **zstd
        )
        if whole:
            stored[...] = to_one_hot(sample.label, num_classes)  # (C, H, W) uint8
        else:
            for index in range(num_classes):
                stored[index] = sample.label == index


def _read_label(stored: h5py.Dataset) -> np.ndarray:
    """(H, W) uint8 of class indices, 255 for void."""
    if math.prod(stored.shape) <= MAX_CHUNK:
        return from_one_hot(stored[()])
    label = np.full(stored.shape[1:], IGNORE_INDEX, np.uint8)
    # a plane at a time: an eighth of the memory of all of them with what checks them
    for index in range(len(stored)):
        plane = stored[index]
        one = plane == 1
        if plane.max(initial=0) > 1 or (label[one] != IGNORE_INDEX).any():
            raise InputError(
                "a label map that is not one-hot", "a single 1 a pixel", "make it anew"
            )
        label[one] = index
    return label


class _Output(io.FileIO):
    """A new file that HDF5 writes to; a full disk is told by `check` and on leaving, not to HDF5.

    HDF5 does not survive a failed write: closing the file then ends in a segmentation fault.
    """

    def __init__(self, path: Path):
        super().__init__(path, "w+")  # HDF5 reads back what it wrote
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        while left and self.error is None:
            try:
                left = left[os.write(self.fileno(), left) :]  # may be short
            except OSError as error:
                self.error = error
        # as if all had gone well: see the class
        return size

    def check(self) -> None:
        """Raise the first error of a write."""
        if self.error is not None:
            raise self.error

    def __exit__(self, *exception: object) -> None:
        # closed first: an error must not leave the descriptor open, and the full disk in use
        self.close()
        self.check()


def _check_file(path: Path) -> None:
    if path.is_dir() and any(path.glob("*.tar")):
        action = f"use tars of another program with `distseg import {path}`"
        raise InputError(f"{path} is a folder of tars", "one file of HDF5 maps", action)
    if path.is_dir():
        action = f"for images and masks of your own: {making(path, place_for_shards(path))}"
        if any(path.glob("*.h5")):
            action = f"name one of its files; of the older layout, {OLDER_ACTION}"
        raise InputError(f"{path} is a folder", "one file of HDF5 maps", action)
    if not path.is_file():
        raise InputError(
            f"no file {path}", "HDF5 maps", "make them with `distseg prepare NAME --out FILE.h5`"
        )


class MapsReader:
    """Reads what `write_maps` wrote.

    Opens the file when first used, so it can be sent to other processes.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: h5py.File | None = None
        _check_file(path)
        try:
            # now, in the main process: a damaged file is refused before workers are started
            self._read_attributes(dict(self._open().attrs))
        except (OSError, RuntimeError, *_NOT_OURS) as error:
            self.close()
            if isinstance(error, InputError):
                raise
            got = f"{path}: {error}"
            raise InputError(
                got, "a sound file of HDF5 maps", "make it again with `distseg prepare`"
            ) from None

    def _read_attributes(self, attributes: dict[str, Any]) -> None:
        if isinstance(self._open().get("OHE"), h5py.Dataset):
            raise InputError(
                f"{self.path}: one label map of the older layout", "HDF5 maps", OLDER_ACTION
            )
        if attributes.get("version") != VERSION:
            got = f"{self.path}: version {attributes.get('version')}"
            raise InputError(
                got, f"HDF5 maps of version {VERSION}", "make them again with `distseg prepare`"
            )
        again = "prepare it again, under other names"
        self.name = check_name(str(attributes["name"]), f"{self.path}: the name", again)
        palette = tuple((int(r), int(g), int(b)) for r, g, b in attributes["palette"])
        self.classes = ClassSet(tuple(str(name) for name in attributes["class_names"]), palette)
        # keys in the order written
        self.splits: dict[str, list[str]] = json.loads(attributes["splits"])
        # a split names shards, and a key a group: "../x" would be a file, or a group, elsewhere
        for split, keys in self.splits.items():
            check_name(split, f"{self.path}: split", again)
            for key in keys:
                check_name(key, f"{self.path}: key", again)
        every = [key for keys in self.splits.values() for key in keys]
        if len(set(every)) != len(every):
            raise ValueError("a key that is listed twice")
        # bad samples: key, why
        self.left_out: dict[str, str] = json.loads(attributes.get("left_out", "{}"))
        # what was done to samples: note, how many
        self.notes: dict[str, int] = json.loads(attributes.get("notes", "{}"))
        # of all labels, by index
        self.pixels = np.asarray(attributes.get("pixels", np.zeros(256, np.int64)))

    def __len__(self) -> int:
        return sum(len(keys) for keys in self.splits.values())

    def __enter__(self) -> MapsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # handles cannot be shared between processes

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, key: str) -> Sample:
        """The sample of a key, its label map turned back into indices.

        Raises InputError, naming file and key, for an absent key, damaged data, or a map not
        one-hot.
        """
        try:
            group = self._group(key)
            label = _read_label(group["label_map"]) if "label_map" in group else None
            split, source_id = str(group.attrs["split"]), str(group.attrs["source_id"])
            origin = json.loads(str(group.attrs.get("origin", "{}")))
            image = group["image"][()].tobytes()
            return Sample(key, image, label, split, source_id, origin=origin)
        # h5py raises any of them, by where the damage lies: header, name, chunk or checksum
        except (OSError, RuntimeError, MemoryError, *_NOT_OURS) as error:
            # of the whole file, which another process holds
            if isinstance(error, InputError) and str(self.path) in error.got:
                raise
            got = error.got if isinstance(error, InputError) else f"not readable ({error})"
            action = "make the maps again with `distseg prepare`"
            raise InputError(f"{self.path}: {key}: {got}", "a sound sample", action) from None

    def copy_to(self, group: h5py.Group, key: str) -> None:
        """Copy a sample as it is stored into an empty group of another file, byte for byte."""
        stored = self._group(key)
        group.attrs.update(stored.attrs)
        for name in sorted(stored):
            stored.copy(name, group)  # chunks are neither unpacked nor packed again

    def label_map(self, key: str) -> np.ndarray:
        """The stored one-hot map (C, H, W) uint8 of a labelled sample."""
        return self._group(key)["label_map"][()]

    def _group(self, key: str) -> h5py.Group:
        """The group of a sample. Raises KeyError where it, or data in it, lies elsewhere."""
        file = self._open()
        group = file[key] if isinstance(file.get(key, getlink=True), h5py.HardLink) else None
        if not isinstance(group, h5py.Group):
            raise KeyError("no group of this file")
        # HDF5 follows links into other files, and reads data from any file that a name leads to
        for name in group:
            is_here = isinstance(group.get(name, getlink=True), h5py.HardLink)
            stored = group[name] if is_here else None
            if isinstance(stored, h5py.Dataset) and not stored.is_virtual and not stored.external:
                self._check_size(name, stored)
            else:
                raise KeyError(f"{name} lies in another file, or is no data set")
        return group

    def _check_size(self, name: str, stored: h5py.Dataset) -> None:
        """Raise KeyError for more than memory has: a few bytes can say that they are many."""
        # images are stored as they are, and maps are as large as their images
        most = self.path.stat().st_size if name == "image" else MAX_PX
        if math.prod(stored.shape if name == "image" else stored.shape[1:]) > most:
            raise KeyError(f"{name} of shape {stored.shape}")

    def _open(self) -> h5py.File:
        if self._file is None:
            self._file = open_to_read(self.path)
        return self._file


def read_older_label(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """(label (H, W) uint8, number of classes) of one file of the older layout: a one-hot data set
    "OHE".

    It may be (C, H, W) or (H, W, C), of any number type and compression; size: the image's (H, W),
    by which the two are told apart. Raises InputError for another shape, or when a column holds
    anything but zeros and at most a single 1.
    """
    try:
        with open_to_read(path) as file:
            stored = file["OHE"][()]  # (C, H, W) or (H, W, C)
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(
            f"{path}: {error}", 'an HDF5 file with a data set "OHE"', "replace the file"
        ) from None
    shape = stored.shape
    # the layout says nowhere which axis has the classes: the image's size does
    views = [stored] if len(shape) == 3 and shape[1:] == size else []
    views += [np.moveaxis(stored, 2, 0)] if len(shape) == 3 and shape[:2] == size else []
    for view in views:  # two for a cube: C == H == W
        try:
            return from_one_hot(view), len(view)
        except InputError:
            continue
    got = (
        f"{path}: "
        f"{'a map that is not one-hot' if views else f'shape {shape} for an image of {size}'}"
    )
    raise InputError(
        got, "one-hot (C, H, W) or (H, W, C)", "correct the file or remove it with its image"
    )
