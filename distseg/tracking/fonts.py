"""Letters for names in any script: DejaVu Sans has most of Europe's, for the rest this machine's
fonts are asked.
"""

from __future__ import annotations

import functools
import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from shards.sample import ClassSet

_log = logging.getLogger(__name__)
_told: set[frozenset[str]] = set()  # one process draws many pictures of the same classes


@dataclass(frozen=True)
class Fonts:
    """files: DejaVu Sans first. others: the place in `files` of what writes a letter that it has
    not. lacking: letters that none has.
    """

    files: tuple[Path, ...]
    others: Mapping[str, int]
    lacking: frozenset[str]


def fonts_for(texts: Iterable[str]) -> Fonts:
    """What writes these texts: DejaVu Sans, then as few fonts of this machine as have the rest."""
    return _fonts_for(frozenset("".join(texts)))


@functools.cache
def _fonts_for(letters: frozenset[str]) -> Fonts:
    # comes with matplotlib: the same letters on every machine, Greek and Cyrillic ones too
    files = [Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"]
    # marks that join letters, and blanks, have no glyph to miss
    seen = {one for one in letters if unicodedata.category(one)[0] not in "CZ"}
    lacking = seen - _in(files[0], seen)
    candidates = system_fonts() if lacking else ()
    others: dict[str, int] = {}
    while lacking:
        # the first of the best: system_fonts has plain upright ones before others
        best = max(candidates, key=lambda path: len(_in(path, lacking)), default=None)
        found = set() if best is None else _in(best, lacking)
        if best is None or not found:
            break
        others |= dict.fromkeys(found, len(files))
        files.append(best)
        lacking -= found
    return Fonts(tuple(files), others, frozenset(lacking))


@functools.cache
def system_fonts() -> tuple[Path, ...]:
    """This machine's outline fonts; regular ones of sans-serif families first."""
    # looked for anew: matplotlib's own list is from when it was first imported by this user
    paths = [Path(path) for path in font_manager.findSystemFonts()]
    known = {path: font for path in paths if (font := _opened(path)) is not None and font.scalable}

    def order(path: Path) -> tuple[bool, bool, str]:
        font = known[path]
        is_special = any(word in font.family_name for word in ("Serif", "Mono", "Ming", "Song"))
        return font.style_name not in ("Regular", "Book", "Normal"), is_special, str(path)

    return tuple(sorted(known, key=order))


def _opened(path: Path) -> FT2Font | None:
    try:
        return FT2Font(str(path))
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # damaged, or a format that FreeType was built without
        return None


def _in(path: Path, letters: Iterable[str]) -> set[str]:
    """Those of the letters that a font has."""
    font = _opened(path)
    return set() if font is None else {one for one in letters if font.get_char_index(ord(one))}


def drawable(names: Sequence[str], suffix: str = ".png") -> tuple[str, ...]:
    """Names of classes as a picture in such a file writes them: "class 3" for one that no font can.

    That is told once. SVG keeps its texts, as what shows it has fonts of its own.
    """
    lacking = fonts_for(names).lacking
    if not lacking or suffix == ".svg":
        return tuple(names)
    shown = tuple(
        f"class {index}" if lacking & {*name} else name for index, name in enumerate(names)
    )
    if lacking not in _told:
        _told.add(lacking)
        changed = [pair for pair in zip(names, shown, strict=True) if pair[0] != pair[1]]
        _log.warning(
            "note: no font on this machine can write %s: pictures say %s; a font such as Noto Sans "
            "CJK (Debian's fonts-noto-cjk) helps, and the report has the names",
            *(", ".join(words) for words in zip(*changed, strict=True)),
        )
    return shown


def drawable_classes(classes: ClassSet, suffix: str = ".png") -> ClassSet:
    """The classes under the names that `drawable` gives."""
    names = drawable(classes.names, suffix)
    # names are unique in a set; one that is called so already keeps what it is called
    names = tuple(
        f"{new} (no font)" if new != old and new in classes.names else new
        for old, new in zip(classes.names, names, strict=True)
    )
    return replace(classes, names=names)


@contextmanager
def lettered(figure: Figure, suffix: str) -> Iterator[None]:
    """A figure to be saved within, whose texts have the fonts that they need.

    A letter that no font has is a question mark, and not a box; in SVG it stays.
    """
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    fonts = fonts_for(text.get_text() for text in texts)
    extra = [_family(path) for path in fonts.files[1:]]
    for text in texts:
        # others stay as they are: pictures of names that need none of this keep their bytes
        if extra:
            text.set_fontfamily([*text.get_fontfamily(), *extra])
        if fonts.lacking and suffix != ".svg":
            text.set_text("".join("?" if one in fonts.lacking else one for one in text.get_text()))
    with warnings.catch_warnings():
        if fonts.lacking:
            # of letters that an SVG keeps: what shows it has fonts of its own
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        yield


@functools.cache
def _family(path: Path) -> str:
    font_manager.fontManager.addfont(str(path))
    return FT2Font(str(path)).family_name
