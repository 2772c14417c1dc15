"""SYNTHIA-RAND-CITYSCAPES (Ros et al. 2016): generated streets, with 16 of Cityscapes' classes.

Ids: the README of the data set, as the tables of public loaders have them. It has no terrain, truck
and train; parking slots, road works and lane markings are no class of Cityscapes' benchmark. The
usual scores are over all 16, or over the 13 without wall, fence and pole.
"""

from __future__ import annotations

from pathlib import Path

from shards.errors import InputError
from shards.prepare.cityscapes import CITYSCAPES
from shards.prepare.dataset import DataSet
from shards.prepare.lists import listed_splits
from shards.prepare.masks import Coding, masked_sample
from shards.prepare.pairing import files_by_id, locate, pair_tasks, pairs_of_splits
from shards.sample import IGNORE_INDEX, ClassSet

NUM_IDS = 23  # 0 to 22
# in the order of Cityscapes' train ids
IDS = {
    "road": 3,
    "sidewalk": 4,
    "building": 2,
    "wall": 21,
    "fence": 5,
    "pole": 7,
    "traffic light": 15,
    "traffic sign": 9,
    "vegetation": 6,
    "sky": 1,
    "person": 10,
    "rider": 17,
    "car": 8,
    "bus": 19,
    "motorcycle": 12,
    "bicycle": 11,
}
_COLORS = dict(zip(CITYSCAPES.names, CITYSCAPES.palette, strict=True))
SYNTHIA = ClassSet(tuple(IDS), tuple(_COLORS[name] for name in IDS))
_INDEX = {id_: index for index, id_ in enumerate(IDS.values())}
CODING = Coding(
    tuple((id_, _INDEX.get(id_, IGNORE_INDEX)) for id_ in range(NUM_IDS)), first_channel=True
)


def samples(root: Path, train_list: str = "", val_list: str = "") -> DataSet:
    """RGB/<id>.png and GT/LABELS/<id>.png, by id: 16-bit PNGs with the class in the first channel
    and the object's number in the second.

    Splits: as for GTA5, all images train unless val_list names others. Missing: an image without a
    label, and the reverse. Raises InputError for a folder without images; a sample, when it is
    read, for an unreadable file, a label of another size, or with ids above 22.
    """
    root = locate(root, "RGB", "RAND_CITYSCAPES", "SYNTHIA", "synthia")
    folders, notes = (root / "RGB", root / "GT" / "LABELS"), list[str]()
    images, labels = (files_by_id(folder, notes=notes) for folder in folders)
    if not images or not labels:
        empty = folders[0] if not images else folders[1]
        raise InputError(f"no PNG in {empty}", "<id>.png", "unpack SYNTHIA_RAND_CITYSCAPES")
    splits = listed_splits(images.keys() | labels.keys(), train_list, val_list)
    pairs = pairs_of_splits(splits, images, labels, folders)
    tasks = pair_tasks(root, pairs, masked_sample, coding=CODING, source="SYNTHIA")
    return DataSet(SYNTHIA, tasks, tuple(notes))
