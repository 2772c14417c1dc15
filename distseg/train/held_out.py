"""How good pseudo-labels are: the teacher labels images whose labels no step sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distseg.data.samples import SampleSet
from distseg.data.stream import evaluation_samples
from distseg.distributed.ranks import Ranks, all_reduce_sum
from distseg.evaluate.inference import TestTimeAugmentation
from distseg.parallel.torch_learner import evaluating
from distseg.tracking.catalogue import (
    AGREEMENT,
    CLASS_AGREEMENT,
    CLASS_CONFIDENT,
    CONFIDENT_AGREEMENT,
    HELD_OUT_CONFIDENT,
)
from shards.sample import IGNORE_INDEX


class _Corrected(nn.Module):
    """A teacher whose logits are what its pseudo-labels are made of."""

    def __init__(self, teacher: nn.Module, corrected: Callable[[Tensor], Tensor]):
        super().__init__()
        self.teacher, self._corrected = teacher, corrected

    def forward(self, image: Tensor) -> Tensor:
        # before they are upsampled or cut into windows, as in training
        return self._corrected(self.teacher(image))


@dataclass(frozen=True)
class HeldOut:
    """Compares the teacher's pseudo-labels with the labels of images that are not trained on.

    gather_network: the teacher with every parameter on this rank; called on every rank. corrected:
    its logits (n, C, h, w) -> those that training makes pseudo-labels of. look: how it sees an
    image. threshold: a pixel is confident from this probability on. mark: told of every image.
    """

    gather_network: Callable[[], nn.Module]
    corrected: Callable[[Tensor], Tensor]
    samples: SampleSet
    ranks: Ranks
    look: TestTimeAugmentation
    threshold: float
    num_threads: int
    mark: Callable[[str], None] = lambda what: None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Shares in [0, 1] by their names in metrics.jsonl, the same for any number of ranks.

        Of pixels with a label. A share of no pixels is left out: an absent class, and agreement
        where nothing is confident.
        """
        # collective under FSDP and ZeRO-3, so before anything that can fail on one rank alone
        network = _Corrected(self.gather_network(), self.corrected)
        num_classes = self.samples.classes.num_classes
        # of the confident pixels and of the others: rows = labels, columns = pseudo-labels
        counts = torch.zeros(2, num_classes, num_classes, device=self.ranks.device).long()
        shares = (self.ranks.rank, self.ranks.world_size, self.num_threads)
        # under DDP it is the network that is trained, whose layers go on in the mode that they were
        # in
        with evaluating(network):
            for _, _, image, array in evaluation_samples(self.samples, *shares):
                self.mark("held-out images")
                confidence, index = self.look(network, image).max(0)
                label = torch.from_numpy(array).to(index.device)
                counts += self._counted(label, index, confidence)
        # whole numbers until here, so that any number of ranks comes to the same bits
        confident, others = all_reduce_sum(counts).cpu().double()
        return dict(self._named(confident, confident + others))

    def _counted(self, label: Tensor, index: Tensor, confidence: Tensor) -> Tensor:
        """(2, C, C) int64 of an image; label, index and confidence: (H, W)."""
        num_classes = self.samples.classes.num_classes
        # one count for both matrices: a place in the flat (2, C, C)
        place = (confidence < self.threshold).long() * num_classes + label.long()
        place = place * num_classes + index
        counted = torch.bincount(place[label != IGNORE_INDEX], minlength=2 * num_classes**2)
        return counted.view(2, num_classes, num_classes)

    def _named(self, confident: Tensor, every: Tensor) -> Iterator[tuple[str, float]]:
        def share(name: str, part: Tensor, whole: Tensor) -> Iterator[tuple[str, float]]:
            # not NaN: a row of the file says nothing of what is not there
            if whole:
                yield name, float(part / whole)

        right, kept, present = confident.diagonal(), confident.sum(1), every.sum(1)
        yield from share(AGREEMENT, every.diagonal().sum(), every.sum())
        yield from share(CONFIDENT_AGREEMENT, right.sum(), confident.sum())
        yield from share(HELD_OUT_CONFIDENT, confident.sum(), every.sum())
        for index, name in enumerate(self.samples.classes.names):
            yield from share(CLASS_CONFIDENT + name, kept[index], present[index])
            yield from share(CLASS_AGREEMENT + name, right[index], kept[index])
