"""Names that come with data: of shards, splits, samples and data sets, each a part of some path."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from typing import Any

from shards.errors import InputError

# of 255 that file systems allow: a name gets an ending, and `published` puts 17 bytes before it
MAX_BYTES = 220
NEEDED = (
    'one name of at most 220 bytes, without "/", "\\" and control characters, and neither "." '
    'nor ".."'
)
# control, lone surrogates (no UTF-8 has them), and the separators of lines and paragraphs
_REFUSED = frozenset(("Cc", "Cs", "Zl", "Zp"))


def is_control(sign: str) -> bool:
    """Whether it is no part of a text on one line: a control character, a lone surrogate, ..."""
    return unicodedata.category(sign) in _REFUSED


def is_name(name: Any) -> bool:
    """Whether it names one file or folder inside of the folder that it is joined to."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
        return False
    # most names are printable; the categories are asked of the others only, of a space in another
    # script for one
    if not name.isprintable() and any(map(is_control, name)):
        return False
    # no character takes more than four bytes: asked for a million keys, the shortcut counts
    return 4 * len(name) <= MAX_BYTES or len(os.fsencode(name)) <= MAX_BYTES


def shortened(name: str, num_bytes: int) -> str:
    """A name of at most so many bytes: itself, or its beginning and eight digits of its hash."""
    content = os.fsencode(name)
    if len(content) <= num_bytes:
        return name
    # a letter that is cut in two is left out
    begin = content[: max(0, num_bytes - 9)].decode("utf-8", "ignore")
    return f"{begin}-{hashlib.sha256(content).hexdigest()[:8]}"


def check_name(name: Any, what: str, action: str) -> str:
    """The name, for whoever reads one from a file that others may have written.

    Checked where it is read, not where it is used: the one place that forgets would be enough.
    Raises InputError: `what` it is, and the name, cut short.
    """
    if not is_name(name):
        # repr: a control character must not reach the terminal
        raise InputError(f"{what} {repr(name)[:80]}", NEEDED, action)
    return name
