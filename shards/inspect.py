"""Packed shards, looked at before time is spent on them: every byte, every image, every label, and
the set as a whole.

Errors are what `distseg pack` refuses too, and damage since: training must not start. Warnings are
what may be meant.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shards.errors import InputError
from shards.files import tracked
from shards.index import is_labelled, parsed, problem_of
from shards.look import (
    ERROR,
    PACK_AGAIN,
    WARNING,
    Finding,
    Look,
    look_at,
    other_members,
    wrong_frame,
)
from shards.manifest import Manifest, ShardInfo, sha256_of
from shards.sample import IGNORE_INDEX, ClassSet
from shards.similar import BITS, MAX_BITS, close_pairs
from shards.verified import mark_verified, withdraw
from shards.words import counted

CHUNK = 16  # samples a task
MAX_COMPARED = 100_000  # pictures; more take minutes
# THIN_SHARE lies between the sound labels and the resized ones that look.thin_share was measured on
VOID_SHARE, ONE_CLASS_SHARE, THIN_SHARE = 0.3, 0.5, 0.14  # of a split, above which it is mentioned
# longest side to shortest; a class's share in two splits; a share below which chance decides
SIZE_RATIO, CLASS_RATIO, NOTICEABLE = 4.0, 10.0, 0.001
SMALL_SHARD, LARGE_SHARD, MANY_SHARDS = 1e6, 4e9, 100  # bytes, bytes, files
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Inspection:
    """What was found in a directory of shards."""

    manifest: Manifest
    findings: list[Finding]  # errors first
    looks: list[Look]  # every sample that could be located, in packed order

    @property
    def errors(self) -> list[Finding]:
        """The findings for which training must not start."""
        return [finding for finding in self.findings if finding.level == ERROR]

    def splits(self) -> dict[str, dict[str, Any]]:
        """Per split, plain values: samples, unlabelled, void share, sizes (height, width), pixels
        and images per class.

        share: of the pixels that are not void, in [0, 1].
        """
        return {name: self._split(name) for name in self.manifest.splits}

    def _split(self, name: str) -> dict[str, Any]:
        looks = [look for look in self.looks if look.split == name]
        pixels, images = _histogram(looks)  # (256,) int64 each, void at 255
        classes = self.manifest.classes.names
        # shares are of the pixels that count: with void among them, two splits would not compare
        valid, every = int(pixels[: len(classes)].sum()), int(pixels.sum())
        sizes = sorted(
            (look.size for look in looks if look.size), key=lambda size: size[0] * size[1]
        )
        return {
            "samples": len(looks),
            "unlabelled": sum(not is_labelled(look.entry) for look in looks),
            "shards": len(self.manifest.splits[name].shards),
            "bytes": sum(shard.num_bytes for shard in self.manifest.splits[name].shards),
            # max(1, ...): a split of unlabelled images has no pixel
            "void_share": int(pixels[IGNORE_INDEX]) / max(1, every),
            "smallest": sizes[0] if sizes else None,
            "median": sizes[len(sizes) // 2] if sizes else None,
            "largest": sizes[-1] if sizes else None,
            "classes": {
                name: {
                    "pixels": int(pixels[i]),
                    "share": int(pixels[i]) / max(1, valid),
                    "images": int(images[i]),
                }
                for i, name in enumerate(classes)
            },
        }


def inspect(directory: Path, num_threads: int | None = None) -> Inspection:
    """Read and check all shards; nothing is written. num_threads: None, as many as there are cores.

    Raises InputError when there is no manifest, or one that is damaged or of another version;
    everything else that is wrong is a finding.
    """
    manifest = Manifest.load(directory)
    # threads, not processes: hashing and decoding run without the interpreter's lock, and the looks
    # need not be pickled
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        findings, looks = _look_at_all(directory, manifest, pool)
    damaged = any(finding.level == ERROR for finding in findings)
    inspection = Inspection(manifest, findings, looks)
    findings += _keys(looks)
    # where samples are damaged or lost, the counts cannot agree: that is known already
    findings += [] if damaged else _counts(inspection)
    findings += _classes(inspection)
    findings += _labels(inspection)
    findings += _sizes(inspection)
    findings += _files(directory, manifest)
    findings += _duplicates(looks)
    # stable: within a level the order of the checks stays
    findings.sort(key=lambda finding: finding.level != ERROR)
    return inspection


@dataclass(frozen=True)
class _Chunk:
    """Some samples of a shard: the work of one task, large enough to be worth handing over."""

    split: str
    shard: ShardInfo
    entries: list[dict[str, Any]]


def _look_at_all(
    directory: Path, manifest: Manifest, pool: ThreadPoolExecutor
) -> tuple[list[Finding], list[Look]]:
    """What the checksums and the samples say by themselves; a look at every sample, as packed."""
    names: list[str] = []
    shards: list[ShardInfo] = []
    for name, split in manifest.splits.items():
        names += [name] * len(split.shards)
        shards += split.shards

    def check(shard: ShardInfo) -> tuple[list[Finding], list[dict[str, Any]]]:
        return _check_shard(directory, shard, is_foreign=bool(manifest.codes))

    def look(chunk: _Chunk) -> list[Look]:
        where = (directory, chunk.split, chunk.shard)
        return [look_at(*where, entry, manifest) for entry in chunk.entries]

    findings: list[Finding] = []
    chunks: list[_Chunk] = []
    # checksums first: they show where samples can be located at all
    checked = _parallel(pool, check, shards, "checksums of shards")
    for name, shard, (found, entries) in zip(names, shards, checked, strict=True):
        findings += found
        for start in range(0, len(entries), CHUNK):
            chunks.append(_Chunk(name, shard, entries[start : start + CHUNK]))
    looks: list[Look] = []
    for some in _parallel(pool, look, chunks, f"images and labels, {CHUNK} at a time"):
        looks += some
    for one in looks:
        findings += one.findings
    return findings, looks


def record(directory: Path, inspection: Inspection) -> None:
    """Make training accept the shards, or refuse them when there are errors."""
    if inspection.errors:
        # a record of an earlier, sound state would let training start
        withdraw(directory)
    else:
        mark_verified(directory, inspection.manifest)


def _parallel(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item], what: str
) -> list[Result]:
    """Results in order, with progress.

    What has not begun is dropped at the first exception, Ctrl-C among them.
    """
    futures: list[Future[Result]] = [pool.submit(function, item) for item in items]
    try:
        return list(tracked((future.result() for future in futures), len(futures), what))
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _check_shard(
    directory: Path, info: ShardInfo, is_foreign: bool
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Checksums of a tar and its index; its samples as far as they can be located."""
    findings, entries = _read_index(directory, info, is_foreign)
    path = directory / info.file
    if not path.is_file():
        findings.append(_damage(info.file, f"missing, with {info.num_samples} samples"))
        return findings, []
    if sha256_of(path) != info.sha256:
        what = (
            f"its sha256 is not the manifest's ({path.stat().st_size} bytes, "
            f"{info.num_bytes} as packed)"
        )
        findings.append(_damage(info.file, what))
        # what lies between the members of others is theirs
        findings += [] if is_foreign else wrong_frame(directory, info, entries)
    # both files are the manifest's: but do they belong together? training goes by the index alone,
    # plain webdataset by the tar alone
    elif not findings:
        findings += other_members(directory, info, entries, is_foreign)
    return findings, entries


def _read_index(
    directory: Path, info: ShardInfo, is_foreign: bool
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """The lines of a member index that can be used, and what is wrong with the others."""
    path, file = directory / info.index_file, info.index_file
    if not path.is_file():
        return [_damage(file, "missing, so that the shard's samples cannot be located")], []
    if sha256_of(path) != info.index_sha256:
        what = "its sha256 is not the manifest's, so that no sample of the shard was looked at"
        return [_damage(file, what)], []
    try:
        content = parsed(path.read_bytes(), str(path))
    except InputError:
        what = "is not JSON, so that no sample of the shard was looked at"
        return [_damage(file, what)], []
    findings, entries = [], []
    for entry in content:
        problem = problem_of(entry, info.num_bytes)
        if not problem and is_foreign and entry.get("names", {}).keys() != entry["members"].keys():
            problem = f"{entry['key']} has members without names"
        if problem:
            findings.append(Finding(ERROR, "member index", file, "", problem, PACK_AGAIN))
        else:
            entries.append(entry)
    if len(content) != info.num_samples:
        what = f"{counted(len(content), 'sample')}; the manifest says {info.num_samples}"
        findings.append(_damage(file, what))
    unlabelled = sum(not is_labelled(entry) for entry in entries)
    # None: of a pack that did not count them
    if not findings and info.num_unlabelled not in (None, unlabelled):
        what = f"{unlabelled} samples have no label; the manifest says {info.num_unlabelled}"
        findings.append(_damage(file, what))
    return findings, entries


def _damage(file: str, what: str) -> Finding:
    return Finding(ERROR, "checksum", file, "", what, PACK_AGAIN)


def _histogram(looks: Sequence[Look]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and images by index, (256,) int64 each."""
    pixels, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for look in looks:
        if look.pixels is not None:
            pixels += look.pixels
            images += look.pixels > 0  # images, not pixels, that have the class
    return pixels, images


def _keys(looks: list[Look]) -> list[Finding]:
    # over all splits: `pack --append` refuses a key that another split has, too
    times, findings = Counter(look.key for look in looks), []
    for look in looks:
        if times[look.key] > 1:
            what = f"{times[look.key]} samples have this key"
            findings.append(
                Finding(
                    ERROR, "key", look.shard, look.key, what, "give each its own, and pack again"
                )
            )
    return findings


def _counts(inspection: Inspection) -> Iterator[Finding]:
    """The manifest's pixel counts against the labels'."""
    for name, split in inspection.manifest.splits.items():
        pixels, _ = _histogram([look for look in inspection.looks if look.split == name])
        counted = (tuple(pixels[: len(split.class_pixels)].tolist()), int(pixels[IGNORE_INDEX]))
        if counted != (split.class_pixels, split.void_pixels):
            what = f"split {name}: the manifest's pixels per class are not its labels'"
            yield Finding(ERROR, "manifest", "", "", what, "pack again")


def _warning(check: str, what: str, action: str) -> Finding:
    """A warning about the set as a whole, not about a shard or a sample."""
    return Finding(WARNING, check, "", "", what, action)


def _classes(inspection: Inspection) -> Iterator[Finding]:
    """Classes that are nowhere, in one split only, or in very different shares; colours that are
    the same.
    """
    labelled = {}
    for split, about in inspection.splits().items():
        # a split without labels would report every class as absent
        if about["samples"] > about["unlabelled"]:
            labelled[split] = about["classes"]
    for index, name in enumerate(inspection.manifest.classes.names):
        counts = {split: classes[name] for split, classes in labelled.items()}
        yield from _class(index, name, counts)
    yield from _colors(inspection.manifest.classes)


def _class(index: int, name: str, counts: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """counts: per split, pixels, share and images of this class."""
    absent = [split for split, count in counts.items() if not count["pixels"]]
    if absent and absent == list(counts):
        # a class too many is at the end of the list; labels from 1 leave the first one empty
        reason = "do the labels begin at 1" if index == 0 else "is the list of classes too long"
        action = f"{reason}, or is it void everywhere? its IoU will be empty"
        yield _warning("class absent", f"{name!r} ({index}) is in no label", action)
        return
    for split in absent:
        if split == "train":
            shown = [other for other, count in counts.items() if count["pixels"]]
            others = ", ".join(
                f"{counted(counts[other]['images'], 'image')} of {other}" for other in shown
            )
            what = f"{name!r} ({index}) is never in train, but in {others}"
            action = "split anew, or take it out: its IoU will be 0"
            yield _warning("class never trained", what, action)
        else:
            what = f"{name!r} ({index}) is in no label of {split}"
            action = f"split anew: {split} cannot say how well it is learned"
            yield _warning("class absent", what, action)
    for split, count in counts.items():
        # without a train split each is compared to itself, and nothing is said
        low, high = sorted((count["share"], counts.get("train", count)["share"]))
        # of rare classes the shares differ by chance
        if low and high > NOTICEABLE and high > CLASS_RATIO * low:
            train = counts["train"]["share"]
            what = f"{name!r} ({index}) is {train:.3%} of train and {count['share']:.3%} of {split}"
            yield _warning("class shares", what, "is the split random?")


def _colors(classes: ClassSet) -> Iterator[Finding]:
    for color, times in Counter(classes.palette).items():
        if times > 1:
            pairs = zip(classes.names, classes.palette, strict=True)
            names = ", ".join(name for name, other in pairs if other == color)
            what = f"{names} have the same colour {color}"
            yield _warning("colours", what, "give them different ones")


def _labels(inspection: Inspection) -> Iterator[Finding]:
    """What labels look like that were made by a wrong conversion, split by split."""
    for name, about in inspection.splits().items():
        labels = []
        for look in inspection.looks:
            if look.split == name and look.pixels is not None:
                labels.append(look)
        for check, what, action in _odd_labels(name, about, labels):
            # with one class there is nothing to tell apart: every label is "one class only"
            if check == "unlabelled" or inspection.manifest.classes.num_classes > 1:
                yield _warning(check, f"split {name}: {what}", action)


def _odd_labels(
    split: str, about: dict[str, Any], labels: list[Look]
) -> Iterator[tuple[str, str, str]]:
    """(check, what, action) of a split whose samples have these labels."""
    if about["unlabelled"] and (split != "train" or not labels):
        what = f"{about['unlabelled']} of {about['samples']} samples have no label"
        yield "unlabelled", what, "label them, or move them into train for mode=semi_supervised"
    if not labels:
        return
    if about["void_share"] > VOID_SHARE:
        what = f"{about['void_share']:.1%} of the pixels are void"
        action = "is 255 in the masks a class? it is void here"
        if about["void_share"] == 1:
            action = "training refuses to train or score on it; " + action
        yield "void", what, action
    pixels, _ = _histogram(labels)
    used = np.flatnonzero(pixels)
    single = 0
    for look in labels:
        # void aside: an object cut out of void is one class, too
        single += look.pixels is not None and int((look.pixels[:IGNORE_INDEX] > 0).sum()) == 1
    if len(used) == 2 and used[1] == IGNORE_INDEX:
        what = f"only {used[0]} and 255 occur"
        yield "0/255 mask", what, "is it a black and white mask? white must be an index: 1"
    elif single > ONE_CLASS_SHARE * len(labels):
        what = f"{single} of {len(labels)} labels have one class only"
        yield "one class", what, "was the conversion to indices right? see the contact sheet"
    # the median: a few labels of wires and fences are thin by nature
    thin = float(np.median([look.thin for look in labels]))
    if thin > THIN_SHARE:
        what = f"{thin:.0%} of the border pixels of the median label are unlike both neighbours"
        action = "were labels resized with interpolation, or kept as JPEG? "
        yield "frayed labels", what, action + "resize them with nearest sampling"


def _sizes(inspection: Inspection) -> Iterator[Finding]:
    for name in inspection.manifest.splits:
        # by the longer side: a portrait is no other size than a landscape
        sized = [
            (max(look.size), look) for look in inspection.looks if look.split == name and look.size
        ]
        if not sized:
            continue
        (short, small), (long, large) = (
            pick(sized, key=lambda pair: pair[0]) for pick in (min, max)
        )
        if long > SIZE_RATIO * short:
            what = f"split {name}: longer sides from {short} to {long} px ({large.key})"
            action = "one crop cannot suit both: resize them, or take the odd ones out"
            yield Finding(WARNING, "image sizes", small.shard, small.key, what, action)


def _files(directory: Path, manifest: Manifest) -> Iterator[Finding]:
    shards = manifest.shards()
    for shard in shards:
        if shard.num_bytes > LARGE_SHARD:
            what = f"{shard.num_bytes / 1e9:.1f} GB: slow to copy, and again when it is damaged"
            yield Finding(
                WARNING, "shard size", shard.file, "", what, "pack with fewer --samples-per-shard"
            )
    mean = sum(shard.num_bytes for shard in shards) / max(1, len(shards))
    # many and small: a small set has small shards, and nothing to gain from fewer
    if len(shards) > MANY_SHARDS and mean < SMALL_SHARD:
        what = f"{len(shards)} shards of {mean / 1e6:.2f} MB: every rank opens them all"
        yield Finding(WARNING, "shard size", "", "", what, "pack with more --samples-per-shard")
    for path in sorted(directory.glob("*.tar")):
        if path.name not in {shard.file for shard in shards}:
            what = "the manifest does not name it; a plain webdataset glob would read it"
            yield Finding(WARNING, "stray shard", path.name, "", what, "move it away")


def _duplicates(looks: list[Look]) -> Iterator[Finding]:
    """The same picture twice: by its pixels, or nearly, by its fingerprint."""
    first: dict[bytes, Look] = {}
    for look in looks:
        if look.image_digest:
            # each against the first: three copies are two findings, not three
            one = first.setdefault(look.image_digest, look)
            if one is not look:
                yield _twice(one, look, 0, same_pixels=True)
    # exact copies are found by now, and would be found once more
    kept = [look for look in first.values() if look.fingerprint is not None]
    if len(kept) > MAX_COMPARED:
        what = (
            f"{len(kept)} pictures: only the first {MAX_COMPARED} were compared for near-duplicates"
        )
        yield Finding(WARNING, "not compared", "", "", what, "inspect parts of the set")
        kept = kept[:MAX_COMPARED]
    if len(kept) > 1:
        yield from _nearly(kept)


def _nearly(kept: list[Look]) -> Iterator[Finding]:
    """Pairs over two splits one by one; those within a split, frames of a video most often, as one
    finding: a warning for each would hide all others.
    """
    within: dict[str, dict[int, tuple[int, Look, Look]]] = {}
    prints = [look.fingerprint for look in kept if look.fingerprint is not None]
    for a, b, bits in close_pairs(np.stack(prints)):
        one, other = kept[a], kept[b]
        if one.split == other.split:
            alike = within.setdefault(one.split, {})
            # under both numbers, as pictures are counted, not pairs
            alike.setdefault(a, (bits, one, other))
            alike.setdefault(b, (bits, one, other))
        else:
            yield _twice(one, other, bits, same_pixels=False)
    for split, alike in within.items():
        bits, one, other = min(alike.values(), key=lambda pair: pair[0])
        total = sum(look.split == split for look in kept)
        what = f"in {split}, is {other.key} within {bits} of {BITS} bits (up to {MAX_BITS} count), "
        what += f"the closest of {len(alike)} of {total} pictures that are nearly another one"
        action = "frames of a video? keep each video in one split, and take some frames only"
        yield Finding(WARNING, "nearly same picture in a split", one.shard, one.key, what, action)


def _twice(one: Look, other: Look, bits: int, same_pixels: bool) -> Finding:
    # in two splits it is worse: the score is then in part of what was trained on
    across = one.split != other.split
    check = (
        ("same" if same_pixels else "nearly same")
        + " picture in "
        + ("two splits" if across else "a split")
    )
    what = f"in {one.split}, is {other.key} in {other.split} ({other.shard})"
    what += "" if same_pixels else f" within {bits} of {BITS} bits (up to {MAX_BITS} count)"
    # labelled twice, and differently: one of the two labels is wrong
    if same_pixels and one.label_digest != other.label_digest:
        what += ", with another label"
    action = (
        f"take one out: {other.split} then measures memory"
        if across
        else "take one out, or let it count twice"
    )
    return Finding(WARNING, check, one.shard, one.key, what, action)
