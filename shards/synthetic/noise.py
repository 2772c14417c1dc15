"""Random fields and lines that come out the same, bit for bit, on every machine.

Only operations whose result is fixed are used: integers and uniform doubles of a NumPy generator,
single arithmetic operations, and OpenCV's INTER_LINEAR_EXACT on bytes (its others depend on the
processor).
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np


def fractal(
    rng: np.random.Generator, size: tuple[int, int], cell_px: tuple[float, float], octaves: int
) -> np.ndarray:
    """Smooth noise, (H, W) float32 in [0, 1], mean about 0.5.

    octaves: layers, each half as wide and half as strong as the one before; cell_px: height and
    width of the widest layer's cells.
    """
    height, width = size
    total = np.zeros(size, np.float32)
    for octave in range(octaves):
        # two grid points a side at least: INTER_LINEAR_EXACT has nothing to blend between with one
        rows = max(2, round(height / cell_px[0] * 2**octave) + 1)
        columns = max(2, round(width / cell_px[1] * 2**octave) + 1)
        # bytes: of floats OpenCV has no exact resize
        grid = rng.integers(0, 256, (rows, columns), np.uint8)
        layer = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
        # a power of two as weight: the product is exact, on every machine
        total += layer.astype(np.float32) * np.float32(0.5**octave)
    # 127.5 times the sum of the weights, 1 + 1/2 + 1/4 + ...
    mean = 127.5 * (2 - 0.5 ** (octaves - 1))
    # a sum of layers keeps to the middle: a gain of 1.7 uses the whole range again
    return ((total - np.float32(mean)) * np.float32(1.7 / (2 * mean)) + np.float32(0.5)).clip(0, 1)


def ridge(rng: np.random.Generator, levels: int, roughness: float) -> list[float]:
    """2**levels + 1 heights, about -1 to 1, by midpoint displacement.

    Roughness 0.3 (hills) to 0.7 (rock).
    """
    line = [rng.random() * 2 - 1, rng.random() * 2 - 1]
    strength = 0.6
    for _ in range(levels):
        middles = [(a + b) / 2 + (rng.random() * 2 - 1) * strength for a, b in pairwise(line)]
        finer = line + middles
        finer[::2], finer[1::2] = line, middles  # there is one middle less than points
        line = finer
        strength *= roughness
    return line


def on_ground(texture: np.ndarray, depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    """A (T, T) texture laid on the ground and seen in perspective: (rows, W) of the same dtype.

    depth: (rows, 1), across: (rows, W), where each pixel meets the ground, in texels. It repeats
    mirrored.
    """
    # an index into the texture, not a warp: the same pixels on every machine
    return texture[_mirrored(depth, len(texture)), _mirrored(across, len(texture))]


def _mirrored(position: np.ndarray, length: int) -> np.ndarray:
    # mirrored, since a plain repeat would show a seam
    index = position.astype(np.int64) % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)
