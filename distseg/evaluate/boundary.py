"""How well a prediction meets the outlines of the classes.

Boundary F1, and the pixels around them (a trimap).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from shards.sample import IGNORE_INDEX

TOLERANCE = 0.0075  # of the image's diagonal: Csurka et al. 2013, section 2.2


@dataclass(frozen=True)
class Outlines:
    """One image's outlines, scored.

    f1_sum, num_classes: boundary F1 summed over the classes with an outline in truth or prediction,
    and how many those are. band: (H, W) bool, the labelled pixels within the tolerance of an
    outline of the truth.
    """

    f1_sum: float
    num_classes: int
    band: np.ndarray


def compare_outlines(prediction: np.ndarray, label: np.ndarray) -> Outlines:
    """Compare the outlines of the classes in two class maps (H, W) uint8; label: 255 for void.

    A pixel lies on its class's outline when one of its 4 neighbours is of another class. Precision
    is the share of the predicted outline's pixels within TOLERANCE of the true outline of the same
    class, recall the converse; a class that only one of the two has scores 0 (Csurka et al. 2013).
    Void counts as the class of the labelled pixel nearest to it, so that objects which void lines
    surround, as in PASCAL VOC, have outlines; those deeper in void than the tolerance do not count,
    in either map.
    """
    if (label == IGNORE_INDEX).all():
        return Outlines(0.0, 0, np.zeros(label.shape, bool))
    reach_px = TOLERANCE * math.hypot(*label.shape)
    truth, depth = _without_void(label)
    shallow = depth <= reach_px
    on_truth, on_prediction = _on_outline(truth) & shallow, _on_outline(prediction) & shallow
    band = (_distance_to(on_truth) <= reach_px) & (label != IGNORE_INDEX)
    classes = np.union1d(truth[on_truth], prediction[on_prediction])
    f1 = [
        _f1(on_truth & (truth == c), on_prediction & (prediction == c), reach_px) for c in classes
    ]
    return Outlines(math.fsum(f1), len(f1), band)


def _f1(truth: np.ndarray, prediction: np.ndarray, reach_px: float) -> float:
    """F1 of two outlines (H, W) bool, of which at least one has a pixel."""
    if not truth.any() or not prediction.any():
        return 0.0
    rows, columns = _window(truth | prediction)
    # distances within it need nothing outside
    truth, prediction = truth[rows, columns], prediction[rows, columns]
    precision = float((_distance_to(truth)[prediction] <= reach_px).mean())
    recall = float((_distance_to(prediction)[truth] <= reach_px).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest rows and columns that hold all of `mask`, which is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _on_outline(classes: np.ndarray) -> np.ndarray:
    """(H, W) bool: which pixels have a 4-neighbour of another class."""
    on = np.zeros(classes.shape, bool)
    down, right = classes[1:] != classes[:-1], classes[:, 1:] != classes[:, :-1]
    on[1:] |= down
    on[:-1] |= down
    on[:, 1:] |= right
    on[:, :-1] |= right
    return on


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """Euclidean distance, in pixels, of every pixel to the nearest one in `mask`.

    Infinite where that is empty.
    """
    if not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    return cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _without_void(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label with every void pixel as the labelled one nearest to it, and its distance to that
    (0 elsewhere).
    """
    void = label == IGNORE_INDEX
    if not void.any():
        return label, np.zeros(label.shape, np.float32)
    # OpenCV finds the nearest pixel by sums of steps to neighbours, so among about equally near
    # ones it may differ
    nearest = cv2.distanceTransformWithLabels(
        void.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )[1]
    class_of = np.zeros(nearest.max() + 1, label.dtype)
    class_of[nearest[~void]] = label[~void]
    return class_of[nearest], _distance_to(~void)
