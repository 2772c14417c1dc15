"""Generated scenes: reproducible, laid out by rule, every class common, none told by its colour alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from shards.errors import InputError
from shards.prepare import toy
from shards.sample import IGNORE_INDEX, STANFORD, Sample, decode_image, image_size
from shards.synthetic import render_scene, scene_layout
from shards.synthetic.canvas import FOREGROUND, GRASS, MOUNTAIN, ROAD, SKY, WATER, Brush, Canvas

NUM_TRAIN, NUM_VAL = 90, 30
SIZES = ((120, 160), (160, 120), (147, 196), (200, 150))
DIGEST = """
import hashlib
from shards.synthetic import render_scene
for index in (0, 1, 2**32):
    image, label = render_scene(3, index, (123, 164))
    print(hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest())
"""
Scene = tuple[int, np.ndarray, np.ndarray]  # row of the horizon, image, label


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Forty scenes of four sizes."""
    cases = [(5, index, SIZES[index % len(SIZES)]) for index in range(40)]
    return [(scene_layout(*case).camera.horizon_px, *render_scene(*case)) for case in cases]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """A small toy set, in order."""
    return list(toy.samples(NUM_TRAIN, NUM_VAL, seed=1)[1])


def label_of(sample: Sample) -> np.ndarray:
    assert sample.label is not None
    return sample.label


def mean_iou_of_histogram(samples: list[Sample], cells: int) -> float:
    """Mean IoU on the validation samples of each colour's (and image cell's) most frequent training class."""

    def keys(sample: Sample) -> np.ndarray:
        color = decode_image(sample.image).astype(np.int64) >> 4
        height, width = color.shape[:2]
        row, column = np.arange(height)[:, None] * cells // height, np.arange(width)[None] * cells // width
        return ((color[..., 0] * 16 + color[..., 1]) * 16 + color[..., 2]) * cells**2 + row * cells + column

    num_classes = STANFORD.num_classes
    votes = np.zeros((16**3 * cells**2, num_classes), np.int64)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for split in ("train", "val"):
        for sample in samples:
            if sample.split == split:
                known = label_of(sample) != IGNORE_INDEX
                key, truth = keys(sample)[known], label_of(sample)[known]
                if split == "train":
                    np.add.at(votes, (key, truth), 1)
                else:
                    np.add.at(confusion, (truth, votes[key].argmax(axis=1)), 1)
    hits = np.diag(confusion)
    return float((hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)).mean())


def test_a_scene_is_the_same_in_another_process() -> None:
    run = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    here = []
    for index in (2**32, 1, 0):  # another order than over there: no scene depends on an earlier one
        image, label = render_scene(3, index, (123, 164))
        here.append(hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest())
    assert run.stdout.split() == here[::-1]
    assert len(set(here)) == 3


def test_image_and_label_have_the_size_asked_for_and_known_values(scenes: list[Scene]) -> None:
    for index, (_, image, label) in enumerate(scenes):
        assert image.shape == (*SIZES[index % len(SIZES)], 3) and image.dtype == np.uint8
        assert label.shape == image.shape[:2] and label.dtype == np.uint8
        assert set(np.unique(label)) <= {*range(STANFORD.num_classes), IGNORE_INDEX}


def test_the_horizon_parts_sky_and_mountains_from_what_lies_on_the_ground(scenes: list[Scene]) -> None:
    for horizon, _, label in scenes:
        assert not np.isin(label[:horizon], (ROAD, GRASS, WATER)).any()
        assert not np.isin(label[horizon:], (SKY, MOUNTAIN)).any()


def test_no_sky_below_a_mountain(scenes: list[Scene]) -> None:
    for _, _, label in scenes:
        seen_mountain = np.logical_or.accumulate(label == MOUNTAIN, axis=0)
        assert not (seen_mountain & (label == SKY)).any()


def test_water_never_touches_the_sky(scenes: list[Scene]) -> None:
    for _, _, label in scenes:
        assert not ((label[1:] == WATER) & (label[:-1] == SKY)).any()


def test_lines_along_the_view_meet_at_the_vanishing_point_on_the_horizon() -> None:
    camera = scene_layout(0, 4, (150, 200)).camera
    widths = [camera.column(3, depth) - camera.column(-3, depth) for depth in (5, 50, 500)]
    assert widths[0] == pytest.approx(10 * widths[1]) and widths[1] == pytest.approx(10 * widths[2])
    for x_m in (-20, 0, 20):
        assert camera.point(x_m, 0, 1e9) == pytest.approx((camera.vanishing_px, camera.horizon_px), abs=1e-3)


def test_depth_is_the_inverse_of_row() -> None:
    camera = scene_layout(0, 4, (150, 200)).camera
    assert camera.depth(camera.row(37.5)) == pytest.approx(37.5)
    assert camera.row(camera.nearest_m) == pytest.approx(camera.size[0])


def test_one_fill_gives_pixels_and_label_together() -> None:
    layout = scene_layout(0, 4, (60, 80))
    canvas = Canvas(layout, np.random.default_rng(0))
    canvas.image[:] = -1
    canvas.fill([[(10, 20), (10, 40), (50, 40), (50, 20)]], FOREGROUND, Brush((200, 0, 0), (220, 0, 0)))
    inside = np.zeros((60, 80), bool)
    inside[20:40, 10:50] = True
    assert np.array_equal(canvas.label == FOREGROUND, inside)
    assert np.array_equal(canvas.image[..., 0] > 0, inside)


def test_void_takes_half_to_two_percent_of_every_scene(samples: list[Sample]) -> None:
    for sample in samples:
        assert 0.005 <= (label_of(sample) == IGNORE_INDEX).mean() <= 0.02


def test_every_class_is_common(samples: list[Sample]) -> None:
    known = [label_of(sample)[label_of(sample) != IGNORE_INDEX] for sample in samples]
    shares = np.stack([np.bincount(label, minlength=STANFORD.num_classes) / label.size for label in known])
    assert (shares.mean(axis=0) > 0.02).all(), shares.mean(axis=0)
    assert ((shares > 0.005).mean(axis=0) > 0.25).all(), (shares > 0.005).mean(axis=0)


def test_color_alone_does_not_tell_the_class_and_position_tells_more(samples: list[Sample]) -> None:
    color_alone = mean_iou_of_histogram(samples, cells=1)
    assert color_alone < 0.35
    assert color_alone < mean_iou_of_histogram(samples, cells=8) < 0.5


def test_splits_have_distinct_scenes_and_names(samples: list[Sample]) -> None:
    assert [sample.split for sample in samples] == ["train"] * NUM_TRAIN + ["val"] * NUM_VAL
    assert samples[12].key == "train-00012" and samples[NUM_TRAIN + 3].key == "val-00003"
    for distinct in ("key", "source_id", "image"):
        assert len({getattr(sample, distinct) for sample in samples}) == len(samples)
    assert all("seed=1" in sample.source_id for sample in samples)


def test_sizes_vary_and_fit_their_labels(samples: list[Sample]) -> None:
    sizes = [image_size(sample.image) for sample in samples]
    assert sizes == [label_of(sample).shape for sample in samples]
    assert len(set(sizes)) >= 25
    assert any(height > width for height, width in sizes) and any(height < width for height, width in sizes)
    assert all(min(size) >= 120 and max(size) <= 224 and (size[0] % 32 or size[1] % 32) for size in sizes)


def test_a_larger_set_begins_with_the_smaller(samples: list[Sample]) -> None:
    classes, smaller, total = toy.samples(2, 1, seed=1)
    assert classes == STANFORD and total == 3
    for one, other in zip(smaller, (samples[0], samples[1], samples[NUM_TRAIN]), strict=True):
        assert (one.key, one.image) == (other.key, other.image)
        assert np.array_equal(label_of(one), label_of(other))


@pytest.mark.parametrize("options", [(0, 1, 0), (1, 0, 0), (-3, 1, 0), (1, 1, -1)])
def test_impossible_sets_are_refused_before_any_scene_is_painted(options: tuple[int, int, int]) -> None:
    with pytest.raises(InputError):
        toy.samples(*options)


@pytest.mark.parametrize("scene", [(-1, 0, (120, 160)), (0, -1, (120, 160)), (0, 0, (20, 160))])
def test_impossible_scenes_are_refused(scene: tuple[int, int, tuple[int, int]]) -> None:
    with pytest.raises(InputError):
        render_scene(*scene)
