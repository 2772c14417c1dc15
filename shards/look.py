"""One sample of a shard, looked at closely.

What is wrong with it, and what the whole set's checks need to know.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import InputError
from shards.images import orientation, with_picture
from shards.manifest import Manifest, ShardInfo
from shards.patterns import key_of
from shards.sample import IGNORE_INDEX, UNREADABLE, ClassSet, decode_image
from shards.similar import fingerprint

ERROR, WARNING = "error", "warning"
# headers, and members with their padding, are whole blocks
BLOCK = 512  # a tar's unit
PACK_AGAIN = "copy the shard again, or pack again"
CORRECT = "correct the source, then `distseg prepare` and `distseg pack` again"


@dataclass(frozen=True)
class Finding:
    """What is wrong where, and what to do. shard, sample: "" where it concerns all of them."""

    level: str  # error: training must not start; warning: it may be meant
    check: str
    shard: str
    sample: str
    what: str
    action: str


@dataclass
class Look:
    """One sample, looked at."""

    split: str
    shard: str
    key: str
    entry: dict[str, Any]  # its line of the member index
    findings: list[Finding] = field(default_factory=list)
    size: tuple[int, int] | None = None  # height, width; None: unreadable
    pixels: np.ndarray | None = None  # (256,) uint32, by index; None: unlabelled or unreadable
    thin: float = 0.0  # see thin_share
    # of the decoded pixels: the same picture in another file is found too
    image_digest: bytes = b""
    label_digest: bytes = b""
    fingerprint: np.ndarray | None = None

    def find(self, level: str, check: str, what: str, action: str) -> None:
        """Add a finding about this sample."""
        self.findings.append(Finding(level, check, self.shard, self.key, what, action))


def look_at(
    directory: Path, split: str, info: ShardInfo, entry: dict[str, Any], manifest: Manifest
) -> Look:
    """Read, check and decode one sample; never raises for what is in it."""
    look = Look(split, info.file, entry["key"], entry)
    members = read_members(directory, look)
    kinds = [kind for kind in ("jpg", "image.png") if kind in members]
    # image: (H, W, 3) uint8
    if kinds and (image := _image(look, members[kinds[0]])) is not None:
        look.fingerprint = fingerprint(image)
        if image.min() == image.max():
            look.find(
                WARNING,
                "blank image",
                f"every pixel is {image[0, 0].tolist()}",
                "look at the source file",
            )
    if "png" in members:
        _label(look, members["png"], manifest)
    if "json" in members:
        _about(look, members["json"])
    return look


def read_members(directory: Path, look: Look) -> dict[str, bytes]:
    """The sample's members with the bytes that were packed, by kind; findings for the others."""
    members = {}
    try:
        # opened anew: threads that shared a file would move each other's position
        with (directory / look.shard).open("rb") as file:
            for kind, (offset, length, crc32) in look.entry["members"].items():
                file.seek(offset)
                content = file.read(length)
                if len(content) == length and zlib.crc32(content) == crc32:
                    members[kind] = content
                else:
                    why = (
                        "is cut off"
                        if len(content) < length
                        else "is not the bytes that were packed (crc32)"
                    )
                    look.find(ERROR, "checksum", f"its .{kind} {why}", PACK_AGAIN)
    except OSError as error:
        look.find(ERROR, "checksum", str(error), PACK_AGAIN)
    return members


def wrong_frame(directory: Path, info: ShardInfo, entries: list[dict[str, Any]]) -> list[Finding]:
    """Damage between the members of a shard: in a tar header, in the padding, behind the last
    member.

    Training never reads these bytes; plain webdataset does, and silently drops what follows.
    """
    findings, end, key = [], 0, ""
    # by hand: tarfile stops at the first damage, and would not say what lies behind it
    with (directory / info.file).open("rb") as file:
        for entry in entries:
            for kind, (offset, length, _) in sorted(
                entry["members"].items(), key=lambda item: item[1][0]
            ):
                key = entry["key"]
                file.seek(end)
                # an index of others may lead backwards
                between = file.read(max(0, offset - end))
                padding, header = between[: -end % BLOCK], between[-end % BLOCK :]
                whole = not any(padding) and _is_header(header, f"{key}.{kind}", length)
                if not whole:
                    what = f"the tar header of its .{kind}, or the padding before it, is damaged"
                    findings.append(Finding(ERROR, "checksum", info.file, key, what, PACK_AGAIN))
                end = offset + length
        file.seek(end)
        rest = file.read()
    if any(rest) or end + len(rest) != info.num_bytes:
        what = "the bytes behind this sample, the shard's last, are damaged"
        findings.append(Finding(ERROR, "checksum", info.file, key, what, PACK_AGAIN))
    return findings


def _is_header(header: bytes, name: str, length: int) -> bool:
    """Whether the bytes before a member are the header that was packed."""
    try:
        with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
            # a header that is damaged raises here, by its own checksum
            member = tar.next()
        # None: nothing but zeros, where a tar would end
        if member is None or (member.name, member.size) != (name, length):
            return False
        # a long name is in blocks of its own, without a checksum
        return len(header) == BLOCK or member.tobuf(tarfile.PAX_FORMAT) == header
    except (tarfile.TarError, ValueError):
        return False


def other_members(
    directory: Path, info: ShardInfo, entries: list[dict[str, Any]], is_foreign: bool
) -> list[Finding]:
    """Where the member index of a shard is not that of its tar: other names, places or lengths.

    is_foreign: of a tar that others wrote, whose members may have any names, and company.
    """
    findings: list[Finding] = []

    def find(key: str, what: str) -> None:
        findings.append(Finding(ERROR, "member index", info.file, key, what, "pack again"))

    spans: dict[str, list[int]] = {}
    try:
        with tarfile.open(directory / info.file, "r:") as tar:
            for member in tar:
                if member.name in spans:
                    find("", f"{member.name[:80]!r} is twice in the tar")
                spans[member.name] = [member.offset_data, member.size]
    except (tarfile.TarError, ValueError) as error:
        find("", f"no tar that can be read to its end ({error})")
        return findings
    for entry in entries:
        for kind, (offset, length, _) in entry["members"].items():
            name = entry["names"].get(kind) if is_foreign else f"{entry['key']}.{kind}"
            span = spans.pop(name, None)
            # the id is a part of the name, see shards.patterns
            if is_foreign and entry["key"] not in key_of(name):
                find(entry["key"], f"its .{kind} is {name[:80]!r} in the tar")
            if span != [offset, length]:
                said = "is nowhere in the tar" if span is None else f"lies at {span} in the tar"
                find(entry["key"], f"its .{kind} {said}, at {[offset, length]} by the index")
    # a label among them would be a label that training leaves out
    for name in () if is_foreign else spans:
        find("", f"{name[:80]!r} is in the tar, and not in the index")
    return findings


def _image(look: Look, content: bytes) -> np.ndarray | None:
    try:
        image = decode_image(content)
        # simplejpeg ignores the orientation, and viewers follow it: a label drawn in a viewer is
        # turned
        turned, mode = with_picture(content, lambda opened: (orientation(opened), opened.mode))
    except (InputError, *UNREADABLE) as error:
        got = error.got if isinstance(error, InputError) else f"an unreadable image ({error})"
        look.find(ERROR, "unreadable image", got, CORRECT)
        return None
    look.size, expected = image.shape[:2], (look.entry["height"], look.entry["width"])
    if look.size != expected:
        look.find(
            ERROR,
            "size",
            f"image of {look.size} pixels (rows, columns), {expected} in the index",
            "pack again",
        )
    if turned != 1:
        what = f"EXIF says that viewers turn it (orientation {turned}); training does not"
        look.find(
            WARNING,
            "turned image",
            what,
            "see in the contact sheet whether its label is turned too",
        )
    if "A" in mode:
        what = f"{mode} image: training drops its transparency, whatever is underneath shows"
        look.find(WARNING, "transparent image", what, "put it on a background of your choice")
    # 16 bytes: no two pictures meet by chance, and a Look stays small
    look.image_digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    return image


def _label(look: Look, content: bytes, manifest: Manifest) -> None:
    classes = manifest.classes
    try:
        label = manifest.decode_label(content)  # (H, W) uint8
    except InputError as error:
        what = error.got if manifest.codes else _other_png(content) or error.got
        look.find(ERROR, "label format", what, CORRECT)
        return
    if look.size not in (None, label.shape):
        turned = ", which is the image turned" if look.size == label.shape[::-1] else ""
        look.find(
            ERROR, "size", f"image of {look.size} pixels, label of {label.shape}{turned}", CORRECT
        )
    # most of a Look's memory
    look.pixels = np.bincount(label.ravel(), minlength=256).astype(np.uint32)
    counts = {str(value): int(look.pixels[value]) for value in np.flatnonzero(look.pixels)}
    # by them classes are balanced, without a look at the label
    if look.entry.get("pixels", counts) != counts:
        what = "its pixels per class in the index are not its label's"
        look.find(ERROR, "member index", what, "pack again")
    look.label_digest = hashlib.blake2b(label.tobytes(), digest_size=16).digest()
    look.thin = thin_share(label)
    used = np.flatnonzero(look.pixels)
    wrong = used[(used >= classes.num_classes) & (used != IGNORE_INDEX)]
    if wrong.size:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if wrong.size > 5 else "")
        what = (
            f"{look.pixels[wrong].sum()} pixels of {shown}: indices end at "
            f"{classes.num_classes - 1}, void is 255"
        )
        if set(wrong.tolist()) <= _grays(classes):
            what += (
                "; these are gray levels of the classes' colours, so a colour mask was read as "
                "indices"
            )
        look.find(ERROR, "label range", what, CORRECT)
    elif look.pixels[IGNORE_INDEX] == label.size:
        look.find(WARNING, "all void", "no pixel of its label counts", "label it, or leave it out")


def _about(look: Look, content: bytes) -> None:
    try:
        split = json.loads(content)["split"]
    except (ValueError, TypeError, KeyError, RecursionError):
        split = None
    # a shard of train that a manifest calls val would be scored on, after training on it
    if split != look.split:
        what = f"its .json says split {split!r}, the manifest {look.split!r}"
        look.find(ERROR, "split", what, PACK_AGAIN)


def thin_share(label: np.ndarray) -> float:
    """Share of the border pixels of (H, W) uint8 that differ from both neighbours in their row, or
    in their column.

    Interpolation and JPEG write indices between two classes along their border. Median over
    Stanford Background, VOC and the toy scenes: 0.01 to 0.035; resized with bilinear sampling 0.15
    to 0.59, kept as JPEG 0.45 to 0.65. Void does not count: thin outlines of it are common.
    """
    # (H, W - 1) and (H - 1, W) bool, then (H - 2, W - 2) each: the outermost pixels lack a
    # neighbour
    across, down = label[:, 1:] != label[:, :-1], label[1:] != label[:-1]
    left, right, above, below = across[1:-1, :-1], across[1:-1, 1:], down[:-1, 1:-1], down[1:, 1:-1]
    border = (left | right | above | below) & (label[1:-1, 1:-1] != IGNORE_INDEX)
    thin = border & ((left & right) | (above & below))
    return float(thin.sum() / max(1, border.sum()))


def _grays(classes: ClassSet) -> set[int]:
    """Gray levels of the palette, as Pillow and OpenCV compute them, with their rounding."""
    # both libraries weigh the channels by ITU-R 601
    levels = {
        round(0.299 * red + 0.587 * green + 0.114 * blue) for red, green, blue in classes.palette
    }
    around: set[int] = set()
    for level in levels:
        around |= {level - 1, level, level + 1}
    return around


def _other_png(content: bytes) -> str | None:
    """What kind of picture is in the label's place."""
    kinds = {
        "P": "a palette PNG",
        "RGB": "a colour mask",
        "RGBA": "a colour mask",
        "L": "a gray PNG of another form",
    }
    try:
        with Image.open(io.BytesIO(content)) as opened:
            kind = kinds.get(opened.mode, f"a PNG of mode {opened.mode}")
        return f"{kind} in the label's place, not distseg's gray PNG of class indices"
    except UNREADABLE:
        return None
