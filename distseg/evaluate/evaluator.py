"""Exact evaluation: every validation image once, at full resolution, one confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distseg.data.samples import SampleSet
from distseg.data.stream import evaluation_samples
from distseg.distributed.ranks import Ranks
from distseg.evaluate.class_map import ClassMap
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.evaluate.metrics import SegmentationScores
from distseg.evaluate.subsets import mean_iou
from distseg.evaluate.tally import Tally
from distseg.tracking.catalogue import NEVER_PREDICTED, PREDICTED_SHARE, SUBSET, VALIDATION


@dataclass
class Evaluator:
    """Scores a network on a split, on all ranks together, and keeps the last result."""

    # the network to score, with every parameter on this rank; called on every rank
    gather_network: Callable[[], nn.Module]
    samples: SampleSet
    ranks: Ranks
    augmentation: TestTimeAugmentation
    _: KW_ONLY
    num_threads: int = 2
    # told of every image, so that slow ones are no stall
    mark: Callable[[str], None] = lambda what: None
    seen: Callable[[int], None] = lambda number: None  # told how many images this rank has scored
    details: bool = False  # outlines, calibration and intervals too, which take longer
    prefix: str = VALIDATION  # of its scores' names
    predicted_shares: bool = False  # of each class too
    per_image: bool = False  # what each image's own scores are made from, in tally.margins
    # None: the classes of the samples are the network's
    class_map: ClassMap | None = None
    # indices of classes whose mean IoU is told too, by the subset's name
    subsets: Mapping[str, Sequence[int]] = field(default_factory=dict)
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
        # a collective under FSDP and ZeRO-3, so before anything that can fail on one rank alone
        network = self.gather_network()
        # DDP gives the very network that is trained, which goes on afterwards as it was
        was_training = network.training
        network.eval()
        num_classes, device = self.samples.classes.num_classes, self.ranks.device
        tally = Tally(
            len(self.samples), num_classes, device, self.details, per_image=self.per_image
        )
        # interleaved, as data sets are often sorted by size or scene, and the slowest rank is
        # waited for
        shares = (self.ranks.rank, self.ranks.world_size, self.num_threads)
        for number, sample in enumerate(evaluation_samples(self.samples, *shares), start=1):
            index, _, image, array = sample
            self.mark("evaluation")
            label = torch.from_numpy(array).to(device)
            if self.class_map is not None:
                label = self.class_map.label(label)
            tally.add(index, self.probabilities(network, image), label)
            self.seen(number)
        network.train(was_training)
        # one exchange at the end: ranks may have an image more or less, so nothing can be agreed on
        # per image
        tally.sum_over_ranks()
        self.tally, self.result = tally, tally.scores()
        self.extra = tally.others(self.samples.classes.names)
        return self.result

    def probabilities(self, network: nn.Module, image: np.ndarray) -> Tensor:
        """(C, H, W) of the samples' classes: what a network makes of an image."""
        found = self.augmentation(network, image)
        return found if self.class_map is None else self.class_map.probabilities(found)

    def named(self) -> dict[str, float]:
        """The last result under its names in metrics.jsonl.

        val/mean_iou, val/iou/<class>, ..., in [0, 1]; prefix in place of val/.
        """
        assert self.result is not None and self.tally is not None
        classes = self.samples.classes.names
        values = self.result.to_dict(classes) | self.extra
        for name, indices in self.subsets.items():
            values[f"{SUBSET}{name}"] = mean_iou(self.result.per_class_iou, indices)
        if self.predicted_shares:
            shares = zip(classes, self.tally.predicted_shares(), strict=True)
            values |= {f"{PREDICTED_SHARE}{name}": share for name, share in shares}
        named = {f"{self.prefix}{name}": value for name, value in values.items()}
        if self.prefix != VALIDATION:
            return named
        missed = self.tally.never_predicted().items()
        return named | {f"{NEVER_PREDICTED}{classes[index]}": share for index, share in missed}

    def written(self) -> dict[str, float | None]:
        """As `named`, with None for what is NaN, such as the IoU of an absent class."""
        # JSON has no NaN, and the strict readers of other languages refuse it
        named = self.named().items()
        return {name: None if math.isnan(value) else value for name, value in named}

    def report(self, step: int) -> dict[str, Any]:
        """What evaluation.json holds.

        The last result (None for an absent class), and all that it depends on.
        """
        assert self.tally is not None
        reader = self.samples.reader
        about = {"step": step, "data": reader.manifest.name, "split": reader.split}
        # two data sets may have one name
        about["data_sha256"] = reader.content_sha256()
        about |= {"num_images": self.tally.num_images} | self.augmentation.to_dict()
        if self.class_map is not None:
            about["class_map"] = self.class_map.to_dict()
        # a thousand resamples, which take longer than one evaluation within training should
        intervals = self.tally.intervals() if self.details else {}
        if intervals:
            about["intervals_95"] = {
                f"{VALIDATION}{name}": list(pair) for name, pair in intervals.items()
            }
        return about | self.written() | {"confusion": self.tally.confusion.tolist()}
