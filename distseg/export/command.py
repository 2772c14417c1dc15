"""`distseg export`: its arguments, read without torch, and the file or folder that it writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from distseg.config.arguments import add_run
from shards.command_line import Commands, add_command

TEXT = """\
Write a run's segmentor as one file: image (N, 3, H, W) in [0, 1] -> logits (N, C, H, W), any N,
H and W.

onnx          runs anywhere, see distseg/export/predict_onnx.py; needs
              pip install -e '.[export]' in the repository
torch-export  runs with torch alone: torch.export.load(FILE).module()
safetensors   the weights, and what to build the network from; also segmentor.init=FILE
Classes, colours and preprocessing are in the file's metadata. What is written is compared with the
original on random images of several sizes; a file that differs is not kept."""


def add_export(commands: Commands) -> None:
    """Add `export` to the commands."""
    summary = "a trained run as ONNX, torch.export or safetensors"
    parser = add_command(commands, "export", summary, TEXT)
    add_run(parser)
    choices = ("onnx", "torch-export", "safetensors")
    parser.add_argument("--format", default=choices[0], choices=choices, help="of the file (onnx)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out", type=Path, metavar="FILE", help="the file to write; else RUN/export/model.*"
    )
    place.add_argument(
        "--hub-folder", type=Path, metavar="DIR", help="weights, config.json and a model card"
    )
    parser.set_defaults(handler=_export)


def _export(options: argparse.Namespace) -> int:
    from shards.files import cleaned_up_after_sigterm

    with cleaned_up_after_sigterm():
        return run(options.run, options.checkpoint, options.format, options.out, options.hub_folder)


def run(run_dir: Path, which: str, form: str, out: Path | None, hub_folder: Path | None) -> int:
    """`distseg export RUN`.

    Write a checkpoint's segmentor, by default as RUN/export/model.<suffix>.
    """
    from distseg.export import hub
    from distseg.export.formats import SUFFIXES, check_packages, export, load

    # before the checkpoint is read, and before a folder is made
    check_packages(form)
    trained = load(run_dir, which)
    if hub_folder is not None:
        written = hub.write_folder(run_dir, trained, form, hub_folder)
    else:
        out = out or run_dir / "export" / f"model{SUFFIXES[form]}"
        error = export(trained.segmentor, trained.metadata, form, out)
        written = [out]
        print(f"largest difference to the original on random images: {error:.1g} (probabilities)")
    for path in written:
        size = path.stat().st_size
        print(f"wrote {path} ({f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB'})")
    return 0
