"""JSON files that carry their own sha256, so that no changed bit of them goes unnoticed."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from shards.files import published
from shards.storage import retried

_SEAL = "sha256"


def seal(content: dict[str, Any]) -> bytes:
    """The bytes of a JSON file with the content and its sha256."""
    digest = hashlib.sha256(_json(content)).hexdigest()
    return _json(content | {_SEAL: digest})


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with its sha256, whole or not at all."""
    with published(path) as partial:
        write = functools.partial(partial.write_bytes, seal(content))
        retried(path, write, expected=path.parent.is_dir)


def unseal(data: bytes) -> tuple[dict[str, Any], bool]:
    """The content of a file's bytes, and whether it had a sha256; files of old versions have none.

    Raises ValueError unless it is a JSON object, and for a sealed one that is not as it was
    written.
    """
    try:
        content = json.loads(data)
    except RecursionError:  # of garbage that is all brackets
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    if _SEAL not in content:
        return content, False
    del content[_SEAL]
    # all bytes, and not the content's alone: a changed blank is a sign of a failing disk too
    if seal(content) != data:
        raise ValueError("its sha256 is not that of its content")
    return content, True


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
