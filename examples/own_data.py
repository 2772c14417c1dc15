"""A data set of your own, into HDF5 maps: images/NAME.jpg with masks/NAME.png of class indices.

    distseg prepare examples/own_data.py:samples --root DIR --out data/mine.h5
    distseg pack data/mine.h5 --out data/mine

Two forms. `samples` names each sample's files and a function that reads them: worker processes
share the work, an interrupted run goes on where it was, and --skip-bad leaves out bad files.
`one_by_one` is a generator, with the classes beside it as CLASSES: shorter, and read in one go.
Further parameters are options: `distseg prepare ... val_share=0.1`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from shards.prepare.dataset import DataSet, Task
from shards.sample import ClassSet, Sample

CLASSES = ClassSet(("ground", "sky"), ((120, 90, 60), (90, 160, 230)))


def samples(root: Path, val_share: float = 0.2) -> DataSet:
    """Every image with its mask; the last `val_share` of the names validates."""
    return DataSet(CLASSES, [Task(*task) for task in _tasks(root, val_share)])


def one_by_one(root: Path, val_share: float = 0.2) -> Iterator[Sample]:
    """The same, read one after the other."""
    for key, split, function, paths in _tasks(root, val_share):
        yield function(key, split, *paths)


def _tasks(root: Path, val_share: float) -> list[tuple]:
    images = sorted((root / "images").glob("*.jpg"))
    num_train = round((1 - val_share) * len(images))
    return [
        (
            image.stem,
            "train" if number < num_train else "val",
            read,
            (image, root / "masks" / f"{image.stem}.png"),
        )
        for number, image in enumerate(images)
    ]


def read(key: str, split: str, image: Path, mask: Path) -> Sample:
    """One sample; its mask holds 0, 1 and 255 for void."""
    return Sample(key, image.read_bytes(), np.array(Image.open(mask)), split, source_id=image.name)
