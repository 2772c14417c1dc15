"""Weights and prior chances of classes, from how many pixels of each there are."""

from __future__ import annotations

import numpy as np


def balanced(pixels: np.ndarray) -> np.ndarray:
    """All pixels / (number of classes x pixels of the class), as scikit-learn's "balanced".

    pixels: (samples, C) int64, of each class in each sample. A class without pixels, which no loss
    will ask for, gets 0 and is none of the number. Returns (C,) float64; their mean over all
    pixels is 1.
    """
    per_class = pixels.sum(0)  # (C,)
    present = per_class > 0
    # without any pixel all weights are 0, and not a division by 0
    fair = per_class.sum() / max(1, present.sum())
    return np.where(present, fair / np.maximum(per_class, 1), 0.0)


def median_frequency(pixels: np.ndarray) -> np.ndarray:
    """The median of the frequencies / a class's frequency (Eigen and Fergus 2015, section 6.2).

    A class's frequency is its pixels over all pixels of the samples that show it. pixels, and what
    is returned: as of `balanced`.
    """
    per_sample = pixels.sum(1)  # (samples,)
    of_samples_with = ((pixels > 0) * per_sample[:, None]).sum(0)  # (C,)
    present = of_samples_with > 0
    frequency = pixels.sum(0) / np.maximum(of_samples_with, 1)
    median = np.median(frequency[present]) if present.any() else 0.0
    return np.where(present, median / np.where(present, frequency, 1.0), 0.0)


def log_shares(pixels: np.ndarray) -> np.ndarray:
    """The natural logarithm of each class's share of all pixels: what a segmentor that has learned
    nothing but how often each class is would answer (Menon et al. 2021, section 3).

    A class without pixels gets what the rarest of the others gets. pixels, and what is returned: as
    of `balanced`; at least one pixel.
    """
    per_class = pixels.sum(0)  # (C,)
    return np.log(np.maximum(per_class, per_class[per_class > 0].min()) / per_class.sum())
