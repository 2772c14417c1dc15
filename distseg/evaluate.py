"""Exact evaluation: every validation image once, at full resolution, one confusion matrix over all ranks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distseg import checkpoint, configuration
from distseg.config import Config, EvaluateConfig
from distseg.data.samples import SampleSet, open_reader
from distseg.data.stream import evaluation_samples
from distseg.device import autocast_dtype, resolve_precision
from distseg.distributed import Ranks, on_main, setup, teardown
from distseg.inference import blend_tiles, probabilities
from distseg.metrics import SegmentationScores
from distseg.models import build_segmentor
from distseg.progress import Progress
from distseg.summary import overview
from distseg.tally import Tally
from distseg.watchdog import Watchdog
from shards.errors import InputError

FREE = (
    "evaluate.",
    "data.shards=",
    "data.cache_",
    "data.val_split=",
    "data.num_threads=",
    "device=",
    "precision=",
    "parallel.",
)


@dataclass(frozen=True)
class View:
    """How an image is looked at: softmax probabilities averaged over scales and, if asked, the mirror image.

    window_px: an image with a longer side is cut into windows that overlap by overlap_px and are blended (see
    `inference.blend_tiles`); 0: never.
    """

    scales: tuple[float, ...]
    mirror: bool
    precision: str  # resolved: bf16, fp32 or fp64
    device: torch.device
    window_px: int = 0
    overlap_px: int = 128

    @classmethod
    def of(cls, options: EvaluateConfig, precision: str, device: torch.device) -> View:
        """The view of a configuration."""
        return cls(tuple(options.scales), options.mirror, precision, device, options.window_px, options.overlap_px)

    def __call__(self, network: nn.Module, image: np.ndarray) -> Tensor:
        """Class probabilities (C, H, W) float32 on the device, of an image (H, W, 3) uint8 RGB."""
        dtype = autocast_dtype(self.precision)

        def whole(part: np.ndarray) -> Tensor:
            return probabilities(network, part, self.scales, self.mirror, self.device, dtype)

        if not 0 < self.window_px < max(image.shape[:2]):
            return whole(image)
        return blend_tiles(whole, image, self.window_px, self.overlap_px).to(self.device)

    def suffix(self) -> str:
        """For file names: nothing for the plain view, for example "-scales-0.75-1-mirror" for another."""
        scales = "" if self.scales == (1.0,) else "-scales-" + "-".join(f"{scale:g}" for scale in self.scales)
        window = f"-window-{self.window_px}-{self.overlap_px}" if self.window_px else ""
        return scales + ("-mirror" if self.mirror else "") + window

    def to_dict(self) -> dict[str, Any]:
        """What a score depends on."""
        window = {"window_px": self.window_px, "overlap_px": self.overlap_px} if self.window_px else {}
        return {"scales": list(self.scales), "mirror": self.mirror} | window | {"precision": self.precision}


@dataclass
class Evaluator:
    """Scores a network on a split, on all ranks together, and keeps the last result."""

    whole: Callable[[], nn.Module]  # the network to score with all its parameters, called on every rank
    samples: SampleSet
    ranks: Ranks
    view: View
    num_threads: int = 2
    mark: Callable[[str], None] = lambda what: None  # told of every image, so that slow ones are no stall
    details: bool = False  # outlines, calibration and intervals too, which take longer
    result: SegmentationScores | None = None
    tally: Tally | None = None  # what the result was made from
    extra: dict[str, float] = field(default_factory=dict)  # scores that no confusion matrix gives: Tally.others

    @torch.no_grad()
    def __call__(self) -> SegmentationScores:
        """Scores of the whole split from one confusion matrix, the same bits for any number of ranks; void excluded.

        Rank r looks at images r, r + world_size, ...; nothing is padded or dropped: every image is counted once, or
        RuntimeError is raised.
        """
        network = self.whole()
        was_training = network.training
        network.eval()
        num_classes, device = self.samples.classes.num_classes, self.ranks.device
        tally = Tally(len(self.samples), num_classes, device, self.details)
        shares = (self.ranks.rank, self.ranks.world_size, self.num_threads)
        for index, _, image, array in evaluation_samples(self.samples, *shares):
            self.mark("evaluation")
            tally.add(index, self.view(network, image), torch.from_numpy(array).to(device))
        network.train(was_training)
        tally.sum_over_ranks()
        self.tally, self.result, self.extra = tally, tally.scores(), tally.others()
        return self.result

    def named(self) -> dict[str, float]:
        """The last result under its names in metrics.jsonl: val/mean_iou, val/iou/<class>, ..., in [0, 1]."""
        assert self.result is not None
        values = self.result.to_dict(self.samples.classes.names) | self.extra
        return {f"val/{name}": value for name, value in values.items()}

    def report(self, step: int) -> dict[str, Any]:
        """What evaluation.json holds: the last result (None for an absent class), and all that it depends on."""
        assert self.tally is not None
        reader = self.samples.reader
        about = {"step": step, "data": reader.manifest.name, "split": reader.split}
        about |= {"num_images": self.tally.num_images} | self.view.to_dict()
        scores = {name: None if math.isnan(value) else value for name, value in self.named().items()}
        if self.details:
            about["intervals_95"] = {f"val/{name}": list(pair) for name, pair in self.tally.intervals().items()}
        return about | scores | {"confusion": self.tally.confusion.tolist()}


def trained_segmentor(run_dir: Path, which: str) -> tuple[nn.Module, Config, Path]:
    """The segmentor of a run's checkpoint in evaluation mode, its configuration, and the checkpoint's path."""
    config = configuration.from_file(run_dir / "config.yaml")
    path = checkpoint.find(run_dir, which)
    num_classes = len(checkpoint.read_state(path)["identity"]["classes"])
    options = {**config.segmentor.options, "init": "random"}
    network = build_segmentor(config.segmentor.name, num_classes, **options)
    checkpoint.load_segmentor(path, network)
    return network.eval(), config, path


def run(run_dir: Path, which: str, overrides: list[str], quick: bool = False) -> int:
    """`distseg evaluate RUN`: score a checkpoint, print the table, write evaluation-step-<step>-<split>.json.

    quick: leave out outlines, calibration and intervals. The shards need not have been verified, as training's must:
    scoring reads each sample once and soon, and ends at the first damaged or impossible one with its name.
    """
    network, config, path = trained_segmentor(run_dir, which)
    fixed = [item for item in overrides if not item.startswith(FREE)]
    if fixed:
        needed = f"a key that begins with {', '.join(FREE)}"
        raise InputError(f"argument {fixed[0]!r}", needed, "the rest is as the run was trained")
    config = configuration.override(config, overrides)
    reader = open_reader(config.data, config.data.val_split)
    samples = SampleSet(reader, keep=config.data.keep_classes)
    check_classes(path, samples)
    ranks = setup(config.device, config.parallel.timeout_seconds)
    with Watchdog(ranks, config.parallel.timeout_seconds) as watchdog:
        reader.tell(watchdog.alive)
        evaluator = _evaluator(network, config, path, samples, ranks)
        evaluator.details, evaluator.mark = not quick, watchdog.mark
        started = time.perf_counter()
        evaluator()
        _publish(evaluator, path, time.perf_counter() - started)
    teardown()
    return 0


def _evaluator(network: nn.Module, config: Config, path: Path, samples: SampleSet, ranks: Ranks) -> Evaluator:
    """Of a checkpoint's network as configured; called on every rank."""
    trained_in = checkpoint.read_state(path)["identity"]["precision"]
    precision = trained_in if config.precision == "auto" else resolve_precision(config.precision, ranks)
    view = View.of(config.evaluate, precision, ranks.device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    dtype = torch.float64 if precision == "fp64" else torch.float32
    network = network.to(ranks.device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    return Evaluator(lambda: network, samples, ranks, view, config.data.num_threads)


def _publish(evaluator: Evaluator, path: Path, seconds: float) -> None:
    """Write and print the scores of a checkpoint; called on every rank."""
    state, reader, ranks = checkpoint.read_state(path), evaluator.samples.reader, evaluator.ranks
    step, identity, precision = state["state"]["step"], state["identity"], evaluator.view.precision
    other = "" if identity["manifest_sha256"] == reader.manifest.sha256 else f"-{reader.manifest.name}"
    other += "" if identity["precision"] == precision else f"-{precision}"
    other += evaluator.view.suffix() + ("" if evaluator.details else "-quick")  # beside the full one
    out = path.parent.parent / f"evaluation-step-{step:08d}-{reader.split}{other}.json"  # evaluation.json is training's
    report = on_main(ranks, lambda: _written(out, evaluator.report(step)))
    progress = Progress(step, step, ranks.is_main)
    counted = f"{report['num_images']} of {len(evaluator.samples)} images of {reader.split}, each once"
    progress.message(f"{path.name}: {counted}, at full resolution, by {ranks.world_size} rank(s), {seconds:.1f} s")
    progress.evaluation(step, evaluator.named())
    progress.message("\n".join([*overview(report), f"wrote {out}"]))


def _written(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    checkpoint.write_json(path, report)
    return report


def check_classes(path: Path, samples: SampleSet) -> None:
    """Raise InputError when a checkpoint was trained on other classes than the shards have."""
    trained_on = checkpoint.read_state(path)["identity"]["classes"]
    classes = samples.classes
    if trained_on != list(classes.names):
        got = f"{path} was trained on {len(trained_on)} classes ({', '.join(trained_on)})"
        needed = f"the {classes.num_classes} classes of the shards ({', '.join(classes.names)})"
        raise InputError(got, needed, "choose other shards with data.shards=DIR")


if __name__ == "__main__":
    from distseg.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
