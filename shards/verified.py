"""verified.json: says that all that a manifest names was looked at and found sound. Training asks
for it.

`distseg pack` writes it, since it decodes every image and checks every label on the way; `distseg
inspect` writes it for shards that come from elsewhere, and takes it away from shards that it finds
damaged. It is bound to the manifest's sha256, which names the sha256 of every shard: after another
manifest it means nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import InputError
from shards.files import published
from shards.manifest import Manifest

if TYPE_CHECKING:
    from shards.reader import ShardReader

FILE_NAME = "verified.json"
CHECKS = 1  # a later version that finds more errors raises it, and asks for another inspection


def mark_verified(directory: Path, manifest: Manifest) -> None:
    """Write the record, whole or not at all. Raises InputError for a full or read-only disk."""
    # whole or not at all: a torn record would ask for an inspection without a reason
    with published(directory / FILE_NAME) as partial:
        partial.write_text(_record(manifest))


def withdraw(directory: Path) -> None:
    """Take the record away, if there is one."""
    # removed, not rewritten as "bad": no record and a bad one have the same consequence
    (directory / FILE_NAME).unlink(missing_ok=True)


def is_verified(directory: Path, manifest: Manifest) -> bool:
    """Whether the record in `directory` is this manifest's. Reads one line: no shard is opened."""
    path = directory / FILE_NAME
    # as bytes: another manifest, an older CHECKS and an edit by hand are all just "not this record"
    return path.is_file() and path.read_bytes() == _record(manifest).encode()


def check_verified(reader: ShardReader) -> None:
    """Raise InputError, with the command to run, unless the record beside a reader's manifest is
    that manifest's.
    """
    # through the reader's source, so that it holds for a bucket as it does for a folder
    if reader.find(FILE_NAME) != _record(reader.manifest).encode():
        got = (
            f"{reader.location}: shards that were not verified, or not since their manifest was "
            "written"
        )
        where = (
            "DIR` there, where they are a folder"
            if "://" in str(reader.location)
            else f"{reader.location}`"
        )
        action = (
            f"run `distseg inspect {where}, which takes about as long as an epoch's reading, "
            "or write data.allow_unverified=true"
        )
        raise InputError(got, "shards that were looked at", action)


def _record(manifest: Manifest) -> str:
    return json.dumps({"checks": CHECKS, "manifest_sha256": manifest.sha256}, sort_keys=True) + "\n"
