"""The generated scenes: the same everywhere, laid out by rule, not to be had by colour alone."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from shards.errors import InputError
from shards.prepare import toy
from shards.sample import IGNORE_INDEX, STANFORD, Sample, check_sample, decode_image, image_size
from shards.synthetic import VOID_SHARE, render_scene, scene_layout

SKY, TREE, ROAD, GRASS, WATER, BUILDING, MOUNTAIN, FOREGROUND = range(STANFORD.num_classes)
SIZE = (120, 160)
# crc32 of labels and images of six scenes: equal for OpenCV 4.11 to 5.0, NumPy 1.26 to 2.4, with
# AVX or not
CHECKSUMS = (2458799535, 3661457059)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [render_scene(5, index, SIZE) for index in range(80)]


@pytest.fixture(scope="module")
def toy_set() -> list[Sample]:
    return made(num_train=150, num_val=30)


def made(**options: int) -> list[Sample]:
    return [task.run() for task in toy.samples(**options).tasks]


def label_of(sample: Sample) -> np.ndarray:
    assert sample.label is not None
    return sample.label


def checksums() -> tuple[int, int]:
    labels = images = 0
    for index in range(6):
        image, label = render_scene(3, index, (97 + index, 141 - index))
        labels, images = zlib.crc32(label.tobytes(), labels), zlib.crc32(image.tobytes(), images)
    return labels, images


def test_scene_is_the_same_on_every_machine_and_in_every_process():
    code = "from tests.test_synthetic import checksums; print(*checksums())"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert tuple(map(int, output.split())) == checksums() == CHECKSUMS


def test_scene_depends_on_seed_and_index_and_on_nothing_before_it():
    first, _ = render_scene(1, 2, SIZE)
    others = [render_scene(2, 2, SIZE)[0], render_scene(1, 3, SIZE)[0], render_scene(2, 1, SIZE)[0]]
    assert all((first != other).mean() > 0.5 for other in others)
    assert np.array_equal(first, render_scene(1, 2, SIZE)[0])


@pytest.mark.parametrize("size", [(32, 32), (33, 250), (211, 47), (320, 480)])
def test_scene_has_the_size_asked_for_and_labels_in_range(size: tuple[int, int]):
    for index in range(6):
        image, label = render_scene(9, index, size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8
        assert label.shape == size and label.dtype == np.uint8
        assert set(np.unique(label)) <= {*range(STANFORD.num_classes), IGNORE_INDEX}
        assert image.std() > 8


def test_sky_and_mountains_end_at_the_horizon_where_the_ground_begins(scenes):
    for index, (_, label) in enumerate(scenes):
        horizon = scene_layout(5, index, SIZE).camera.horizon_px
        assert not np.isin(label[horizon:], (SKY, MOUNTAIN)).any()
        assert not np.isin(label[:horizon], (ROAD, GRASS, WATER)).any()


def test_sky_is_above_the_mountains_in_every_column(scenes):
    for _, label in scenes:
        sky = np.where(label == SKY, np.arange(SIZE[0])[:, None], -1).max(axis=0)
        mountain = np.where(label == MOUNTAIN, np.arange(SIZE[0])[:, None], SIZE[0]).min(axis=0)
        assert (sky < mountain).all()


def test_classes_of_a_scene_follow_its_layout(scenes):
    for index, (_, label) in enumerate(scenes):
        layout = scene_layout(5, index, SIZE)
        assert layout.has_water or not (label == WATER).any()
        assert layout.has_road or not (label == ROAD).any()
        assert layout.has_mountains or not (label == MOUNTAIN).any()


def test_streets_narrow_towards_the_vanishing_point(scenes):
    streets = 0
    for index, (_, label) in enumerate(scenes):
        layout = scene_layout(5, index, SIZE)
        if layout.place == "street":
            rows = np.linspace(layout.camera.horizon_px, SIZE[0] - 1, 5).astype(int)
            widths = (label == ROAD).sum(axis=1)
            assert widths[rows[0] : rows[1]].mean() < 0.75 * widths[rows[1] :].max()
            columns = np.nonzero(label[rows[0] : rows[0] + 8] == ROAD)[1]
            if columns.size:  # what little is seen of it there lies at the vanishing point
                assert abs(np.median(columns) - layout.camera.vanishing_px) < 0.15 * SIZE[1]
            streets += 1
    assert streets > 10


def test_things_shrink_with_their_distance():
    camera = scene_layout(5, 0, SIZE).camera
    heights = [camera.row(depth) - camera.row(depth, up_m=1.7) for depth in (5.0, 10.0, 40.0)]
    assert heights == pytest.approx([heights[0], heights[0] / 2, heights[0] / 8])
    assert camera.depth(camera.row(12.5)) == pytest.approx(12.5)


def test_void_has_its_share_in_specks_and_on_borders(scenes):
    kernel = range(-1, 2)
    on_border, total = 0, 0
    for _, label in scenes:
        void = label == IGNORE_INDEX
        assert VOID_SHARE[0] * 0.98 <= void.mean() <= VOID_SHARE[1] * 1.1
        rows, columns = np.nonzero(void[2:-2, 2:-2])
        # a border's pixel has two classes within two pixels; a speck inside one surface has one
        near = np.stack(
            [label[rows + 2 + 2 * i, columns + 2 + 2 * j] for i in kernel for j in kernel]
        )
        known = np.where(near == IGNORE_INDEX, near.min(axis=0), near)
        on_border += int(np.count_nonzero(known.max(axis=0) != known.min(axis=0)))
        total += len(rows)
    assert 0.5 < on_border / total < 0.95


def test_borders_of_the_label_are_edges_of_the_picture(scenes):
    """Across a border of classes the picture changes more than inside them.

    Label and pixels are aligned.
    """
    ratios = []
    for image, label in scenes:
        step = np.abs(np.diff(image.astype(np.int16), axis=1)).sum(axis=2)
        known = (label[:, 1:] != IGNORE_INDEX) & (label[:, :-1] != IGNORE_INDEX)
        border = known & (label[:, 1:] != label[:, :-1])
        ratios.append(
            [
                step[border].mean(),
                step[known & ~border].mean(),
                np.roll(step, 4, axis=1)[border].mean(),
            ]
        )
    across, inside, shifted = np.mean(ratios, axis=0)
    assert across > 3 * inside
    assert across > 2 * shifted


def test_every_class_is_common(toy_set):
    labels = [
        np.bincount(label.ravel(), minlength=256)[: STANFORD.num_classes] / label.size
        for label in map(label_of, toy_set)
    ]
    assert np.mean(labels, axis=0).min() > 0.02
    assert (np.array(labels) > 0.005).mean(axis=0).min() > 0.25
    assert np.mean(labels, axis=0).max() < 0.35


def test_colour_alone_does_not_solve_it(toy_set):
    train, val = ([s for s in toy_set if s.split == split] for split in ("train", "val"))
    score = histogram_miou(train, val)
    assert 0.15 < score < 0.40


def test_toy_samples_are_valid_and_named_by_split():
    classes, listed = (
        toy.samples(num_train=1, num_val=1).classes,
        made(num_train=33, num_val=4, seed=2),
    )
    assert classes == STANFORD and len(listed) == 37
    assert [s.key for s in listed[:2]] == ["train-00000", "train-00001"] and listed[
        33
    ].key == "val-00000"
    assert {s.split for s in listed[:33]} == {"train"} and {s.split for s in listed[33:]} == {"val"}
    assert len({s.source_id for s in listed}) == 37 and listed[1].source_id == "toy seed=2 index=1"
    assert len({image_size(s.image) for s in listed[:33]}) == 30
    for sample in listed:
        check_sample(sample, classes.num_classes)


def test_smaller_toy_set_begins_the_larger_one():
    small, large = ({s.key: s for s in made(num_train=n, num_val=2)} for n in (2, 5))
    assert all(
        s.image == large[key].image and np.array_equal(label_of(s), label_of(large[key]))
        for key, s in small.items()
    )


def test_scenes_like_stanford_are_larger_and_have_about_the_shares_of_its_training_labels() -> None:
    listed = [task.run() for task in toy.samples(num_train=60, num_val=1, like="stanford").tasks]
    pixels = np.zeros(STANFORD.num_classes)
    for sample in listed[:60]:
        label = label_of(sample)
        pixels += np.bincount(label[label != IGNORE_INDEX], minlength=STANFORD.num_classes)
    shares = pixels / pixels.sum()
    # of 572 photographs; trees and sky are not asked for, as places do not decide them
    known = {ROAD: 0.222, GRASS: 0.069, WATER: 0.040, BUILDING: 0.237, MOUNTAIN: 0.014}
    for index, share in (known | {FOREGROUND: 0.131}).items():
        assert abs(shares[index] - share) < 0.07, STANFORD.names[index]
    assert image_size(listed[0].image) == (180, 240)
    assert listed[1].source_id == "toy seed=0 index=1 like=stanford"


def test_jpeg_keeps_the_picture():
    sample = made(num_train=1, num_val=1)[0]
    image, label = render_scene(0, 0, image_size(sample.image))
    assert np.array_equal(label, label_of(sample))
    assert np.abs(decode_image(sample.image).astype(int) - image).mean() < 4


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: render_scene(-1, 0, SIZE), "seed -1"),
        (lambda: render_scene(0, -3, SIZE), "index -3"),
        (lambda: render_scene(0, 0, (16, 160)), "16 x 160"),
        (lambda: toy.samples(num_train=0), "num_train 0"),
        (lambda: toy.samples(num_val=0), "num_val 0"),
        (lambda: toy.samples(seed=-1), "seed -1"),
        (lambda: toy.samples(like="voc"), "like=voc"),
    ],
)
def test_bad_input_is_named_at_once(call, named: str):
    with pytest.raises(InputError, match=named):
        call()


def histogram_miou(train: Iterable[Sample], val: Iterable[Sample]) -> float:
    """Mean IoU of the best guess from a pixel's colour alone.

    The class most frequent in its cell of 32^3.
    """
    counts = np.zeros((2**15, STANFORD.num_classes), np.int64)
    for cells, labels in map(_colours, train):
        np.add.at(counts, (cells, labels), 1)
    guess = counts.argmax(axis=1)
    confusion = np.zeros((STANFORD.num_classes,) * 2, np.int64)
    for cells, labels in map(_colours, val):
        np.add.at(confusion, (labels, guess[cells]), 1)
    hits = np.diag(confusion)
    return float((hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean())


def _colours(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    red, green, blue = np.moveaxis(decode_image(sample.image).astype(np.int64) >> 3, 2, 0)
    label = label_of(sample)
    known = label != IGNORE_INDEX
    return (red << 10 | green << 5 | blue)[known], label[known]
