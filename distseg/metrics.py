"""Segmentation scores from one confusion matrix over a whole split (Long et al. 2015, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shards.errors import InputError


def confusion_matrix(
    prediction: torch.Tensor, label: torch.Tensor, num_classes: int, ignore_index: int = 255
) -> torch.Tensor:
    """Count the pixels of each true class that were predicted as each class.

    prediction, label: integer tensors of one shape, class indices in 0..num_classes-1; pixels whose label is
    ignore_index do not count, whatever was predicted there. Returns (num_classes, num_classes) int64 on the
    tensors' device, rows = truth, columns = prediction. Matrices of several images or ranks are added. Raises
    InputError for unequal shapes and for an index out of range.
    """
    if prediction.shape != label.shape:
        got = f"prediction of {tuple(prediction.shape)} and label of {tuple(label.shape)}"
        raise InputError(got, "the same shape", "resize the logits to the label's size before taking the class")
    valid = label != ignore_index
    truth, guess = label[valid].long(), prediction[valid].long()
    for name, classes in (("label", truth), ("prediction", guess)):
        if classes.numel():
            low, high = (int(bound) for bound in classes.aminmax())
            if low < 0 or high >= num_classes:
                got = f"{name} with class indices {low} to {high}"
                raise InputError(got, f"0 to {num_classes - 1}", "check the number of classes of data and network")
    counts = torch.bincount(truth * num_classes + guess, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


@dataclass(frozen=True)
class SegmentationScores:
    """Scores in [0, 1] over all counted pixels; n_ij pixels of class i were predicted as j, t_i = sum_j n_ij.

    mean_iou: mean of per_class_iou over the classes that occur in truth or prediction;
    pixel_accuracy: sum_i n_ii / sum_i t_i;
    mean_class_accuracy: mean of n_ii / t_i over the classes that occur in truth;
    frequency_weighted_iou: sum_i t_i IoU_i / sum_i t_i;
    per_class_iou: n_ii / (t_i + sum_j n_ji - n_ii), NaN for a class in neither truth nor prediction;
    num_classes_counted: classes that mean_iou is the mean of; num_pixels: labelled pixels.
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
        return values | {f"iou/{name}": iou for name, iou in zip(class_names, self.per_class_iou, strict=True)}


def scores(confusion: torch.Tensor) -> SegmentationScores:
    """Scores of a (C, C) int64 confusion matrix, rows = truth; for ranks or images, add their matrices first.

    Raises InputError when no pixel was counted, because no score is defined then.
    """
    counts = confusion.to("cpu", torch.float64)
    hits, truth, union = counts.diagonal(), counts.sum(1), counts.sum(0) + counts.sum(1) - counts.diagonal()
    total = truth.sum()
    if total == 0:
        action = "evaluate on a split with labels that are not all void"
        raise InputError("a confusion matrix without a single pixel", "at least one labelled pixel", action)
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
