"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from shards.maps import write_maps
from shards.pack import pack
from shards.sample import IGNORE_INDEX, STANFORD, Sample

# height, width: mixed, some smaller and some larger than a crop of 48; the first eight train, the
# last four validate
TOY_SIZES = ((60, 80), (80, 60), (48, 48), (40, 120), (96, 72), (64, 64), (33, 47), (110, 90))
TOY_SIZES += ((60, 80), (75, 50), (48, 64), (90, 100))


def toy_samples() -> list[Sample]:
    """Twelve samples of random blobs in their classes' colours, some void; always the same."""
    samples = []
    for index, (height, width) in enumerate(TOY_SIZES):
        rng = np.random.default_rng(index)
        coarse = rng.normal(size=(4, 5, STANFORD.num_classes + 1)).astype(np.float32)
        fields = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        label = fields.argmax(2).astype(np.uint8)
        label[label == STANFORD.num_classes] = IGNORE_INDEX
        colors = np.zeros((256, 3), np.int16)
        colors[: STANFORD.num_classes] = STANFORD.palette
        noisy = colors[label] + rng.integers(-20, 21, (height, width, 3))
        image = simplejpeg.encode_jpeg(noisy.clip(0, 255).astype(np.uint8), quality=95)
        split = "train" if index < 8 else "val"
        samples.append(Sample(f"toy_{index:02d}", image, label, split, source_id=f"toy/{index}"))
    return samples


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="of tests marked gpu; auto: a GPU where there is one, else the CPU",
    )


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of packed shards.

    8 training and 4 validation samples of toy_samples(), three to a shard.
    """
    directory = tmp_path_factory.mktemp("toy")
    samples = toy_samples()
    write_maps(directory / "maps.h5", "toy blobs", STANFORD, samples, total=len(samples))
    pack(directory / "maps.h5", directory / "shards", samples_per_shard=3)
    return directory / "shards"
