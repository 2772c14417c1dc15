"""Your own images and masks.

Two folders matched by name, and a small YAML that says what the masks mean.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from shards.errors import InputError
from shards.prepare.dataset import DataSet
from shards.prepare.masks import Coding, color_code, masked_sample
from shards.prepare.ohe import rainbow
from shards.prepare.pairing import (
    Pair,
    check_listed_once,
    files_by_id,
    ids_in_list,
    pair_tasks,
    seeded_splits,
)
from shards.sample import IGNORE_INDEX, ClassSet

MAX_ID = 2**16 - 1  # of a 16-bit gray picture
PLACE = "{split}"
KEYS = (
    *("classes", "void", "mask_values", "images", "masks"),
    *("mask_suffix", "splits", "unlabelled", "name"),
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
    mask_suffix: str
    splits: dict[str, str] | tuple[str, ...] | None
    unlabelled: bool


def samples(root: Path, layout: str = "", seed: int | None = None) -> DataSet:
    """Images (JPEG, PNG) and masks below `root` and its subfolders, matched by path and stem.

    layout: the YAML file (default: <root>/distseg.yaml). Its keys:
      classes      list of {name, color: [r, g, b], ids: [mask values]}, in the order of the class
                   indices; ids default to the place in the list, colours to a rainbow
      void         mask values, or colours, that are no class (default: [255], for colours none)
      mask_values  ids (gray values or palette indices; the default) or colors (a class is where
                   its colour is)
      images, masks  folders (default: images, masks); "{split}" in both stands for each of `splits`
      mask_suffix  what a mask's name has after the image's, e.g. _mask
      splits       [train, val] with "{split}" above; or {train: FILE, val: FILE}, lists with an id
                   a line; without it a fifth of a permutation by `seed` (default 0) validates
      unlabelled   true: an image without a mask is kept without a label, except in val (default:
                   it is missing)
      name         of the data set (default: folder)

    Missing: an image without a mask, a mask without an image, an id of a list without a file.
    Raises InputError for a YAML that is not that, an empty folder or list; a sample, when it is
    read, for an unreadable file, a mask of another size or with what is neither a class nor void.
    """
    file = Path(layout) if layout else root / "distseg.yaml"
    what = _read(file)
    if what.splits is not None and seed is not None:
        raise InputError(
            f"seed={seed} where {file} names the splits", "one of both", "leave out seed"
        )
    notes: list[str] = []
    if isinstance(what.splits, tuple):
        pairs = []
        for split in what.splits:
            pairs += _pairs(root, what, split)
        pairs = _unlike(pairs)
    else:
        pairs = _distributed(root, what, seed or 0, notes)
    tasks = pair_tasks(root, pairs, masked_sample, coding=what.coding, source=what.name)
    unlabelled = sum(pair.label is None for pair in pairs)
    if unlabelled:
        notes.append(f"{unlabelled} images have no mask and stay unlabelled")
    return DataSet(what.classes, tasks, tuple(notes), what.name)


def _unlike(pairs: list[Pair]) -> list[Pair]:
    """The pairs, with the split before each id where two splits number their images alike."""
    # folders train/ and val/ may both begin with 0001.jpg; where none do, ids stay short
    if len({pair.id for pair in pairs}) == len(pairs):
        return pairs
    return [replace(pair, id=f"{pair.split}/{pair.id}") for pair in pairs]


def _pairs(root: Path, what: _Layout, split: str) -> list[Pair]:
    """All pairs of a split, by folders."""
    folders = root / what.images.replace(PLACE, split), root / what.masks.replace(PLACE, split)
    images, masks = files_by_id(folders[0]), files_by_id(folders[1], what.mask_suffix)
    if folders[0] == folders[1]:  # masks beside their images, told apart by the suffix
        images = {id_: path for id_, path in images.items() if not id_.endswith(what.mask_suffix)}
    if not images:
        raise InputError(
            f"no JPEG or PNG in {folders[0]}", "images", "correct `images` in the YAML, or --root"
        )
    pairs = []
    # ids of both folders: a mask without an image is a mistake, too, and becomes a task that says
    # so
    for id_ in sorted(images.keys() | masks.keys()):
        mask = masks.get(id_)
        if mask is None and not (what.unlabelled and split != "val"):
            mask = folders[1] / f"{id_}{what.mask_suffix}.png"
        pairs.append(Pair(id_, split, images.get(id_, folders[0] / f"{id_}.jpg"), mask))
    return pairs


def _distributed(root: Path, what: _Layout, seed: int, notes: list[str]) -> list[Pair]:
    """The pairs of two folders, put into splits by lists or by a seed; adds to the notes."""
    pairs = {pair.id: pair for pair in _pairs(root, what, "")}
    if isinstance(what.splits, dict):
        splits = {split: ids_in_list(root / path) for split, path in what.splits.items()}
        check_listed_once(splits)
    else:
        # labelled images only are drawn: one without a mask could not validate, and would shrink
        # the split
        splits = seeded_splits([id_ for id_, pair in pairs.items() if pair.label is not None], seed)
        splits["train"] += [id_ for id_, pair in pairs.items() if pair.label is None]
    placed = []
    for split, ids in splits.items():
        for id_ in ids:
            pair = pairs.get(id_) or Pair(id_, split, root / what.images / f"{id_}.jpg", None)
            unscored = split == "val" and pair.label is None  # nothing to score it by: missing
            label = root / what.masks / f"{id_}{what.mask_suffix}.png" if unscored else pair.label
            placed.append(Pair(id_, split, pair.image, label))
    unlisted = len(pairs.keys() - {pair.id for pair in placed})
    if unlisted:
        notes.append(f"{unlisted} images or masks are in no list")
    return placed


def _read(file: Path) -> _Layout:
    content = _content(file)
    # first, since a misspelt key has no effect, and its default would be believed
    _check_keys(file, content, KEYS)
    colors = _choice(file, content, "mask_values", ("ids", "colors")) == "colors"
    classes, codes = _classes(file, content.get("classes"), colors)
    codes += _void(file, content, colors)
    # a value of two classes: one of them would win by its place in the list
    _check_said_once(file, codes, colors)
    texts = {key: _text(file, content, key, default) for key, default in _DEFAULTS.items()}
    unlabelled = content.get("unlabelled", False)
    if not isinstance(unlabelled, bool):
        raise _wrong(file, f"unlabelled: {unlabelled!r} is neither true nor false")
    splits = _splits(file, content.get("splits"), texts)
    if texts["images"] == texts["masks"] and not texts["mask_suffix"]:
        raise _wrong(
            file,
            f"images and masks are both in {texts['images']!r} "
            "and mask_suffix does not tell them apart",
        )
    return _Layout(
        classes, Coding(tuple(codes), colors), splits=splits, unlabelled=unlabelled, **texts
    )


def _content(file: Path) -> dict[Any, Any]:
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


def _check_said_once(file: Path, codes: list[tuple[int, int]], colors: bool) -> None:
    times = Counter(value for value, _ in codes)
    twice = sorted(value for value, count in times.items() if count > 1)
    if twice:
        value = f"mask value {twice[0]:#08x}" if colors else f"id {twice[0]}"
        raise _wrong(file, f"{value} means two things")


_DEFAULTS = {"name": "folder", "images": "images", "masks": "masks", "mask_suffix": ""}


def _classes(file: Path, entries: Any, colors: bool) -> tuple[ClassSet, list[tuple[int, int]]]:
    """(classes, their codes)."""
    if not isinstance(entries, list) or not entries:
        raise _wrong(file, f"classes: {entries!r} is no list")
    names, palette, codes = [], [], []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise _wrong(file, f"classes: {entry!r} has no name, color and ids")
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
    if type(value) is not int or not 0 <= value <= MAX_ID:
        raise _wrong(file, f"{name}: id {value!r} is no whole number from 0 to {MAX_ID}")
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
    if not isinstance(value, str) or (not value and key != "mask_suffix"):
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
