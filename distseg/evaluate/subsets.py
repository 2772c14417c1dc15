"""Mean IoU over some of the classes, as a field reports it beside the mean over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shards.errors import InputError
from shards.words import nearest, same_name


def subsets_of(
    asked: Mapping[str, Sequence[str]], classes: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """The class indices of each subset.

    asked: as `evaluate.subsets`. Raises InputError for a name that no class has, and for a class
    that is named twice in one.
    """
    found = {}
    for name, members in asked.items():
        named = {word: same_name(word, classes) for word in members}
        for word, one in named.items():
            if one is None:
                got = f"evaluate.subsets.{name} with the class {word!r}"
                needed = f"classes of the run: {', '.join(classes)}"
                raise InputError(got, needed, nearest(word, classes))
        indices = tuple(list(classes).index(str(one)) for one in named.values())
        if len({*indices}) < len(members):
            got = f"evaluate.subsets.{name}={list(members)}"
            raise InputError(got, "each class once", "correct evaluate.subsets")
        found[name] = indices
    return found


def mean_iou(per_class_iou: Sequence[float], indices: Sequence[int]) -> float:
    """Over those that occur in labels or predictions; NaN where none does."""
    values = np.array([per_class_iou[index] for index in indices])
    # a mean over nothing is told by a warning else
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
