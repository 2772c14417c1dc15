"""The image files below a folder, and what was passed over on the way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import InputError
from shards.images import JPEG_SIGNATURE, SUFFIXES

# made by file managers, NAS systems and archivers: copies, thumbnails and what was thrown away
TOOL_FOLDERS = ("@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found")
# beside every file (._a.jpg) or in every folder of some systems: never images, and not worth a word
SYSTEM_FILES = ("thumbs.db", "desktop.ini", ".ds_store")
# of a JPEG under another ending: a camera's thumbnail, an editor's copy, a download that was cut
COPIES = (".thm", ".bak", ".orig", ".old", ".tmp", ".part", ".crdownload", ".swp")
PASSED_OVER = "passed over"
NUM_NAMED = 5  # of each kind that was passed over


@dataclass
class Listing:
    """files: the images, sorted by path; passed_over: what a person may miss, by reason."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    passed_over: dict[str, list[Path]] = field(default_factory=dict)

    def pass_over(self, why: str, path: Path) -> None:
        """Count a file or folder among what was passed over."""
        self.passed_over.setdefault(why, []).append(path)

    def notes(self) -> list[str]:
        """What was passed over, a line for each reason, the first of each by name."""
        lines = []
        for why, paths in self.passed_over.items():
            paths = sorted(paths)
            names = [path.relative_to(self.folder).as_posix() for path in paths[:NUM_NAMED]]
            more = ", ..." if len(paths) > NUM_NAMED else ""
            lines.append(
                f"{PASSED_OVER} in {self.folder}: {len(paths)} {why}: {', '.join(names)}{more}"
            )
        return lines


def images_below(
    folder: Path, suffixes: Iterable[str] = SUFFIXES, *, subfolders: bool = True
) -> Listing:
    """The image files in `folder` and, if asked, below it.

    By the ends of their names in any case, and JPEGs under other ends by their first bytes. Links
    are followed, also out of the folder; one that leads back to a folder it lies in ends there.
    Hidden files and folders, and those of file managers and archivers, are left out. Raises
    InputError for a folder that cannot be read.
    """
    listing, wanted = Listing(folder), tuple(suffixes)
    for entry in _entries(folder, listing, subfolders, ()):
        path, suffix = Path(entry.path), os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(".") and entry.name.lower() not in SYSTEM_FILES:
            # ._a.jpg is what macOS knows about a.jpg
            if not entry.name.startswith("._"):
                listing.pass_over("hidden", path)
        elif _is_special(entry):
            listing.pass_over("no files", path)  # a pipe would be waited for
        elif suffix in wanted or (suffix not in SUFFIXES and _is_jpeg(path, suffix)):
            listing.files.append(path)
        elif entry.name.lower() not in SYSTEM_FILES:
            listing.pass_over("not read as images", path)
    # a folder's own order differs from disk to disk, and with it the order of the maps
    listing.files.sort()
    return listing


def _entries(
    folder: Path, listing: Listing, subfolders: bool, above: tuple[tuple[int, int], ...]
) -> Iterator[os.DirEntry[str]]:
    """What is not a folder; `above`: the folders that this one was reached through."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return  # told by who looks for images in it
    except OSError as error:
        got = f"{folder}: {error.strerror}"
        raise InputError(got, "a folder that can be read", "give yourself the right to") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        listing.pass_over("links back to a folder above", folder)
        return
    for entry in entries:
        if not _is_folder(entry):
            yield entry
        elif entry.name.startswith(".") or entry.name.lower() in TOOL_FOLDERS:
            listing.pass_over("hidden", Path(entry.path))
        elif subfolders:
            yield from _entries(Path(entry.path), listing, subfolders, (*above, here))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is there, and a pipe, a socket or a device."""
    try:
        # a link without an end is a file that is lost, which is told by who reads it
        return not entry.is_file() and os.path.exists(entry.path)
    except OSError:
        return False


def _is_jpeg(path: Path, suffix: str) -> bool:
    if suffix in COPIES or path.name.endswith("~"):
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(JPEG_SIGNATURE)) == JPEG_SIGNATURE
    except OSError:
        return False  # passed over, and named
