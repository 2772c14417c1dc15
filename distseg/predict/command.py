"""`distseg predict`: its arguments, read without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from distseg.config.arguments import add_device, add_run, configured_command
from shards.command_line import Commands, add_overrides

TEXT = """\
Label images with a run's segmentor: class indices, colours and an overlay, as PNG files per image.
Below the overlay the classes that it shows are named; evaluate.palette=safe takes colours that
colour-blind readers tell apart.

Test-time augmentation is as the run evaluates, or as evaluate.scales=[0.75,1,1.25]
evaluate.horizontal_flip=true say. Images with a side above 2048 px are labelled by a sliding
window; evaluate.window_px=N evaluate.overlap_px=M choose another."""


def add_predict(commands: Commands) -> None:
    """Add `predict` to the commands."""
    parser = configured_command(commands, "predict", "label images with a trained run", TEXT)
    add_run(parser)
    parser.add_argument(
        "images", type=Path, metavar="IMAGE|FOLDER", help="an image, or a folder of images"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the pictures go"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also one probability picture per class"
    )
    parser.add_argument(
        "--no-legend", action="store_true", help="overlays of the images' size, without names"
    )
    add_device(parser)
    add_overrides(parser, "evaluate.horizontal_flip=true precision=fp32")
    parser.set_defaults(handler=_predict)


def _predict(options: argparse.Namespace) -> int:
    from distseg.config import loading

    # before torch, whose import takes seconds; a wrong path of images is the worse mistake
    if options.images.exists():
        loading.check_changes(options.run, options.overrides, lambda key: key.at_prediction)
    from distseg.predict.run import PredictOptions, run

    return run(
        options.run,
        options.images,
        options.out,
        PredictOptions(probabilities=options.probabilities, legend=not options.no_legend),
        which=options.checkpoint,
        device=options.device,
        overrides=options.overrides,
    )
