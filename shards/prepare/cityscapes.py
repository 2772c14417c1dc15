"""Cityscapes (Cordts et al. 2016): label ids to the 19 classes of its benchmark, everything else
void.

Names, ids, train ids and colours: the table of labels in the data set's own tools
(cityscapesScripts, labels.py).
"""

from __future__ import annotations

from pathlib import Path

from shards.errors import InputError
from shards.prepare.dataset import DataSet
from shards.prepare.masks import Coding, masked_sample
from shards.prepare.pairing import Pair, files_by_id, locate, pair_tasks
from shards.sample import IGNORE_INDEX, ClassSet

# label id, name, colour; the train id is the place in this table
TABLE = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
NUM_LABEL_IDS = 34  # 0 to 33; 255 is how an 8-bit picture holds -1, the license plate
CITYSCAPES = ClassSet(tuple(name for _, name, _ in TABLE), tuple(color for _, _, color in TABLE))
# from the table's order alone, so that names, colours and train ids cannot get out of step
_TRAIN_IDS = {label_id: index for index, (label_id, _, _) in enumerate(TABLE)}
CODINGS = {
    "labelIds": Coding(
        tuple((id_, _TRAIN_IDS.get(id_, IGNORE_INDEX)) for id_ in (*range(NUM_LABEL_IDS), 255))
    ),
    # nothing but train ids: a labelIds mask under this name has values above 18, and is refused
    "labelTrainIds": Coding(tuple((id_, id_) for id_ in (*range(len(TABLE)), IGNORE_INDEX))),
}


def samples(root: Path, labels: str = "labelIds", test: int = 0) -> DataSet:
    """leftImg8bit/<split>/<city>/<id>_leftImg8bit.png and
    gtFine/<split>/<city>/<id>_gtFine_<labels>.png, by id.

    labels: labelIds, as downloaded, or labelTrainIds, as cityscapesScripts makes them. The splits
    are train and val; test=1 adds the test images, unlabelled, since their ground truth is not
    published (the files there are void). Missing: an image without a mask, and the reverse. Raises
    InputError for a folder without images; a sample, when it is read, for an unreadable file, a
    mask of another size or with ids that are not Cityscapes'.
    """
    if labels not in CODINGS:
        raise InputError(f"labels={labels}", f"one of: {', '.join(CODINGS)}", "correct it")
    root = locate(root, "leftImg8bit")
    # val is the split that papers report, and stays whole
    pairs = _pairs(root, "train", labels) + _pairs(root, "val", labels)
    if test:
        pairs += _pairs(root, "test", labels)
    tasks = pair_tasks(root, pairs, masked_sample, coding=CODINGS[labels], source="cityscapes")
    extra = [
        name
        for name in ("test", "train_extra")
        if (root / "leftImg8bit" / name).is_dir() and not (test and name == "test")
    ]
    return DataSet(
        CITYSCAPES, tasks, tuple(f"leftImg8bit/{name} has no fine labels" for name in extra)
    )


def _pairs(root: Path, split: str, labels: str) -> list[Pair]:
    folder, fine = root / "leftImg8bit" / split, root / "gtFine" / split
    images = files_by_id(folder, "_leftImg8bit")
    masks = files_by_id(fine, f"_gtFine_{labels}")
    if not images:
        raise InputError(
            f"no images in {folder}", "<city>/<id>_leftImg8bit.png", "unpack leftImg8bit"
        )
    # most often the other kind of masks is there: the message names its option
    if not masks and split != "test":
        needed = f"<city>/<id>_gtFine_{labels}.png"
        raise InputError(
            f"no {labels} in {fine}", needed, f"unpack gtFine, or write {_other(labels)}"
        )
    pairs = []
    # the test masks are there, but void throughout: taken as labels they would score 0 pixels
    for id_ in sorted(images if split == "test" else images.keys() | masks.keys()):
        lost = fine / f"{id_}_gtFine_{labels}.png"
        mask = None if split == "test" else masks.get(id_, lost)
        image = images.get(id_, folder / f"{id_}_leftImg8bit.png")
        # the city stands in the name too
        pairs.append(Pair(id_.rpartition("/")[2], split, image, mask))
    return pairs


def _other(labels: str) -> str:
    return f"labels={next(name for name in CODINGS if name != labels)}"
