"""manifest.json: what a directory of shards holds, with checksums. It is written last."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards.errors import InputError
from shards.files import published
from shards.names import check_name
from shards.sample import IGNORE_INDEX, ClassSet, decode_coded_label, decode_label
from shards.storage import is_file, read_bytes
from shards.words import making, place_for_shards

VERSION = 1
FILE_NAME = "manifest.json"
MAX_COUNT = 2**62  # of samples, bytes or pixels: sums of a few stay within int64


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, samples, bytes, and the sha256 of the tar and of its member index.

    num_unlabelled: samples without a label; None: of a pack that did not count them.
    """

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    # younger than version 1, so optional: manifests without it keep their bytes and their sha256
    num_unlabelled: int | None = None

    @property
    def index_file(self) -> str:
        """Name of the member index beside the tar."""
        return str(Path(self.file).with_suffix(".index.json"))


@dataclass(frozen=True)
class SplitInfo:
    """The shards of one split in order, and how its pixels are shared among the classes."""

    shards: tuple[ShardInfo, ...]
    num_samples: int
    class_pixels: tuple[int, ...]
    void_pixels: int


@dataclass(frozen=True)
class Manifest:
    """A packed data set: its name, classes, and splits by name.

    left_out: samples that `distseg prepare --skip-bad` left out; sources: for each split, what it
    was packed from (see pack.source_of), which says whether packing again would change anything;
    codes: of shards that others wrote (see shards.foreign), what the values of their masks mean, as
    (value, class index or 255), empty where the labels are `pack`'s.
    """

    version: int
    name: str
    classes: ClassSet
    splits: dict[str, SplitInfo]
    left_out: int = 0
    sources: dict[str, str] = field(default_factory=dict)
    codes: tuple[tuple[int, int], ...] = ()

    def decode_label(self, png: bytes) -> np.ndarray:
        """(H, W) uint8, class indices and 255, of a label of these shards.

        Raises InputError for another picture than they have.
        """
        return decode_coded_label(png, self._table) if self.codes else decode_label(png)

    @cached_property
    def _table(self) -> np.ndarray:
        # int16: what is not named is no index at all
        table = np.full(256, -1, np.int16)
        for value, index in self.codes:
            table[value] = index
        return table

    # it writes into __dict__, past the guard of a frozen dataclass
    @cached_property
    def sha256(self) -> str:
        """Identity of the data: of the canonical JSON, which names the sha256 of every shard."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, the same bytes for the same content.

        The sources are none of it.
        """
        return json.dumps(self._content(), indent=1, sort_keys=True) + "\n"

    def save(self, directory: Path) -> None:
        """Write manifest.json, whole or not at all, with its own sha256."""
        with published(directory / FILE_NAME) as partial:
            partial.write_text(self._file_text())

    @staticmethod
    def load(directory: Path) -> Manifest:
        """Read manifest.json. Raises InputError: it is missing, damaged or of another version."""
        path = directory / FILE_NAME
        if not is_file(path):
            needed = "a directory of packed shards with its manifest"
            raise InputError(f"no {path}", needed, _instead(directory))
        action = f"make it again: {making(None, directory)}"
        return Manifest.parse(read_bytes(path), str(path), action)

    @staticmethod
    def parse(content: bytes, place: str, action: str) -> Manifest:
        """The manifest in a file's bytes. Raises InputError with place and action, like `load`."""
        try:
            text = content.decode()
            values = json.loads(text)
            if values["version"] != VERSION:
                raise InputError(
                    f"{place}: version {values['version']}", f"version {VERSION}", action
                )
            manifest = _from_json(values)
            # written once more and compared: finds an edit by hand, a lost field, and a sha256 that
            # is not the content's
            if manifest._file_text() != text:
                raise ValueError("not the bytes that were written")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # a ClassSet's InputError does not name the file, and is wrapped like the others
            if isinstance(error, InputError) and place in error.got:
                raise
            why = error.got if isinstance(error, InputError) else repr(error)
            raise InputError(
                f"{place}: damaged ({why})", "the manifest that `distseg pack` wrote", action
            ) from None

    def verify(self, directory: Path) -> None:
        """Read every shard and index.

        Raises InputError naming the first that is missing or not as packed.
        """
        for shard in self.shards():
            for file, expected in (
                (shard.file, shard.sha256),
                (shard.index_file, shard.index_sha256),
            ):
                path = directory / file
                if not path.is_file():
                    raise InputError(
                        f"no {path}", "every shard that the manifest names", "pack again"
                    )
                if sha256_of(path) != expected:
                    raise InputError(
                        f"{path}: sha256 is not the manifest's", "the bytes as packed", "pack again"
                    )

    def _file_text(self) -> str:
        content = self._content() | {"sha256": self.sha256}
        if self.sources:
            # with the data's sha256 in it: sources taken from another manifest do not fit
            sealed = hashlib.sha256(
                (self.sha256 + repr(sorted(self.sources.items()))).encode()
            ).hexdigest()
            content |= {"sources": self.sources, "sources_sha256": sealed}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def _content(self) -> dict[str, Any]:
        """What makes the data; maps of other bytes can hold the same.

        What older packs did not know is not written.
        """
        splits = {}
        for name, split in self.splits.items():
            shards = [_without_none(vars(shard)) for shard in split.shards]
            splits[name] = vars(split) | {"shards": shards}
        content = {
            "version": self.version,
            "name": self.name,
            "classes": asdict(self.classes),
            "splits": splits,
        }
        # nothing, not 0: else each manifest from before it would have another sha256
        content |= {"left_out": self.left_out} if self.left_out else {}
        return content | ({"codes": self.codes} if self.codes else {})

    def shards(self) -> list[ShardInfo]:
        """All shards of all splits."""
        found: list[ShardInfo] = []
        for split in self.splits.values():
            found += split.shards
        return found


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def sha256_of(path: Path, moved: Callable[[], None] = lambda: None) -> str:
    """Hex sha256 of a file; `moved` is called at each MiB, as reading a large one may last."""
    with path.open("rb") as file:
        return hashed(file, moved).hexdigest()


def hashed(file: BinaryIO, moved: Callable[[], None] = lambda: None) -> hashlib._Hash:
    """The running sha256 of a file, from where it stands to its end."""
    digest = hashlib.sha256()
    # 1 MiB at a time: a shard may be larger than the memory; hashlib lets other threads run
    while block := file.read(1 << 20):
        digest.update(block)
        moved()
    return digest


def _from_json(content: dict[str, Any]) -> Manifest:
    # JSON has lists only, which would equal no ClassSet of ours, nor be hashable
    palette = tuple((int(r), int(g), int(b)) for r, g, b in content["classes"]["palette"])
    classes = ClassSet(tuple(content["classes"]["names"]), palette)
    # files of reports are called by both names
    check_name(content["name"], "the name", "pack the data again, under another name")
    splits = {}
    for name, split in content["splits"].items():
        check_name(name, "split", "pack the data again, with splits of other names")
        splits[name] = _split(split, classes.num_classes)
    extra = content.get("left_out", 0), content.get("sources", {})  # absent in older packs
    codes = tuple((value, index) for value, index in content.get("codes", ()))
    _check_counts(extra[0])
    _check_codes(codes, classes.num_classes)
    manifest = Manifest(content["version"], content["name"], classes, splits, *extra, codes)
    files = [shard.file for shard in manifest.shards()]
    if len(set(files)) != len(files):
        raise ValueError("a shard that is named twice")
    return manifest


def _instead(directory: Path) -> str:
    """What to do about a place without a manifest."""
    if any(directory.glob("*.tar")):
        # ours have lost their manifest, or they never had one
        again = making(None, directory)
        return f"tars of another program: `distseg import {directory}`; else make it: {again}"
    if directory.is_file() and directory.suffix in (".h5", ".hdf5"):
        # maps in the place of shards: the folder they are mostly packed into is beside them
        out = directory.with_suffix("")
        return f"name the shards; `distseg pack {directory} --out {out}` makes them"
    inside = sorted(path.parent for path in directory.glob(f"*/{FILE_NAME}"))
    if inside:
        more = f", or another of its {len(inside)}" if len(inside) > 3 else ""
        return f"name a data set in it: {', '.join(map(str, inside[:3]))}{more}"
    # hidden: what a pack that was killed has left
    if any(not path.name.startswith(".") for path in directory.glob("*")):
        out = place_for_shards(directory)
        return f"for images and masks of your own: {making(directory, out)}"
    return f"make it: {making(None, directory, _data_set(directory.name))}"


def _data_set(name: str) -> str:
    """A data set that a folder is called after, as `distseg prepare` takes it."""
    # here, as preparers need more than readers of shards
    from shards.prepare import NAMES, preparer_of

    if name not in NAMES:
        return "NAME --root DIR"
    is_raw = "root" in inspect.signature(preparer_of(name)).parameters
    return f"{name} --root DIR" if is_raw else name


def _split(split: dict[str, Any], num_classes: int) -> SplitInfo:
    shards = tuple(_checked(ShardInfo(**shard)) for shard in split["shards"])
    pixels = tuple(split["class_pixels"])
    found = SplitInfo(shards, split["num_samples"], pixels, split["void_pixels"])
    _check_counts(found.num_samples, found.void_pixels, *pixels)
    if len(pixels) != num_classes:
        raise ValueError(f"pixels of {len(pixels)} classes, and {num_classes} classes")
    if sum(shard.num_samples for shard in shards) != found.num_samples:
        raise ValueError(f"{found.num_samples} samples, and its shards have others")
    return found


def _checked(shard: ShardInfo) -> ShardInfo:
    """A shard whose fields are what they say. All of them come from a file of others."""
    check_name(shard.file, "shard", "pack the data again")
    # anything else would be taken for a shard wherever shards are moved, fetched or replaced
    if not shard.file.endswith(".tar"):
        raise ValueError(f"shard {shard.file!r} is no .tar")
    # the length becomes a part of a name in the cache, as the checksums do
    _check_counts(shard.num_samples, shard.num_bytes, shard.num_unlabelled or 0)
    for sha256 in (shard.sha256, shard.index_sha256):
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"sha256 {sha256[:80]!r}")
    return shard


def _check_codes(codes: tuple[tuple[int, int], ...], num_classes: int) -> None:
    for value, index in codes:
        _check_counts(value, index)
        if value > IGNORE_INDEX or not (index < num_classes or index == IGNORE_INDEX):
            raise ValueError(f"a mask value {value} for class {index}")
    if len(dict(codes)) != len(codes):
        raise ValueError("a mask value that means two things")


def _check_counts(*counts: Any) -> None:
    for count in counts:
        # type, not isinstance: true is an int, too
        if type(count) is not int or not 0 <= count < MAX_COUNT:
            raise ValueError(f"{str(count)[:80]!r} where a count is needed")
