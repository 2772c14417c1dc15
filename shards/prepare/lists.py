"""Lists of a split's images: an id, a file name, or an image and its mask a line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError
from shards.prepare.pairing import MASK_SUFFIXES, check_listed_once

# not str.split and str.splitlines: names have other blanks in them (macOS writes U+202F)
LINE_ENDS = re.compile(r"\r\n|\r|\n")
GAPS = re.compile(r"[ \t]*[,;][ \t]*|[ \t]+")
BLANKS = " \t"


@dataclass(frozen=True)
class Entry:
    """An image that a list names; mask: the id of the mask that it names with it, if any."""

    image: str
    mask: str | None = None


class Names:
    """Ids, found by the ways to write them: as file names, as paths from anywhere, in another
    Unicode normal form.

    suffix: what file names have after the id. folder: where the files lie.
    """

    def __init__(self, ids: Iterable[str], suffix: str = "", folder: str = ""):
        self._suffix, self.folder = suffix, folder.rpartition("/")[2]
        self._ids = set(ids)
        self._by_form = {normal_form(id_): id_ for id_ in sorted(self._ids)}
        self.respelt: set[str] = set()  # found by their normal form only

    def find(self, text: str, *, anywhere: bool = True) -> str | None:
        """The id that a text means; None where there is none.

        anywhere: also without the folders in front, since lists name paths of other machines.
        """
        parts = text.replace("\\", "/").split("/") if text not in self._ids else [text]
        for start in range(len(parts) if anywhere else 1):
            tail = "/".join(parts[start:])
            for form in self._forms(tail):
                if form in self._ids:
                    return form
                found = self._by_form.get(normal_form(form))
                if found is not None:
                    self.respelt.add(found)
                    return found
        return None

    def lost(self, text: str) -> str:
        """The id that a text would mean if its file were there, which it is not.

        Without the folder that the files lie in, or a message would have it twice.
        """
        name = without_extension(text.replace("\\", "/"))
        name = f"/{name}".rpartition(f"/{self.folder}/")[2] if self.folder else name
        return name.removeprefix("/").removesuffix(self._suffix)

    def _forms(self, tail: str) -> Iterator[str]:
        for form in (tail, without_extension(tail)):
            yield form
            yield form.removesuffix(self._suffix)


def normal_form(text: str) -> str:
    """NFC: an "e" and an accent as the one letter that other systems write."""
    return unicodedata.normalize("NFC", text)


def without_extension(name: str) -> str:
    """The name without the end of an image's or mask's file name, if it has one."""
    for suffix in MASK_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def read_lines(path: Path, names: Names | None = None) -> list[str]:
    """The lines of a list that hold something, blanks around them left out.

    A line that begins with # is a comment, unless it is one of the names. Raises InputError for an
    empty or unreadable list.
    """
    try:
        # utf-8-sig: Windows' editors begin a file with a byte-order mark
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        # strerror: an OSError's own text ends with the path once more
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{path}: {why}", "a list with an id a line", "put it there, or name another"
        ) from None
    lines = [line.strip(BLANKS) for line in LINE_ENDS.split(text)]
    lines = [line for line in lines if line and not _is_comment(line, names)]
    if not lines:
        raise InputError(f"{path} is empty", "an id a line", "choose another list")
    return lines


def _is_comment(line: str, names: Names | None) -> bool:
    is_name = names is not None and names.find(line, anywhere=False) is not None
    return line.startswith("#") and not is_name


def entries_of(path: Path, images: Names, masks: Names | None = None) -> list[Entry]:
    """What the lines of a list name, in order: the ids of `images`, and of `masks` where a line
    names an image and its mask.

    A line that is no id is two columns, an image and a mask (UniMatch, mmsegmentation), or else
    several ids; a mask alone stands for its image; see `read_lines` for comments. What is not found
    is what `Names.lost` makes of it. Raises InputError for an empty or unreadable list.
    """
    entries = []
    for line in read_lines(path, images):
        entries += _entries(line, images, images if masks is None else masks)
    return entries


def ids_in_list(path: Path, ids: Iterable[str] = ()) -> list[str]:
    """The ids that a list names, for data whose masks go by the same ids; see `entries_of`."""
    return [entry.image for entry in entries_of(path, Names(ids))]


def listed_splits(ids: Iterable[str], train_list: str, val_list: str) -> dict[str, list[str]]:
    """{"train": ids, "val": ids} of lists with an id a line: without val_list none validates, and
    without train_list all others train.

    Raises InputError for an empty or unreadable list, an id in both or twice.
    """
    ids = sorted(ids)
    # ids of images or labels: one without the other becomes a task that says so
    splits = {"train": ids_in_list(Path(train_list), ids)} if train_list else {"train": ids}
    if val_list:
        splits["val"] = ids_in_list(Path(val_list), ids)
        if not train_list:
            left_out = {*splits["val"]}
            splits["train"] = [id_ for id_ in ids if id_ not in left_out]
    check_listed_once(splits)
    return splits


def _entries(line: str, images: Names, masks: Names) -> list[Entry]:
    whole = _found(line, images, masks, anywhere=False)
    # at each gap, since the names on both sides may have blanks
    columns = [(line[: gap.start()], line[gap.end() :]) for gap in GAPS.finditer(line)]
    for left, right in columns if whole is None else ():
        pair = _pair(left, right, images, masks)
        if pair is not None:
            return [pair]
    # of "images/a.jpg masks/b.png" the last part alone would be found, too
    if whole is None and all(without_extension(left) == left for left, _ in columns):
        whole = _found(line, images, masks)
    if whole is not None:
        return [Entry(whole)]
    words = GAPS.split(line)
    if any(_found(word, images, masks) is not None for word in words):
        return [Entry(_found(word, images, masks) or images.lost(word)) for word in words]
    # none of it is known: two files, or one name with blanks in it
    if len(words) == 2 and all(without_extension(word) != word for word in words):
        return [Entry(images.lost(words[0]))]
    return [Entry(images.lost(line))]


def _found(text: str, images: Names, masks: Names, *, anywhere: bool = True) -> str | None:
    """The id of an image, or of the mask that a text names, where that is an image's, too."""
    found = images.find(text, anywhere=anywhere)
    mask = masks.find(text, anywhere=anywhere) if found is None else None
    return found if mask is None else images.find(mask, anywhere=False)


def _pair(left: str, right: str, images: Names, masks: Names) -> Entry | None:
    image, mask = images.find(left), masks.find(right)
    if image is None:
        return None
    if mask is None:
        # a mask that is not there is told as missing; without an extension it may be another id
        other = (
            without_extension(right) == right
            or GAPS.search(right)
            or images.find(right) is not None
        )
        return None if other else Entry(image, masks.lost(right))
    # images and masks go by the same ids most often: "a b" are two images, and "a masks/b.png" a
    # mask of another name
    folders = right.replace("\\", "/").split("/")[:-1]
    paired = mask == image or images.find(right) is None
    paired |= masks.folder in folders and masks.folder != images.folder
    return Entry(image, mask) if paired else None
