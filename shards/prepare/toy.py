"""The toy set: generated outdoor scenes, for a first run in minutes and for tests; no input."""

from __future__ import annotations

import simplejpeg

from shards.errors import InputError
from shards.prepare.dataset import DataSet, Task
from shards.sample import STANFORD, Sample
from shards.synthetic import render_scene
from shards.synthetic.layout import PLACES, TOWN_PLACES

JPEG_QUALITY = 92
VAL_START = 2**32  # index of the first validation scene: more training scenes never run into it
# 30 sizes (height, width), landscape and portrait, 120 x 160 to 224 x 168; none a multiple of 32
# both ways
LANDSCAPE = (
    *(
        (120, 160),
        (123, 164),
        (126, 168),
        (129, 172),
        (132, 176),
        (135, 180),
        (138, 184),
        (141, 188),
    ),
    *(
        (144, 194),
        (147, 196),
        (150, 200),
        (153, 204),
        (156, 208),
        (159, 212),
        (162, 216),
        (165, 220),
    ),
    *((168, 224), (120, 180), (132, 198), (144, 216), (150, 150)),
)
PORTRAIT = (
    *(
        (160, 120),
        (168, 126),
        (176, 132),
        (184, 138),
        (190, 143),
        (200, 150),
        (208, 156),
        (216, 162),
    ),
    (224, 168),
)
SIZES = (*LANDSCAPE, *PORTRAIT)
# as large as photographs of Stanford Background, most of 240 x 320
LARGER_SIZES = tuple((height * 3 // 2, width * 3 // 2) for height, width in SIZES)
# by `like`: sizes, and how often each place is drawn
KINDS = {"": (SIZES, PLACES), "stanford": (LARGER_SIZES, TOWN_PLACES)}


def samples(num_train: int = 400, num_val: int = 60, seed: int = 0, like: str = "") -> DataSet:
    """`num_train` training scenes, then `num_val` validation scenes.

    like: "stanford": as large as the photographs of Stanford Background, and with about the shares
    of classes of its training labels, which is all that is taken from it.
    Keys are train-00000 and val-00000 onwards. A scene depends on seed, split and its number only,
    so that each split of a larger set begins with the smaller one. Labels and pixels are the same
    on every machine (see shards.synthetic); so are the JPEG files with one version of simplejpeg.
    Raises InputError unless both splits have a scene and seed is within 0..2^63-1.
    """
    if num_train < 1 or num_val < 1:
        got = f"num_train {num_train} and num_val {num_val}"
        raise InputError(got, "1 or more of each", "ask for more scenes")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed}", "a whole number from 0 to 2^63 - 1", "choose another")
    # before a scene is painted, as for the others
    if like not in KINDS:
        raise InputError(f"like={like}", "like=stanford", "correct it, or leave it out")
    splits = (("train", 0, num_train), ("val", VAL_START, num_val))
    tasks = []
    for split, start, count in splits:
        for number in range(count):
            key = f"{split}-{number:05d}"
            # numbers only: the scene is painted by the worker that stores it
            tasks.append(Task(key, split, _scene, (seed, start + number, number, like)))
    return DataSet(STANFORD, tasks)


def _scene(key: str, split: str, seed: int, index: int, number: int, like: str) -> Sample:
    sizes, places = KINDS[like]
    # (H, W, 3) uint8 and (H, W) uint8; the size goes by the number, so that a short set has all
    # sizes, too
    image, label = render_scene(seed, index, sizes[number % len(sizes)], places)
    jpeg = simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY)
    # its arguments as the source: the scene can be painted again from them
    kind = f" like={like}" if like else ""
    return Sample(key, jpeg, label, split, f"toy seed={seed} index={index}{kind}")
