"""Which members of a tar are images, which are their masks, and which belong together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from shards.errors import InputError
from shards.image_files import SYSTEM_FILES, TOOL_FOLDERS
from shards.images import SUFFIXES
from shards.words import counted

# as they are found in the wild; "" first, as most tars have no folders. Ends of names, tried where
# nothing was said, the longer ones for masks before the plain one
_IMAGES = ("*.jpg", "*.image.png", "*.img.png", "*.input.png", "*_image.png", "*.png")
_MASKS = ("seg", "mask", "masks", "label", "labels", "gt", "target", "annotation", "labelIds")
_LABELS = (*(f"*{sep}{word}.png" for word in _MASKS for sep in "._-"), "*.png")
_MASK_FOLDERS = ("mask", "label", "annot", "seg", "gt", "truth", "target")
PICTURES = (*SUFFIXES, ".npy")  # by their names' ends, also those that cannot be used in place
MAX_FOLDERS = 8  # that are tried in pairs; a tar with more has its samples' folders there


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name without "./", the name as it stands there, first byte, bytes."""

    name: str
    stored: str
    offset: int
    size: int

    @property
    def is_hidden(self) -> bool:
        """Whether it is a copy or thumbnail of a file manager or archiver, as in folders."""
        *folders, name = self.name.split("/")
        if name.startswith(".") or name.lower() in SYSTEM_FILES:
            return True
        dotted = (folder.startswith(".") and folder not in (".", "..") for folder in folders)
        return any(dotted) or any(folder.lower() in TOOL_FOLDERS for folder in folders)


@dataclass(frozen=True)
class Patterns:
    """Names of images and of their masks; what "*" stands for is the sample's id in both.

    "" where that is to be found, or where there are no masks.
    """

    image: str = ""
    label: str = ""

    def sorted_out(self, members: Iterable[Member]) -> tuple[dict[str, Member], dict[str, Member]]:
        """(images, masks) by id, in order. Raises InputError for two of one id."""
        images: dict[str, Member] = {}
        labels: dict[str, Member] = {}
        for member in members:
            if member.is_hidden:
                continue
            id_, label_id = id_of(member.name, self.image), id_of(member.name, self.label)
            place = images
            # *.png takes 1.seg.png, too: the longer pattern knows better
            if label_id and (not id_ or len(self.label) > len(self.image)):
                place, id_ = labels, label_id
            if not id_:
                continue
            if id_ in place:
                got = f"{place[id_].name!r} and {member.name!r} in one tar"
                raise InputError(got, "one image and one mask for each id", "rename one of them")
            place[id_] = member
        return images, labels


def id_of(name: str, pattern: str) -> str:
    """What the "*" of a pattern stands for in a name; "" where it does not fit.

    .JPG and .jpeg are .jpg.
    """
    start, _, end = pattern.partition("*")
    lower = name.lower()
    if end == ".jpg" and lower.endswith(".jpeg"):
        end = ".jpeg"
    fits = pattern and name.startswith(start) and lower.endswith(end.lower())
    return name[len(start) : len(name) - len(end)] if fits else ""


def key_of(id_: str) -> str:
    """The key of a sample: its id with "_" for "." and "/", as `distseg prepare` has it."""
    return id_.replace("/", "_").replace(".", "_")


def chosen_patterns(members: Sequence[Member], said: Patterns) -> Patterns:
    """The patterns under which most images have a mask; what was said stays.

    Raises InputError for a pattern without "*", for no image at all, and where it stays open which
    of two folders has the masks.
    """
    for pattern in filter(None, (said.image, said.label)):
        if pattern.count("*") != 1:
            needed = "a name with one *, for the sample's id: *.jpg, masks/*.png"
            raise InputError(f"pattern {pattern!r}", needed, "correct --image or --label")
    names = [member.name for member in members if not member.is_hidden]
    ids = {pattern: _ids(names, pattern) for pattern in _candidates(names, said)}
    best, most = said, (0, 0, 0)
    for image in _wanted(said.image, ids, _IMAGES):
        for label in ("", *_wanted(said.label, ids, _LABELS)):
            if label == image:
                continue
            pairs = len(ids[image] & ids[label]) if label else 0
            # then the folder that is called like one of masks; then the most images, if no masks
            score = (pairs, _likelihood(image, label) if pairs else 0, len(ids[image]))
            if score > most:
                best, most = Patterns(image, label if pairs else ""), score
            elif score == most and pairs and image == best.label and label == best.image:
                got = f"{image} and {label} could both be the masks"
                raise InputError(got, "to know which", f"write --image '{image}' --label '{label}'")
    if not most[2]:
        raise InputError(
            f"members: {told(names)}", "JPEG or PNG images", "name them: --image '*.x'"
        )
    if said.label and not most[0]:
        got = f"no image has a mask called {said.label}; members: {told(names)}"
        raise InputError(got, "masks of the images' ids", "correct --image or --label")
    _check_masks_are_found(names, best, bool(said.image))
    return best


def _check_masks_are_found(names: list[str], found: Patterns, said: bool) -> None:
    """Raise InputError where no masks were found, and some of the pictures are masks most likely.

    said: the images' names are not a guess.
    """
    if found.label:
        return
    other_way = "or unpack them, and use `distseg prepare folder`"
    taken = [name for name in names if id_of(name, found.image)]
    rest = [name for name in names if name.lower().removesuffix(".gz").endswith(PICTURES)]
    rest = [name for name in rest if not id_of(name, found.image)]
    if rest:
        got = f"images {found.image}, and {counted(len(rest), 'picture')} beside them, "
        got += f"{rest[0]!r} for one"
        action = "write for example --image 'images/*.jpg' --label 'masks/*_mask.png'"
        action = f"{action}; {other_way}"
        raise InputError(got, "to know which mask is of which image, masks as PNG", action)
    masks = [name for name in taken if _is_called_mask(name)]
    # all of them: a set that is called so
    if masks and len(masks) < len(taken) and not said:
        got = f"{len(masks)} of {len(taken)} images are called like masks, {masks[0]!r} for one"
        action = f"name the images alone with --image 'images/*.jpg'; {other_way}"
        raise InputError(got, "masks as PNG: other formats change their values", action)


def _is_called_mask(name: str) -> bool:
    """Whether its folder, or the end of its name, is called as masks are."""
    folder, _, file = name.lower().rpartition("/")
    stem = os.path.splitext(file)[0]
    ends = tuple(sep + word.lower() for word in _MASKS for sep in "._-")
    return stem.endswith(ends) or any(word in folder for word in _MASK_FOLDERS)


def _candidates(names: list[str], said: Patterns) -> Iterator[str]:
    yield from filter(None, (said.image, said.label))
    folders = _folders(names)
    for folder in ("", *folders):
        for end in (*_IMAGES, *_LABELS):
            yield folder + end


def _folders(names: list[str]) -> list[str]:
    """The folders that the names part in: "x/images/", "x/masks/" of x/images/1.jpg, ..."""
    parts = [name.split("/")[:-1] for name in names]
    # a folder that all of them lie in says nothing: what first and last in order share, all do
    first, last = min(parts), max(parts)
    same = [one == other for one, other in zip(first, last, strict=False)]
    depth = same.index(False) if False in same else len(same)
    found = sorted({"/".join(one[: depth + 1]) + "/" for one in parts if len(one) > depth})
    return found if len(found) <= MAX_FOLDERS else []


def _ids(names: list[str], pattern: str) -> set[str]:
    return set(filter(None, (id_of(name, pattern) for name in names)))


def _wanted(said: str, ids: dict[str, set[str]], ends: tuple[str, ...]) -> list[str]:
    if said:
        return [said]
    return [pattern for pattern, found in ids.items() if found and pattern.endswith(ends)]


def _likelihood(image: str, label: str) -> int:
    """Whether the label's pattern is called like masks, and the image's is not."""
    folders = [pattern.partition("*")[0].lower() for pattern in (image, label)]
    is_mask = [any(word in folder for word in _MASK_FOLDERS) for folder in folders]
    return int(is_mask[1]) - int(is_mask[0])


def told(names: Sequence[str]) -> str:
    """How many names have which ends, for messages."""
    ends = Counter("*" + os.path.splitext(name)[1].lower() for name in names)
    return ", ".join(f"{count} {end}" for end, count in ends.most_common(6)) or "none"
