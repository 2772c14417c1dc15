"""The teacher of weak-to-strong consistency: pseudo-labels of weak views, and the strong views that
the segmentor is trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.data.plan import rank_positions
from distseg.data.strong import FILL, StrongView, strong_draws
from distseg.distributed.ranks import Ranks
from distseg.losses.tensors import at_least_float32, upsample
from distseg.losses.terms import PseudoLabels
from distseg.parallel import Learner
from distseg.train.batch import Images
from distseg.train.ema import MovingAverage
from shards.errors import InputError
from shards.sample import IGNORE_INDEX

# beyond the seeds of the streams, so that a strong view repeats no draw of its weak one
SEED = 2**33


@dataclass(frozen=True)
class WeakToStrong:
    """Makes strong views of weak ones, with the teacher's pseudo-labels.

    teach: pixels (n, 3, H, W) -> logits (n, C, h, w), without a graph. batch_size: of unlabelled
    images, over all ranks. soft: whether the probabilities of all classes are kept.
    """

    teach: Callable[[Tensor], Tensor]
    view: StrongView
    ranks: Ranks
    seed: int
    batch_size: int
    num_classes: int
    soft: bool = False

    @classmethod
    def of(
        cls, config: Config, segmentor: Learner, ema: MovingAverage | None, ranks: Ranks
    ) -> WeakToStrong:
        """Of a configuration; ema: with a network, where the teacher is one."""
        chosen, names = config.consistency, [field.name for field in fields(StrongView)]
        network = segmentor.network
        if chosen.teacher == "ema":
            assert ema is not None and ema.network is not None
            network = ema.network

        def teach(pixels: Tensor) -> Tensor:
            return segmentor.infer(network, pixels)

        return cls(
            teach,
            StrongView(**{name: getattr(chosen, name) for name in names}),
            ranks,
            config.seed + SEED,
            config.semi.batch_size or config.batch_size,
            int(segmentor.network.num_classes),  # type: ignore[arg-type]
            soft=chosen.target == "probabilities",
        )

    @torch.no_grad()
    def __call__(self, weak: Images, step: int, num_micro_batches: int = 1) -> Images:
        """The strong views of this rank's images of a step, with their pseudo-labels.

        The teacher sees as many images at a time as the segmentor does.
        """
        positions = rank_positions(step, self.batch_size, self.ranks.rank, self.ranks.world_size)
        draws = strong_draws(self.seed, positions, self.num_classes)
        parts = [weak.pixels, weak.label, draws]
        chunks = zip(*(part.chunk(num_micro_batches) for part in parts), strict=True)
        strong = [self._strong(*chunk) for chunk in chunks]
        return strong[0] if len(strong) == 1 else _joined(strong)

    def _strong(self, pixels: Tensor, label: Tensor, draws: Tensor) -> Images:
        """Of some of the images, whole pairs where they are mixed."""
        inside = label != IGNORE_INDEX
        # by the weak view, so before anything is mixed
        pseudo = self._pseudo_labels(pixels, inside)
        mask = self.view.mask(pseudo.label, draws)
        changed = self.view.mixed(self.view.changed(pixels, inside, draws), mask, FILL)
        every = pseudo.probabilities
        mixed = PseudoLabels(
            self.view.mixed(pseudo.label, mask, IGNORE_INDEX),
            self.view.mixed(pseudo.confidence, mask),
            None if every is None else self.view.mixed(every, mask),
        )
        channels_last = pixels.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return Images(
            changed.contiguous(memory_format=layout),
            self.view.mixed(label, mask, IGNORE_INDEX),
            mixed,
        )

    def _pseudo_labels(self, pixels: Tensor, inside: Tensor) -> PseudoLabels:
        logits = upsample(at_least_float32(self.teach(pixels)), pixels.shape[-2:])
        probabilities = logits.softmax(1)
        confidence, index = probabilities.max(1)
        label = index.to(torch.uint8).where(inside, IGNORE_INDEX)
        return PseudoLabels(label, confidence, probabilities if self.soft else None)


def check_pairs(config: Config, world_size: int) -> None:
    """Raise InputError where a rank's share of a micro-batch holds half a pair of mixed images."""
    mix, size = config.consistency.mix, config.semi.batch_size or config.batch_size
    num_parts = world_size * config.gradient_accumulation_steps
    is_mixed = StrongView(mix=mix).is_paired and config.consistency.mix_probability > 0
    if config.consistency.weight and is_mixed and size // num_parts % 2:
        got = f"consistency.mix={mix} with {size // num_parts} unlabelled images a rank and "
        got += "micro-batch"
        needed = "an even number: neighbours are mixed with each other"
        action = f"write semi.batch_size={2 * num_parts * max(1, size // num_parts // 2)} or "
        action += "consistency.mix=cutout; of a run that goes on, start fewer ranks"
        raise InputError(got, needed, action)


def _joined(parts: list[Images]) -> Images:
    """Images of several micro-batches, in their order."""
    pseudo = [part.pseudo for part in parts if part.pseudo is not None]
    every = [each.probabilities for each in pseudo if each.probabilities is not None]
    labels = PseudoLabels(
        torch.cat([each.label for each in pseudo]),
        torch.cat([each.confidence for each in pseudo]),
        torch.cat(every) if every else None,
    )
    images = Images(
        torch.cat([part.pixels for part in parts]), torch.cat([part.label for part in parts])
    )
    return replace(images, pseudo=labels)
