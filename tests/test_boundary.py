"""Outlines against brute force over pairs of pixels, and what void does to them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distseg.evaluate.boundary import TOLERANCE, compare_outlines


def outline(classes: np.ndarray, index: int) -> list[tuple[int, int]]:
    height, width = classes.shape
    found = []
    for y, x in np.argwhere(classes == index):
        near = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
        if any(0 <= v < height and 0 <= u < width and classes[v, u] != index for v, u in near):
            found.append((int(y), int(x)))
    return found


def share_near(points: list, others: list, reach_px: float) -> float:
    if not points:
        return 0.0
    return sum(any(math.dist(p, q) <= reach_px for q in others) for p in points) / len(points)


def brute_force(prediction: np.ndarray, label: np.ndarray) -> tuple[float, int, np.ndarray]:
    """Without void: every pixel of an outline against every pixel of the other."""
    reach_px = TOLERANCE * math.hypot(*label.shape)
    scores, edge = [], []
    for index in range(int(max(label.max(), prediction.max())) + 1):
        truth, guess = outline(label, index), outline(prediction, index)
        edge += truth
        if truth or guess:
            precision, recall = (
                share_near(guess, truth, reach_px),
                share_near(truth, guess, reach_px),
            )
            scores.append(
                2 * precision * recall / (precision + recall) if precision + recall else 0.0
            )
    band = np.zeros(label.shape, bool)
    for place in np.ndindex(label.shape):
        band[place] = any(math.dist(place, q) <= reach_px for q in edge)
    return sum(scores), len(scores), band


def blocks(seed: int, size: tuple[int, int], num_classes: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, num_classes, (4, 5), dtype=np.uint8)
    rows, columns = (
        np.arange(side) * count // side for side, count in zip(size, coarse.shape, strict=True)
    )
    return coarse[rows][:, columns]


# tolerances 0.5, 0.7, 1.4 and 0.08 px
@pytest.mark.parametrize("size", [(40, 52), (31, 90), (110, 150), (8, 6)])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_outlines_equal_brute_force(size: tuple[int, int], shift: int) -> None:
    label = blocks(1, size)
    prediction = np.roll(label, (shift, -shift), (0, 1))
    prediction[: size[0] // 3, : size[1] // 4] = 5  # a class that is nowhere true
    found = compare_outlines(prediction, label)
    f1_sum, num_classes, band = brute_force(prediction, label)
    assert found.f1_sum == pytest.approx(f1_sum, abs=1e-12) and found.num_classes == num_classes
    np.testing.assert_array_equal(found.band, band)


def test_a_perfect_prediction_scores_one_a_distant_one_zero() -> None:
    label = np.zeros((100, 100), np.uint8)  # the tolerance is 1.06 px
    label[:, 50:] = 1
    assert compare_outlines(label, label).f1_sum == 2
    for shift, f1 in ((1, 2), (3, 0)):
        moved = np.zeros_like(label)
        moved[:, 50 + shift :] = 1
        assert compare_outlines(moved, label).f1_sum == pytest.approx(f1), shift
    nothing = compare_outlines(label, np.zeros_like(label))  # outlines that are nowhere true
    assert nothing.num_classes == 2 and nothing.f1_sum == 0 and not nothing.band.any()


def test_a_line_of_void_between_two_classes_is_their_outline() -> None:
    """As in PASCAL VOC, where no two classes touch."""
    label = np.zeros((600, 600), np.uint8)  # the tolerance is 6.4 px
    label[:, 303:] = 1
    label[:, 298:303] = 255
    prediction = np.zeros_like(label)
    prediction[:, 300:] = 1
    found = compare_outlines(prediction, label)
    assert found.num_classes == 2 and found.f1_sum == 2
    assert (
        not found.band[label == 255].any()
        and found.band[:, [297, 303]].all()
        and not found.band[:, [290, 310]].any()
    )
    far = np.zeros_like(label)
    far[:, 320:] = 1
    assert compare_outlines(far, label).f1_sum == 0


def test_what_lies_deep_in_void_does_not_count() -> None:
    label = np.zeros((100, 100), np.uint8)
    label[:, 20:] = 1
    label[30:, 40:] = 255
    prediction = np.where(label == 255, 0, label).astype(np.uint8)
    prediction[60:, 60:] = 3
    border = compare_outlines(prediction, label)
    prediction[60:, 60:] = 0
    assert compare_outlines(prediction, label).f1_sum == border.f1_sum
    assert border.num_classes == 2
    label[:, :50], label[:, 50:] = 0, 1
    label[30:] = 255  # the nearest labelled pixels would let the outline go on through all of it
    prediction = np.tile(np.repeat(np.array([0, 1], np.uint8), 50), (100, 1))
    prediction[40:] = 1
    assert compare_outlines(prediction, label).f1_sum == 2


def test_an_image_of_void_or_of_one_class_has_no_outline() -> None:
    void = np.full((20, 30), 255, np.uint8)
    for label in (void, np.zeros_like(void)):
        found = compare_outlines(np.zeros_like(void), label)
        assert (found.f1_sum, found.num_classes, found.band.any()) == (0, 0, False)
