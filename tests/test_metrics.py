"""Scores against loops over single pixels."""

import math

import numpy as np
import pytest
import torch

from distseg.evaluate.metrics import (
    calibration_counts,
    confusion_matrix,
    log_loss_sum,
    max_f1,
    scores,
    threshold_counts,
)
from shards.errors import InputError


def brute_force(predictions, labels, num_classes):
    """The formulas of Long et al. 2015 from loops over pixels, in Python floats."""
    pixels = [
        (int(truth), int(guess))
        for prediction, label in zip(predictions, labels, strict=True)
        for truth, guess in zip(label.flatten(), prediction.flatten(), strict=True)
        if truth != 255
    ]
    ious, accuracies, weighted = [], [], 0.0
    for c in range(num_classes):
        hit = sum(truth == c and guess == c for truth, guess in pixels)
        either = sum(truth == c or guess == c for truth, guess in pixels)
        in_truth = sum(truth == c for truth, _ in pixels)
        ious.append(hit / either if either else math.nan)
        if in_truth:
            accuracies.append(hit / in_truth)
            weighted += in_truth * ious[-1]
    present = [iou for iou in ious if not math.isnan(iou)]
    return {
        "mean_iou": sum(present) / len(present),
        "pixel_accuracy": sum(truth == guess for truth, guess in pixels) / len(pixels),
        "mean_class_accuracy": sum(accuracies) / len(accuracies),
        "frequency_weighted_iou": weighted / len(pixels),
        "num_classes_counted": len(present),
        "num_pixels": len(pixels),
    } | {f"iou/class {c}": iou for c, iou in enumerate(ious)}


def mixed_images(num_classes, allowed):
    """Predictions and labels of several sizes.

    Truth of the allowed classes and void, one image all void.
    """
    generator = torch.Generator().manual_seed(0)
    predictions, labels = [], []
    for size in ((3, 5), (17, 2), (8, 8), (1, 1), (13, 21)):
        choice = torch.randint(len(allowed), size, generator=generator)
        label = torch.tensor(allowed, dtype=torch.uint8)[choice]
        prediction = torch.where(torch.rand(size, generator=generator) < 0.6, label, label.flip(0))
        label[torch.rand(size, generator=generator) < 0.2] = 255
        predictions.append(prediction)
        labels.append(label)
    labels[2].fill_(255)
    predictions[0][0, 0] = num_classes - 1  # predicted, but never true
    labels[0][0, 0] = allowed[0]
    return predictions, labels


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_scores_equal_pixel_loops_for_any_number_of_ranks(world_size, dtype):
    num_classes = 6
    predictions, labels = mixed_images(num_classes, allowed=[0, 1, 3])  # 2 and 4 occur nowhere
    ranks = [torch.zeros(num_classes, num_classes, dtype=torch.int64) for _ in range(world_size)]
    for i, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
        ranks[i % world_size] += confusion_matrix(
            prediction.to(dtype), label.to(dtype), num_classes
        )
    found = scores(torch.stack(ranks).sum(0)).to_dict(
        tuple(f"class {c}" for c in range(num_classes))
    )
    expected = brute_force(predictions, labels, num_classes)
    assert found == pytest.approx(expected, abs=1e-14, nan_ok=True)
    assert found["num_classes_counted"] == 4
    assert math.isnan(found["iou/class 2"]) and found["iou/class 5"] == 0


def test_confusion_has_truth_in_rows():
    label = torch.tensor([[0, 0, 1, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1, 1]])
    assert confusion_matrix(prediction, label, 2).tolist() == [[1, 1], [0, 1]]
    assert confusion_matrix(prediction, label, 2).dtype == torch.int64


def test_what_is_predicted_in_void_counts_for_nothing():
    label = torch.tensor([[0, 1, 255, 255]], dtype=torch.uint8)
    first = confusion_matrix(torch.tensor([[0, 1, 0, 1]]), label, 2)
    assert torch.equal(first, confusion_matrix(torch.tensor([[0, 1, 77, -3]]), label, 2))
    other_void = torch.tensor([[0, 1, 9, 9]])
    assert torch.equal(
        first, confusion_matrix(torch.tensor([[0, 1, 0, 1]]), other_void, 2, ignore_index=9)
    )


def test_a_perfect_prediction_scores_one():
    label = torch.randint(0, 5, (20, 30), generator=torch.Generator().manual_seed(1))
    perfect = scores(confusion_matrix(label, label, 8))
    assert (perfect.mean_iou, perfect.pixel_accuracy, perfect.mean_class_accuracy) == (1, 1, 1)
    assert perfect.frequency_weighted_iou == 1 and perfect.num_classes_counted == 5


@pytest.mark.parametrize(("truth", "guess"), [(8, 0), (-1, 0), (254, 0), (0, 8), (0, -1)])
def test_an_index_out_of_range_is_refused(truth, guess):
    """Counted blindly, class 8 of 8 would land on another class's row."""
    with pytest.raises(InputError, match="0 to 7"):
        confusion_matrix(torch.tensor([[guess, 1]]), torch.tensor([[truth, 1]]), 8)


def test_unequal_shapes_are_refused():
    with pytest.raises(InputError, match="same shape"):
        confusion_matrix(
            torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.uint8), 2
        )


def test_nothing_but_void_is_refused():
    void = torch.full((3, 3), 255, dtype=torch.uint8)
    with pytest.raises(InputError, match="labelled pixel"):
        scores(confusion_matrix(void, void, 4))


def test_max_f1_equals_brute_force_over_all_thresholds() -> None:
    rng = np.random.default_rng(0)
    counts, chances, truths = torch.zeros(2, 256, dtype=torch.int64), [], []
    for height, width in ((7, 9), (20, 5)):
        label = rng.choice([0, 1, 255], size=(height, width), p=[0.6, 0.3, 0.1])
        chance = np.clip(0.25 * label.clip(0, 1) + rng.random((height, width)) * 0.8, 0, 1)
        counts += threshold_counts(
            torch.from_numpy(chance), torch.from_numpy(label.astype(np.uint8))
        )
        chances.append(chance[label != 255])
        truths.append(label[label != 255] == 1)
    chance, truth = np.concatenate(chances), np.concatenate(truths)
    best = 0.0
    for k in range(256):
        guess = chance >= k / 255
        hits = (guess & truth).sum()
        best = max(best, 2 * hits / (guess.sum() + truth.sum()))
    f1, threshold = max_f1(counts)
    assert f1 == pytest.approx(best, abs=1e-12)
    guess = chance >= threshold
    assert 2 * (guess & truth).sum() / (guess.sum() + truth.sum()) == pytest.approx(best, abs=1e-12)
    assert math.isnan(max_f1(torch.zeros(2, 256, dtype=torch.int64))[0])


def test_a_confidence_on_an_edge_is_in_the_lower_bin() -> None:
    """Bins (k/15, (k+1)/15], as Guo et al. 2017 have them; 0.2 is 3/15."""
    even = torch.full((5, 1, 1), 0.2, dtype=torch.float64)
    sure = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)[:, None, None]
    label = torch.zeros(1, 2, dtype=torch.uint8)
    pixels = calibration_counts(torch.cat([even, sure], 2), label)[0]
    assert pixels.nonzero().flatten().tolist() == [2, 14]


def test_log_loss_is_its_formula_and_finite_for_a_chance_of_zero() -> None:
    chances = torch.tensor([[[0.25, 1.0]], [[0.75, 0.0]]])
    label = torch.tensor([[1, 255]], dtype=torch.uint8)
    assert float(log_loss_sum(chances, label)) == pytest.approx(-math.log(0.75), abs=1e-7)
    label[0, 1] = 1
    assert math.isfinite(log_loss_sum(chances, label))
