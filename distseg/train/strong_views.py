"""Strong views of a step's images on this rank, of labelled ones together with their labels."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.data.plan import rank_positions
from distseg.data.strong import FILL, StrongView, strong_draws
from distseg.distributed.ranks import Ranks
from distseg.losses.predicted import PseudoLabels
from distseg.losses.tensors import of_neighbours, sent
from distseg.train.batch import Images
from shards.sample import IGNORE_INDEX

# beyond the seeds of the streams, so that a strong view repeats no draw of its crop
OF_UNLABELLED, OF_LABELLED, NEXT_VIEW = 2**33, 3 * 2**32, 2**34


@dataclass(frozen=True)
class StrongViews:
    """What makes strong views of one kind of images.

    batch_size: of these images, over all ranks. seed: that of their draws.
    """

    view: StrongView
    ranks: Ranks
    seed: int
    batch_size: int
    num_classes: int

    @classmethod
    def of_unlabelled(cls, config: Config, num_classes: int, ranks: Ranks) -> StrongViews:
        """For the crops that a teacher labels."""
        size, seed = config.semi.batch_size or config.batch_size, config.seed + OF_UNLABELLED
        return cls(_view(config), ranks, seed, size, num_classes)

    @classmethod
    def of_untaught(cls, config: Config, num_classes: int, ranks: Ranks) -> StrongViews:
        """For unlabelled crops that no teacher has labelled, so that none is cut by its classes."""
        views = cls.of_unlabelled(config, num_classes, ranks)
        mix = "none" if config.strong.mix == "classmix" else config.strong.mix
        return replace(views, view=replace(views.view, mix=mix))

    @classmethod
    def of_labelled(cls, config: Config, num_classes: int, ranks: Ranks) -> StrongViews:
        """For the labelled crops, where `strong.labelled` asks for it."""
        seed = config.seed + OF_LABELLED
        return cls(_view(config), ranks, seed, config.batch_size, num_classes)

    def draws(self, step: int, number: int = 0) -> Tensor:
        """The random numbers of this rank's images, of their `number`-th views; see
        `strong_draws`.
        """
        seed = self.seed + number * NEXT_VIEW
        return strong_draws(seed, self.positions(step), self.num_classes)

    def positions(self, step: int) -> range:
        """Of this rank's images of a step, among all that the run has seen."""
        return rank_positions(step, self.batch_size, self.ranks.rank, self.ranks.world_size)

    def changed(self, images: Images, inside: Tensor, draws: Tensor) -> Images:
        """With other colours and sharpness; see StrongView.changed."""
        return replace(images, pixels=self.view.changed(images.pixels, inside, draws))

    def mixed(self, images: Images, partners: Images, draws: Tensor) -> Images:
        """With a part of each one's partner laid over it, and over its label and pseudo-label.

        Which part follows from the partners' pseudo-labels, else their labels.
        """
        pseudo, others = images.pseudo, partners.pseudo
        mask = self.view.mask(partners.label if others is None else others.label, draws)
        channels_last = images.pixels.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        pixels = self.view.mixed(images.pixels, partners.pixels, mask, FILL)
        label = self.view.mixed(images.label, partners.label, mask, IGNORE_INDEX)
        if pseudo is not None and others is not None:
            every = pseudo.probabilities
            if every is not None and others.probabilities is not None:
                every = self.view.mixed(every, others.probabilities, mask)
            pseudo = PseudoLabels(
                self.view.mixed(pseudo.label, others.label, mask, IGNORE_INDEX),
                self.view.mixed(pseudo.confidence, others.confidence, mask),
                every,
                pseudo.share,
            )
        pixels = pixels.contiguous(memory_format=layout)
        return replace(images, pixels=pixels, label=label, pseudo=pseudo)

    def partners(self, images: Images) -> Images:
        """The neighbour of each image; of views that are not mixed in pairs the images."""
        return images.each(of_neighbours) if self.view.is_paired else images

    @torch.no_grad()
    def alone(self, images: Images, step: int) -> Images:
        """This rank's images of a step, which no teacher has labelled, with their labels mixed as
        the pixels are.
        """
        draws = self.draws(step)
        # not by the label, whose void is inside of images too: a ring of unchanged colours would
        # tell the network where objects end. A pixel of an image may have the fill's colour; it
        # keeps it
        # within half a byte: a GPU divides bytes by 255 through its inverse, which rounds otherwise
        fill = sent(FILL, images.pixels.device, images.pixels.dtype)
        inside = ((images.pixels - fill).abs() > 0.5 / 255).any(1)
        changed = self.changed(images, inside, draws)
        return self.mixed(changed, self.partners(changed), draws)


def _view(config: Config) -> StrongView:
    return StrongView(**{field.name: getattr(config.strong, field.name) for field in _FIELDS})


_FIELDS = fields(StrongView)
