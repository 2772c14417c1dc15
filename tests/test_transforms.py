"""The view against indexing and formulas."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.data.transforms import BLUR_MIN_PX, FILL_RGB, GRAY, MAX_TRIES, TrainView, color_matrix
from shards.errors import InputError

SIDES = st.integers(1, 70)


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 200, (height, width), dtype=np.uint8)


def apply(view, image, label, seed=0):
    rng = np.random.default_rng(seed)
    # into the middle of larger arrays: nothing beside the output may be touched
    images = np.full((3, view.crop_px, view.crop_px, 3), 7, np.uint8)
    labels = np.full((3, view.crop_px, view.crop_px), 7, np.uint8)
    view(image, label, rng, images[1], labels[1])
    assert (images[::2] == 7).all() and (labels[::2] == 7).all()
    return images[1], labels[1]


class Chosen:
    """A generator of chosen draws: 0.5 but for those named by their place in a try's ten."""

    def __init__(self, **places):
        self._left = np.full((MAX_TRIES, 10), 0.5)
        for place, value in places.items():
            self._left[:, int(place[1:])] = value

    def random(self, shape):
        part, self._left = self._left[:, : shape[1]], self._left[:, shape[1] :]
        return part


def seen_with(view, image, label, **places):
    out = (
        np.empty((view.crop_px, view.crop_px, 3), np.uint8),
        np.empty((view.crop_px, view.crop_px), np.uint8),
    )
    view(image, label, Chosen(**places), *out)
    return out


def drawn(view, size, seed=0):
    """What the first draw of this seed stands for, by the documented rules: (first, seen, place,
    filled) for rows and columns, and whether it is mirrored.
    """
    scale, row, column, mirror = np.random.default_rng(seed).random((MAX_TRIES, 7))[0, :4]
    factor = np.exp(
        np.log(view.scale_min) + scale * (np.log(view.scale_max) - np.log(view.scale_min))
    )
    spans = []
    for side, u in zip(size, (row, column), strict=True):
        fits = side * factor < view.crop_px
        seen = side if fits else min(side, max(1, round(view.crop_px / factor)))
        filled = max(1, round(side * factor)) if fits else view.crop_px
        room = view.crop_px - filled
        spans.append((int(u * (side - seen + 1)), seen, room - int(u * (room + 1)), filled))
    return spans, view.horizontal_flip and mirror < 0.5


def nearest(source, spans, crop_px, outside, ties=(0, 0)):
    """Source pixel whose area holds the centre of each view pixel, in whole numbers; else
    `outside`. ties: 1 for the first instead of the second where a centre lies on the line between
    two, in rows, in columns.
    """
    view = np.full((crop_px, crop_px, *source.shape[2:]), outside, np.uint8)
    index, inside = [], []
    for (first, seen, place, filled), tie in zip(spans, ties, strict=True):
        i = np.arange(filled)
        index.append(first + np.maximum(((2 * i + 1) * seen - tie) // (2 * filled), 0))
        inside.append(slice(place, place + filled))
    view[tuple(inside)] = source[np.ix_(*index)]
    return view


def bilinear(source, spans):
    """The written part of a view in float64.

    Between the centres of the four nearest pixels that were cut out.
    """
    result = source.astype(np.float64)
    for axis, (first, seen, _, filled) in enumerate(spans):
        at = np.clip((np.arange(filled) + 0.5) * seen / filled - 0.5, 0, seen - 1) + first
        low = np.minimum(at.astype(int), first + max(seen - 2, 0))
        high = np.minimum(low + 1, first + seen - 1)
        weight = (at - low).reshape((-1,) + (1,) * (2 - axis))
        result = np.take(result, low, axis) * (1 - weight) + np.take(result, high, axis) * weight
    return result


def test_at_scale_one_and_full_size_it_is_the_identity():
    image, label = noise(64, 64)
    seen, seen_label = apply(TrainView(64, horizontal_flip=False), image, label)
    assert np.array_equal(seen, image) and np.array_equal(seen_label, label)


@given(height=SIDES, width=SIDES, seed=st.integers(0, 1000))
@settings(deadline=None)
def test_at_scale_one_it_only_moves_pixels(height, width, seed):
    """Image and label move together, bit for bit, also where the image is smaller than the crop."""
    image, label = noise(height, width)
    view = TrainView(40)
    seen, seen_label = apply(view, image, label, seed)
    spans, mirrored = drawn(view, label.shape, seed)
    turn = slice(None, None, -1 if mirrored else None)
    assert np.array_equal(seen, nearest(image, spans, 40, FILL_RGB)[:, turn])
    assert np.array_equal(seen_label, nearest(label, spans, 40, 255)[:, turn])


@given(height=SIDES, width=SIDES, seed=st.integers(0, 1000), wide=st.booleans())
@settings(deadline=None)
def test_label_equals_the_nearest_formula_at_any_scale(height, width, seed, wide):
    image, label = noise(height, width)
    view = TrainView(40, 0.25, 4.0) if wide else TrainView(40, 0.5, 1.5)
    _, seen_label = apply(view, image, label, seed)
    spans, mirrored = drawn(view, label.shape, seed)
    seen_label = seen_label[:, ::-1] if mirrored else seen_label
    either = [
        nearest(label, spans, 40, 255, (rows, columns)) for rows in (0, 1) for columns in (0, 1)
    ]
    assert np.any([seen_label == one for one in either], axis=0).all()


@given(height=st.integers(1, 120), width=st.integers(1, 120), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_image_equals_interpolating_what_was_cut_out(height, width, seed):
    """To one level of 255, by which the library's fixed-point weights may be off."""
    image, label = noise(height, width)
    view = TrainView(48, 0.5, 1.5)
    seen, _ = apply(view, image, label, seed)
    spans, mirrored = drawn(view, label.shape, seed)
    part = tuple(slice(place, place + filled) for _, _, place, filled in spans)
    seen = seen[:, ::-1] if mirrored else seen
    assert np.abs(seen[part] - bilinear(image, spans)).max() <= 1
    outside = np.ones((48, 48), bool)
    outside[part] = False
    assert (seen[outside] == FILL_RGB).all()


@given(height=SIDES, width=SIDES, seed=st.integers(0, 1000))
@settings(deadline=None)
def test_mirror_is_exact(height, width, seed):
    image, label = noise(height, width)
    plain = apply(TrainView(40, 0.5, 1.5, horizontal_flip=False), image, label, seed)
    chosen = apply(TrainView(40, 0.5, 1.5, horizontal_flip=True), image, label, seed)
    turn = slice(
        None, None, -1 if np.random.default_rng(seed).random((MAX_TRIES, 7))[0, 3] < 0.5 else None
    )
    for one, other in zip(plain, chosen, strict=True):
        assert np.array_equal(one[:, turn], other)


@given(height=SIDES, width=SIDES, seed=st.integers(0, 1000))
@settings(deadline=None)
def test_the_larger_holds_the_smaller(height, width, seed):
    """On each side either the view shows image only, or it shows the whole image."""
    view = TrainView(40, 0.5, 1.5)
    image, _ = noise(height, width)
    _, seen_label = apply(view, image, np.zeros((height, width), np.uint8), seed)
    spans, _ = drawn(view, (height, width), seed)
    shown = seen_label == 0
    assert [shown.any(1).sum(), shown.any(0).sum()] == [filled for *_, filled in spans]
    assert all(
        filled == 40 or seen == side
        for (_, seen, _, filled), side in zip(spans, (height, width), strict=True)
    )


@given(height=SIDES, width=SIDES, seed=st.integers(0, 1000), degrees=st.floats(1, 180))
@settings(deadline=None)
def test_a_turned_label_equals_its_formula(height, width, seed, degrees):
    """Every view pixel's centre, turned back about the view's middle in complex numbers, and the
    pixel it falls in.
    """
    _, label = noise(height, width)
    view = TrainView(40, 0.5, 1.5, horizontal_flip=False, rotate_degrees=degrees)
    _, seen_label = apply(view, np.zeros((height, width, 3), np.uint8), label, seed)
    rng = np.random.default_rng(seed)
    rng.random((MAX_TRIES, 7))
    turn = np.exp(1j * np.radians(degrees) * (2 * rng.random((MAX_TRIES, 3))[0, 0] - 1))
    spans, _ = drawn(view, (height, width), seed)
    grid = np.arange(40) + 0.5 - 20
    there = (grid[None, :] + 1j * grid[:, None]) * turn + 20 + 20j
    y, x = (
        first + (at - place) * seen / filled
        for (first, seen, place, filled), at in zip(spans, (there.imag, there.real), strict=True)
    )
    columns, rows = np.floor(x).astype(int), np.floor(y).astype(int)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    expected = np.full((40, 40), 255, np.uint8)
    expected[inside] = label[rows[inside], columns[inside]]
    if not inside.any():
        return  # drawn again
    tie = 2e-3  # the library rounds positions to 1/1024 of a pixel
    clear = (np.abs(x - np.round(x)) > tie) & (np.abs(y - np.round(y)) > tie)
    assert (seen_label == expected)[clear].all()


@pytest.mark.parametrize(("draw", "quarters"), [(0.0, -1), (1.0, 1)])
def test_a_quarter_turn_is_exact(draw, quarters):
    image, label = noise(64, 64)
    seen, seen_label = seen_with(
        TrainView(64, horizontal_flip=False, rotate_degrees=90), image, label, _7=draw
    )
    assert np.array_equal(seen_label, np.rot90(label, quarters))
    assert np.array_equal(seen, np.rot90(image, quarters))


def test_image_and_label_turn_together_and_the_fill_stays_as_it_is():
    """A label that is the image's red.

    They agree to the half pixel of the border, and beyond it the fill is whole.
    """
    label = np.tile(np.repeat(np.arange(8, dtype=np.uint8) * 30, 10), (60, 1))
    image = np.dstack([label, label, label])
    for seed in range(30):
        plain = TrainView(50, 0.7, 1.3, rotate_degrees=180)
        seen, seen_label = apply(plain, image, label, seed)
        inside = seen_label != 255
        # inside a stripe
        smooth = cv2.erode(seen_label, np.ones((3, 3))) == cv2.dilate(seen_label, np.ones((3, 3)))
        smooth[[0, -1]], smooth[:, [0, -1]] = False, False  # where the neighbours are not seen
        assert np.abs(seen[..., 0].astype(int) - seen_label)[inside & smooth].max() <= 1
        colorful = TrainView(50, 0.7, 1.3, True, 0.9, rotate_degrees=180, blur_probability=1.0)
        changed, same_label = apply(colorful, image, label, seed)
        assert np.array_equal(seen_label, same_label)
        assert (changed[~inside] == FILL_RGB).all() and (seen[~inside] == FILL_RGB).all()


@pytest.mark.parametrize("draw", [0.2, 1.0])
def test_blur_equals_a_gaussian_sum(draw):
    image, label = noise(40, 40)
    view = TrainView(40, horizontal_flip=False, blur_probability=0.5, blur_max_px=2.0)
    seen, seen_label = seen_with(view, image, label, _8=0.49, _9=draw)
    sigma = BLUR_MIN_PX + (2.0 - BLUR_MIN_PX) * draw
    kernel = np.exp(-0.5 * (np.arange(-8, 9) / sigma) ** 2)
    kernel /= kernel.sum()
    expected = image.astype(np.float64)
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, kernel, "same")
    middle = (slice(8, -8), slice(8, -8))
    # the library cuts its kernel at three sigma
    assert np.abs(seen[middle] - expected[middle]).max() <= 2
    assert np.array_equal(seen_label, label)
    assert np.array_equal(seen_with(view, image, label, _8=0.51, _9=draw)[0], image)


def test_every_position_and_both_mirrors_are_reached():
    """On a 6x5 image with one marked pixel and a crop of 4, counted over many draws."""
    label = np.arange(30, dtype=np.uint8).reshape(6, 5)
    image = np.zeros((6, 5, 3), np.uint8)
    views = [apply(TrainView(4), image, label, seed)[1] for seed in range(600)]
    corners = [(int(v.min()), bool(v[0, 0] > v[0, 1])) for v in views]
    counts = {corner: corners.count(corner) for corner in set(corners)}
    assert set(counts) == {
        (5 * r + c, m) for r in range(3) for c in range(2) for m in (False, True)
    }
    assert min(counts.values()) > 25  # 50 expected of each, standard deviation 6.8


def test_scale_is_log_uniform():
    view = TrainView(100, 0.5, 2.0)
    seen = [drawn(TrainView(200, 0.5, 2.0), (1000, 1000), seed)[0][0][1] for seed in range(2000)]
    assert np.mean(np.log2(200 / np.array(seen)) < 0) == pytest.approx(0.5, abs=0.05)
    # the view itself obeys: of a ramp of one class per 20 source pixels it shows those that were
    # cut out
    label = np.tile(np.repeat(np.arange(10, dtype=np.uint8), 20), (200, 1))
    for seed in range(20):
        _, shown = apply(
            TrainView(100, 0.5, 2.0, horizontal_flip=False),
            np.zeros((200, 200, 3), np.uint8),
            label,
            seed,
        )
        first, count, _, _ = drawn(view, label.shape, seed)[0][1]
        assert set(np.unique(shown)) - {255} == set(
            range(first // 20, (first + count - 1) // 20 + 1)
        )


def test_a_void_crop_is_drawn_again():
    """One labelled corner of 1/16 of the area: a single draw would miss it most of the time."""
    image, label = noise(160, 160)
    label[40:], label[:, 40:] = 255, 255
    views = [apply(TrainView(40), image, label, seed)[1] for seed in range(50)]
    assert sum((view != 255).any() for view in views) >= 25  # about 6 without
    # and it ends where nothing helps
    assert (apply(TrainView(40), image, np.full_like(label, 255))[1] == 255).all()


@pytest.mark.parametrize("void", [False, True])
def test_the_generator_advances_equally_for_all_options(void):
    image, label = noise(50, 50)
    label = np.full_like(label, 255) if void else label
    following = set()
    everything = TrainView(20, 2.0, 2.0, True, 1.0, rotate_degrees=40, blur_probability=0.5)
    for view in (TrainView(20), TrainView(90, 0.5, 1.5, False, 0.5), everything):
        rng = np.random.default_rng(0)
        view(
            image,
            label,
            rng,
            np.empty((view.crop_px,) * 2 + (3,), np.uint8),
            np.empty((view.crop_px,) * 2, np.uint8),
        )
        following.add(rng.random())
    assert len(following) == 1


def test_one_option_does_not_shift_the_others():
    """The label shows the geometry: colour and blur leave it alone, and mirroring only mirrors."""
    image, label = noise(60, 80)
    for seed in range(20):
        plain = apply(TrainView(40, 0.5, 1.5), image, label, seed)[1]
        recolored = TrainView(40, 0.5, 1.5, color_jitter=0.8, blur_probability=0.5)
        assert np.array_equal(plain, apply(recolored, image, label, seed)[1])
        still = apply(TrainView(40, 0.5, 1.5, horizontal_flip=False), image, label, seed)[1]
        assert np.array_equal(plain, still) or np.array_equal(plain, still[:, ::-1])


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_color_jitter_equals_three_float_operations(strength):
    image, label = noise(30, 30)
    for seed in range(10):
        seen, _ = apply(
            TrainView(30, horizontal_flip=False, color_jitter=strength), image, label, seed
        )
        draws = np.random.default_rng(seed).random((MAX_TRIES, 7))[0, 4:]
        brightness, contrast, saturation = 1 - strength + 2 * strength * draws
        rgb = image.astype(np.float64)
        gray = (rgb @ GRAY)[..., None]
        rgb = (gray + saturation * (rgb - gray)) * brightness
        pivot = np.dot(FILL_RGB, GRAY)
        rgb = np.clip(pivot + contrast * (rgb - pivot), 0, 255)
        assert np.abs(seen - rgb).max() <= 1.5


def test_color_jitter_off_and_neutral_change_nothing():
    image, label = noise(30, 30)
    seen, _ = apply(TrainView(30, horizontal_flip=False), image, label)
    assert np.array_equal(seen, image)
    assert np.array_equal(cv2.transform(image, color_matrix(1, 1, 1)), image)


def test_color_jitter_leaves_the_fill_alone():
    image, _ = noise(10, 10)
    seen, seen_label = apply(TrainView(40, color_jitter=1.0), image, np.zeros((10, 10), np.uint8))
    assert (seen[seen_label == 255] == FILL_RGB).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"crop_px": 0}, "crop_px"),
        ({"scale_min": 0.0}, "scale_min"),
        ({"scale_min": 2.0, "scale_max": 1.0}, "scale_min"),
        ({"scale_max": float("nan")}, "scale_max"),
        ({"color_jitter": 1.5}, "color_jitter"),
        ({"rotate_degrees": -1}, "rotate_degrees"),
        ({"blur_probability": 2}, "blur_probability"),
        ({"blur_max_px": float("nan")}, "blur_max_px"),
    ],
)
def test_bad_options(options, named):
    with pytest.raises(InputError, match=named):
        TrainView(**({"crop_px": 40} | options))
