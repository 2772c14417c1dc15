"""The `distseg` command: for each subcommand its parser and what it calls.

What a subcommand needs is imported only when it runs: --help stays instant.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from shards import terminal
from shards.errors import InputError, TemporaryError
from shards.storage import is_passing
from shards.words import counted

DESCRIPTION = "Adversarial training of semantic segmentation networks, on one machine or many."
EPILOG = """the whole path, with generated scenes:
  distseg prepare toy --out data/toy.h5
  distseg pack data/toy.h5 --out data/toy
  distseg inspect data/toy
  torchrun --standalone --nproc_per_node=2 -m distseg.train preset=toy
  distseg evaluate runs/toy
  distseg predict runs/toy picture.jpg --out predictions
"""
# exit codes; the last two are what shells give for Ctrl-C, and for a reader that has gone
BAD_INPUT, INTERRUPTED, NO_READER = 2, 130, 141

Commands = argparse._SubParsersAction


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns its exit code. Bad input is one message on stderr, exit code 2."""
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()  # what is left of it: at the end of Python nobody could answer
    except BrokenPipeError:
        # `| head` has what it wanted; another pipe is another matter
        if not terminal.has_no_reader(sys.stdout):
            raise
        return NO_READER


def _main(arguments: list[str] | None) -> int:
    if arguments is None:
        terminal.use_utf8()
    terminal.forgive(sys.stdout, sys.stderr)
    # outside of the `try`: argparse ends the process by itself, with exit code 2 too
    options = parse(arguments)
    # before the handler, whose first act is to read the configuration
    if _rank() != "0":
        _leave_notes_to_rank_0()
    try:
        _check_text(getattr(options, "overrides", []))
        return options.handler(options)
    except InputError as error:
        # torchrun shows the output of all ranks: 64 times the same message would hide it
        if _is_told_here(error):
            where = "" if _rank() == "0" else f" on rank {_rank()}"
            print(f"error{where}: {error}", file=sys.stderr)
        return BAD_INPUT
    except RuntimeError as error:
        # a failure that is no fault of the program brings its exit code; all others are shown whole
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"error on rank {_rank()}: {error}", file=sys.stderr)
        return exit_code
    except OSError as error:
        # of storage, where it is not tried again: the next start may well find it answering
        if not is_passing(error, Path()):
            raise
        print(f"error on rank {_rank()}: {error}", file=sys.stderr)
        return TemporaryError.exit_code
    # no traceback: it shows where the program was, and not what went wrong
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line; key=value may stand before, between and after the options."""
    parser = build_parser()
    # key=value may stand anywhere, which argparse alone does not allow
    options, rest = parser.parse_known_args(arguments)
    # argparse takes optional positionals only where it meets the required ones
    takes_overrides = hasattr(options, "overrides")
    unknown = [
        word for word in rest if word.startswith("-") or "=" not in word or not takes_overrides
    ]
    # an option that is misspelt must not pass for a value
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _check_text(overrides: list[str]) -> None:
    """Raise InputError for bytes that are no text: no configuration could be written with them."""
    for word in overrides:
        if any("\udc80" <= letter <= "\udcff" for letter in word):
            got = f"argument {word!a}, bytes that are no UTF-8"
            action = "rename the file or folder, or call with LC_ALL=C.UTF-8 if the name is UTF-8"
            raise InputError(got, "text in UTF-8", action)


def build_parser() -> argparse.ArgumentParser:
    """The command's parser, without importing anything heavy."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "distseg", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_summarize(commands)
    _add_predict(commands)
    _add_report(commands)
    _add_export(commands)
    _add_prepare(commands)
    _add_pack(commands)
    _add_import(commands)
    _add_inspect(commands)
    _add_models(commands)
    _add_doctor(commands)
    # light: submit and sweep import what they need when they run
    from launchers.commands import add_commands

    add_commands(commands)
    return parser


def _rank(of_torchrun: str = "RANK", of_srun: str = "SLURM_PROCID") -> str:
    # SLURM_PROCID alone makes no rank: a batch script may have it too, outside of any step
    in_step = "SLURM_STEP_ID" in os.environ
    return os.environ.get(of_torchrun, os.environ.get(of_srun, "0") if in_step else "0")


def _is_told_here(error: InputError) -> bool:
    """Whether this process prints it: what all ranks met alike is told once per machine or once."""
    if _rank() == "0":
        return True
    if getattr(error, "raised_in_job", False):
        # an error of this rank alone is told by it: nobody else knows
        return not hasattr(error, "raised_on_all_ranks")
    return _rank("LOCAL_RANK", "SLURM_LOCALID") == "0"  # machines can differ


def _leave_notes_to_rank_0() -> None:
    """All ranks read the same configuration: what it has to note is printed once."""
    import logging

    logging.getLogger("distseg.config").setLevel(logging.ERROR)


class _KeyHelp(argparse.Action):
    """`--help`, and `--help KEY` for a key or a section of the configuration."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            parser.print_help()
            parser.exit()
        from distseg.config.reference import help_text

        try:
            # `--help loss.adv_weight=0.1` is asked as well, of a command line that is at hand
            print(help_text(values.partition("=")[0]))
        except InputError as error:
            parser.exit(BAD_INPUT, f"error: {error}\n")
        parser.exit()


def _command(
    commands: Commands, name: str, summary: str, text: str, **options: Any
) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=summary, description=text, formatter_class=raw, **options)


def _configured_command(
    commands: Commands, name: str, summary: str, text: str
) -> argparse.ArgumentParser:
    """A command that takes keys of the configuration, and explains them."""
    # without argparse's own --help, which takes no argument
    parser = _command(commands, name, summary, text, add_help=False)
    explained = "this help, or that of a key or a section (loss.adv_weight, loss)"
    parser.add_argument("-h", "--help", action=_KeyHelp, nargs="?", metavar="KEY", help=explained)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, e.g. runs/stanford")
    parser.add_argument(
        "--checkpoint", default="last", metavar="WHICH", help="last (default), best, or a step"
    )


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=example)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes; 0: in this one"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def _add_train(commands: Commands) -> None:
    text = """\
Train, evaluate and draw the curves of one run; the same command resumes a run that was stopped.

On several processes:  torchrun --standalone --nproc_per_node=N -m distseg.train key=value ...
Later values win:      defaults < preset < command line.  `--dry-run` prints every key's value;
                       `--help KEY` explains a key, `--help loss` lists a section of them.
Signals:               SIGUSR1, SIGTERM or Ctrl-C save a checkpoint at the next step and stop; what
                       is left to do after the last checkpoint (evaluation, pictures) is made up by
                       the same command."""
    parser = _configured_command(commands, "train", "train a segmentor with an adversary", text)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    _add_overrides(parser, "preset=stanford steps=500 ...")
    # a function per command, whose imports are its own: none pays for what another needs
    parser.set_defaults(handler=_train)


def _train(options: argparse.Namespace) -> int:
    from distseg.train import command

    return command.run(options.overrides, options.dry_run)


def _add_evaluate(commands: Commands) -> None:
    text = """\
Score a run's checkpoint on a split: every image once, at full resolution, one confusion matrix.

Test-time augmentation:  evaluate.scales=[0.75,1,1.25] evaluate.horizontal_flip=true
Sliding window:          evaluate.window_px=512 evaluate.overlap_px=128, for large images
On several processes:    torchrun --standalone --nproc_per_node=N -m distseg.evaluate RUN
The scores are written beside the run's config.yaml; `distseg summarize` makes tables of them."""
    parser = _configured_command(commands, "evaluate", "score a trained run", text)
    _add_run(parser)
    parser.add_argument(
        "--quick", action="store_true", help="without outlines, calibration and intervals"
    )
    _add_overrides(parser, "data.val_split=val evaluate.horizontal_flip=true")
    parser.set_defaults(handler=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from distseg.evaluate import command

    return command.run(options.run, options.checkpoint, options.overrides, options.quick)


def _add_summarize(commands: Commands) -> None:
    text = """Tables of evaluated runs; of runs that differ in their seed only, mean and spread.

A run stands for its evaluation.json, what training's last evaluation found; name the file of
another evaluation:
  distseg summarize runs/*/evaluation-step-00000900-val-scales-0.75-1-1.25-flip.json
The spread is the sample standard deviation over seeds. Only like is compared: data, split, classes,
scales, flip and window."""
    parser = _command(commands, "summarize", "tables of runs, mean and spread over seeds", text)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN|FILE", help="run directories or evaluation*.json"
    )
    parser.add_argument("--format", default="markdown", choices=("markdown", "latex", "json"))
    parser.set_defaults(handler=_summarize)


def _summarize(options: argparse.Namespace) -> int:
    from distseg.evaluate import summary

    return summary.run(options.runs, options.format)


def _add_predict(commands: Commands) -> None:
    text = """\
Label images with a run's segmentor: class indices, colours and an overlay, as PNG files per image.

Test-time augmentation is as the run evaluates, or as evaluate.scales=[0.75,1,1.25]
evaluate.horizontal_flip=true say. Images with a side above 2048 px are labelled by a sliding
window; evaluate.window_px=N evaluate.overlap_px=M choose another."""
    parser = _configured_command(commands, "predict", "label images with a trained run", text)
    _add_run(parser)
    parser.add_argument(
        "images", type=Path, metavar="IMAGE|FOLDER", help="an image, or a folder of images"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the pictures go"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also one probability picture per class"
    )
    _add_device(parser)
    _add_overrides(parser, "evaluate.horizontal_flip=true precision=fp32")
    parser.set_defaults(handler=_predict)


def _predict(options: argparse.Namespace) -> int:
    from distseg import predict

    wanted = predict.PredictOptions(probabilities=options.probabilities)
    return predict.run(
        options.run,
        options.images,
        options.out,
        wanted,
        which=options.checkpoint,
        device=options.device,
        overrides=options.overrides,
    )


def _add_report(commands: Commands) -> None:
    text = """\
Write one HTML page about one or several runs: curves, health, IoU and confusion of classes,
predictions, what differs between the configurations, and means over seeds. It needs neither a
network nor another file."""
    parser = _command(commands, "report", "an HTML page about runs, to look at or to send", text)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directories, finished or not"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="else report.html in the run's directory"
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also a W&B report with the same panels"
    )
    parser.set_defaults(handler=_report)


def _report(options: argparse.Namespace) -> int:
    from distseg import report

    return report.run(options.runs, options.out, options.wandb)


def _add_export(commands: Commands) -> None:
    text = """\
Write a run's segmentor as one file: image (N, 3, H, W) in [0, 1] -> logits (N, C, H, W), any N,
H and W.

onnx          runs anywhere, see distseg/export/predict_onnx.py; needs
              pip install '.[export]' in the repository
torch-export  runs with torch alone: torch.export.load(FILE).module()
safetensors   the weights, and what to build the network from; also segmentor.init=FILE
Classes, colours and preprocessing are in the file's metadata. What is written is compared with the
original on random images of several sizes; a file that differs is not kept."""
    summary = "a trained run as ONNX, torch.export or safetensors"
    parser = _command(commands, "export", summary, text)
    _add_run(parser)
    parser.add_argument("--format", default="onnx", choices=("onnx", "torch-export", "safetensors"))
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out", type=Path, metavar="FILE", help="the file to write; else RUN/export/model.*"
    )
    place.add_argument(
        "--hub-folder", type=Path, metavar="DIR", help="weights, config.json and a model card"
    )
    parser.set_defaults(handler=_export)


def _export(options: argparse.Namespace) -> int:
    from distseg.export import command

    return command.run(
        options.run, options.checkpoint, options.format, options.out, options.hub_folder
    )


PREPARE = """\
Read a raw data set, check it, and write images and one-hot label maps into one HDF5 file.

toy         generated outdoor scenes with eight classes; needs no --root
stanford    Stanford Background (iccv09Data): images/*.jpg, labels/*.regions.txt, optional splits/
voc         PASCAL VOC 2012 (VOCdevkit/VOC2012); train_list=FILE val_list=FILE;
            labels=SegmentationClassAug: train_aug
cityscapes  leftImg8bit/ and gtFine/, 19 classes; labels=labelTrainIds; test=1 for the unlabelled
            test images
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


def _add_prepare(commands: Commands) -> None:
    parser = _command(commands, "prepare", "raw data set -> HDF5 maps", PREPARE)
    parser.add_argument("name", metavar="NAME", help="one of the above")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the unpacked data set")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.h5", help="the file to write"
    )
    _add_workers(parser)
    skipped = "leave out what is missing or unreadable, and list it"
    parser.add_argument("--skip-bad", action="store_true", help=skipped)
    _add_overrides(parser, "options of the preparer, e.g. seed=1")
    parser.set_defaults(handler=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from shards.prepare import prepare

    # plain text: each preparer knows the types of its options
    pairs = [option.partition("=") for option in options.overrides]
    for key, separator, _ in pairs:
        if not separator:
            raise InputError(f"argument {key!r}", "key=value", "write for example seed=1")
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
    command = shlex.join(["pack", str(made.path), "--out", str(made.path.with_suffix(""))])
    print(f"next: distseg {command}")
    return 0


def _add_pack(commands: Commands) -> None:
    text = """Write HDF5 maps into checksummed WebDataset shards with a manifest.

The same input gives the same bytes, for any number of workers; where they are there already,
nothing is done."""
    parser = _command(commands, "pack", "HDF5 maps -> shards", text)
    parser.add_argument("maps", type=Path, metavar="FILE.h5", help="what `distseg prepare` wrote")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory for the shards"
    )
    parser.add_argument("--samples-per-shard", type=int, default=256, metavar="N")
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
    # a data set of one split is no run yet: --append adds the other
    if {"train", "val"} <= manifest.splits.keys():
        print(f"next: distseg train {shlex.quote(f'data.shards={options.out}')}")
    return 0


def _add_import(commands: Commands) -> None:
    text = """\
Use shards that others wrote, by webdataset's ShardWriter or plain tar: a member index and a
manifest are written beside the tars, which stay as they are.

The YAML has `classes` and `void`, as that of `distseg prepare folder`; masks are PNG with ids. In
the names of members * is the sample's id; without --image and --label the patterns are found.
Every image and every mask is read and checked."""
    parser = _command(commands, "import", "tars of others -> shards", text)
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
    _check_threads(options.threads)
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
    said = "" if {"train", "val"} <= set(splits) else " data.train_split=NAME data.val_split=NAME"
    return f"next: distseg train {shlex.quote(f'data.shards={tars}')}{said}"


def _check_threads(num_threads: int | None) -> None:
    # None is one for each core, and 0 no thread at all
    if num_threads is not None and num_threads < 1:
        raise InputError(f"--threads {num_threads}", "at least 1", "correct it, or leave it out")


def _add_inspect(commands: Commands) -> None:
    text = """\
Look at packed shards before time is spent on them, and let training accept them when they are
sound.

errors    (exit code 1)  damaged or missing files, unreadable images, labels of another size, form
                         or range
warnings  (exit code 0)  classes that a split lacks, void, pictures that are in two splits, frayed
                         labels, ..."""
    parser = _command(commands, "inspect", "find what is wrong with shards", text)
    parser.add_argument("shards", metavar="DIR", help="what `distseg pack` wrote")
    place = "for inspection.json and contact_sheet.png; else the same"
    parser.add_argument("--out", type=Path, metavar="DIR", help=place)
    parser.add_argument(
        "--threads", type=int, metavar="N", help="decoding threads; else one for each core"
    )
    parser.set_defaults(handler=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from distseg import inspection

    _check_threads(options.threads)
    # inspecting writes verified.json beside the shards, which is possible in a folder only
    if "://" in options.shards:
        action = (
            "run it where they are a folder, and copy verified.json there too; or copy them here"
        )
        raise InputError(f"inspect {options.shards}", "a folder of packed shards", action)
    return inspection.run(Path(options.shards), options.out, options.threads)


def _add_models(commands: Commands) -> None:
    text = """\
Measure segmentors and discriminators: parameters, output stride, field of view, work at
321x321 px.

Your own as in training: distseg models segmentor=my_net.py:MyNet discriminator=my_pkg.judge:MyJudge
"""
    summary = "list the networks to choose from, with their sizes"
    parser = _command(commands, "models", summary, text)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; none: all")
    parser.add_argument(
        "--classes", type=int, default=21, metavar="N", help="number of classes (21)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(handler=_models)


def _models(options: argparse.Namespace) -> int:
    from distseg.models import catalogue

    return catalogue.run(options.names, options.classes, options.json)


def _add_doctor(commands: Commands) -> None:
    text = """\
Look at machine, disk, network and data before a run is started on them, in some seconds.

On all processes of a job:
  torchrun --standalone --nproc_per_node=N -m distseg.doctor --run-dir runs/x --shards DIR
  srun distseg doctor --run-dir runs/x --shards DIR
Exit code 1 for what would end or break a run; warnings and measurements leave it 0."""
    parser = _command(commands, "doctor", "check machine, disk, network and data", text)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs are written"
    )
    parser.add_argument("--shards", metavar="DIR|URL", help="packed shards to read")
    parser.add_argument("--split", default="train", help="of the shards (train)")
    _add_device(parser)
    parser.set_defaults(handler=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from distseg.doctor import command

    return command.run(options.run_dir, options.shards, options.split, options.device)


if __name__ == "__main__":
    sys.exit(main())
