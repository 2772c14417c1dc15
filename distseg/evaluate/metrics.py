"""Segmentation scores from sums over a whole split.

One confusion matrix (Long et al. 2015, section 5), and more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shards.errors import InputError
from shards.sample import IGNORE_INDEX


def confusion_matrix(
    prediction: torch.Tensor,
    label: torch.Tensor,
    num_classes: int,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Count the pixels of each true class that were predicted as each class.

    prediction, label: integer tensors of one shape, class indices in 0..num_classes-1; pixels whose
    label is ignore_index do not count, whatever was predicted there. Returns (num_classes,
    num_classes) int64 on the tensors' device, rows = truth, columns = prediction. Matrices of
    several images or ranks are added. Raises InputError for unequal shapes and for an index out of
    range.
    """
    if prediction.shape != label.shape:
        got = f"prediction of {tuple(prediction.shape)} and label of {tuple(label.shape)}"
        raise InputError(
            got, "the same shape", "resize the logits to the label's size before taking the class"
        )
    valid = label != ignore_index
    # int64, as uint8 x num_classes would wrap around
    truth, guess = label[valid].long(), prediction[valid].long()
    # bincount would make a longer array of an index too large, and fail at the reshape without a
    # name
    for name, classes in (("label", truth), ("prediction", guess)):
        if classes.numel():
            low, high = (int(bound) for bound in classes.aminmax())
            if low < 0 or high >= num_classes:
                got = f"{name} with class indices {low} to {high}"
                raise InputError(
                    got,
                    f"0 to {num_classes - 1}",
                    "check the number of classes of data and network",
                )
    # pairs as one number: a single pass, where one mask per class takes C^2 of them
    counts = torch.bincount(truth * num_classes + guess, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def log_loss_sum(
    probabilities: torch.Tensor, label: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Sum over valid pixels of -ln p(label), in nats, a float64 scalar; a chance of 0 counts as
    float32's smallest.

    probabilities: (C, H, W) float32 summing to 1 over C; label: (H, W), 0..C-1 or ignore_index.
    """
    valid = label != ignore_index
    index = label.long().where(valid, 0)
    # a chance that fp32 has rounded to 0 would make the mean of a whole split infinite
    chances = probabilities.gather(0, index[None])[0].clamp(min=torch.finfo(torch.float32).tiny)
    return -(chances[valid].double().log().sum())


@dataclass(frozen=True)
class SegmentationScores:
    """Scores in [0, 1] over all counted pixels; n_ij pixels of class i were predicted as j, t_i =
    sum_j n_ij.

    mean_iou: mean of per_class_iou over the classes that occur in truth or prediction;
    pixel_accuracy: sum_i n_ii / sum_i t_i;
    mean_class_accuracy: mean of n_ii / t_i over the classes that occur in truth;
    frequency_weighted_iou: sum_i t_i IoU_i / sum_i t_i;
    per_class_iou: n_ii / (t_i + sum_j n_ji - n_ii), NaN for a class in neither truth nor
    prediction; num_classes_counted: classes that mean_iou is the mean of; num_pixels: labelled
    pixels.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_class_accuracy: float
    frequency_weighted_iou: float
    per_class_iou: tuple[float, ...]
    num_classes_counted: int
    num_pixels: int

    def to_dict(self, class_names: tuple[str, ...]) -> dict[str, float]:
        """One flat dictionary, the classes as "iou/<name>"; an absent class stays in, as NaN."""
        values = {
            "mean_iou": self.mean_iou,
            "pixel_accuracy": self.pixel_accuracy,
            "mean_class_accuracy": self.mean_class_accuracy,
            "frequency_weighted_iou": self.frequency_weighted_iou,
            "num_classes_counted": self.num_classes_counted,
            "num_pixels": self.num_pixels,
        }
        return values | {
            f"iou/{name}": iou for name, iou in zip(class_names, self.per_class_iou, strict=True)
        }


def scores(confusion: torch.Tensor) -> SegmentationScores:
    """Scores of a (C, C) int64 confusion matrix, rows = truth; for ranks or images, add their
    matrices first.

    Raises InputError when no pixel was counted, because no score is defined then.
    """
    counts = confusion.to("cpu", torch.float64)
    hits, truth, union = (
        counts.diagonal(),
        counts.sum(1),
        counts.sum(0) + counts.sum(1) - counts.diagonal(),
    )
    total = truth.sum()
    if total == 0:
        action = "evaluate on a split with labels that are not all void"
        raise InputError(
            "a confusion matrix without a single pixel", "at least one labelled pixel", action
        )
    iou = hits / union  # 0 / 0 is NaN: absent
    return SegmentationScores(
        mean_iou=float(iou.nanmean()),
        pixel_accuracy=float(hits.sum() / total),
        mean_class_accuracy=float((hits / truth).nanmean()),
        frequency_weighted_iou=float((truth * iou).nansum() / total),
        per_class_iou=tuple(iou.tolist()),
        num_classes_counted=int((union > 0).sum()),
        num_pixels=int(total),
    )


NUM_THRESHOLDS = 256  # k / 255, as the KITTI road devkit counts


def threshold_counts(
    probability: torch.Tensor, label: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """How many pixels of class 0 and of class 1 have a probability of class 1 in [k/255,
    (k+1)/255): (2, 256) int64.

    probability: (H, W) float in [0, 1]; label: (H, W), 0, 1 or ignore_index. Counts of several
    images or ranks are added.
    """
    valid = label != ignore_index
    # in double: k / 255 as fp32 times 255 may land a bin too low or too high
    bins = (
        (probability[valid].double() * (NUM_THRESHOLDS - 1))
        .floor()
        .long()
        .clamp(0, NUM_THRESHOLDS - 1)
    )
    counts = torch.bincount(
        label[valid].long() * NUM_THRESHOLDS + bins, minlength=2 * NUM_THRESHOLDS
    )
    return counts.reshape(2, NUM_THRESHOLDS)


def max_f1(counts: torch.Tensor) -> tuple[float, float]:
    """The largest F1 of class 1 over all thresholds, and its threshold, from `threshold_counts`;
    (NaN, NaN) without it.

    F1 = 2PR / (P + R) with precision and recall pooled over all pixels (KITTI road's MaxF, in the
    image plane).
    """
    # (2, 256): pixels at or above k / 255
    # sums from the right: whoever passes a threshold has passed all lower ones
    at_least = counts.to("cpu", torch.float64).flip(1).cumsum(1).flip(1)
    false_positives, true_positives = at_least
    # at threshold 0 everything is predicted positive
    positives = true_positives[0]
    if positives == 0:
        return float("nan"), float("nan")
    f1 = 2 * true_positives / (true_positives + false_positives + positives)
    best = int(f1.argmax())
    return float(f1[best]), best / (NUM_THRESHOLDS - 1)


NUM_BINS = 15  # of equal width: Guo et al. 2017, section 2


def calibration_counts(
    probabilities: torch.Tensor, label: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Per bin of the confidence, in (k/15, (k+1)/15]: pixels, right ones, summed confidence: (3,
    15) float64.

    probabilities: (C, H, W) float summing to 1 over C, the largest one is the confidence; label:
    (H, W), 0..C-1 or ignore_index. Counts of several images or ranks are added.
    """
    valid = label != ignore_index
    confidence, prediction = (part[valid] for part in probabilities.max(dim=0))
    confidence = confidence.double()
    # half-open to the left, as Guo et al. have them: a confidence of exactly k / 15 is in the lower
    # bin
    bins = ((confidence * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)
    right = (prediction == label[valid]).double()
    # sums, which add over images and ranks, as errors do not
    kinds = (torch.ones_like(confidence), right, confidence)
    return torch.stack([torch.bincount(bins, weights, minlength=NUM_BINS) for weights in kinds])


def calibration_error(counts: torch.Tensor) -> float:
    """Expected calibration error of `calibration_counts`.

    Sum over bins of |right pixels - confidence| / all pixels.
    """
    pixels, right, confidence = counts.to("cpu", torch.float64)
    return float((right - confidence).abs().sum() / pixels.sum())
