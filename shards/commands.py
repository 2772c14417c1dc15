"""`distseg prepare`, `distseg pack` and `distseg import`: their arguments, and what is printed.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from shards.command_line import Commands, add_command, add_overrides
from shards.errors import InputError
from shards.words import counted, train_command

PREPARE = """\
Read a raw data set, check it, and write images and one-hot label maps into one HDF5 file.

toy         generated outdoor scenes with eight classes; needs no --root
stanford    Stanford Background (iccv09Data): images/*.jpg, labels/*.regions.txt, optional splits/
voc         PASCAL VOC 2012 (VOCdevkit/VOC2012); train_list=FILE val_list=FILE;
            labels=SegmentationClassAug: train_aug
cityscapes  leftImg8bit/ and gtFine/, 19 classes; labels=labelTrainIds; test=1 for the unlabelled
            test images
gta5        Playing for Data: images/ and labels/, Cityscapes' 19 classes; val_list=FILE
synthia     SYNTHIA-RAND-CITYSCAPES: RGB/ and GT/LABELS/, 16 of Cityscapes' classes; val_list=FILE
camvid      SegNet's layout: train/, trainannot/, ... or train.txt, ...; 11 classes
kitti_road  data_road: road, not road, the rest void; task=lane
ade20k      ADEChallengeData2016: images/, annotations/; 150 classes
folder      your images and masks, matched by name; layout=FILE.yaml (default: distseg.yaml in
            --root) names the classes
ohe         the older layout: one HDF5 file per image with a one-hot data set "OHE", and a folder of
            images
FILE.py:F   your own, as examples/own_data.py: F(root, ...) gives a DataSet or, one by one, samples

An interrupted run goes on where it was, by the same command. Neither that nor --workers changes the
file."""


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes; 0: in this one (0)"
    )


def add_prepare(commands: Commands) -> None:
    """Add `prepare` to the commands."""
    parser = add_command(commands, "prepare", "raw data set -> HDF5 maps", PREPARE)
    parser.add_argument("name", metavar="NAME", help="one of the above")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the unpacked data set")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.h5", help="the file to write"
    )
    _add_workers(parser)
    skipped = "leave out what is missing or unreadable, and list it"
    parser.add_argument("--skip-bad", action="store_true", help=skipped)
    add_overrides(parser, "options of the preparer, e.g. seed=1")
    parser.set_defaults(handler=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from shards.prepare import prepare

    # plain text: each preparer knows the types of its options
    pairs = [option.partition("=") for option in options.overrides]
    for key, separator, _ in pairs:
        if not separator:
            action = "write for example seed=1"
            # a data set mostly, whose place is no key
            if options.root is None and Path(key).is_dir():
                action = f"write --root {shlex.quote(key)}"
            raise InputError(f"argument {key!r}", "key=value", action)
    settings: dict[str, Any] = {key: value for key, _, value in pairs}
    # they would reach the preparer twice, as options and as settings
    if settings.keys() & {"workers", "skip_bad"}:
        raise InputError(
            "workers or skip_bad as key=value", "an option", "write --workers N, --skip-bad"
        )
    how = {"workers": options.workers, "skip_bad": options.skip_bad}
    made = prepare(options.name, options.root, options.out, **how, **settings)
    counts = ", ".join(f"{count} {split}" for split, count in made.num_samples.items())
    print(f"wrote {made.path}: {counts}")
    for note in made.notes:
        print(f"note: {note}")
    if made.left_out:
        print(f"left out, because they are bad: {len(made.left_out)}")
    for key, why in made.left_out.items():
        print(f"  {key}: {why}")
    # each step of the way names the next one
    out = made.path.with_suffix("")
    # the raw data may lie there; only shards are replaced by shards
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        out = out.with_name(f"{out.name}-shards")
    print(f"next: distseg {shlex.join(['pack', str(made.path), '--out', str(out)])}")
    return 0


def add_pack(commands: Commands) -> None:
    """Add `pack` to the commands."""
    text = """Write HDF5 maps into checksummed WebDataset shards with a manifest.

The same input gives the same bytes, for any number of workers; where they are there already,
nothing is done."""
    parser = add_command(commands, "pack", "HDF5 maps -> shards", text)
    parser.add_argument("maps", type=Path, metavar="FILE.h5", help="what `distseg prepare` wrote")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory for the shards"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=256, metavar="N", help="images of a shard (256)"
    )
    _add_workers(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another data set that is in the directory"
    )
    parser.add_argument(
        "--append", action="store_true", help="add the maps' splits to the shards that are there"
    )
    parser.set_defaults(handler=_pack)


def _pack(options: argparse.Namespace) -> int:
    from shards.pack import pack

    how = {"samples_per_shard": options.samples_per_shard, "num_workers": options.workers}
    manifest = pack(
        options.maps, options.out, overwrite=options.overwrite, append=options.append, **how
    )
    counts = ", ".join(f"{split.num_samples} {name}" for name, split in manifest.splits.items())
    print(f"{options.out}: {counts}")
    if manifest.left_out:
        print(f"left out when the maps were prepared, because they are bad: {manifest.left_out}")
    print(f"next: distseg inspect {shlex.quote(str(options.out))}")
    # a data set of one split is no run yet: --append adds the other
    if command := train_command(options.out, manifest.splits):
        print(f"then: {command}")
    return 0


def add_import(commands: Commands) -> None:
    """Add `import` to the commands."""
    text = """\
Use shards that others wrote, by webdataset's ShardWriter or plain tar: a member index and a
manifest are written beside the tars, which stay as they are.

The YAML has `classes` and `void`, as that of `distseg prepare folder`; masks are PNG with ids. In
the names of members * is the sample's id; without --image and --label the patterns are found.
Every image and every mask is read and checked."""
    parser = add_command(commands, "import", "tars of others -> shards", text)
    parser.add_argument("tars", type=Path, metavar="DIR", help="a folder of tars, not compressed")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE.yaml", help="else distseg.yaml beside the tars"
    )
    of_split = "tars of a split (train='a*.tar'); else by their names: train-000000.tar"
    parser.add_argument(
        "--split", action="append", default=[], metavar="NAME=PATTERN", help=of_split
    )
    parser.add_argument("--image", default="", metavar="PATTERN", help="for example '*.jpg'")
    parser.add_argument("--label", default="", metavar="PATTERN", help="for example '*.seg.png'")
    parser.add_argument("--threads", type=int, metavar="N", help="else one for each core, and more")
    parser.set_defaults(handler=_import)


def _import(options: argparse.Namespace) -> int:
    from shards.foreign import import_tars
    from shards.patterns import Patterns

    splits = {}
    for text in options.split:
        name, _, pattern = text.partition("=")
        if not name or not pattern or name in splits:
            action = "write for example --split val='val-*.tar'"
            raise InputError(f"--split {text}", "NAME=PATTERN, each name once", action)
        splits[name] = pattern
    check_threads(options.threads)
    manifest = import_tars(
        options.tars,
        options.classes or options.tars / "distseg.yaml",
        splits=splits,
        patterns=Patterns(options.image, options.label),
        num_threads=options.threads,
    )
    for name, split in manifest.splits.items():
        unlabelled = sum(shard.num_unlabelled or 0 for shard in split.shards)
        without = f", {unlabelled} without a mask" if unlabelled else ""
        print(f"{options.tars}: {name}: {counted(split.num_samples, 'sample')}{without}")
    print(_after_import(options.tars, list(manifest.splits)))
    return 0


def _after_import(tars: Path, splits: list[str]) -> str:
    if len(splits) == 1:
        return (
            f"note: all tars are of the split {splits[0]}, and training needs another to score on: "
            "divide them with --split train='a*.tar' --split val='b*.tar'"
        )
    return f"next: {train_command(tars, splits)}"


def check_threads(num_threads: int | None) -> None:
    """Raise InputError for less than one thread; None is one for each core."""
    # 0 would be no thread at all
    if num_threads is not None and num_threads < 1:
        raise InputError(f"--threads {num_threads}", "at least 1", "correct it, or leave it out")
