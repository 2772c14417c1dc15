"""A change of your own to every training view, after crop, scale, flip and colours.

    distseg train preset=toy data.view=examples/own_view.py:CutOut data.view_options.side_px=32

Called with image (H, W, 3) uint8 RGB, label (H, W) uint8, 255 = void, and the view's own random
generator; returns both, of the same shapes and types. Draw from that generator alone: then the
pixels are the same on any number of ranks and workers, and after a restart. A plain function of
(image, label, rng, **options) will do, too.
"""

from __future__ import annotations

import numpy as np

VOID = 255


class CutOut:
    """A square without colours and without a label (DeVries and Taylor 2017)."""

    def __init__(self, side_px: int = 16):
        self.side_px = side_px

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        top, left = (int(rng.integers(side)) for side in label.shape)
        hole = np.s_[top : top + self.side_px, left : left + self.side_px]
        image[hole] = 128
        label[hole] = VOID
        return image, label
