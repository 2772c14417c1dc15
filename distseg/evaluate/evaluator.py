"""Exact evaluation: every validation image once, at full resolution, one confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distseg.config.schema import EvaluateConfig
from distseg.data.samples import SampleSet
from distseg.data.stream import evaluation_samples
from distseg.distributed.device import autocast_dtype
from distseg.distributed.ranks import Ranks
from distseg.evaluate.inference import blend_tiles, probabilities
from distseg.evaluate.metrics import SegmentationScores
from distseg.evaluate.tally import Tally


@dataclass(frozen=True)
class View:
    """How an image is looked at: softmax probabilities averaged over scales and, if asked, the
    flipped image.

    window_px: an image with a longer side is cut into windows that overlap by overlap_px and are
    blended (see `inference.blend_tiles`); 0: never.
    """

    scales: tuple[float, ...]
    horizontal_flip: bool
    precision: str  # resolved: bf16, fp32 or fp64
    device: torch.device
    window_px: int = 0
    overlap_px: int = 128

    @classmethod
    def of(cls, options: EvaluateConfig, precision: str, device: torch.device) -> View:
        """The view of a configuration."""
        return cls(
            tuple(options.scales),
            options.horizontal_flip,
            precision,
            device,
            options.window_px,
            options.overlap_px,
        )

    def __call__(self, network: nn.Module, image: np.ndarray) -> Tensor:
        """Class probabilities (C, H, W) float32 on the device, of an image (H, W, 3) uint8 RGB."""
        dtype = autocast_dtype(self.precision)

        def whole(part: np.ndarray) -> Tensor:
            return probabilities(
                network, part, self.scales, self.horizontal_flip, self.device, dtype
            )

        if not 0 < self.window_px < max(image.shape[:2]):
            return whole(image)
        return blend_tiles(whole, image, self.window_px, self.overlap_px).to(self.device)

    def suffix(self) -> str:
        """For file names: nothing for the plain view, for example "-scales-0.75-1-flip" for
        another.
        """
        scales = (
            ""
            if self.scales == (1.0,)
            else "-scales-" + "-".join(f"{scale:g}" for scale in self.scales)
        )
        window = f"-window-{self.window_px}-{self.overlap_px}" if self.window_px else ""
        return scales + ("-flip" if self.horizontal_flip else "") + window

    def to_dict(self) -> dict[str, Any]:
        """What a score depends on."""
        window = (
            {"window_px": self.window_px, "overlap_px": self.overlap_px} if self.window_px else {}
        )
        return (
            {"scales": list(self.scales), "horizontal_flip": self.horizontal_flip}
            | window
            | {"precision": self.precision}
        )


@dataclass
class Evaluator:
    """Scores a network on a split, on all ranks together, and keeps the last result."""

    # the network to score with all its parameters, called on every rank
    whole: Callable[[], nn.Module]
    samples: SampleSet
    ranks: Ranks
    view: View
    num_threads: int = 2
    # told of every image, so that slow ones are no stall
    mark: Callable[[str], None] = lambda what: None
    details: bool = False  # outlines, calibration and intervals too, which take longer
    result: SegmentationScores | None = None
    tally: Tally | None = None  # what the result was made from
    # scores that no confusion matrix gives: Tally.others
    extra: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self) -> SegmentationScores:
        """Scores of the whole split from one confusion matrix, the same bits for any number of
        ranks; void excluded.

        Rank r looks at images r, r + world_size, ...; nothing is padded or dropped: every image is
        counted once, or RuntimeError is raised.
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
        """The last result under its names in metrics.jsonl.

        Val/mean_iou, val/iou/<class>, ..., in [0, 1].
        """
        assert self.result is not None
        values = self.result.to_dict(self.samples.classes.names) | self.extra
        return {f"val/{name}": value for name, value in values.items()}

    def report(self, step: int) -> dict[str, Any]:
        """What evaluation.json holds.

        The last result (None for an absent class), and all that it depends on.
        """
        assert self.tally is not None
        reader = self.samples.reader
        about = {"step": step, "data": reader.manifest.name, "split": reader.split}
        about |= {"num_images": self.tally.num_images} | self.view.to_dict()
        scores = {
            name: None if math.isnan(value) else value for name, value in self.named().items()
        }
        if self.details:
            about["intervals_95"] = {
                f"val/{name}": list(pair) for name, pair in self.tally.intervals().items()
            }
        return about | scores | {"confusion": self.tally.confusion.tolist()}
