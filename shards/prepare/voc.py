"""PASCAL VOC segmentation (Everingham et al. 2010): palette PNGs of 21 class indices, 255 for the void border."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import InputError
from shards.prepare.pairing import read_image
from shards.sample import IGNORE_INDEX, UNREADABLE, ClassSet, Sample

NAMES: tuple[str, ...] = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
)
NAMES += ("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


def voc_palette(num_colors: int) -> tuple[tuple[int, int, int], ...]:
    """The development kit's colours: the bits of the index, three at a time, become the high bits of R, G and B."""
    colors = []
    for index in range(num_colors):
        channels = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                channels[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
        colors.append((channels[0], channels[1], channels[2]))
    return tuple(colors)


VOC = ClassSet(NAMES, voc_palette(len(NAMES)))


def samples(
    root: Path, train_list: str = "", val_list: str = "", labels: str = "SegmentationClass"
) -> tuple[ClassSet, Iterator[Sample], int]:
    """(classes, samples, how many) of a VOC2012 folder: JPEGImages/<id>.jpg and <labels>/<id>.png, paired by id.

    root: the folder itself, or one with VOC2012 or VOCdevkit/VOC2012 in it. train_list, val_list: files with an id a
    line (default: ImageSets/Segmentation/train.txt and val.txt). labels: the folder of masks; SegmentationClassAug
    with a list of its ids gives train_aug. Masks are palette or gray PNGs whose values are the indices.
    Raises InputError for a list or file that is missing, an id in both lists or twice, and, while the samples are
    drawn, for an unreadable file, a mask of another size, in colours, or with other values than 0 to 20 and 255.
    """
    folder = _find(root)
    lists = {"train": train_list, "val": val_list}
    default = folder / "ImageSets" / "Segmentation"
    splits = {split: _ids(Path(given) if given else default / f"{split}.txt") for split, given in lists.items()}
    ids = [key for keys in splits.values() for key in keys]
    if len(set(ids)) != len(ids):
        twice = next(key for key in ids if ids.count(key) > 1)
        raise InputError(f"{twice} is listed twice", "each id in one list, once", "correct the lists")
    wanted = [folder / "JPEGImages" / f"{key}.jpg" for key in ids] + [folder / labels / f"{key}.png" for key in ids]
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        got = f"{len(missing)} of the {len(wanted)} files are not there, the first: {missing[0]}"
        raise InputError(got, "an image and a mask for every id of the lists", "unpack all of it, or correct the lists")
    pairs = [(key, split) for split, keys in splits.items() for key in keys]
    return VOC, (_sample(folder, labels, *pair) for pair in pairs), len(pairs)


def _find(root: Path) -> Path:
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise InputError(f"no JPEGImages in {root}", "VOCdevkit/VOC2012 as unpacked", "correct --root")


def _ids(path: Path) -> list[str]:
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        action = "unpack ImageSets too, or write train_list=FILE val_list=FILE"
        raise InputError(f"{path}: {error}", "a list with an id a line", action) from None
    if not keys:
        raise InputError(f"{path} is empty", "an id a line", "choose another list")
    return keys


def _sample(folder: Path, labels: str, key: str, split: str) -> Sample:
    image, size = read_image(folder / "JPEGImages" / f"{key}.jpg")
    return Sample(key, image, _read_mask(folder / labels / f"{key}.png", size), split, f"VOC2012/{key}")


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 of class indices, 255 for void."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            mode, mask = picture.mode, np.asarray(picture)
    except UNREADABLE as error:
        raise InputError(f"{path}: {error}", "a readable PNG", "unpack the data set again") from None
    if mode not in ("P", "L"):
        needed = "a palette or gray picture whose values are the class indices"
        raise InputError(f"{path}: a picture in mode {mode}", needed, "use the original masks, not coloured copies")
    if mask.shape != size:
        got = f"{path}: {mask.shape[0]} x {mask.shape[1]} pixels for an image {size[0]} x {size[1]}"
        raise InputError(got, "a mask of the image's size", "unpack the data set again")
    wrong = mask[(mask >= len(NAMES)) & (mask != IGNORE_INDEX)]
    if wrong.size:
        got = f"{path}: class index {wrong[0]} where there are {len(NAMES)} classes"
        raise InputError(got, f"0 to {len(NAMES) - 1}, or {IGNORE_INDEX} for void", "correct the mask")
    return mask
