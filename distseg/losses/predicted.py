"""What a loss term gets to look at: images of a micro-batch, what is known of them, and what the
networks and a teacher say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from distseg.losses.tensors import at_least_float32, label_at, upsample

Kind = Literal["labelled", "unlabelled"]
Head = Literal["logits", "auxiliary"]
GROUND_TRUTH = 1  # in the label of an unlabelled image; see Targets


@dataclass(frozen=True)
class Targets:
    """What is known of images before any network has seen them.

    label: (n, H, W) uint8, 255 = void; of unlabelled images 0 inside, 255 outside, and GROUND_TRUTH
    where a labelled image is laid over. index: (n, h, w) int64, the label at the resolution of the
    label maps, 0 at void. valid: (n, h, w) bool, where that is not void.
    """

    label: Tensor
    index: Tensor
    valid: Tensor

    @classmethod
    def at(cls, label: Tensor, size: tuple[int, int] | torch.Size) -> Targets:
        """Of a label, for label maps of a size."""
        return cls(label, *label_at(label, size))

    def __getitem__(self, chosen: slice) -> Targets:
        return Targets(self.label[chosen], self.index[chosen], self.valid[chosen])


@dataclass(frozen=True)
class PseudoLabels:
    """What a teacher takes unlabelled images to show, where the segmentor sees a strong view.

    label: (n, H, W) uint8, the likeliest class, 255 outside of the image. confidence: (n, H, W)
    float, its probability. probabilities: (n, C, H, W), of all classes; None where no term asks.
    share: (n,) float64, how much of the weak view is confident, where labelled images are laid over
    the strong one; None where views are mixed with each other.
    """

    label: Tensor
    confidence: Tensor
    probabilities: Tensor | None = None
    share: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> PseudoLabels:
        """With every tensor changed, for example to those of some of the images."""
        every, share = (
            None if tensor is None else change(tensor)
            for tensor in (self.probabilities, self.share)
        )
        return PseudoLabels(change(self.label), change(self.confidence), every, share)


@dataclass(frozen=True)
class FeatureMeans:
    """The discriminator's mean features over all ranks' images of a micro-batch: (K,) float each,
    constants. real: of ground truth; fake: of the predictions that are matched with it.
    """

    real: Tensor
    fake: Tensor


@dataclass(frozen=True)
class Predicted:
    """Images of a micro-batch, and what the networks say of them.

    pixels: (n, 3, H, W) float in [0, 1]. logits: (n, C, h, w), with a graph. auxiliary: logits of
    the auxiliary head, (n, C, h'', w''); None: there is none. In a step without the adversary the
    others are None: probabilities (n, C, h, w), the softmax of the logits; scores, the
    discriminator's logits on them, (n, 1, h', w') or (n, 1, 1, 1), whose graph ends at the
    probabilities; auxiliary_scores, likewise on the auxiliary head's, None where they are not
    judged. features: the discriminator's on them, (n, K), likewise, and feature_means, where a term
    needs them. pseudo: of unlabelled images in steps with a teacher, else None.
    """

    pixels: Tensor
    targets: Targets
    logits: Tensor
    auxiliary: Tensor | None = None
    probabilities: Tensor | None = None
    scores: Tensor | None = None
    pseudo: PseudoLabels | None = None
    features: Tensor | None = None
    feature_means: FeatureMeans | None = None
    auxiliary_scores: Tensor | None = None

    def with_constant_scores(self) -> Predicted:
        """For terms whose gradient must not reach the discriminator."""
        if self.scores is None:
            return self
        constant = replace(self, scores=self.scores.detach(), auxiliary_scores=None)
        return replace(constant, features=None, feature_means=None)

    @property
    def label(self) -> Tensor:
        """(n, H, W) uint8, 255 = void."""
        return self.targets.label

    def heads(self) -> dict[Head, Tensor]:
        """The segmentor's outputs, by name."""
        heads: dict[Head, Tensor] = {"logits": self.logits}
        return heads if self.auxiliary is None else heads | {"auxiliary": self.auxiliary}

    # kept for all terms of the micro-batch: at this size it is the loss's largest tensor
    @cached_property
    def full_logits(self) -> Tensor:
        """Logits at the label's size, (n, C, H, W), in at least fp32."""
        return upsample(at_least_float32(self.logits), self.label.shape[-2:])

    def __getitem__(self, chosen: slice) -> Predicted:
        """Of some of the images, without pseudo-labels."""
        optional = (self.auxiliary, self.probabilities, self.scores, self.features)
        auxiliary, probabilities, scores, features, auxiliary_scores = (
            None if tensor is None else tensor[chosen]
            for tensor in (*optional, self.auxiliary_scores)
        )
        # its full_logits are made anew, so a term of some images does not upsample all of them
        return Predicted(
            self.pixels[chosen],
            self.targets[chosen],
            self.logits[chosen],
            auxiliary,
            probabilities,
            scores,
            features=features,
            feature_means=self.feature_means,
            auxiliary_scores=auxiliary_scores,
        )
