"""CamVid in the layout and the 11 classes of SegNet (Brostow et al. 2009; Badrinarayanan et al.
2017), 11 for void.

Names and their order: SegNet's tutorial, whose masks these are. Colours: CamVid's own table of 32
classes, by the class that each of these is named after (markings are part of the road here).
"""

from __future__ import annotations

from pathlib import Path

from shards.errors import InputError
from shards.prepare.dataset import DataSet
from shards.prepare.lists import GAPS, read_lines
from shards.prepare.masks import Coding, masked_sample
from shards.prepare.pairing import Pair, files_by_id, locate, pair_tasks
from shards.sample import IGNORE_INDEX, ClassSet
from shards.words import counted

NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (0, 0, 192),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
CAMVID = ClassSet(NAMES, PALETTE)
# one behind the last class, while 255 is void in the shards
VOID = 11
CODING = Coding((*((index, index) for index in range(VOID)), (VOID, IGNORE_INDEX)))
SPLITS = ("train", "val", "test")


def samples(root: Path) -> DataSet:
    """<split>/<id>.png with <split>annot/<id>.png for train, val and test, where there is one.

    <split>.txt, an image and its mask a line, decides what is in a split and how it is paired; of
    its paths, which begin elsewhere (/SegNet/CamVid/), the last two parts count. Without a list,
    the files of the two folders are paired by name. Missing: an image without a mask, and the
    reverse. Raises InputError for a folder without train, an empty or odd list; a sample, when it
    is read, for an unreadable file, a mask of another size or with values above 11.
    """
    root = locate(root, "train", "CamVid")
    # a split's list alone is enough: its paths may lead elsewhere below the root
    there = [
        split for split in SPLITS if (root / split).is_dir() or (root / f"{split}.txt").is_file()
    ]
    pairs = []
    for split in there:
        pairs += _pairs(root, split)
    tasks = pair_tasks(root, pairs, masked_sample, coding=CODING, source="CamVid")
    # copies without test are common, so that it is a note and no error
    notes = tuple(f"there is no {split}" for split in SPLITS if split not in there)
    return DataSet(CAMVID, tasks, notes)


def _pairs(root: Path, split: str) -> list[Pair]:
    listed = root / f"{split}.txt"
    if not listed.is_file():
        images, masks = files_by_id(root / split), files_by_id(root / f"{split}annot")
        if not images:
            raise InputError(
                f"no images in {root / split}", "at least one", "unpack the data set again"
            )
        # ids of both folders: one without the other becomes a task that says so
        ids = sorted(images.keys() | masks.keys())
        return [
            Pair(
                *(id_, split, images.get(id_, root / split / f"{id_}.png")),
                masks.get(id_, root / f"{split}annot" / f"{id_}.png"),
            )
            for id_ in ids
        ]
    paths = GAPS.split(" ".join(read_lines(listed)))
    if len(paths) % 2:
        raise InputError(
            f"{listed}: {counted(len(paths), 'path')}",
            "an image and its mask a line",
            "correct the list",
        )
    # the lists name paths of the machine that they were written on
    inside = [root.joinpath(*Path(path).parts[-2:]) for path in paths]
    return [
        Pair(image.stem, split, image, mask)
        for image, mask in zip(inside[::2], inside[1::2], strict=True)
    ]
