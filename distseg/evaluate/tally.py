"""What is counted over a split, image by image.

Every image once, and the same bits for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distseg.distributed.ranks import all_reduce_sum
from distseg.evaluate.boundary import boundary_counts, compare_outlines
from distseg.evaluate.metrics import (
    NUM_BINS,
    NUM_THRESHOLDS,
    SegmentationScores,
    calibration_counts,
    calibration_error,
    confusion_matrix,
    log_loss_sum,
    max_f1,
    scores,
    threshold_counts,
)
from shards.sample import IGNORE_INDEX
from shards.words import WAS, counted

NUM_RESAMPLES = 1000
INTERVAL_PERCENT = (2.5, 97.5)
_CHUNK = 100  # resamples at a time, to bound memory
# columns of the values that each image leaves
_LOSS, _F1_SUM, _F1_CLASSES, _CALIBRATION = 0, 1, 2, 3


class Tally:
    """Counts over the images that this rank has seen; after `sum_over_ranks`, over all.

    What is not a whole number is kept for each image and added in the images' order, so rounding
    does not depend on who saw which. details: also outlines, calibration and what the bootstrap
    needs. per_image: also `margins`, which details bring along.
    """

    def __init__(
        self,
        num_images: int,
        num_classes: int,
        device: torch.device,
        details: bool = False,
        *,
        per_image: bool = False,
    ):
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.details = details
        # int64 everywhere that things are counted: whole numbers add to the same bits in any order
        self.confusion = zeros(num_classes, num_classes)
        self._trimap_confusion = zeros(num_classes, num_classes)
        # of boundary regions: pixels of the intersection, of the union
        self._boundary = zeros(2, num_classes)
        self._at_thresholds = zeros(2, NUM_THRESHOLDS)
        # kept per image, or one image twice and another one not at all would pass for all
        self._times_seen = zeros(num_images)
        # right, true and predicted pixels
        self._keeps_margins = details or per_image
        self._margins = zeros(num_images if self._keeps_margins else 0, 3, num_classes)
        num_values = _CALIBRATION + 3 * NUM_BINS if details else 1
        # (images, values): a rank fills its rows, and sums over ranks add zeros to them
        self._values = zeros(num_images, num_values, dtype=torch.float64)

    def add(self, index: int, probabilities: Tensor, label: Tensor) -> None:
        """Count image `index`: probabilities (C, H, W) float32, label (H, W) uint8 on the same
        device, 255 = void.
        """
        num_classes = len(self.confusion)
        prediction = probabilities.argmax(dim=0).to(torch.uint8)
        confusion = confusion_matrix(prediction, label, num_classes)
        self.confusion += confusion
        self._times_seen[index] += 1
        self._values[index, _LOSS] = log_loss_sum(probabilities, label)
        if num_classes == 2:
            self._at_thresholds += threshold_counts(probabilities[1], label)
        if self._keeps_margins:
            self._margins[index] = torch.stack(
                [confusion.diagonal(), confusion.sum(1), confusion.sum(0)]
            )
        if self.details:
            self._values[index, _CALIBRATION:] = calibration_counts(probabilities, label).flatten()
            self._add_outlines(index, prediction, label)

    def _add_outlines(self, index: int, prediction: Tensor, label: Tensor) -> None:
        num_classes, device = len(self.confusion), label.device
        # outlines are OpenCV's work, on the CPU
        maps = prediction.cpu().numpy(), label.cpu().numpy()
        outlines = compare_outlines(*maps)
        self._values[index, _F1_SUM] = outlines.f1_sum
        self._values[index, _F1_CLASSES] = outlines.num_classes
        # what lies outside of the trimap becomes void, and is counted by nothing
        in_trimap = label.where(torch.from_numpy(outlines.trimap).to(device), IGNORE_INDEX)
        self._trimap_confusion += confusion_matrix(prediction, in_trimap, num_classes)
        self._boundary += torch.from_numpy(boundary_counts(*maps, num_classes)).to(device)

    def sum_over_ranks(self) -> None:
        """Make every rank's counts those of all ranks.

        Raises RuntimeError unless every image was seen once.
        """
        # the same order on every rank: collectives pair up by it
        for counts in (self.confusion, self._at_thresholds, self._times_seen, self._values):
            all_reduce_sum(counts)
        if self._keeps_margins:
            all_reduce_sum(self._margins)
        if self.details:
            for counts in (self._trimap_confusion, self._boundary):
                all_reduce_sum(counts)
        # the promise of an exact evaluation, checked: a padded sampler would break it without a
        # trace
        wrong = (self._times_seen != 1).nonzero().flatten().tolist()
        if wrong:
            times = int(self._times_seen[wrong[0]])
            raise RuntimeError(
                f"{counted(len(wrong), 'image', verb=WAS)} not counted once; "
                f"image {wrong[0]} was {times} times"
            )

    @property
    def num_images(self) -> int:
        """Images counted."""
        return int(self._times_seen.sum())

    @property
    def margins(self) -> np.ndarray:
        """(images, 3, C) int64: an image's right, true and predicted pixels of each class."""
        return self._margins.cpu().numpy()

    def scores(self) -> SegmentationScores:
        """Those of the confusion matrix. Raises InputError where no pixel has a label."""
        return scores(self.confusion)

    def never_predicted(self) -> dict[int, float]:
        """By index, the share of the labelled pixels of each class that no pixel was taken for."""
        truth, predicted = self.confusion.sum(1), self.confusion.sum(0)
        missed = ((truth > 0) & (predicted == 0)).nonzero().flatten().tolist()
        total = int(truth.sum())
        return {index: int(truth[index]) / total for index in missed}

    def predicted_shares(self) -> list[float]:
        """The share of the labelled pixels that is taken for each class."""
        predicted = self.confusion.sum(0).double()
        return (predicted / predicted.sum()).tolist()

    def others(self, class_names: Sequence[str]) -> dict[str, float]:
        """Scores that no confusion matrix gives.

        loss: mean of -ln p(label) over the labelled pixels, nats; max_f1 and its threshold, for two
        classes. With details also what `_outlines` gives, and calibration_error.
        """
        values = self._values.cpu()
        # summed on the CPU in the images' order, so that no number of ranks changes a bit
        found = {"loss": float(values[:, _LOSS].sum() / self.confusion.sum().cpu())}
        if len(self.confusion) == 2:
            found["max_f1"], found["max_f1_threshold"] = max_f1(self._at_thresholds)
        if self.details:
            found |= self._outlines(values, class_names)
            calibration = values[:, _CALIBRATION:].sum(0).reshape(3, NUM_BINS)
            found["calibration_error"] = calibration_error(calibration)
        return found

    def _outlines(self, values: Tensor, class_names: Sequence[str]) -> dict[str, float]:
        """Scores of outlines, see `boundary`; NaN where no image has one.

        boundary_f1: the mean over images of the mean over an image's classes; trimap_iou: the mean
        IoU of the pixels within the tolerance of a true outline; boundary_iou/<class> and their
        mean, mean_boundary_iou, over the classes in truth or prediction.
        """
        # images without any outline, all of one class, have no F1
        outlined = values[values[:, _F1_CLASSES] > 0]
        boundary_f1 = float((outlined[:, _F1_SUM] / outlined[:, _F1_CLASSES]).mean())
        has_trimap = bool(self._trimap_confusion.sum())
        trimap_iou = scores(self._trimap_confusion).mean_iou if has_trimap else float("nan")
        intersection, union = self._boundary.cpu().double()
        # sums over all images first, as for IoU: means of the images' own would weigh small objects
        # more
        of_classes = intersection / union  # 0 / 0 is NaN: absent
        found = {"boundary_f1": boundary_f1, "trimap_iou": trimap_iou}
        found["mean_boundary_iou"] = float(of_classes.nanmean())
        each = zip(class_names, of_classes.tolist(), strict=True)
        return found | {f"boundary_iou/{name}": iou for name, iou in each}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals over images; only with details, and none of a single image."""
        # drawn again and again it is no other set: an interval without a width looks like certainty
        return bootstrap(self.margins) if self.num_images > 1 else {}


def bootstrap(margins: np.ndarray, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile intervals (95 %) of the scores, for splits drawn with replacement from this one's
    images.

    margins: (images, 3, C) whole numbers, an image's right, true and predicted pixels of each
    class: all that the scores depend on. Raises ValueError where no image has a labelled pixel.
    """
    num_images, _, num_classes = margins.shape
    if not margins[:, 1].any():
        raise ValueError("no labelled pixel")
    flat = margins.reshape(num_images, -1).astype(np.float64)  # sums below 2^53 pixels are exact
    # a fixed seed: the same evaluation gives the same interval
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(NUM_RESAMPLES // _CHUNK):
        # how often each image is drawn, (resamples, images): then resampling is one matrix product
        times = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=_CHUNK)
        drawn.append((times.astype(np.float64) @ flat).reshape(_CHUNK, 3, num_classes))
    hits, truth, predicted = np.concatenate(drawn).transpose(1, 0, 2)  # (resamples, C) each
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: absent
        iou, accuracy, total = hits / (truth + predicted - hits), hits / truth, truth.sum(1)
        values = {
            "mean_iou": _mean_of_present(iou),
            "pixel_accuracy": hits.sum(1) / total,
            "mean_class_accuracy": _mean_of_present(accuracy),
            "frequency_weighted_iou": np.nansum(truth * iou, axis=1) / total,
        }
    bounds = {name: np.nanpercentile(value, INTERVAL_PERCENT) for name, value in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def _mean_of_present(values: np.ndarray) -> np.ndarray:
    """(resamples, C) -> (resamples,): the mean over C without NaN."""
    present = ~np.isnan(values)
    return np.where(present, values, 0).sum(1) / present.sum(1)
