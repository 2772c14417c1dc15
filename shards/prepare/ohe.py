"""The older one-hot layout: an HDF5 file an image, data set "OHE", beside a folder of JPEGs."""

from __future__ import annotations

import colorsys
from pathlib import Path

from shards.errors import InputError
from shards.images import stored_image
from shards.maps import read_older_label
from shards.prepare.dataset import DataSet
from shards.prepare.pairing import (
    Pair,
    each_id,
    files_by_id,
    pair_tasks,
    seeded_splits,
    source_of,
)
from shards.sample import STANFORD, ClassSet, Sample
from shards.words import counted

LABEL_PREFIX = "h5py_"  # as in h5py_0000047.regions.txt, which is HDF5 whatever its name says
SUFFIXES = (".regions.txt", ".h5", ".hdf5")


def samples(root: Path, seed: int = 0) -> DataSet:
    """A folder of images/<id>.jpg and h5py/[h5py_]<id>.(regions.txt|h5|hdf5).

    That layout keeps neither splits nor class names: a fifth of a permutation by `seed` validates;
    eight classes are Stanford's, any other number is called class-0 onwards. Missing: an image
    without a label map or the reverse. Raises InputError for files of other names; a sample, when
    it is read, for a map that is not one-hot or has another number of classes than the first
    readable one.
    """
    notes: list[str] = []
    images = files_by_id(root / "images", notes=notes)
    # hidden files are a file manager's, not label maps
    labels = {_key(path): path for path in sorted((root / "h5py").glob("[!.]*"))}
    if not images or not labels:
        side = "h5py/*" if images else "images/*.jpg"
        raise InputError(
            f"no {side} in {root}", "images/ and h5py/ with a file for each id", "correct --root"
        )
    # ids of both, so that a lost file does not change how the others are split
    splits = seeded_splits(sorted(images.keys() | labels.keys()), seed)
    pairs = [
        Pair(
            *(id_, split, images.get(id_, root / "images" / f"{id_}.jpg")),
            labels.get(id_, root / "h5py" / f"{id_}.h5"),
        )
        for split, id_ in each_id(splits)
    ]
    # the layout keeps no class names: the number of planes of a map is all that is known
    num_classes = _num_classes([pair for pair in pairs if pair.id in images.keys() & labels.keys()])
    tasks = pair_tasks(root, pairs, _sample, num_classes=num_classes)
    return DataSet(classes_by_number(num_classes), tasks, tuple(notes))


def _num_classes(pairs: list[Pair]) -> int:
    """Of the first map that can be read, so that --skip-bad can leave out one that cannot."""
    first: InputError | None = None
    for pair in pairs:
        assert pair.label is not None  # ids of both folders
        try:
            # the image's size tells (C, H, W) from (H, W, C)
            return read_older_label(pair.label, stored_image(pair.image).size)[1]
        except InputError as error:
            first = first or error
    raise first or InputError("no id with both an image and a map", "one", "correct --root")


def _key(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix).removeprefix(LABEL_PREFIX)
    raise InputError(
        f"{path}", f"label maps named <id> and one of {', '.join(SUFFIXES)}", "move it elsewhere"
    )


def classes_by_number(num_classes: int) -> ClassSet:
    """Stanford's classes when there are eight, else class-0 onwards in a rainbow's colours."""
    # the layout was made for Stanford Background: eight planes are its classes, in its order
    if num_classes == STANFORD.num_classes:
        return STANFORD
    return ClassSet(tuple(f"class-{index}" for index in range(num_classes)), rainbow(num_classes))


def rainbow(num_colors: int) -> tuple[tuple[int, int, int], ...]:
    """Colours of equal distance around the circle of hues."""
    colors = [colorsys.hsv_to_rgb(index / num_colors, 1.0, 0.9) for index in range(num_colors)]
    return tuple((int(255 * r), int(255 * g), int(255 * b)) for r, g, b in colors)


def _sample(key: str, split: str, image_path: Path, label_path: Path, num_classes: int) -> Sample:
    image = stored_image(image_path)
    label, found = read_older_label(label_path, image.size)  # (H, W) uint8
    if found != num_classes:
        got = f"{label_path}: {counted(found, 'class', 'classes')}, the first map has {num_classes}"
        raise InputError(got, "the same classes in every map", "correct the file")
    source = source_of(label_path.parent.name, label_path)
    return Sample(key, image.content, label, split, source, image.notes)
