"""Dropout of whole channels of an encoder's features, in views of unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distseg.config.schema import Config
from distseg.config.world_size import has_teacher
from distseg.data.plan import augmentation_rng
from distseg.losses.tensors import sent
from shards.errors import InputError

# beyond the seeds of all strong views (strong_views.py)
OF_FEATURES = 2**38
# of a channel that is left out, and of images whose strong views keep all (UniMatch, both)
PROBABILITY = 0.5


@dataclass(frozen=True)
class FeatureDropout:
    """What a segmentor's head gets of its encoder's features, of each view and channel.

    channels: of each feature map. seed: that of the draws. num_strong: strong views of an image.
    is_complementary: of two strong views one has the channels that the other lacks, the same of
    every map, and some images have both views whole (Yang et al. 2025, UniMatch V2); else strong
    views are whole, and the weak one is a further view, of which each map lacks channels of its own
    (Yang et al. 2023, UniMatch). Channels that are kept count twice as much, as in any dropout.
    """

    channels: tuple[int, ...]
    seed: int
    num_strong: int
    is_complementary: bool

    @classmethod
    def of(cls, config: Config, segmentor: nn.Module) -> FeatureDropout | None:
        """Of a configuration and its bare network; None: there is none.

        Raises InputError for a network whose features cannot be changed on their way to its head.
        """
        chosen = config.consistency
        if not has_teacher(config) or chosen.feature_perturbation == "none":
            return None
        channels = getattr(segmentor, "feature_channels", None)
        if channels is None:
            got = f"consistency.feature_perturbation={chosen.feature_perturbation} with "
            got += f"segmentor={config.segmentor.name}"
            needed = "a segmentor with a head on an encoder's features: HEAD_ENCODER or a DeepLab"
            action = "write consistency.feature_perturbation=none, or another segmentor"
            raise InputError(got, needed, action)
        is_complementary = chosen.feature_perturbation == "complementary"
        seed = config.seed + OF_FEATURES
        return cls(tuple(channels), seed, chosen.num_views, is_complementary)

    def factors(self, positions: Iterable[int], like: Tensor) -> tuple[Tensor, ...]:
        """What each channel is multiplied by: (n * views, c) for each c of `channels`, all views of
        the first image first, on the device and in the type of `like`.

        positions: of the n images among all that the run has seen, by which they are drawn.
        """
        # the first number says whether an image keeps all
        count = max(self.channels) if self.is_complementary else sum(self.channels)
        rows = [augmentation_rng(self.seed, position).random(1 + count) for position in positions]
        draws = torch.from_numpy(np.stack(rows)) < PROBABILITY
        ones = torch.ones(len(rows), count, dtype=torch.float64)
        some = draws[:, 1:] / PROBABILITY
        views = [*[ones] * self.num_strong, some]
        if self.is_complementary:
            views = [ones.where(draws[:, :1], each) for each in (some, 1 / PROBABILITY - some)]
        every = sent(torch.stack(views, 1).flatten(0, 1), like.device, like.dtype)
        if self.is_complementary:
            return tuple(every[:, :number] for number in self.channels)
        return every.split(self.channels, 1)
