"""Your own images and masks: two folders matched by name, and a small YAML that says what the masks
mean (docs/your_data.md has examples).

Its keys:
  classes      list of {name, color: [r, g, b], ids: [mask values]}, or of names alone, in the
               order of the class indices; ids default to the place in the list, colours to a
               rainbow
  void         mask values, or colours, that are no class (default: [255], for colours none)
  mask_values  ids (gray values or palette indices; the default) or colors (a class is where its
               colour is)
  images, masks  folders (default: images, masks); "{split}" in both stands for each of `splits`
  image_suffix, mask_suffix  what a name has after the part that both share, e.g. _sat and _mask
  splits       [train, val] with "{split}" above; or {train: FILE, val: FILE}, lists with an id, or
               an image and its mask, a line; without it a fifth of a permutation by `seed`
               (default 0) validates
  unlabelled   true: an image without a mask is kept without a label, except in val (default: it is
               missing)
  exif         turn: images and masks are turned upright as EXIF says (the default, as viewers do);
               ignore: pixels stay as they are stored
  lossy_masks  refuse (the default), or nearest: masks may be JPEGs, and a value stands for the
               nearest one that the YAML names
  name         of the data set (default: that of the folder)
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from shards.errors import InputError
from shards.image_files import NUM_NAMED
from shards.images import READ, SUFFIXES
from shards.names import is_name
from shards.prepare.dataset import DataSet
from shards.prepare.lists import Names, entries_of, normal_form
from shards.prepare.masks import Coding, color_code, masked_sample
from shards.prepare.ohe import rainbow
from shards.prepare.pairing import (
    MASK_SUFFIXES,
    Pair,
    check_listed_once,
    each_id,
    files_by_id,
    pair_tasks,
    seeded_splits,
)
from shards.sample import IGNORE_INDEX, ClassSet
from shards.words import IS, counted

# a 16-bit gray picture ends at 65535; arrays hold more, and -1 for void
MIN_ID, MAX_ID = -(2**31), 2**31 - 1
PLACE = "{split}"
KEYS = (
    *("classes", "void", "mask_values", "images", "masks", "image_suffix", "mask_suffix"),
    *("splits", "unlabelled", "exif", "lossy_masks", "name"),
)
LAYOUT = """classes: [{name: sky, color: [70, 130, 180], ids: [1]}, \
{name: road, color: [128, 64, 128], ids: [2, 3]}]
          void: [0, 255]"""


@dataclass(frozen=True)
class _Layout:
    """The YAML, checked."""

    classes: ClassSet
    coding: Coding
    name: str
    images: str
    masks: str
    image_suffix: str
    mask_suffix: str
    splits: dict[str, str] | tuple[str, ...] | None
    unlabelled: bool


def samples(root: Path, layout: str = "", seed: int | None = None) -> DataSet:
    """Images and masks below `root` and its subfolders, matched by path and stem.

    layout: the YAML file (default: <root>/distseg.yaml), see above. Missing: an image without a
    mask, a mask without an image, an id of a list without a file. Raises InputError for a YAML that
    is not that, an empty folder or list, no mask by the name of any image; a sample, when it is
    read, for an unreadable file, a mask of another size or with what is neither a class nor void.
    """
    file = Path(layout) if layout else root / "distseg.yaml"
    what = _read(file, _name(root))
    if what.splits is not None and seed is not None:
        raise InputError(
            f"seed={seed} where {file} names the splits", "one of both", "leave out seed"
        )
    notes: list[str] = []
    if isinstance(what.splits, tuple):
        pairs = []
        for split in what.splits:
            pairs += _all_pairs(_files(root, what, split, notes), what, split)
        pairs = _unlike(pairs)
    elif isinstance(what.splits, dict):
        pairs = _listed(root, what, what.splits, notes)
    else:
        pairs = _drawn(_all_pairs(_files(root, what, "", notes), what, ""), seed or 0, what)
    keep = f"keep it unlabelled by `unlabelled: true` in {file.name}"
    # a mask that a list names has to be there
    keep = "" if what.unlabelled or isinstance(what.splits, dict) else keep
    tasks = pair_tasks(root, pairs, masked_sample, keep, coding=what.coding, source=what.name)
    unlabelled = sum(pair.label is None for pair in pairs)
    if unlabelled:
        have = "image has" if unlabelled == 1 else "images have"
        notes.append(f"{unlabelled} {have} no mask and stay unlabelled")
    return DataSet(what.classes, tasks, tuple(notes), what.name, several_classes=True)


def _unlike(pairs: list[Pair]) -> list[Pair]:
    """The pairs, with the split before each id where two splits number their images alike."""
    # folders train/ and val/ may both begin with 0001.jpg; where none do, ids stay short
    if len({pair.id for pair in pairs}) == len(pairs):
        return pairs
    return [replace(pair, id=f"{pair.split}/{pair.id}") for pair in pairs]


@dataclass(frozen=True)
class _Files:
    """Two folders, and the images and masks in them by id; an image and its mask have one id."""

    folders: tuple[Path, Path]
    images: dict[str, Path]
    masks: dict[str, Path]

    def check_names(self, what: _Layout) -> None:
        """Raise InputError where no image and no mask are called alike."""
        if self.masks and not self.images.keys() & self.masks.keys():
            raise _strangers(what, self)

    def pair(self, id_: str, split: str, what: _Layout, mask_id: str = "") -> Pair:
        """An id's pair, with the names that missing files would have.

        mask_id: of the mask that a list names, where the image may not stay unlabelled.
        """
        mask = self.masks.get(mask_id or id_)
        # in val there would be nothing to score an unlabelled image by
        if mask is None and (mask_id or not what.unlabelled or split == "val"):
            mask = self.folders[1] / f"{mask_id or id_}{what.mask_suffix}.png"
        image = self.images.get(id_, self.folders[0] / f"{id_}{what.image_suffix}.jpg")
        return Pair(id_, split, image, mask)


def _files(
    root: Path, what: _Layout, split: str, notes: list[str], *, by_name: bool = True
) -> _Files:
    """The files of a split ("": of all); what was passed over is added to the notes.

    by_name: InputError where no image and no mask are called alike, as nothing else pairs them.
    """
    folders = root / what.images.replace(PLACE, split), root / what.masks.replace(PLACE, split)
    beside = folders[0] == folders[1]  # told apart by their suffixes
    kinds = MASK_SUFFIXES if beside else SUFFIXES
    images = files_by_id(folders[0], what.image_suffix, kinds, notes=notes, strange=not beside)
    masks = files_by_id(
        folders[1], what.mask_suffix, MASK_SUFFIXES, notes=notes, strange=not beside
    )
    if beside:
        # a name that ends in the longer suffix may end in the shorter one, or none, as well
        if len(what.mask_suffix) >= len(what.image_suffix):
            images = _without(images, masks)
        else:
            masks = _without(masks, images)
    if not images:
        raise InputError(f"no image in {folders[0]}", f"images: {READ}", _folders_there(root))
    respelt = _share_ids(images, masks)
    if respelt:
        spelt = counted(respelt, "mask", verb=IS)
        notes.append(f"{spelt} spelt in another Unicode normal form than the images")
    files = _Files(folders, images, masks)
    if by_name:
        files.check_names(what)
    return files


def _folders_there(root: Path) -> str:
    """What to do where there are no images: name one of the folders that are there."""
    action = "correct `images` in the YAML, or --root"
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    there = [name for name in there if not name.startswith(".")]
    if not there:
        return action
    more = ", ..." if len(there) > NUM_NAMED else ""
    named = ", ".join(there[:NUM_NAMED])
    return f"write `images: FOLDER` and `masks: FOLDER` in the YAML ({root} has {named}{more})"


def _without(files: Mapping[str, Path], others: Mapping[str, Path]) -> dict[str, Path]:
    taken = set(others.values())
    return {id_: path for id_, path in files.items() if path not in taken}


def _share_ids(images: Mapping[str, Path], masks: dict[str, Path]) -> int:
    """Give masks the ids of images that are spelt alike but for their normal form; how many."""
    lonely = {normal_form(id_): id_ for id_ in masks if id_ not in images}
    count = 0
    for id_ in images:
        if id_ not in masks and normal_form(id_) in lonely:
            masks[id_] = masks.pop(lonely.pop(normal_form(id_)))
            count += 1
    return count


def _strangers(what: _Layout, files: _Files) -> InputError:
    """The error of folders in which no image and no mask are called alike, with what would help."""
    image = min(files.images)
    mask = max(files.masks, key=lambda id_: len(_shared(image, id_)))
    # with the folders below, which may be all that differs
    names = [
        path.relative_to(folder).as_posix()
        for folder, path in zip(
            files.folders, (files.images[image], files.masks[mask]), strict=True
        )
    ]
    got = (
        f"no image in {files.folders[0]} has a mask of its name in {files.folders[1]}: "
        f"for example {names[0]} and {names[1]}"
    )
    lines = _folder_lines(what, files) or _suffix_lines(image, mask, files)
    action = "rename them, or correct `images` and `masks`"
    if lines:
        action = f"add to the YAML: {', '.join(lines)}"
    return InputError(got, "masks called as their images are", action)


def _folder_lines(what: _Layout, files: _Files) -> list[str]:
    """What the YAML would say of files that all lie a folder deeper, as archives unpack them."""
    lines, below = [], []
    keys = (("images", what.images, files.images), ("masks", what.masks, files.masks))
    for key, folder, found in keys:
        inside = os.path.commonpath([id_.rpartition("/")[0] for id_ in found])
        lines += [f"{key}: {folder}/{inside}"] if inside else []
        below.append({id_.removeprefix(f"{inside}/") for id_ in found})
    return lines if below[0] & below[1] else []


def _suffix_lines(image: str, mask: str, files: _Files) -> list[str]:
    """What the YAML would say of names that end in what the other folder's do not."""
    # a sign between name and suffix is the suffix's
    shared = _shared(image, mask).rstrip("_-. ")
    ends = image[len(shared) :], mask[len(shared) :]
    # two numbers differ in their last digits, too: only what all names end in is a suffix
    if not shared or not all(id_.endswith(ends[0]) for id_ in files.images):
        return []
    known = {id_.removesuffix(ends[0]) for id_ in files.images}
    if not known & {id_.removesuffix(ends[1]) for id_ in files.masks if id_.endswith(ends[1])}:
        return []
    keys = zip(("image_suffix", "mask_suffix"), ends, strict=True)
    return [f"{key}: {end}" for key, end in keys if end]


def _shared(first: str, second: str) -> str:
    """What both texts begin with."""
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return first[:count]


def _all_pairs(files: _Files, what: _Layout, split: str) -> list[Pair]:
    """All pairs of a split, by folders."""
    # ids of both folders: a mask without an image is a mistake, too, and becomes a task that says
    # so
    ids = sorted(files.images.keys() | files.masks.keys())
    return [files.pair(id_, split, what) for id_ in ids]


def _drawn(pairs: list[Pair], seed: int, what: _Layout) -> list[Pair]:
    """The pairs, put into splits by a seed."""
    by_id = {pair.id: pair for pair in pairs}
    # labelled images only are drawn: one without a mask could not validate, and would shrink the
    # split
    splits = seeded_splits([pair.id for pair in pairs if pair.label is not None], seed)
    splits["train"] += [pair.id for pair in pairs if pair.label is None]
    return [replace(by_id[id_], split=split) for split, id_ in each_id(splits)]


def _listed(root: Path, what: _Layout, lists: Mapping[str, str], notes: list[str]) -> list[Pair]:
    """The pairs that lists name; adds to the notes."""
    files = _files(root, what, "", notes, by_name=False)
    images = Names(files.images, what.image_suffix, what.images)
    masks = Names(files.masks, what.mask_suffix, what.masks)
    entries = {split: entries_of(root / path, images, masks) for split, path in lists.items()}
    check_listed_once({split: [one.image for one in some] for split, some in entries.items()})
    pairs, used = [], set()
    for split, some in entries.items():
        for entry in some:
            pairs.append(files.pair(entry.image, split, what, entry.mask or ""))
            used |= {entry.image, entry.mask or entry.image}
    # lists may pair what is not called alike
    if not any(pair.label in files.masks.values() for pair in pairs):
        files.check_names(what)
    unlisted = len((files.images.keys() | files.masks.keys()) - used)
    if unlisted:
        notes.append(f"{counted(unlisted, 'image or mask', 'images or masks', IS)} in no list")
    respelt = len(images.respelt | masks.respelt)
    if respelt:
        listed = counted(respelt, "name", verb=IS)
        notes.append(f"{listed} listed in another Unicode normal form than the files'")
    return pairs


def _read(file: Path, name: str) -> _Layout:
    content = _content(file)
    # first, since a misspelt key has no effect, and its default would be believed
    _check_keys(file, content, KEYS)
    colors = _choice(file, content, "mask_values", ("ids", "colors")) == "colors"
    classes, codes = _classes(file, content.get("classes"), colors)
    codes += _void(file, content, colors)
    # a value of two classes: one of them would win by its place in the list
    _check_said_once(file, codes, colors, "void" in content)
    defaults = _DEFAULTS | {"name": name}
    texts = {key: _text(file, content, key, default) for key, default in defaults.items()}
    unlabelled = content.get("unlabelled", False)
    if not isinstance(unlabelled, bool):
        raise _wrong(file, f"unlabelled: {unlabelled!r} is neither true nor false")
    splits = _splits(file, content.get("splits"), texts)
    if texts["images"] == texts["masks"] and texts["image_suffix"] == texts["mask_suffix"]:
        raise _wrong(
            file,
            f"images and masks are both in {texts['images']!r} "
            "and mask_suffix does not tell them apart",
        )
    turn = _choice(file, content, "exif", ("turn", "ignore")) == "turn"
    nearest = _choice(file, content, "lossy_masks", ("refuse", "nearest")) == "nearest"
    coding = Coding(tuple(codes), colors, classes.names, turn, nearest)
    return _Layout(classes, coding, splits=splits, unlabelled=unlabelled, **texts)


def _content(file: Path) -> dict[Any, Any]:
    if not file.exists():
        got, needed = f"no {file}", f"a YAML that says what the masks mean:\n          {LAYOUT}"
        raise InputError(got, needed, "write it, see docs/your_data.md")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _wrong(file, f"{error}") from None
    if not isinstance(content, dict):
        raise _wrong(file, f"{type(content).__name__} instead of keys and values")
    return content


def _void(file: Path, content: Mapping[Any, Any], colors: bool) -> list[tuple[int, int]]:
    # 255 is void in most masks of ids; of colours none is so common that it could be meant
    void = content.get("void", [] if colors else [IGNORE_INDEX])
    if not isinstance(void, list):
        raise _wrong(file, f"void: {void!r} is no list")
    return [(_code(file, "void", value, colors), IGNORE_INDEX) for value in void]


def _check_said_once(
    file: Path, codes: list[tuple[int, int]], colors: bool, void_said: bool
) -> None:
    times = Counter(value for value, _ in codes)
    twice = sorted(value for value, count in times.items() if count > 1)
    if twice:
        value = f"mask value {twice[0]:#08x}" if colors else f"id {twice[0]}"
        default = twice[0] == IGNORE_INDEX and not colors and not void_said
        hint = " (255 is void unless the YAML says otherwise: write `void: []`)" if default else ""
        raise _wrong(file, f"{value} means two things{hint}")


_DEFAULTS = {"images": "images", "masks": "masks", "image_suffix": "", "mask_suffix": ""}


def _name(root: Path) -> str:
    """What a data set is called whose YAML does not say it.

    As its folder: maps and shards of one name replace each other, those of two folders should not.
    """
    name = root.resolve().name
    return name if is_name(name) else "folder"


def _classes(file: Path, entries: Any, colors: bool) -> tuple[ClassSet, list[tuple[int, int]]]:
    """(classes, their codes)."""
    if not isinstance(entries, list) or not entries:
        raise _wrong(file, f"classes: {entries!r} is no list")
    names, palette, codes = [], [], []
    for index, entry in enumerate(entries):
        if isinstance(entry, str):
            entry = {"name": entry}  # a plain list of names
        if not isinstance(entry, dict):
            raise _wrong(file, f"classes: {entry!r} is neither a name nor {{name, color, ids}}")
        _check_keys(file, entry, ("name", "color", "ids"))
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            raise _wrong(
                file,
                f"classes: name {name!r} is no text (write yes, no, on, off and numbers in quotes)",
            )
        if colors and ("color" not in entry or "ids" in entry):
            raise _wrong(
                file, f"classes: {name} needs color, and no ids, where mask_values is colors"
            )
        names.append(name)
        color = entry.get("color", rainbow(len(entries))[index])
        palette.append(_color(file, name, color))
        ids = [color] if colors else entry.get("ids", [index])
        if not isinstance(ids, list) or not ids:
            raise _wrong(file, f"classes: ids {ids!r} of {name} is no list")
        codes += [(_code(file, name, value, colors), index) for value in ids]
    try:
        return ClassSet(tuple(names), tuple(palette)), codes
    except InputError as error:
        raise InputError(f"{file}: {error.got}", error.needed, error.action) from None


def _code(file: Path, name: str, value: Any, colors: bool) -> int:
    if colors:
        return color_code(_color(file, name, value))
    # type, not isinstance: YAML reads yes and true as True, which is an int in Python
    if type(value) is not int or not MIN_ID <= value <= MAX_ID:
        raise _wrong(file, f"{name}: id {value!r} is no whole number")
    return value


def _color(file: Path, name: str, value: Any) -> tuple[int, int, int]:
    # type, not isinstance: YAML's true is an int too
    numbers = isinstance(value, list | tuple) and all(
        type(part) is int and 0 <= part <= 255 for part in value
    )
    if not numbers or len(value) != 3:
        raise _wrong(file, f"{name}: color {value!r} is not [red, green, blue] from 0 to 255")
    return value[0], value[1], value[2]


def _splits(
    file: Path, splits: Any, texts: Mapping[str, str]
) -> dict[str, str] | tuple[str, ...] | None:
    placed = [PLACE in texts[key] for key in ("images", "masks")]
    if (
        isinstance(splits, list)
        and splits
        and all(isinstance(split, str) for split in splits)
        and all(placed)
    ):
        return tuple(dict.fromkeys(splits))
    lists = isinstance(splits, dict) and bool(splits)
    if (splits is None or lists) and not any(placed):
        texts_only = not lists or all(isinstance(text, str) for text in (*splits, *splits.values()))
        if not texts_only:
            raise _wrong(file, f"splits: {splits!r} does not give a file for each name")
        return splits
    got = f"splits: {splits!r} with images {texts['images']!r} and masks {texts['masks']!r}"
    raise _wrong(file, f'{got}: neither a list with "{PLACE}" in both, nor list files, nor nothing')


def _text(file: Path, content: Mapping[str, Any], key: str, default: str) -> str:
    value = content.get(key, default)
    if not isinstance(value, str) or not (value or key.endswith("_suffix")):
        raise _wrong(file, f"{key}: {value!r} is no text")
    return value


def _choice(file: Path, content: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = content.get(key, choices[0])
    if value not in choices:
        raise _wrong(file, f"{key}: {value!r} is none of {', '.join(choices)}")
    return value


def _check_keys(file: Path, content: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in content:
        if key not in known:
            # str: YAML's keys may be numbers, or true
            near = difflib.get_close_matches(str(key), known, 1)
            raise _wrong(
                file,
                f"key {key!r}{f' (nearest: {near[0]})' if near else ''}, known: {', '.join(known)}",
            )


def _wrong(file: Path, got: str) -> InputError:
    return InputError(f"{file}: {got}", f"for example\n          {LAYOUT}", "correct the YAML")


def read_classes(file: Path) -> tuple[ClassSet, list[tuple[int, int]], str]:
    """(classes, (mask value, class index or 255) for each value, name or "") of a YAML as above.

    Of its keys `classes`, `void` and `name` only, with ids from 0 to 255. Raises InputError.
    """
    content = _content(file)
    _check_keys(file, content, ("classes", "void", "name"))
    classes, codes = _classes(file, content.get("classes"), colors=False)
    values = [value for value, _ in codes]
    # void by default, where it is no class
    if "void" in content or IGNORE_INDEX not in values:
        codes += _void(file, content, colors=False)
        values = [value for value, _ in codes]
    twice = sorted(value for value, times in Counter(values).items() if times > 1)
    if twice or max(values) > IGNORE_INDEX:
        wrong = f"id {twice[0]} means two things" if twice else f"id {max(values)} is above 255"
        raise _wrong(file, wrong)
    return classes, codes, _text(file, content, "name", "") if "name" in content else ""
