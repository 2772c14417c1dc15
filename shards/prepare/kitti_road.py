"""KITTI road (Fritsch, Kuehnl, Geiger 2013): road and not road in colours.

Colours and what they mean: the benchmark's development kit, which evaluates where red is set and
calls road what is blue as well. Black, where neither is set, is not evaluated there, and void here:
as "not road" it would be a claim that the annotators did not make.
"""

from __future__ import annotations

from pathlib import Path

from shards.errors import InputError
from shards.prepare.dataset import DataSet
from shards.prepare.masks import Coding, color_code, masked_sample
from shards.prepare.pairing import Pair, each_id, files_by_id, locate, pair_tasks, seeded_splits
from shards.sample import IGNORE_INDEX, ClassSet

NOT_ROAD, ROAD, OTHER = (255, 0, 0), (255, 0, 255), (0, 0, 0)
KITTI_ROAD = ClassSet(("not road", "road"), (NOT_ROAD, ROAD))
# three colours and no others: a picture that was resized smoothly, or kept as JPEG, is refused
CODING = Coding(
    ((color_code(NOT_ROAD), 0), (color_code(ROAD), 1), (color_code(OTHER), IGNORE_INDEX)),
    colors=True,
)
TASKS = ("road", "lane")


def samples(root: Path, task: str = "road", seed: int = 0) -> DataSet:
    """training/image_2/<scene>_<number>.png and training/gt_image_2/<scene>_<task>_<number>.png,
    paired by id.

    root: data_road, or a folder with data_road in it. task: road (um, umm, uu) or lane (um only:
    the car's own lane). A fifth of a permutation by `seed` validates; the testing images have no
    ground truth and are left out. Missing: an image without a mask of the task, and the reverse.
    Raises InputError for a folder without them; a sample, when it is read, for an unreadable file,
    a mask of another size or with another colour.
    """
    if task not in TASKS:
        raise InputError(f"task={task}", f"one of: {', '.join(TASKS)}", "correct it")
    folder = locate(root, "training/image_2", "data_road") / "training"
    images, masks = files_by_id(folder / "image_2"), _masks(folder, task)
    wanted = images.keys() | masks.keys()
    if task == "lane":
        # only these scenes have a lane to keep to: the others have no marks, or many lanes
        wanted = {id_ for id_ in wanted if id_.startswith("um_")}
    # sorted, since a permutation of another order would be another split
    splits = seeded_splits(sorted(wanted), seed)
    pairs = [
        Pair(
            id_,
            split,
            images.get(id_, folder / "image_2" / f"{id_}.png"),
            # the name that a missing mask would have, for the message about it
            masks.get(id_, folder / "gt_image_2" / _mask_name(id_, task)),
        )
        for split, id_ in each_id(splits)
    ]
    others = len(images.keys() - wanted)
    notes: tuple[str, ...] = ()
    if others:
        notes += (f"{others} training images are not of the scenes with lanes",)
    # said, not only done: who counts the files would miss them
    if (folder.parent / "testing").is_dir():
        notes += ("the testing images have no ground truth",)
    tasks = pair_tasks(root, pairs, masked_sample, coding=CODING, source="kitti_road")
    return DataSet(KITTI_ROAD, tasks, notes)


def _masks(folder: Path, task: str) -> dict[str, Path]:
    """The masks of a task, by the ids of their images."""
    truth = folder / "gt_image_2"
    masks = {}
    for id_, path in files_by_id(truth).items():
        if task in id_:
            # um_road_000001 is the mask of um_000001
            masks[id_.replace(f"_{task}_", "_")] = path
    if not masks:
        got = f"no *_{task}_*.png in {truth}"
        raise InputError(got, "the ground truth of the training images", "unpack all of data_road")
    return masks


def _mask_name(id_: str, task: str) -> str:
    scene, _, number = id_.rpartition("_")
    return f"{scene}_{task}_{number}.png"
