"""PASCAL VOC segmentation (Everingham et al.

2010): palette PNGs of 21 class indices, 255 for the void border.
"""

from __future__ import annotations

from pathlib import Path

from shards.prepare.dataset import DataSet
from shards.prepare.lists import ids_in_list
from shards.prepare.masks import Coding, masked_sample
from shards.prepare.pairing import (
    MASK_SUFFIXES,
    Pair,
    check_listed_once,
    each_id,
    files_by_id,
    locate,
    pair_tasks,
)
from shards.sample import IGNORE_INDEX, ClassSet
from shards.words import IS, counted

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
NAMES += (
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def voc_palette(num_colors: int) -> tuple[tuple[int, int, int], ...]:
    """The development kit's colours.

    The bits of the index, three at a time, become the high bits of R, G and B.
    """
    colors = []
    for index in range(num_colors):
        channels = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                # index 1 is (128, 0, 0), 2 is (0, 128, 0), 3 both: neighbours in number are far
                # apart in colour
                channels[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
        colors.append((channels[0], channels[1], channels[2]))
    return tuple(colors)


VOC = ClassSet(NAMES, voc_palette(len(NAMES)))
# values stay as they are: what the coding adds is that any other value is refused
CODING = Coding((*((index, index) for index in range(len(NAMES))), (IGNORE_INDEX, IGNORE_INDEX)))


def samples(
    root: Path, train_list: str = "", val_list: str = "", labels: str = "SegmentationClass"
) -> DataSet:
    """A VOC2012 folder: JPEGImages/<id>.jpg and <labels>/<id>.png, paired by id.

    root: the folder itself, or one with VOC2012 or VOCdevkit/VOC2012 in it. train_list, val_list:
    files with an id a line (default: ImageSets/Segmentation/train.txt and val.txt). labels: the
    folder of masks; SegmentationClassAug with a list of its ids gives train_aug. Masks are palette
    or gray PNGs whose values are the indices. Raises InputError for a list that is missing, an id
    in both lists or twice; a sample, when it is read, for an unreadable file, a mask of another
    size, in colours, or with other values than 0 to 20 and 255.
    """
    folder = locate(root, "JPEGImages", "VOC2012", "VOCdevkit/VOC2012")
    # the devkit's lists are of 2012's own annotations; the 10,582 images of "train_aug" have a list
    # of their own, which users bring along
    lists = {"train": train_list, "val": val_list}
    default = folder / "ImageSets" / "Segmentation"
    notes: list[str] = []
    images = files_by_id(folder / "JPEGImages", notes=notes)
    masks = files_by_id(folder / labels, suffixes=MASK_SUFFIXES, notes=notes)
    splits = {
        split: ids_in_list(Path(given) if given else default / f"{split}.txt", images)
        for split, given in lists.items()
    }
    # lists that are put together by hand (train_aug) may contain validation images, and the score
    # then means nothing
    check_listed_once(splits)
    pairs = [
        Pair(
            *(id_, split, images.get(id_, folder / "JPEGImages" / f"{id_}.jpg")),
            masks.get(id_, folder / labels / f"{id_}.png"),
        )
        for split, id_ in each_id(splits)
    ]
    # most of VOC has no segmentation: said as a note, so that it is not taken for a loss
    unlisted = len(images.keys() - {pair.id for pair in pairs})
    if unlisted:
        notes.append(f"{counted(unlisted, 'image')} of JPEGImages {IS[unlisted != 1]} in no list")
    tasks = pair_tasks(root, pairs, masked_sample, coding=CODING, source="VOC2012")
    return DataSet(VOC, tasks, tuple(notes))
