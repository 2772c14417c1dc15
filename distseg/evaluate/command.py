"""`distseg evaluate` and `distseg summarize`: their arguments, read without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from distseg.config.arguments import add_run, configured_command
from shards.command_line import Commands, add_command, add_overrides

EVALUATE = """\
Score a run's checkpoint on a split: every image once, at full resolution, one confusion matrix.

Test-time augmentation:  evaluate.scales=[0.75,1,1.25] evaluate.horizontal_flip=true
Sliding window:          evaluate.window_px=512 evaluate.overlap_px=128, for large images
Other data:              data.shards=DIR; classes of other spelling or order are found by name,
                         others by --map 'car=vehicle,truck=vehicle', whose probabilities add up
On several processes:    torchrun --standalone --nproc_per_node=N -m distseg.evaluate RUN
The scores are written beside the run's config.yaml; `distseg summarize` makes tables of them."""
SUMMARIZE = """Tables of evaluated runs; of runs that differ in their seed only, mean and spread.

A run stands for its evaluation.json, what training's last evaluation found; name the file of
another evaluation:
  distseg summarize runs/*/evaluation-step-00000900-val-scales-0.75-1-1.25-flip.json
The spread is the sample standard deviation over seeds. Only like is compared: data, split, classes,
scales, flip and window."""
PICTURES = """\
Draw a run's curves, IoU of each class and validation images again: as drawings for a paper, in
other colours, more of them. Training draws them at its end, as PNG.

For a paper:         distseg pictures RUN --format pdf --out figures
For other eyes:      distseg pictures RUN evaluate.palette=safe (`distseg report` shows these then)
Curves alone:        evaluate.num_pictures=0, which needs neither shards nor a network
Of two runs:         distseg pictures ADAPTED --beside SOURCE_ONLY: picture, label and both
                     predictions, in beside/

Text stays text in SVG and PDF, and photographs keep their pixels."""


def add_evaluate(commands: Commands) -> None:
    """Add `evaluate` to the commands."""
    parser = configured_command(commands, "evaluate", "score a trained run", EVALUATE)
    add_run(parser)
    parser.add_argument(
        "--quick", action="store_true", help="without outlines, calibration and intervals"
    )
    explained = (
        "which classes of other data the run's are: 'car=vehicle,truck=vehicle', or FILE.yaml"
    )
    parser.add_argument("--map", dest="class_map", metavar="RUN'S=DATA'S", help=explained)
    parser.add_argument(
        "--per-image", type=Path, metavar="FILE.csv", help="also the scores of each image"
    )
    add_overrides(parser, "data.val_split=val evaluate.horizontal_flip=true")
    parser.set_defaults(handler=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from distseg.config import loading

    # before torch, whose import takes seconds: a misspelt key is told at once
    overrides = loading.of_validation(options.overrides)
    loading.check_changes(options.run, overrides, lambda key: key.at_evaluation)
    from distseg.evaluate.class_map import parsed
    from distseg.evaluate.run import EvaluateOptions, run

    wanted = None if options.class_map is None else parsed(options.class_map)
    chosen = EvaluateOptions(options.quick, wanted, options.per_image)
    return run(options.run, options.checkpoint, options.overrides, chosen)


def add_summarize(commands: Commands) -> None:
    """Add `summarize` to the commands."""
    summary = "tables of runs, mean and spread over seeds"
    parser = add_command(commands, "summarize", summary, SUMMARIZE)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN|FILE", help="run directories or evaluation*.json"
    )
    choices = ("markdown", "latex", "json")
    parser.add_argument(
        "--format", default=choices[0], choices=choices, help="of the table (markdown)"
    )
    parser.set_defaults(handler=_summarize)


def _summarize(options: argparse.Namespace) -> int:
    from distseg.evaluate import summary

    return summary.run(options.runs, options.format)


def add_pictures(commands: Commands) -> None:
    """Add `pictures` to the commands."""
    parser = configured_command(commands, "pictures", "draw a run's pictures again", PICTURES)
    add_run(parser)
    parser.add_argument(
        "--format", default="png", choices=("png", "svg", "pdf"), help="of the files (png)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where they go; else pictures/ of the run"
    )
    parser.add_argument(
        "--beside", type=Path, metavar="RUN", help="another run, whose predictions stand beside"
    )
    add_overrides(parser, "evaluate.num_pictures=12 data.val_split=val")
    parser.set_defaults(handler=_pictures)


def _pictures(options: argparse.Namespace) -> int:
    from distseg.config import loading

    # before torch, whose import takes seconds
    overrides = loading.of_validation(options.overrides)
    loading.check_changes(options.run, overrides, lambda key: key.at_evaluation)
    from distseg.evaluate import pictures

    chosen = options.run, options.checkpoint, options.out, options.format
    return pictures.run(*chosen, options.overrides, beside=options.beside)
