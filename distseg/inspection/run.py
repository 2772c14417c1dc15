"""`distseg inspect`: the findings as a table, the samples as a contact sheet, both as JSON.

Then the conclusion.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distseg.tracking.figures import legend_entries, overlay, plain, save
from distseg.tracking.fonts import drawable_classes
from distseg.tracking.palettes import coloured
from shards.files import published
from shards.inspect import Inspection, inspect, record
from shards.look import ERROR, Look, read_members
from shards.manifest import Manifest
from shards.sample import ClassSet, decode_image
from shards.similar import BITS, MAX_BITS
from shards.words import counted, train_command

JSON_FILE, SHEET_FILE = "inspection.json", "contact_sheet.png"
MIN_WIDTH, SHOWN = 100, 8  # columns of the terminal; findings of one kind in the table
# of the sheet, each with a picture and its label; at most
NUM_COLUMNS, NUM_CELLS, NUM_FLAGGED = 4, 32, 8
CELL_PX, DPI = (240, 520), 100  # height and width of a cell


def run(directory: Path, out: Path | None, num_threads: int | None, palette: str = "data") -> int:
    """Inspect `directory`, write inspection.json and contact_sheet.png into `out` (None: the
    directory itself).

    palette: of the sheet, as `evaluate.palette`. Returns 1 when there are errors, else 0, and then
    training accepts the shards. Raises InputError for a directory without a manifest, and for an
    `out` that cannot be written.
    """
    inspection = inspect(directory, num_threads)
    console = Console()
    # piped into a file a console is 80 columns wide, which would fold every row
    console.width = max(console.width, MIN_WIDTH)
    for table in tables(inspection):
        console.print(table)
    # data are often on a disk that users can only read; inspecting them must work all the same
    writable = os.access(directory, os.W_OK)
    if writable:
        # before the pictures: what training asks for is there even if drawing fails
        record(directory, inspection)
    out = out or directory
    with published(out / JSON_FILE) as partial:
        partial.write_text(json.dumps(document(inspection), indent=1) + "\n")
    contact_sheet(directory, inspection, out / SHEET_FILE, palette)
    console.print(
        conclusion(directory, inspection, writable), highlight=False, markup=False, soft_wrap=True
    )
    console.print(
        f"wrote {out / JSON_FILE} and {out / SHEET_FILE}: look at it",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    command = train_command(directory, inspection.manifest.splits)
    if command and not inspection.errors:
        console.print(f"next: {command}", highlight=False, markup=False, soft_wrap=True)
    # for scripts: `distseg inspect DIR && distseg train ...`
    return 1 if inspection.errors else 0


def document(inspection: Inspection) -> dict[str, Any]:
    """What inspection.json holds: plain values."""
    return {
        "data": inspection.manifest.name,
        "manifest_sha256": inspection.manifest.sha256,
        "sound": not inspection.errors,
        # what "near" meant when the file was written: the bounds may change
        "near_duplicate_bits": [MAX_BITS, BITS],
        "splits": inspection.splits(),
        "findings": [asdict(finding) for finding in inspection.findings],
    }


def conclusion(directory: Path, inspection: Inspection, writable: bool) -> str:
    """The last line: how much was found, and whether training accepts the shards.

    writable: that they are sound could be recorded beside them.
    """
    num_errors = len(inspection.errors)
    num_warnings = len(inspection.findings) - num_errors
    counts = f"{counted(num_errors, 'error')}, {counted(num_warnings, 'warning')}"
    counts += f" in {counted(len(inspection.looks), 'sample')}"
    said = f"{directory}: {counts}; "
    if num_errors:
        return said + "training refuses these shards until they are sound"
    if not writable:
        return (
            said + "sound, but that cannot be recorded there: train with data.allow_unverified=true"
        )
    about = inspection.splits().items()
    void = [name for name, split in about if split["void_share"] == 1]
    if void:
        return said + f"sound, but training refuses {', '.join(void)}: void everywhere"
    return said + "sound, and training accepts them"


def tables(inspection: Inspection) -> Iterator[Table]:
    """The splits side by side, their classes, and the findings if there are any."""
    splits = inspection.splits()
    about = _table(
        escape(f"{inspection.manifest.name}: splits; sizes: height x width"),
        "split",
        right=("samples", "unlabelled", "shards", "MB"),
    )
    for column in ("void", "smallest", "median", "largest px"):
        about.add_column(column, justify="right")
    for name, split in splits.items():
        counts = (f"{split['samples']:,}", f"{split['unlabelled']:,}", f"{split['shards']:,}")
        sizes = (
            "x".join(map(str, split[size] or ("-",))) for size in ("smallest", "median", "largest")
        )
        about.add_row(
            escape(name),
            *counts,
            f"{split['bytes'] / 1e6:,.0f}",
            f"{split['void_share']:.1%}",
            *sizes,
        )
    yield about
    columns: list[str] = []
    for name in splits:
        columns += [escape(f"{name} pixels"), escape(f"{name} images")]
    histogram = _table(
        "classes: share of the pixels that are not void, and images", "class", right=columns
    )
    for index, name in enumerate(inspection.manifest.classes.names):
        of_class = [split["classes"][name] for split in splits.values()]
        cells: list[str] = []
        for count in of_class:
            cells += [f"{count['share']:.2%}", f"{count['images']:,}"]
        histogram.add_row(escape(f"{index} {name}"), *cells)
    yield histogram
    # no table at all says "nothing found" more plainly than an empty one
    if inspection.findings:
        yield _findings(inspection)


def _findings(inspection: Inspection) -> Table:
    table = Table(title="findings", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "where", "what", "to do"):
        table.add_column(column, overflow="fold")
    # One fault in a labelling tool gives thousands of findings of a kind, which would hide the
    # others.
    of_kind = Counter((finding.level, finding.check) for finding in inspection.findings)
    shown: Counter[tuple[str, str]] = Counter()
    for finding in inspection.findings:
        kind = (finding.level, finding.check)
        shown[kind] += 1
        style = "bold red" if finding.level == ERROR else "yellow"
        if shown[kind] <= SHOWN:
            where = f"{finding.sample}\n{finding.shard}".strip()
            table.add_row(
                f"[{style}]{finding.level}",
                escape(where),
                escape(f"{finding.check}: {finding.what}"),
                escape(finding.action),
            )
        # at the last of its kind, so that the note stands below those that are shown
        elif shown[kind] == of_kind[kind]:
            rest = f"{of_kind[kind] - SHOWN} more of {finding.check}"
            table.add_row(f"[{style}]{finding.level}", "", rest, f"see {JSON_FILE}")
    return table


def _table(title: str, left: str, right: list[str] | tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(left, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right")
    return table


def contact_sheet(
    directory: Path, inspection: Inspection, out: Path, palette: str = "data"
) -> None:
    """Draw samples, each beside its label over it: `out` is a PNG.

    First some with findings, then for each split and class the image that shows most of it, then
    others, evenly. Where the label is void the picture is left as it is.
    """
    classes = drawable_classes(coloured(inspection.manifest.classes, palette))
    # titles and pictures
    cells = [
        (_title(look, inspection), cell)
        for look in _chosen(inspection)
        if (cell := _cell(directory, look, inspection.manifest, classes)) is not None
    ]
    _draw_sheet(cells, classes, out)


def _title(look: Look, inspection: Inspection) -> str:
    """A sample's split and the end of its name; behind a colon the checks that found it."""
    checks = sorted({one.check for one in inspection.findings if one.sample == look.key})
    return f"{look.split} {look.key[-28:]}" + (f": {', '.join(checks)}" if checks else "")


def _draw_sheet(cells: list[tuple[str, np.ndarray]], classes: ClassSet, out: Path) -> None:
    num_rows = max(1, -(-len(cells) // NUM_COLUMNS))
    # inches, in which matplotlib counts
    height, width = (side / DPI for side in CELL_PX)
    legend = legend_entries(classes, with_void=False)  # void is left uncovered
    legend_columns = int(NUM_COLUMNS * width / 1.4)
    below = 0.25 * -(-len(legend) // legend_columns) + 0.2
    # of its own and not pyplot's: no display, and freed with the function
    figure = Figure(figsize=(NUM_COLUMNS * width, num_rows * (height + 0.25) + below), dpi=DPI)
    grid = {"left": 0.005, "right": 0.995, "top": 1 - 0.25 / figure.get_figheight()}
    grid |= {"bottom": below / figure.get_figheight(), "wspace": 0.02, "hspace": 0.25 / height}
    axes = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False, gridspec_kw=grid).ravel()
    # the last row may have cells that nothing is drawn into
    for one in axes:
        one.set_axis_off()
    for one, (title, cell) in zip(axes, cells, strict=False):
        one.imshow(cell, interpolation="nearest")
        one.set_title(plain(title), fontsize=8, pad=3)
        # of one with findings
        one.title.set_color("#B00000" if ": " in title else "black")
    figure.legend(
        handles=legend, loc="lower center", ncols=legend_columns, fontsize=9, frameon=False
    )
    save(figure, out)


def _chosen(inspection: Inspection) -> list[Look]:
    # others cannot be decoded, and are in the table of findings
    looks = [look for look in inspection.looks if look.size is not None]
    flagged = {finding.sample for finding in inspection.findings if finding.sample}
    # what may be wrong comes first, but leaves room for what is right
    with_findings = [look for look in looks if look.key in flagged]
    # by identity, as a sample can be flagged and the best of a class too
    chosen = {id(look): look for look in with_findings[:NUM_FLAGGED]}
    labelled = [look for look in looks if look.pixels is not None]
    for split in inspection.manifest.splits:
        of_split = [look for look in labelled if look.split == split]
        for index in range(inspection.manifest.classes.num_classes if of_split else 0):
            # most of its pixels, not most pixels: a large picture is no better example
            best = max(of_split, key=lambda look: _share(look, index))
            if _share(best, index) > 0 and len(chosen) < NUM_CELLS:
                chosen[id(best)] = best
    for index in np.linspace(0, len(looks) - 1, min(len(looks), NUM_CELLS)).astype(int).tolist():
        if len(chosen) < NUM_CELLS:
            chosen[id(looks[index])] = looks[index]
    return list(chosen.values())


def _share(look: Look, index: int) -> float:
    return 0.0 if look.pixels is None else float(look.pixels[index] / look.pixels.sum())


def _cell(directory: Path, look: Look, manifest: Manifest, classes: ClassSet) -> np.ndarray | None:
    """Picture and overlay side by side, (240, 520, 3) uint8 on white.

    An index out of range in void's colour.
    """
    members = read_members(directory, look)
    content = members.get("jpg", members.get("image.png"))
    if content is None:
        return None
    image = decode_image(content)
    height, width = CELL_PX[0], CELL_PX[1] // 2 - 2
    # one scale for both sides, or a road sign would look like another one
    scale = min(height / image.shape[0], width / image.shape[1])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    # area for the picture, nearest for the label: indices have no means
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    pair = [image]
    if look.pixels is not None:
        label = manifest.decode_label(members["png"])
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
        pair.append(overlay(image, label, classes, alpha=0.6))
    # white, as void is black in many palettes
    cell = np.full((*CELL_PX, 3), 255, np.uint8)
    for place, picture in enumerate(pair):
        top, left = (height - size[1]) // 2, place * (CELL_PX[1] // 2) + (width - size[0]) // 2
        cell[top : top + size[1], left : left + size[0]] = picture
    return cell
