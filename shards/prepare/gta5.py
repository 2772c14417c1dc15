"""GTA5 (Richter et al. 2016, "Playing for Data"): frames of a game, with the label ids of
Cityscapes as palette indices.

Ids: the data set's labels are made to be those of Cityscapes; 34 is the license plate, which has
-1 there (label tables of public GTA5 loaders). Sizes: most frames are 1914 x 1052 px.
"""

from __future__ import annotations

from pathlib import Path

from shards.errors import InputError
from shards.prepare.cityscapes import CITYSCAPES, CODINGS
from shards.prepare.dataset import DataSet
from shards.prepare.lists import listed_splits
from shards.prepare.masks import Coding, masked_sample
from shards.prepare.pairing import files_by_id, locate, pair_tasks, pairs_of_splits
from shards.sample import IGNORE_INDEX

LICENSE_PLATE = 34
# beside the labels, where public code for domain adaptation has written them
CONVERTED = "_labelTrainIds"
CODING = Coding((*CODINGS["labelIds"].codes, (LICENSE_PLATE, IGNORE_INDEX)))


def samples(root: Path, train_list: str = "", val_list: str = "") -> DataSet:
    """images/<id>.png and labels/<id>.png, by id: palette PNGs, or gray ones, of label ids.

    val_list: a file with an id a line for a split val; without it there is none, as the papers
    train on all frames and score on Cityscapes. train_list: likewise for train, else all others.
    Missing: an image without a label, and the reverse. Raises InputError for a folder without
    images; a sample, when it is read, for an unreadable file, a label of another size (a few of the
    data set are: --skip-bad leaves them out), one in colours, or with ids that are not the set's.
    """
    root = locate(root, "images", "GTA5", "gta5", "gta")
    folders, notes = (root / "images", root / "labels"), list[str]()
    images, labels = (files_by_id(folder, notes=notes) for folder in folders)
    # each would be a label without an image
    converted = [id_ for id_ in labels if id_.endswith(CONVERTED)]
    labels = {id_: path for id_, path in labels.items() if id_ not in converted}
    if converted:
        notes.append(f"{len(converted)} labels/*{CONVERTED}.png: made of the others")
    if not images or not labels:
        empty = folders[0] if not images else folders[1]
        raise InputError(f"no PNG in {empty}", "<id>.png", "unpack all ten archives of each")
    splits = listed_splits(images.keys() | labels.keys(), train_list, val_list)
    pairs = pairs_of_splits(splits, images, labels, folders)
    tasks = pair_tasks(root, pairs, masked_sample, coding=CODING, source="GTA5")
    return DataSet(CITYSCAPES, tasks, tuple(notes))
