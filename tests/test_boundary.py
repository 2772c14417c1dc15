"""Outlines against brute force over pairs of pixels, and what void does to them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distseg.evaluate.boundary import (
    BOUNDARY_WIDTH,
    TOLERANCE,
    boundary_counts,
    compare_outlines,
)


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


def filled(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Void by the rule: the class of the nearest labelled pixel, the lowest of several; and how far
    away it is.
    """
    classes, depth = label.copy(), np.zeros(label.shape)
    labelled = np.argwhere(label != 255)
    values = label[label != 255].astype(int)
    for y, x in np.argwhere(label == 255):
        squares = ((labelled - (y, x)) ** 2).sum(1)  # whole numbers, so that ties are ties
        classes[y, x] = values[squares == squares.min()].min()
        depth[y, x] = math.sqrt(squares.min())
    return classes, depth


def brute_force(prediction: np.ndarray, label: np.ndarray) -> tuple[float, int, np.ndarray]:
    """Every pixel of an outline against every pixel of the other."""
    reach_px = TOLERANCE * math.hypot(*label.shape)
    true_classes, depth = filled(label)
    scores, edge = [], []
    for index in range(int(max(true_classes.max(), prediction.max())) + 1):
        truth, guess = (
            [place for place in outline(classes, index) if depth[place] <= reach_px]
            for classes in (true_classes, prediction)
        )
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
        near = label[place] != 255 and any(math.dist(place, q) <= reach_px for q in edge)
        band[place] = near
    return sum(scores), len(scores), band


def blocks(seed: int, size: tuple[int, int], num_classes: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, num_classes, (4, 5), dtype=np.uint8)
    rows, columns = (
        np.arange(side) * count // side for side, count in zip(size, coarse.shape, strict=True)
    )
    return coarse[rows][:, columns]


# tolerances 0.5, 0.7, 1.1 and 0.08 px
@pytest.mark.parametrize("size", [(40, 52), (31, 90), (20, 145), (8, 6)])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_outlines_equal_brute_force(size: tuple[int, int], shift: int) -> None:
    label = blocks(1, size)
    prediction = np.roll(label, (shift, -shift), (0, 1))
    prediction[: size[0] // 3, : size[1] // 4] = 5  # a class that is nowhere true
    found = compare_outlines(prediction, label)
    f1_sum, num_classes, band = brute_force(prediction, label)
    assert found.f1_sum == pytest.approx(f1_sum, abs=1e-12) and found.num_classes == num_classes
    np.testing.assert_array_equal(found.trimap, band)


# tolerances 1.1 and 0.3 px
@pytest.mark.parametrize("size", [(12, 150), (25, 31)])
@pytest.mark.parametrize("seed", range(8))
def test_outlines_with_void_equal_brute_force(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = blocks(seed, size)
    prediction = np.roll(label, tuple(rng.integers(-2, 3, 2)), (0, 1))
    y, x = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
    label[y : y + rng.integers(1, 9)] = 255  # a band, odd or even: many a pixel is equally near
    label[:, x : x + 3] = 255
    label[rng.random(size) < 0.1 * (seed % 2)] = 255
    found = compare_outlines(prediction, label)
    f1_sum, num_classes, band = brute_force(prediction, label)
    assert found.f1_sum == pytest.approx(f1_sum, abs=1e-12) and found.num_classes == num_classes
    np.testing.assert_array_equal(found.trimap, band)


def test_void_as_near_to_two_classes_counts_as_the_lower() -> None:
    label = np.repeat(np.array([2, 255, 1], np.uint8), (30, 1, 30))[None].repeat(400, 0)
    by_rule = np.repeat(np.array([2, 1], np.uint8), (30, 31))[None].repeat(400, 0)
    assert compare_outlines(by_rule, label).f1_sum == 2
    np.testing.assert_array_equal(filled(label)[0], by_rule)


def test_a_perfect_prediction_scores_one_a_distant_one_zero() -> None:
    label = np.zeros((100, 100), np.uint8)  # the tolerance is 1.06 px
    label[:, 50:] = 1
    assert compare_outlines(label, label).f1_sum == 2
    for shift, f1 in ((1, 2), (3, 0)):
        moved = np.zeros_like(label)
        moved[:, 50 + shift :] = 1
        assert compare_outlines(moved, label).f1_sum == pytest.approx(f1), shift
    nothing = compare_outlines(label, np.zeros_like(label))  # outlines that are nowhere true
    assert nothing.num_classes == 2 and nothing.f1_sum == 0 and not nothing.trimap.any()


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
        not found.trimap[label == 255].any()
        and found.trimap[:, [297, 303]].all()
        and not found.trimap[:, [290, 310]].any()
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
        assert (found.f1_sum, found.num_classes, found.trimap.any()) == (0, 0, False)


def region(mask: np.ndarray, reach_px: int) -> set[tuple[int, int]]:
    """The definition: members of which a pixel at most reach_px rows and columns away is none."""
    members = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    reach = range(-reach_px, reach_px + 1)
    return {
        (y, x)
        for y, x in members
        if any((y + down, x + right) not in members for down in reach for right in reach)
    }


# d = 1, 1, 1, 2 and 3 px
@pytest.mark.parametrize("size", [(8, 6), (3, 5), (40, 52), (31, 90), (24, 150)])
@pytest.mark.parametrize("void_share", [0.0, 0.02])
def test_boundary_counts_equal_the_definition(size: tuple[int, int], void_share: float) -> None:
    label = blocks(2, size)
    prediction = np.roll(label, (2, -1), (0, 1))
    prediction[: size[0] // 3, : size[1] // 4] = 5  # nowhere true
    label[np.random.default_rng(0).random(size) < void_share] = 255
    label[size[0] // 2 : size[0] // 2 + 2, : size[1] // 2] = 255
    reach_px = max(1, round(BOUNDARY_WIDTH * math.hypot(*size)))
    found = boundary_counts(prediction, label, 7)
    for index in range(7):
        truth = region(label == index, reach_px)
        guess = region((prediction == index) & (label != 255), reach_px)
        assert found[:, index].tolist() == [len(truth & guess), len(truth | guess)], index
    assert found[1, 5] > 0 and not found[0, 5] and not found[:, 6].any()


def test_boundary_iou_of_a_square_follows_its_side() -> None:
    """A square of 60 px, and one of 56 px inside of it, in a large image: d = 8 px."""
    label, prediction = np.zeros((240, 320), np.uint8), np.zeros((240, 320), np.uint8)
    label[100:160, 100:160] = 1
    prediction[102:158, 102:158] = 1
    truth, guess = 60**2 - 44**2, 56**2 - 40**2
    both = 56**2 - 44**2  # the inner one's outer edge to the outer one's inner edge
    assert boundary_counts(prediction, label, 2)[:, 1].tolist() == [both, truth + guess - both]
    same, union = boundary_counts(label, label, 2)
    assert same.tolist() == union.tolist() and same[1] == truth
    assert same[0] == 240 * 320 - 224 * 304 + (76**2 - 60**2)  # the image's border is a boundary


def test_what_is_predicted_in_void_changes_no_boundary_count() -> None:
    label = blocks(3, (60, 80))
    label[20:30] = 255
    one, other = label.copy(), label.copy()
    one[20:30], other[20:30] = 0, 3
    np.testing.assert_array_equal(boundary_counts(one, label, 5), boundary_counts(other, label, 5))
    void = np.full((20, 30), 255, np.uint8)
    assert not boundary_counts(np.zeros_like(void), void, 5).any()
