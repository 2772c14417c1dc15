"""manifest.json: what a directory of shards holds, with checksums. It is written last."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import InputError
from shards.files import published
from shards.sample import ClassSet
from shards.storage import is_file, read_bytes

VERSION = 1
FILE_NAME = "manifest.json"


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
    was packed from (see pack.source_of), which says whether packing again would change anything.
    """

    version: int
    name: str
    classes: ClassSet
    splits: dict[str, SplitInfo]
    left_out: int = 0
    sources: dict[str, str] = field(default_factory=dict)

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
        action = (
            f"make it with `distseg pack FILE.h5 --out {directory}` "
            "(FILE.h5: from `distseg prepare`)"
        )
        if not is_file(path):
            raise InputError(f"no {path}", "a directory of packed shards with its manifest", action)
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # a ClassSet's InputError does not name the file, and is wrapped like the others
            if isinstance(error, InputError) and place in error.got:
                raise
            raise InputError(
                f"{place}: damaged ({error!r})", "the manifest that `distseg pack` wrote", action
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
        return content | ({"left_out": self.left_out} if self.left_out else {})

    def shards(self) -> list[ShardInfo]:
        """All shards of all splits."""
        found: list[ShardInfo] = []
        for split in self.splits.values():
            found += split.shards
        return found


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashed(file).hexdigest()


def hashed(file: BinaryIO) -> hashlib._Hash:
    """The running sha256 of a file, from where it stands to its end."""
    digest = hashlib.sha256()
    # 1 MiB at a time: a shard may be larger than the memory; hashlib lets other threads run
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _from_json(content: dict[str, Any]) -> Manifest:
    # JSON has lists only, which would equal no ClassSet of ours, nor be hashable
    palette = tuple((int(r), int(g), int(b)) for r, g, b in content["classes"]["palette"])
    splits = {}
    for name, split in content["splits"].items():
        shards = tuple(ShardInfo(**shard) for shard in split["shards"])
        pixels = tuple(split["class_pixels"])
        splits[name] = SplitInfo(shards, split["num_samples"], pixels, split["void_pixels"])
    classes = ClassSet(tuple(content["classes"]["names"]), palette)
    extra = content.get("left_out", 0), content.get("sources", {})  # absent in older packs
    return Manifest(content["version"], content["name"], classes, splits, *extra)
