"""Shards that others wrote: a member index and a manifest beside tars that stay as they are.

webdataset's ShardWriter, or plain `tar` over a folder: any tar that holds JPEG or PNG images, and
masks of class ids as PNG. Which members belong together is said by two patterns, or found.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.files import published, say, tracked
from shards.look import ERROR, look_at
from shards.manifest import FILE_NAME, VERSION, Manifest, ShardInfo, SplitInfo, sha256_of
from shards.names import check_name
from shards.patterns import Member, Patterns, chosen_patterns, id_of, key_of, told
from shards.prepare.folder import read_classes
from shards.prepare.parts import check_several_classes
from shards.sample import IGNORE_INDEX, image_extension, image_size
from shards.verified import mark_verified, withdraw
from shards.words import counted

# names of splits as others write them
_KNOWN_SPLITS = {"training": "train", "valid": "val", "validation": "val", "dev": "val"}
_KNOWN_SPLITS |= {name: name for name in ("train", "val", "test")}
OTHER_WAY = "unpack them, and use `distseg prepare folder`"


@dataclass(frozen=True)
class _Imported:
    """What was learned of one tar."""

    info: ShardInfo
    index: str  # its member index, as text
    pixels: np.ndarray  # (256,) int64, by index
    keys: list[str]
    warned: Counter[str]  # how many samples have each warning


def import_tars(
    directory: Path,
    classes: Path,
    *,
    splits: Mapping[str, str] | None = None,
    patterns: Patterns | None = None,
    num_threads: int | None = None,
) -> Manifest:
    """Write member indices, then the manifest beside the tars of a folder; returns it.

    classes: the YAML of `distseg prepare folder`, of which classes, void and name count. splits:
    for each split a pattern of file names (train-*.tar); none: by the names, without their
    numbers. patterns: of the members; what they leave open is found. Every image and every mask is
    read and checked as `distseg inspect` does, so training accepts the shards. Raises InputError,
    naming tar and member, for what cannot be used as it is; the tars are never written to.
    """
    _check_no_pack(directory)
    paths = _tars(directory)
    manifest = _described_by(classes, directory)
    of_split = _of_splits(paths, splits or {})
    # threads, since reading and decoding run without the interpreter's lock
    with ThreadPoolExecutor(num_threads) as pool:
        members = dict(zip(paths, pool.map(members_of, paths), strict=True))
        every = [member for path in paths for member in members[path]]
        found = chosen_patterns(every, patterns or Patterns())
        say(_described(every, found))
        tasks = []
        for split, tars in of_split.items():
            tasks += [_Task(directory, path, split, members[path], found) for path in tars]
        done = pool.map(lambda task: _imported(task, manifest), tasks)
        imported = list(tracked(done, len(tasks), "reading and checking"))
    _check_keys(imported)
    pixels = np.sum([one.pixels for one in imported], axis=0)
    check_several_classes(manifest.classes, pixels)
    _say_warnings(imported)
    return _published(directory, manifest, tasks, imported)


def _described_by(classes: Path, directory: Path) -> Manifest:
    """A manifest of the YAML's classes, without splits yet: what a mask means is asked of it."""
    if not classes.is_file():
        needed = "a YAML that says what the ids of the masks mean, with classes and void"
        action = "write one, see docs/foreign_shards.md, and name it with --classes FILE.yaml"
        raise InputError(f"no {classes}", needed, action)
    class_set, codes, name = read_classes(classes)
    name = check_name(
        name or directory.resolve().name, "the data set's name", "name it in the YAML"
    )
    return Manifest(VERSION, name, class_set, {}, codes=tuple(sorted(codes)))


def _described(members: Sequence[Member], patterns: Patterns) -> str:
    shown = [member.name for member in members if not member.is_hidden]
    rest = [
        name
        for name in shown
        if not any(id_of(name, one) for one in (patterns.image, patterns.label))
    ]
    kinds = [told(rest)] if rest else []
    kinds += [f"{len(members) - len(shown)} hidden"] if len(members) > len(shown) else []
    passed_over = f"; passed over: {', '.join(kinds)}" if kinds else ""
    return f"images: {patterns.image}, masks: {patterns.label or 'none'}{passed_over}"


@dataclass(frozen=True)
class _Task:
    directory: Path
    path: Path
    split: str
    members: list[Member]
    patterns: Patterns


def members_of(path: Path) -> list[Member]:
    """The files in a tar, without what macOS knows about each.

    Raises InputError for a tar, or a member, that cannot be read from where it lies.
    """
    found = []
    try:
        # "r:": a compressed tar has no place to read a member from
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                # of macOS's tar: ._001.jpg is no picture
                if member.isdir() or name.rpartition("/")[2].startswith("._"):
                    continue
                if not member.isreg() or member.issparse():
                    kind = "a link" if member.islnk() or member.issym() else "no plain file"
                    got = f"{path}: {name!r} is {kind}"
                    action = "write the tar with the files themselves (tar --dereference)"
                    raise InputError(got, "plain files", action)
                found.append(Member(name, member.name, member.offset_data, member.size))
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        needed = "a whole tar, not compressed, so that each member can be read from where it lies"
        action = "copy it again, or gunzip it"
        raise InputError(f"{path}: {error}", needed, action) from None
    with path.open("rb") as file:
        file.seek(end)
        # cut between two members it would look whole, but for the zeros that each tar ends with
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise InputError(f"{path} is cut off", "a whole tar", "copy it again")
        # of tars joined by `cat` all but the first are behind the first one's end
        while block := file.read(1 << 20):
            if any(block):
                got = f"{path} goes on behind its end"
                action = "keep tars apart, or join them by `tar --concatenate`"
                raise InputError(got, "one tar a file", action)
    return found


def _imported(task: _Task, manifest: Manifest) -> _Imported:
    """Index and counts of one tar, each of whose samples was decoded and checked."""
    entries, wrong, warned = [], [], Counter[str]()
    pixels = np.zeros(256, np.int64)
    info = ShardInfo(task.path.name, 0, task.path.stat().st_size, "", "")
    for key, image, label in _pairs(task):
        entry = _entry(task.path, key, image, label)
        look = look_at(task.directory, task.split, info, entry, manifest)
        wrong += [finding for finding in look.findings if finding.level == ERROR]
        warned.update(finding.check for finding in look.findings if finding.level != ERROR)
        if look.pixels is not None:
            pixels += look.pixels
            counts = np.flatnonzero(look.pixels)
            entry["pixels"] = {str(value): int(look.pixels[value]) for value in counts}
        entries.append(entry)
    if wrong:
        samples = len({finding.sample for finding in wrong})
        got = f"{task.path}: {samples} of {len(entries)} samples cannot be used as they are, the "
        got += f"first: {wrong[0].sample}: {wrong[0].check}: {wrong[0].what}"
        needed = "whole JPEG or PNG images, and PNG masks of their size with ids of the YAML"
        raise InputError(got, needed, f"correct the YAML or the tar; or {OTHER_WAY}")
    text = json.dumps(entries, indent=0, sort_keys=True) + "\n"
    unlabelled = sum("png" not in entry["members"] for entry in entries)
    sums: dict[str, Any] = {
        "sha256": sha256_of(task.path),
        "index_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    info = replace(info, num_samples=len(entries), num_unlabelled=unlabelled, **sums)
    return _Imported(info, text, pixels, [entry["key"] for entry in entries], warned)


def _pairs(task: _Task) -> list[tuple[str, Member, Member | None]]:
    """(key, image, label or None) of each sample, in the tar's order of images."""
    images, labels = task.patterns.sorted_out(task.members)
    lost = sorted(labels.keys() - images.keys())
    if lost:
        masks = counted(len(lost), "mask")
        got = f"{task.path}: {masks} without an image, {labels[lost[0]].name!r} for one"
        raise InputError(got, "an image in the same tar", "correct --image and --label, or the tar")
    pairs = []
    for id_, image in images.items():
        action = "rename it in the tar"
        key = check_name(key_of(id_), f"{task.path}: sample", action)
        pairs.append((key, image, labels.get(id_)))
    return pairs


def _entry(path: Path, key: str, image: Member, label: Member | None) -> dict[str, Any]:
    """A line of the member index, as `pack` writes it, and the names that the members have."""
    content = _content(path, image)
    try:
        height, width = image_size(content)
        # by its content, as in our own shards, whatever its name says
        kind = {"jpg": "jpg", "png": "image.png"}[image_extension(content)]
    except InputError as error:
        got = f"{path}: {image.name}: {error.got}"
        raise InputError(got, error.needed, f"write JPEG or PNG; or {OTHER_WAY}") from None
    members = {kind: [image.offset, image.size, zlib.crc32(content)]}
    names = {kind: image.stored}
    if label is not None:
        members["png"] = [label.offset, label.size, zlib.crc32(_content(path, label))]
        names["png"] = label.stored
    entry = {"key": key, "height": int(height), "width": int(width)}
    return entry | {"members": members, "names": names}


def _content(path: Path, member: Member) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _published(
    directory: Path, manifest: Manifest, tasks: Sequence[_Task], imported: Sequence[_Imported]
) -> Manifest:
    splits: dict[str, SplitInfo] = {}
    num_classes = manifest.classes.num_classes
    for split in dict.fromkeys(task.split for task in tasks):
        own = [one for task, one in zip(tasks, imported, strict=True) if task.split == split]
        pixels = sum((one.pixels for one in own), np.zeros(256, np.int64)).tolist()
        infos = tuple(one.info for one in own)
        counts = tuple(pixels[:num_classes]), pixels[IGNORE_INDEX]
        splits[split] = SplitInfo(infos, sum(info.num_samples for info in infos), *counts)
    manifest = replace(manifest, splits=splits)
    # the record first and the manifest last: a kill in between leaves nothing that training takes
    withdraw(directory)
    for one in imported:
        with published(directory / one.info.index_file) as partial:
            partial.write_text(one.index)
    manifest.save(directory)
    # every image was decoded and every mask checked on the way
    mark_verified(directory, manifest)
    return Manifest.load(directory)


def _say_warnings(imported: Sequence[_Imported]) -> None:
    for check, count in sum((one.warned for one in imported), Counter[str]()).items():
        say(f"note: {counted(count, 'sample')}: {check}; `distseg inspect` says more")


def _check_keys(imported: Sequence[_Imported]) -> None:
    times = Counter(key for one in imported for key in one.keys)
    if not times:
        raise InputError("no images in these tars", "at least one", "check the patterns")
    twice = [key for key, count in times.items() if count > 1]
    if twice:
        files = [one.info.file for one in imported if twice[0] in one.keys]
        got = f"{len(twice)} keys are there more than once, {twice[0]!r} in {', '.join(files)}"
        raise InputError(got, "each key once, over all splits", f"rename them; or {OTHER_WAY}")


def _check_no_pack(directory: Path) -> None:
    """Raise InputError for a manifest that is not of an earlier import."""
    if not (directory / FILE_NAME).is_file():
        return
    action = f"remove {directory / FILE_NAME}, if the tars are others'"
    needed = "tars without a manifest, or with that of an earlier import"
    try:
        if Manifest.load(directory).codes:
            return
    except InputError as error:
        raise InputError(error.got, needed, action) from None
    raise InputError(f"{directory} holds shards of `distseg pack`", needed, action)


def _tars(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise InputError(f"no folder {directory}", "the folder of the tars", "correct it")
    paths = [path for path in sorted(directory.glob("*.tar")) if path.is_file()]
    if paths:
        for path in paths:
            check_name(path.name, "tar", "rename it")
        return paths
    got, action = f"no *.tar in {directory}", "give the folder that holds them"
    packed = [path.name for path in sorted(directory.iterdir()) if ".t" in path.name]
    below = sorted(directory.glob("*/*.tar"))
    if below:
        got += f", but {below[0].relative_to(directory)} for one"
        action = "give that folder; or link all into one, with the split before each name"
    elif packed:
        got += f", but {packed[0]}"
        action = "gunzip them: a compressed tar cannot be read member by member"
    raise InputError(got, "tars in one folder, not compressed", action)


def _of_splits(paths: Sequence[Path], patterns: Mapping[str, str]) -> dict[str, list[Path]]:
    """The tars of each split, in order."""
    splits: dict[str, list[Path]] = {}
    for path in paths:
        if patterns:
            matching = [split for split, one in patterns.items() if fnmatchcase(path.name, one)]
        else:
            matching = [_split_of(path.stem)]
        if len(matching) != 1 or not matching[0]:
            which = ", ".join(filter(None, matching)) or "none"
            got = f"{path.name} is of the splits: {which}"
            action = "write for example --split train='a*.tar' --split val='b*.tar'"
            raise InputError(got, "one split for each tar", action)
        action = "name the splits with --split NAME=PATTERN"
        splits.setdefault(check_name(matching[0], "split", action), []).append(path)
    missing = sorted(patterns.keys() - splits.keys())
    if missing:
        got = f"no tar is called as --split {missing[0]}={patterns[missing[0]]}"
        raise InputError(got, "at least one for each split", "correct the pattern")
    return splits


def _split_of(stem: str) -> str:
    """train of camvid-train-000012-of-000040; "" of a name that is but a number."""
    prefix = re.sub(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?$", "", stem)
    known = [_KNOWN_SPLITS.get(word) for word in re.split(r"[-_.]", prefix.lower())]
    return next(filter(None, known), None) or prefix.replace(".", "_")
