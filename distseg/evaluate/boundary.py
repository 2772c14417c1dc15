"""How well a prediction meets the outlines of the classes.

Boundary F1 and the pixels around the true outlines (a trimap): Csurka et al. 2013. Boundary IoU:
Cheng et al. 2021. The three treat void and the image's border differently, as their sources do or
leave open; each function says how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from shards.sample import IGNORE_INDEX

# both shares of the image's diagonal
TOLERANCE = 0.0075  # Csurka et al. 2013, section 2.2
BOUNDARY_WIDTH = 0.02  # Cheng et al. 2021, section 5


@dataclass(frozen=True)
class Outlines:
    """One image's outlines, scored.

    f1_sum, num_classes: boundary F1 summed over the classes with an outline in truth or prediction,
    and how many those are. trimap: (H, W) bool, the labelled pixels within the tolerance of an
    outline of the truth.
    """

    f1_sum: float
    num_classes: int
    trimap: np.ndarray


def compare_outlines(prediction: np.ndarray, label: np.ndarray) -> Outlines:
    """Compare the outlines of the classes in two class maps (H, W) uint8; label: 255 for void.

    A pixel lies on its class's outline when one of its 4 neighbours is of another class. Precision
    is the share of the predicted outline's pixels within TOLERANCE of the true outline of the same
    class, recall the converse; a class that only one of the two has scores 0 (Csurka et al. 2013).

    The paper does not say what void does. Here a void pixel counts as the class of the labelled
    pixel nearest to it by Euclidean distance, of several equally near ones the lowest class, so
    that objects which void lines surround, as in PASCAL VOC, have outlines. The prediction is taken
    as it is. Pixels farther from every labelled one than the tolerance count in neither outline.
    """
    # filling void needs a labelled pixel somewhere to fill it from
    if (label == IGNORE_INDEX).all():
        return Outlines(0.0, 0, np.zeros(label.shape, bool))
    reach_px = TOLERANCE * math.hypot(*label.shape)
    # (H, W) each: classes without void, and px to the nearest labelled pixel
    truth, depth = _without_void(label, math.ceil(reach_px) + 1)
    shallow = depth <= reach_px
    on_truth, on_prediction = _on_outline(truth) & shallow, _on_outline(prediction) & shallow
    # the truth's outlines alone: with the prediction's too, a bad one would choose where it is
    # scored
    trimap = (_distance_to(on_truth) <= reach_px) & (label != IGNORE_INDEX)
    # also those that the prediction made up, which score 0: else inventing a class would cost
    # nothing
    classes = np.union1d(truth[on_truth], prediction[on_prediction])
    f1 = [
        _f1(on_truth & (truth == c), on_prediction & (prediction == c), reach_px) for c in classes
    ]
    # a sum and a count, as several images are averaged by whoever adds them
    return Outlines(math.fsum(f1), len(f1), trimap)


def boundary_counts(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of the intersection and of the union of each class's two boundary regions: (2, C)
    int64, whose quotient over the sums of all images is Boundary IoU (Cheng et al. 2021, eq. 2).

    prediction, label: (H, W) uint8, label 255 for void. A mask's boundary region are its pixels no
    more than d from a pixel outside of it, d = 2 % of the diagonal, rounded, at least 1, counted in
    steps to any of 8 neighbours as the authors' program does. As there, what lies beyond the
    image's border is outside. So is void, of both masks: what is predicted there counts nowhere,
    and a mask that void cuts has its boundary there.
    """
    # per image, as in the authors' program: a share of the diagonal, so that sizes of images
    # compare
    reach_px = max(1, round(BOUNDARY_WIDTH * math.hypot(*label.shape)))
    counted = label != IGNORE_INDEX
    counts = np.zeros((2, num_classes), np.int64)
    for index in np.union1d(label[counted], prediction[counted]):
        truth = _boundary_region(label == index, reach_px)
        predicted = _boundary_region((prediction == index) & counted, reach_px)
        counts[:, index] = (truth & predicted).sum(), (truth | predicted).sum()
    return counts


def _boundary_region(mask: np.ndarray, reach_px: int) -> np.ndarray:
    """The pixels of a mask (H, W) bool within reach_px, in steps to 8 neighbours, of its
    outside.
    """
    region = np.zeros(mask.shape, bool)
    if mask.any():
        box = _bounding_box(mask)  # beyond it there is nothing but outside
        # one pixel of outside all around, as the image's border is outside of every mask
        padded = np.pad(mask[box], 1).view(np.uint8)
        # exact for steps to 8 neighbours, of which a 3 x 3 mask is all that there is
        steps = cv2.distanceTransform(padded, cv2.DIST_C, 3)[1:-1, 1:-1]
        region[box] = mask[box] & (steps <= reach_px)
    return region


def _f1(truth: np.ndarray, prediction: np.ndarray, reach_px: float) -> float:
    """F1 of two outlines (H, W) bool, of which at least one has a pixel."""
    if not truth.any() or not prediction.any():
        return 0.0
    # most classes cover little of an image, and a distance transform costs as much as its area
    rows, columns = _bounding_box(truth | prediction)
    # distances within it need nothing outside
    truth, prediction = truth[rows, columns], prediction[rows, columns]
    # distances to all of an outline, looked up at the pixels of the other
    precision = float((_distance_to(truth)[prediction] <= reach_px).mean())
    recall = float((_distance_to(prediction)[truth] <= reach_px).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
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
    # OpenCV's distance to nothing is some large number, not infinity
    if not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    return cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _without_void(label: np.ndarray, depth_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The label with the class of the nearest labelled pixel, the lowest of several, at every void
    pixel not deeper than depth_px, and the distance to that (0 at labelled pixels).

    What is deeper stays void, or counts as some class, at a distance above depth_px or infinite.
    """
    void = label == IGNORE_INDEX
    filled, depth = label.copy(), np.where(void, np.inf, 0).astype(np.float32)
    # a class at a time: OpenCV finds the nearest pixel itself only by sums of steps to neighbours,
    # which is another one where two are about equally near; distances alone it finds exactly
    for index in np.unique(label[~void]) if void.any() else ():
        rows, columns = _bounding_box(label == index)
        near = (
            slice(max(0, rows.start - depth_px), rows.stop + depth_px),
            slice(max(0, columns.start - depth_px), columns.stop + depth_px),
        )
        distance = _distance_to(label[near] == index)
        closer = distance < depth[near]  # ascending, so that the lowest class keeps a tie
        filled[near][closer] = index
        depth[near][closer] = distance[closer]
    return filled, depth
