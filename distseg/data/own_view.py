"""Code of the user's own that changes training views."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from shards import user_code
from shards.errors import InputError
from shards.sample import IGNORE_INDEX

KEY, OPTIONS = "data.view", "data.view_options"
NUM_TRIES = 16
FORM = "(image, label, rng) -> (image, label)"
# image (H, W, 3) uint8 RGB, label (H, W) uint8, rng -> the same two
View = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


class OwnView:
    """A function of the user's own, or an object of a class of his, that gets each view last.

    It is called with image (H, W, 3) uint8 RGB, label (H, W) uint8, 255 = void, and the position's
    own random generator, and returns image and label of the same shapes and types. All that it
    draws must come from that generator: then it gives the same pixels on any number of ranks and
    workers, and after a restart. Several threads may be in it at a time. options: further keyword
    arguments of the function, or those of the class. In another process it is imported anew.
    """

    def __init__(self, reference: str, options: dict[str, Any], num_classes: int):
        self._arguments = (reference, options, num_classes)
        self._said, self._num_classes = f"{KEY}={reference}", num_classes
        self._code = user_code.load(reference, KEY)
        self._view: View
        if inspect.isclass(self._code.value):
            self._view = user_code.call(self._code, KEY, options, OPTIONS)
            if not callable(self._view):
                raise self._refused("a class without __call__")
        else:
            given = tuple(user_code.parameters(self._code.value))[:3]
            user_code.check_options(self._code, options, OPTIONS, given)
            self._view = partial(self._code.value, **options)

    def __reduce__(self) -> tuple[type[OwnView], tuple[str, dict[str, Any], int]]:
        # code from a file cannot be pickled; the other process reads the file itself
        return OwnView, self._arguments

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> None:
        """Change a view in place: image (H, W, 3) uint8, label (H, W) uint8.

        Raises InputError for an answer of another form, and for classes that there are not.
        """
        answer = self._view(image, label, rng)
        # at every view and not the first alone: what a function answers may depend on what it draws
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise self._refused(f"answers with a {type(answer).__name__}")
        for name, given, new in zip(("image", "label"), (image, label), answer, strict=True):
            if not isinstance(new, np.ndarray):
                raise self._refused(f"gives a {type(new).__name__} as {name}")
            if new.shape != given.shape or new.dtype != np.uint8:
                got = f"gives {name} {new.shape} {new.dtype} for {given.shape} uint8"
                raise self._refused(got)
        # copied, as the outputs are parts of a batch, and the answer may be an array that it keeps
        image[...], label[...] = answer
        # 255 + 1 wraps to 0, so one maximum finds any other index that is too large
        highest = int((label + np.uint8(1)).max()) - 1
        if highest >= self._num_classes:
            needed = f"0 to {self._num_classes - 1}, or {IGNORE_INDEX} for void"
            raise InputError(f"{self._said} gives class {highest}", needed, "correct its label")

    def check(self, crop_px: int) -> None:
        """Try it on one view, again and again. Raises InputError for what goes wrong in it, or
        differs.
        """
        results = []
        # a generator of its own (random, np.random) shows only in a difference; a coin that it
        # tosses for a flip shows the same side in all of them once in 2^15
        for _ in range(NUM_TRIES):
            rng = np.random.default_rng(0)
            image = rng.integers(0, 256, (crop_px, crop_px, 3), dtype=np.uint8)
            label = rng.integers(0, self._num_classes, (crop_px, crop_px), dtype=np.uint8)
            # void too, which code for whole labels often forgets
            label[: crop_px // 8] = IGNORE_INDEX
            try:
                self(image, label, rng)
            except InputError:
                raise
            except BaseException as error:
                if not user_code.is_own(error):
                    raise
                # any error in it is its author's to correct, so it names his line and not ours
                raise self._refused(user_code.told(error, self._code.path)) from error
            results.append((image, label))
        images, labels = zip(*results, strict=True)
        if not (_all_equal(images) and _all_equal(labels)):
            got = f"{self._said}: views of one image, with the same rng, differ"
            needed = "all randomness from rng, or ranks and restarts would see other pixels"
            raise InputError(got, needed, "draw from the generator that it is given")

    def _refused(self, got: str) -> InputError:
        needed = f"{FORM}, (H, W, 3) and (H, W) uint8 as given"
        return InputError(f"{self._said}: {got}", needed, f"correct {self._code.name}")


def _all_equal(arrays: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(arrays[0], other) for other in arrays[1:])
