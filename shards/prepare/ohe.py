"""The older one-hot layout: one HDF5 file an image, data set "OHE", beside a folder of JPEG files."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from pathlib import Path

from shards.errors import InputError
from shards.maps import read_older_label
from shards.prepare.pairing import check_pairs, read_image, seeded_splits
from shards.sample import STANFORD, ClassSet, Sample

LABEL_PREFIX = "h5py_"  # as in h5py_0000047.regions.txt, which is HDF5 whatever its name says
SUFFIXES = (".regions.txt", ".h5", ".hdf5")


def samples(root: Path, seed: int = 0) -> tuple[ClassSet, Iterator[Sample], int]:
    """(classes, samples, how many) of images/<id>.jpg and h5py/[h5py_]<id>.(regions.txt|h5|hdf5).

    That layout keeps neither splits nor class names: a fifth of a permutation by `seed` validates; eight
    classes are Stanford's, any other number is called class-0 onwards. Raises InputError for an image without
    a label map or the reverse, and, while the samples are drawn, for maps that are not one-hot or differ in
    their number of classes.
    """
    images = {path.stem: path for path in (root / "images").glob("*.jpg")}
    labels = {_key(path): path for path in (root / "h5py").iterdir()} if (root / "h5py").is_dir() else {}
    check_pairs(root, images, labels)
    splits = seeded_splits(sorted(images), seed)
    pairs = [(images[key], labels[key], split) for split, keys in splits.items() for key in keys]
    first_image, first_label, _ = pairs[0]
    num_classes = read_older_label(first_label, read_image(first_image)[1])[1]
    return _classes(num_classes), (_sample(*pair, num_classes) for pair in pairs), len(pairs)


def _key(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix).removeprefix(LABEL_PREFIX)
    raise InputError(f"{path}", f"label maps named <id> and one of {', '.join(SUFFIXES)}", "move it elsewhere")


def _classes(num_classes: int) -> ClassSet:
    if num_classes == STANFORD.num_classes:
        return STANFORD
    colors = [colorsys.hsv_to_rgb(index / num_classes, 1.0, 0.9) for index in range(num_classes)]
    palette = tuple((int(255 * r), int(255 * g), int(255 * b)) for r, g, b in colors)
    return ClassSet(tuple(f"class-{index}" for index in range(num_classes)), palette)


def _sample(image_path: Path, label_path: Path, split: str, num_classes: int) -> Sample:
    image, size = read_image(image_path)
    label, found = read_older_label(label_path, size)
    if found != num_classes:
        got = f"{label_path}: {found} classes, the first map has {num_classes}"
        raise InputError(got, "the same classes in every map", "correct the file")
    return Sample(image_path.stem, image, label, split, f"{label_path.parent.name}/{label_path.name}")
