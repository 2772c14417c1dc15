"""A table of every image's own scores, as CSV."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distseg.data.samples import SampleSet
from shards.errors import InputError
from shards.files import nearest_existing, published


def check_place(path: Path) -> None:
    """Raise InputError for a path that cannot be a file of ours, before time is spent."""
    folder = nearest_existing(path.parent)
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "a folder" if path.is_dir() else f"{folder} cannot be written"
        raise InputError(f"--per-image {path}: {what}", "a file to write", "name another file")


def write(path: Path, samples: SampleSet, names: Sequence[str], margins: np.ndarray) -> None:
    """Write the scores of each image, by key, whole or not at all.

    margins: (images, 3, C), an image's right, true and predicted pixels of each class, void left
    out. Columns: key; mean_iou, over the classes that occur in the image's label or prediction;
    pixel_accuracy; iou/<class>; void_pixels; height and width in px. A class that occurs in neither
    has an empty cell, and so have mean_iou and accuracy of an image that is void everywhere.
    """
    rows = [
        [key, *_scores(counts, samples.size(index))]
        for index, (key, counts) in enumerate(zip(samples.keys, margins, strict=True))
    ]
    head = ["key", "mean_iou", "pixel_accuracy", *(f"iou/{name}" for name in names)]
    with published(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*head, "void_pixels", "height", "width"])
        table.writerows(sorted(rows))


def _scores(counts: np.ndarray, size: tuple[int, int]) -> list[str]:
    """One image's cells behind its key."""
    right, truth, predicted = counts.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: absent
        iou, accuracy = right / (truth + predicted - right), right.sum() / truth.sum()
    present = iou[~np.isnan(iou)]
    mean = float(present.mean()) if len(present) else math.nan
    void = size[0] * size[1] - int(truth.sum())
    cells = [_cell(value) for value in (mean, float(accuracy), *iou.tolist())]
    return [*cells, str(void), str(size[0]), str(size[1])]


def _cell(value: float) -> str:
    # all digits: the mean of a column can be compared with another program's
    return "" if math.isnan(value) else repr(value)
