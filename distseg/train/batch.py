"""The images of a step on this rank, and the micro-batches that they are taken in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from distseg.config.schema import ADAPTATION, Config
from distseg.losses.predicted import Kind, Predicted, PseudoLabels


@dataclass(frozen=True)
class Images:
    """Images of one kind on this rank's device.

    pixels: (n, 3, H, W) float in [0, 1]; label: (n, H, W) uint8, 255 = void. Of unlabelled images
    the label says only where they are, and where ground truth is laid over them; see Targets.
    pseudo: of unlabelled images whose pixels are a strong view, what a teacher says of them.
    is_tracked: whether batch norm's running statistics are of these images too; else each kind is
    normalised by itself. feature_factors: what their channels are multiplied by where the
    segmentor's encoder gives them to its head, (n, channels) for each feature map; None: nothing
    is.
    """

    pixels: Tensor
    label: Tensor
    pseudo: PseudoLabels | None = None
    is_tracked: bool = True
    feature_factors: tuple[Tensor, ...] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Images:
        """With every tensor changed, for example to those of some of the images."""
        pseudo = None if self.pseudo is None else self.pseudo.each(change)
        factors = None
        if self.feature_factors is not None:
            factors = tuple(change(each) for each in self.feature_factors)
        changed = replace(self, pixels=change(self.pixels), label=change(self.label))
        return replace(changed, pseudo=pseudo, feature_factors=factors)

    def __getitem__(self, chosen: slice) -> Images:
        return self.each(lambda tensor: tensor[chosen])


def tracked_by(config: Config, labelled: Images) -> Images:
    """Labelled images, with whether running statistics are of them, between domains."""
    together = config.mode not in ADAPTATION or config.adaptation.batch_norm == "joint"
    return replace(labelled, is_tracked=together)


@dataclass(frozen=True)
class MicroBatch:
    """Labelled images, and unlabelled ones in semi-supervised mode."""

    labelled: Images
    unlabelled: Images | None = None

    @cached_property
    def all(self) -> Images:
        """All images, the labelled ones first, in the labelled ones' memory format."""
        one, other = self.labelled, self.unlabelled
        if other is None:
            return one
        # said, not left to torch.cat: convolutions in another format are slower, and round
        # differently
        channels_last = one.pixels.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        # One forward of all images: batch normalisation sees the statistics of both kinds together,
        # and the segmentor's gradients are exchanged once.
        pixels = torch.cat([one.pixels, other.pixels]).contiguous(memory_format=layout)
        factors = other.feature_factors
        if factors is not None:
            # labelled images keep their features as they are
            of_one = (each.new_ones(len(one.label), each.shape[1]) for each in factors)
            factors = tuple(map(torch.cat, zip(of_one, factors, strict=True)))
        label = torch.cat([one.label, other.label])
        return Images(pixels, label, feature_factors=factors)

    @property
    def num_tracked(self) -> int | None:
        """How many of the first of all images, or below 0 of the last, batch norm's running
        statistics are of alone, each kind being normalised by itself; None: of all together.
        """
        if self.unlabelled is None or self.labelled.is_tracked == self.unlabelled.is_tracked:
            return None
        tracked_first = self.labelled.is_tracked
        return len(self.labelled.label) if tracked_first else -len(self.unlabelled.label)

    def slices(self) -> dict[Kind, slice]:
        """Where the images of each kind are among all."""
        count = len(self.labelled.label)
        if self.unlabelled is None:
            return {"labelled": slice(0, count)}
        # labelled first, so that a discriminator's k-th label map goes with the k-th image
        return {"labelled": slice(0, count), "unlabelled": slice(count, None)}

    def parts(self, seen: Predicted) -> dict[Kind, Predicted]:
        """What the networks say of all images, by kind; with the pseudo-labels, where there are."""
        parts = {kind: seen[where] for kind, where in self.slices().items()}
        if self.unlabelled is not None and self.unlabelled.pseudo is not None:
            parts["unlabelled"] = replace(parts["unlabelled"], pseudo=self.unlabelled.pseudo)
        return parts

    def split(self, count: int) -> Iterator[MicroBatch]:
        """In `count` micro-batches of one size; the configuration makes sure that it divides."""
        if count == 1:
            yield self
            return
        for index in range(count):
            # The k-th share of both kinds. A micro-batch of one kind alone would have batch
            # normalisation see statistics of that kind alone.
            labelled = self.labelled[_share(self.labelled, index, count)]
            unlabelled = self.unlabelled
            if unlabelled is not None:
                unlabelled = unlabelled[_share(unlabelled, index, count)]
            yield MicroBatch(labelled, unlabelled)


def _share(images: Images, index: int, count: int) -> slice:
    size = len(images.label) // count
    return slice(index * size, (index + 1) * size)
