"""`distseg train`: its arguments, read without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from distseg.config.arguments import configured_command
from shards.command_line import Commands, add_overrides

TEXT = """\
Train, evaluate and draw the curves of one run; the same command resumes a run that was stopped.

On several processes:  torchrun --standalone --nproc_per_node=N -m distseg.train key=value ...
Later values win:      defaults < preset < FILE.yaml < command line.  `--dry-run` prints every key
                       with its value, where it is from and what it means; `--help KEY` explains a
                       key, `--help loss` lists a section of them.
A file:                `distseg train FILE.yaml key=value ...`, of keys as --dry-run prints them or
                       as a run keeps them: RUN/config.yaml goes on with the run, and with
                       run_dir=NEW begins another one like it.
Signals:               SIGUSR1, SIGTERM or Ctrl-C save a checkpoint at the next step and stop; what
                       is left to do after the last checkpoint (evaluation, pictures) is made up by
                       the same command."""


def add_train(commands: Commands) -> None:
    """Add `train` to the commands."""
    parser = configured_command(commands, "train", "train a segmentor with an adversary", TEXT)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    add_overrides(parser, "preset=stanford steps=500 ..., or FILE.yaml with such keys")
    parser.set_defaults(handler=_train)


def _train(options: argparse.Namespace) -> int:
    from distseg.config import loading

    # before torch, whose import takes seconds: a misspelt key is told at once
    if options.dry_run:
        config, waiting = loading.outline(options.overrides)
        from distseg.train.dry_run import show

        return show(options.overrides, config, waiting)
    config = loading.load(options.overrides)
    try:
        from distseg.train.run import run

        return run(config)
    except KeyboardInterrupt:
        # before the first step, after the last, or a second Ctrl-C that did not wait for a step
        raise KeyboardInterrupt(_standing(config.run_dir)) from None


def _standing(run_dir: str) -> str:
    """How far an interrupted run has come, for people."""
    from distseg.runs.checkpoint import FOLDER, published

    names = [path.name for path in published(Path(run_dir) / FOLDER)]
    if not names:
        return "no checkpoint yet, the same command begins anew"
    step = int(max(names).removeprefix("step-"))
    return f"the checkpoint of step {step} is there, and the same command goes on from it"
