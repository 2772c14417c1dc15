"""Exact evaluation: every validation image once, at full resolution, one confusion matrix over all
ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distseg.config import loading
from distseg.config.schema import Config, DataConfig
from distseg.data.mixture import names_of
from distseg.data.partners import mapped_classes
from distseg.data.samples import Mapped, SampleSet, check_not_void, open_reader, sha256_of_keys
from distseg.distributed.device import resolve_precision
from distseg.distributed.ranks import Ranks, joined, of_all, on_each, on_main
from distseg.distributed.watchdog import Watchdog
from distseg.evaluate import document, table_of_images
from distseg.evaluate.class_map import Wanted, class_map
from distseg.evaluate.evaluator import Evaluator
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.evaluate.subsets import subsets_of
from distseg.evaluate.summary import overview
from distseg.evaluate.trained import trained_classes, trained_segmentor
from distseg.runs.checkpoint import Checkpoint
from distseg.runs.lease import leased
from distseg.tracking.progress import Progress
from shards.errors import InputError
from shards.files import check_writable, write_json
from shards.reader import ShardReader
from shards.words import counted


@dataclass(frozen=True)
class EvaluateOptions:
    """What is scored and written.

    quick: leave out outlines, calibration and intervals. wanted: which of the data's classes the
    run's are, see `class_map`. per_image: a CSV file of each image's own scores.
    """

    quick: bool = False
    wanted: Wanted | None = None
    per_image: Path | None = None


def run(run_dir: Path, which: str, overrides: list[str], options: EvaluateOptions) -> int:
    """`distseg evaluate RUN`: score a checkpoint, print the table, write
    evaluation-step-<step>-<split>.json.

    The shards need not have been verified, as training's must: scoring reads each sample once and
    soon, and ends at the first damaged or impossible one with its name.
    """
    # before the network is built: a key that may not differ would score another network, or none
    check_overrides(overrides)
    overrides = loading.of_validation(overrides)
    # everything that can refuse comes before the ranks join, where leaving alone hangs the others
    network, config, found = trained_segmentor(run_dir, which)
    config = loading.override(config, overrides)
    samples = open_samples(config, found, options.wanted)
    timeout_seconds = config.parallel.timeout_seconds
    with (
        # a training beside may prune it before every rank has come to read it
        leased(found.path),
        joined(config.device, timeout_seconds) as ranks,
        Watchdog(ranks, timeout_seconds) as watchdog,
    ):
        # now, and not when all is scored
        action = "copy the run to where you may write, or use distseg.load(RUN).evaluate()"
        on_main(ranks, lambda: check_writable(run_dir, action))
        network, found = _of_one_checkpoint(run_dir, network, found, ranks)
        # bytes of a long download are signs of life
        samples.reader.tell(watchdog.keep_alive)
        evaluator = evaluator_of(network, config, found, samples, ranks, wanted=options.wanted)
        # each image is reported: a split at full resolution takes longer than the time limit
        evaluator.details, evaluator.mark = not options.quick, watchdog.report
        path = options.per_image
        if path is not None:
            # by the main rank, which writes it: the others may be on machines without the folder
            on_main(ranks, lambda: table_of_images.check_place(path))
            evaluator.per_image = True
        _publish(evaluator, found, _score(evaluator), options.wanted)
        if path is not None:
            on_main(ranks, lambda: _write_images(path, evaluator))
    return 0


def _score(evaluator: Evaluator) -> float:
    """Let it score all images, and show how far it is; returns the seconds that it took."""
    ranks, total = evaluator.ranks, len(evaluator.samples)
    progress = Progress(total, 0, ranks.is_main, noun="image", brief=True)
    if evaluator.class_map is not None and evaluator.class_map.changes():
        progress.message(f"classes: {', '.join(evaluator.class_map.changes())}")
    # after all is open: the time told is that of scoring
    started = time.perf_counter()

    def seen(number: int) -> None:
        # the main rank's share stands for all: they have as many images, or one less
        done = min(number * ranks.world_size, total)
        speed = done / (time.perf_counter() - started)
        progress.update(done, {"images_per_second": speed})

    evaluator.seen = seen
    try:
        evaluator()
    finally:
        progress.close()
    return time.perf_counter() - started


def _write_images(path: Path, evaluator: Evaluator) -> None:
    assert evaluator.tally is not None
    samples = evaluator.samples
    table_of_images.write(path, samples, samples.classes.names, evaluator.tally.margins)
    print(f"wrote {path}")


def _of_one_checkpoint(
    run_dir: Path, network: nn.Module, found: Checkpoint, ranks: Ranks
) -> tuple[nn.Module, Checkpoint]:
    """The main rank's checkpoint, on every rank: "last" may be another for each, where the run
    trains on meanwhile.
    """
    step = on_main(ranks, lambda: found.step)
    if of_all(ranks, found.step != step, any):
        network, _, found = on_each(ranks, lambda: trained_segmentor(run_dir, str(step)))
    return network, found


def check_overrides(overrides: list[str]) -> None:
    """Raise InputError for a key that may not differ from the run when it is scored."""
    loading.refuse_others(overrides, lambda key: key.at_evaluation)


def open_samples(config: Config, found: Checkpoint, wanted: Wanted | None = None) -> SampleSet:
    """The split to score; InputError where its classes cannot be those of the checkpoint.

    wanted: which of them the checkpoint's are, see `class_map`.
    """
    check_place(config, found.path.parent.parent)
    options = config.data
    reader = open_reader(options, options.val_split, options.val_shards)
    mapped = None if wanted is not None else _mapped(options, found, reader)
    samples = SampleSet(reader, keep=options.keep_classes, mapped=mapped)
    class_map(found.identity["classes"], samples.classes.names, wanted)
    check_not_void(samples, "to score on")
    return samples


def _mapped(options: DataConfig, found: Checkpoint, reader: ShardReader) -> Mapped | None:
    """A data set's classes as training mapped them: told by data.class_map, or "other" where they
    have no kept name. None: as they are, to be found by `class_map`.

    Raises InputError where it is another data set than training had, and its classes do not fit.
    """
    sha256, identity = reader.manifest.sha256, found.identity
    # by its content, and not by its folder, or by a name that another may have
    name = identity.get("data_names", {}).get(sha256, names_of([reader])[0])
    is_first = sha256 == identity.get("manifest_sha256")
    if is_first or not (options.keep_classes or name in options.class_map):
        return None
    try:
        return mapped_classes(trained_classes(found), reader.classes, options, name)
    except InputError as error:
        action = "choose other shards with data.shards=DIR: what the classes are is training's"
        raise InputError(error.got, error.needed, action) from None


def check_place(config: Config, run_dir: Path) -> None:
    """Raise InputError where the shards' path is relative, and begins in another folder."""
    location = config.data.val_shards or config.data.shards[0]
    shards = Path(location)
    if "://" in location or shards.is_absolute() or shards.exists():
        return
    # where training was called, if the run's own path still says it
    here, ours = run_dir.resolve(), Path(config.run_dir).parts
    action = "call this in the folder that the run was trained in, or write data.shards=DIR"
    if ours and not Path(config.run_dir).is_absolute() and here.parts[-len(ours) :] == ours:
        found = here.parents[len(ours) - 1] / shards
        action = f"write data.shards={found}" if found.exists() else action
    raise InputError(
        f"data.shards={shards}: a relative path, and not in {Path.cwd()}",
        "the shards' path as it is from here",
        action,
    )


def evaluator_of(
    network: nn.Module,
    config: Config,
    found: Checkpoint,
    samples: SampleSet,
    ranks: Ranks,
    *,
    wanted: Wanted | None = None,
) -> Evaluator:
    """Of a checkpoint's network as configured; called on every rank."""
    network, augmentation = as_trained(network, config, found, ranks)
    return Evaluator(
        lambda: network,
        samples,
        ranks,
        augmentation,
        num_threads=config.data.num_threads,
        class_map=class_map(found.identity["classes"], samples.classes.names, wanted),
        subsets=subsets_of(config.evaluate.subsets, samples.classes.names),
    )


def as_trained(
    network: nn.Module, config: Config, found: Checkpoint, ranks: Ranks
) -> tuple[nn.Module, TestTimeAugmentation]:
    """The network on its device as training computed with it; the augmentation as configured."""
    # "auto" means the run's own precision: another machine's choice would give other scores than
    # training's
    trained_in = found.identity["precision"]
    precision = (
        trained_in if config.precision == "auto" else resolve_precision(config.precision, ranks)
    )
    # as in training: another memory format runs other kernels, with other rounding
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    dtype = torch.float64 if precision == "fp64" else torch.float32
    network = network.to(ranks.device, dtype=dtype)
    network = network.to(memory_format=layout)  # type: ignore[call-overload]
    return network, TestTimeAugmentation.of(config.evaluate, precision, ranks.device)


def _publish(
    evaluator: Evaluator, found: Checkpoint, seconds: float, wanted: Wanted | None
) -> None:
    """Write and print the scores of a checkpoint; called on every rank."""
    reader, ranks, precision = (
        evaluator.samples.reader,
        evaluator.ranks,
        evaluator.augmentation.precision,
    )
    # as it was read at the start: the folder may have been pruned meanwhile
    path, step, identity = found.path, found.step, found.identity
    # part of the file's name is whatever makes scores incomparable, so that none overwrites another
    other = data_suffix(reader, identity["manifest_sha256"])
    other += "" if wanted is None else f"-map-{document.short(sha256_of_keys([repr(wanted)]))}"
    other += "" if identity["precision"] == precision else f"-{precision}"
    # beside the full one
    other += evaluator.augmentation.suffix() + ("" if evaluator.details else "-quick")
    # evaluation.json is training's
    out = path.parent.parent / f"evaluation-step-{step:08d}-{reader.split}{other}.json"
    # the main rank writes, and all learn of a full disk
    report = on_main(ranks, lambda: _written(out, evaluator.report(step)))
    progress = Progress(step, step, ranks.is_main)
    images = counted(len(evaluator.samples), "image")
    scored = f"{report['num_images']} of {images} of {reader.split}, each once"
    progress.message(
        f"{path.name}: {scored}, at full resolution, by "
        f"{counted(ranks.world_size, 'rank')}, {seconds:.1f} s"
    )
    progress.evaluation(step, evaluator.named())
    progress.message("\n".join([*overview(report), f"wrote {out}"]))


def data_suffix(reader: ShardReader, trained_on: str) -> str:
    """What the name of a file of scores says of the data; "" for those that the run trained on.

    trained_on: the sha256 of their manifest.
    """
    if reader.manifest.sha256 == trained_on:
        return ""
    # by content too: other data may have the same name
    return f"-{reader.manifest.name}-{document.short(reader.content_sha256())}"


def _written(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    write_json(path, report)
    return report
