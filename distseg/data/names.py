"""Names out of files of data: what may become part of a path, checked where it is read."""

from __future__ import annotations

from shards.errors import InputError

MAX_BYTES = 200  # file systems take 255, of which endings need some


def check_file_name(name: str, what: str) -> str:
    """The name, if a file of a folder can be called by it.

    what: its kind, for the message ("key"). Raises InputError for one that could lead out of the
    folder or be no name of a file: with a slash, a sign that is not printable, a dot at its
    beginning, or of more than MAX_BYTES bytes.
    """
    # from a stranger's shards "../../x" would make training write wherever it may
    is_plain = name.isprintable() and "/" not in name and "\\" not in name
    if not is_plain or not name or name.startswith(".") or len(name.encode()) > MAX_BYTES:
        needed = f"a printable name without slashes, of at most {MAX_BYTES} bytes"
        raise InputError(f"the {what} {name!r}", needed, "prepare and pack the data anew")
    return name
