"""Weights of classes from how many pixels of each there are."""

from __future__ import annotations

import numpy as np


def balanced(pixels: np.ndarray) -> np.ndarray:
    """All pixels / (number of classes x pixels of the class), as scikit-learn's "balanced".

    pixels: (samples, C) int64, of each class in each sample. A class without pixels, which no loss
    will ask for, gets 0 and is none of the number. Returns (C,) float64; their mean over all
    pixels is 1.
    """
    per_class = pixels.sum(0)
    present = per_class > 0
    fair = per_class.sum() / max(1, present.sum())
    return np.where(present, fair / np.maximum(per_class, 1), 0.0)


def median_frequency(pixels: np.ndarray) -> np.ndarray:
    """The median of the frequencies / a class's frequency (Eigen and Fergus 2015, section 6.2).

    A class's frequency is its pixels over all pixels of the samples that show it. pixels, and what
    is returned: as of `balanced`.
    """
    per_sample = pixels.sum(1)
    of_samples_with = ((pixels > 0) * per_sample[:, None]).sum(0)
    present = of_samples_with > 0
    frequency = pixels.sum(0) / np.maximum(of_samples_with, 1)
    median = np.median(frequency[present]) if present.any() else 0.0
    return np.where(present, median / np.where(present, frequency, 1.0), 0.0)
