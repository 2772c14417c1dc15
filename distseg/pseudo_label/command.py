"""`distseg pseudo-label`: its arguments, read without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from distseg.config.arguments import add_device, add_run, configured_command
from shards.command_line import Commands, add_overrides

TEXT = """\
Label the unlabelled training images of a run with its segmentor, and write HDF5 maps of a data set
that is labelled throughout: the labelled images as they are, those images with what the segmentor
says (pixels that it is not sure of are void), and the validation split as it is. Then
`distseg pack` them and train on: self-training in stages.

Of all unlabelled images the surest come first: --keep 0.5 leaves out the others. FILE.csv beside
FILE.h5 tells of each image how sure, how much of it is labelled and whether it was kept.

Test-time augmentation makes better labels: evaluate.scales=[0.75,1,1.25]
evaluate.horizontal_flip=true"""
RANKS = ("confidence", "discriminator")


def add_pseudo_label(commands: Commands) -> None:
    """Add `pseudo-label` to the commands."""
    summary = "label unlabelled training images, as new data"
    parser = configured_command(commands, "pseudo-label", summary, TEXT)
    add_run(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.h5", help="HDF5 maps, for `distseg pack`"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.9,
        metavar="P",
        help="a pixel whose likeliest class is less probable is void (default 0.9; 0: none is)",
    )
    parser.add_argument(
        "--keep", type=float, default=1.0, metavar="SHARE", help="of the images (default 1: all)"
    )
    parser.add_argument(
        "--rank",
        default=RANKS[0],
        choices=RANKS,
        help="which images are the surest: by the mean probability of their pixels' classes, or "
        "by how real the run's discriminator takes the prediction to be",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="where the shards do have labels of these images: how far they agree, in the table, "
        "and of each class in FILE.png",
    )
    add_device(parser)
    add_overrides(parser, "evaluate.horizontal_flip=true data.shards=DIR")
    parser.set_defaults(handler=_pseudo_label)


def _pseudo_label(options: argparse.Namespace) -> int:
    from distseg.config import loading

    # before torch, whose import takes seconds: a misspelt key is told at once
    loading.check_changes(options.run, options.overrides, lambda key: key.at_evaluation)
    from distseg.pseudo_label.run import Choice, run

    choice = Choice(options.threshold, options.keep, options.rank, options.compare)
    return run(
        options.run,
        options.out,
        choice,
        which=options.checkpoint,
        device=options.device,
        overrides=options.overrides,
    )
