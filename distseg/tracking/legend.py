"""The legend below a picture: a strip of pixels with the names of the classes that it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distseg.tracking.fonts import drawable, fonts_for
from shards.sample import ClassSet

# of a letter, in pixels: read at the size of a small picture, and after a large one was shrunk to
# the width of a screen or of a page
_MIN_SIZE_PX, _SIZE_SHARE = 12, 1 / 64
_MAX_LETTERS = 32  # of a name: a longer one ends in three dots
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def with_legend(picture: np.ndarray, classes: ClassSet, shown: Sequence[int]) -> np.ndarray:
    """The picture (H, W, 3) uint8 RGB with a white strip below it that names classes.

    shown: their indices. The picture's pixels stay where they are; one that is narrower than a name
    gets a white margin at its right.
    """
    height, width = picture.shape[:2]
    strip = legend_strip(classes, shown, width, max(height, width))
    whole = np.full((height + len(strip), strip.shape[1], 3), _PAPER, np.uint8)
    whole[:height, :width] = picture
    whole[height:] = strip
    return whole


def legend_strip(
    classes: ClassSet, shown: Sequence[int], width: int, longer_side: int
) -> np.ndarray:
    """Boxes in the classes' colours and their names, (h, w, 3) uint8 RGB; w >= width.

    longer_side: of the picture in pixels, by which the letters are as large as they have to be.
    """
    size = max(_MIN_SIZE_PX, round(_SIZE_SHARE * longer_side))
    names = [_short(name) for name in drawable(classes.names)]
    letters = _Letters(size, names)
    # columns of one width: the eye finds a name sooner than in lines that flow
    entry = math.ceil(max(letters.width(names[index]) for index in shown)) + 3 * size
    per_row = max(1, min(len(shown), (width - size // 2) // entry))
    num_rows, pitch = math.ceil(len(shown) / per_row), round(1.5 * size)
    # the picture's width, or that of one name where it is narrower
    area = max(width, entry + size // 2), num_rows * pitch + size // 2
    strip = Image.new("RGB", area, _PAPER)
    draw = ImageDraw.Draw(strip)
    for place, index in enumerate(shown):
        # down the columns, as lists are read
        column, row = divmod(place, num_rows)
        x, y = size // 2 + column * entry, size // 4 + row * pitch + pitch // 2
        box = (x, y - size // 2, x + round(1.3 * size), y + size // 2)
        draw.rectangle(box, tuple(classes.palette[index]), outline=_INK)
        letters.draw(draw, (x + round(1.8 * size), y), names[index])
    return np.asarray(strip)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_LETTERS else name[: _MAX_LETTERS - 1] + "…"


class _Letters:
    """Text of one size, each letter from the first font that has it."""

    def __init__(self, size: int, texts: Iterable[str]):
        # the plain engine: another one, where it is installed, moves letters by a pixel
        engine = ImageFont.Layout.BASIC
        found = fonts_for(texts)
        self._others = found.others
        self._fonts = [
            ImageFont.truetype(str(path), size, layout_engine=engine) for path in found.files
        ]

    def width(self, text: str) -> float:
        """In pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
        """Write text; place: (x, y) of its left end, in the middle of its height."""
        x, y = place
        for font, run in self._runs(text):
            draw.text((x, y), run, _INK, font, anchor="lm")
            x += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """The text in pieces of one font."""
        for place, run in groupby(text, lambda letter: self._others.get(letter, 0)):
            yield self._fonts[place], "".join(run)
