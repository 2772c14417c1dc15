"""The teacher of weak-to-strong consistency: pseudo-labels of weak views, and the strong views that
the segmentor is trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distseg.config.schema import ADAPTATION, Config
from distseg.config.world_size import has_teacher
from distseg.distributed.ranks import Ranks, all_reduce_sum
from distseg.evaluate.judged import sees_self_information
from distseg.losses.adversarial import self_information
from distseg.losses.class_weights import log_shares
from distseg.losses.predicted import GROUND_TRUTH, PseudoLabels
from distseg.losses.tensors import at_least_float32, label_at, upsample
from distseg.losses.terms import confident_share
from distseg.parallel import Learner
from distseg.train.batch import Images
from distseg.train.ema import MovingAverage
from distseg.train.feature_dropout import FeatureDropout
from distseg.train.strong_views import StrongViews
from shards.sample import IGNORE_INDEX

# of Alignment: a step's weight in the running shares, twenty of which are enough images to show a
# rare class; and bounds, so that one that is nowhere is not raised until it is everywhere
_SHARE_WEIGHT, _LEAST_SHARE, _LARGEST_ERROR, _LARGEST_SHIFT = 0.05, 1e-5, 2.0, 4.0


@dataclass(frozen=True)
class Gate:
    """Which images are pseudo-labelled, by the discriminator's score of the teacher's predictions.

    judge: pixels (n, 3, H, W), probabilities (n, C, h, w) -> scores (n, 1, h', w') or (n, 1, 1, 1),
    without a graph. at_image_size: h, w are H, W. probability: an image counts where the sigmoid of
    its score is above it; None: the share of the global batch with the highest scores counts.
    batch_size: of unlabelled images, over all ranks. as_self_information: as of Judging.
    """

    judge: Callable[[Tensor, Tensor], Tensor]
    ranks: Ranks
    batch_size: int
    at_image_size: bool
    probability: float | None
    share: float
    as_self_information: bool = False

    @classmethod
    def of(cls, config: Config, discriminator: Learner, ranks: Ranks) -> Gate:
        """Of a configuration whose consistency.gate is not "none"."""

        def judge(pixels: Tensor, probabilities: Tensor) -> Tensor:
            return discriminator.infer(discriminator.network, pixels, probabilities)[0]

        chosen = config.consistency
        return cls(
            judge,
            ranks,
            config.semi.batch_size or config.batch_size,
            config.loss.map_resolution == "image",
            chosen.gate_probability if chosen.gate == "score" else None,
            chosen.gate_share,
            sees_self_information(config),
        )

    def scores(self, pixels: Tensor, inside: Tensor, logits: Tensor) -> Tensor:
        """One for each image: (n,) float64, of several cells the mean over those inside."""
        # as in the step, or it would judge what it has never learned from
        if self.at_image_size:
            logits = upsample(logits, pixels.shape[-2:])
        label_map = logits.softmax(1)
        if self.as_self_information:
            label_map = self_information(label_map)
        scores = self.judge(pixels, label_map)[:, 0].double()  # (n, h', w')
        if scores.shape[-1] == scores.shape[-2] == 1:
            return scores[:, 0, 0]
        _, valid = label_at((~inside).to(torch.uint8) * IGNORE_INDEX, scores.shape[-2:])
        return (scores * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)

    def opens(self, scores: Tensor) -> Tensor:
        """Whether it lets each of this rank's images through: (n,) bool, by their scores."""
        if self.probability is not None:
            return scores.sigmoid() > self.probability
        # one message of a number an image; each rank finds the same order by itself
        everywhere = scores.new_zeros(self.ranks.world_size, len(scores))
        everywhere[self.ranks.rank] = scores
        # stable: images of one score stay in the order of the batch, on every rank
        order = all_reduce_sum(everywhere).flatten().argsort(descending=True, stable=True)
        chosen = order[: round(self.share * self.batch_size)]
        opened = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, chosen, True)
        return opened.view(self.ranks.world_size, -1)[self.ranks.rank]


class Alignment:
    """Keeps the classes of pseudo-labels as frequent as those of the labels.

    What is added to the teacher's logits of a class grows, after each step, by rate x log(its share
    of the labelled pixels / its running share of the pseudo-labels), and falls where these have too
    much of it. Shares of pseudo-labels and not mean probabilities, as distribution alignment takes
    them (Berthelot et al. 2020, ReMixMatch): a class that is likely nowhere has its share of
    probability all over the image. The same on every rank.
    """

    def __init__(self, rate: float, class_pixels: np.ndarray, ranks: Ranks):
        """class_pixels: (samples, C), of the labelled images."""
        self.rate = rate
        labelled = torch.from_numpy(log_shares(class_pixels)).to(ranks.device)  # (C,) float64
        self._labelled = labelled
        # of a class that no label has nothing is known
        self._is_known = torch.from_numpy(class_pixels.any(0)).to(ranks.device)
        self._share, self._shift = labelled.exp(), torch.zeros_like(labelled)

    def shift(self) -> Tensor:
        """What is added to logits now, (C, 1, 1) float64."""
        return self._shift[:, None, None]

    def learn(self, pseudo: Tensor) -> None:
        """Take in a step's pseudo-labels: (n, H, W) uint8, 255 = none. Called on every rank."""
        # no count by an index: that would wait for the device
        classes = torch.arange(len(self._share), device=pseudo.device, dtype=torch.uint8)
        counts = torch.stack([(pseudo == index).sum() for index in classes]).double()
        everywhere = all_reduce_sum(counts)
        total = everywhere.sum()
        is_any = (total > 0).double()  # else nothing is learned
        self._share.lerp_(everywhere / total.clamp(min=1), is_any * _SHARE_WEIGHT)
        error = (self._labelled - self._share.clamp(min=_LEAST_SHARE).log()) * self._is_known
        error = error.clamp(-_LARGEST_ERROR, _LARGEST_ERROR) * is_any
        self._shift.add_(self.rate * error).clamp_(-_LARGEST_SHIFT, _LARGEST_SHIFT)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The running shares, and what follows from them."""
        return {"alignment": {"share": self._share, "shift": self._shift}}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy in what `state_dict` gave."""
        self._share.copy_(state["alignment"]["share"])
        self._shift.copy_(state["alignment"]["shift"])


@dataclass(frozen=True)
class WeakToStrong:
    """Makes strong views of weak ones, with the teacher's pseudo-labels.

    teach: pixels (n, 3, H, W) -> logits (n, C, h, w), without a graph. soft: whether the
    probabilities of all classes are kept. gate: None, all images are pseudo-labelled. num_views: of
    each image. is_tracked: of the strong views, as in Images. with_labelled: partners are
    labelled images, not neighbours. threshold: of a confident pixel. adjustment: (C, 1, 1), added
    to the teacher's logits; and alignment, by what it has said so far. dropout: of features of some
    views; None: of none.
    """

    teach: Callable[[Tensor], Tensor]
    views: StrongViews
    soft: bool = False
    gate: Gate | None = None
    num_views: int = 1
    is_tracked: bool = True
    with_labelled: bool = False
    threshold: float = 0.95
    adjustment: Tensor | None = None
    alignment: Alignment | None = None
    dropout: FeatureDropout | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        segmentor: Learner,
        ema: MovingAverage | None,
        ranks: Ranks,
        discriminator: Learner | None = None,
    ) -> WeakToStrong:
        """Of a configuration, without an adjustment; ema: with a network, where the teacher is
        one.
        """
        chosen, network = config.consistency, segmentor.network
        # by reference: the average goes on while this teacher labels
        if chosen.teacher == "ema":
            assert ema is not None and ema.network is not None
            network = ema.network

        def teach(pixels: Tensor) -> Tensor:
            return segmentor.infer(network, pixels)

        gate = None
        if chosen.gate != "none":
            assert discriminator is not None  # config/rules
            gate = Gate.of(config, discriminator, ranks)
        num_classes = int(segmentor.network.num_classes)  # type: ignore[arg-type]
        views = StrongViews.of_unlabelled(config, num_classes, ranks)
        return cls(
            teach,
            views,
            soft=chosen.target == "probabilities",
            gate=gate,
            num_views=chosen.num_views,
            is_tracked=_is_tracked(config),
            with_labelled=chosen.mix_with == "labelled",
            threshold=chosen.threshold,
            dropout=FeatureDropout.of(config, segmentor.network),
        )

    @torch.no_grad()
    def __call__(
        self, weak: Images, labelled: Images, step: int, num_micro_batches: int = 1
    ) -> Images:
        """The strong views of this rank's images of a step, with their pseudo-labels: all views of
        the first image, then those of the second.

        labelled: as many, as the segmentor sees them.
        """
        return self.strong(self.taught(weak, num_micro_batches), labelled, step)

    @torch.no_grad()
    def taught(self, weak: Images, num_micro_batches: int = 1, learn: bool = True) -> Images:
        """This rank's weak views with their pseudo-labels; called on every rank.

        The teacher sees as many images at a time as the segmentor does. learn: whether the
        alignment takes in what it says.
        """
        chunks = (part.chunk(num_micro_batches) for part in (weak.pixels, weak.label))
        taught = [self._taught(*chunk) for chunk in zip(*chunks, strict=True)]
        pseudo = _joined([labels for labels, _ in taught])
        if self.alignment is not None and learn:
            self.alignment.learn(pseudo.label)
        if self.gate is not None:
            scores = torch.cat([scores for _, scores in taught if scores is not None])
            opened = self.gate.opens(scores)
            # here and not in the term, so that what is laid over another image keeps its own gate:
            # less than any threshold, so that no pixel of the others is confident
            confidence = pseudo.confidence.where(opened[:, None, None], -1)
            pseudo = replace(pseudo, confidence=confidence)
        return replace(weak, pseudo=pseudo, is_tracked=self.is_tracked)

    @torch.no_grad()
    def strong(self, weak: Images, labelled: Images, step: int) -> Images:
        """The strong views of weak ones that have been taught, as of a call; with what their
        features are multiplied by, and the weak ones behind them, where there is dropout of that
        kind.
        """
        if self.with_labelled:
            weak = self._with_share(weak)
        views = [self._strong(weak, labelled, step, number) for number in range(self.num_views)]
        if self.dropout is None:
            return views[0] if len(views) == 1 else _joined_views(views)
        if not self.dropout.is_complementary:
            views.append(weak)
        joined = _joined_views(views)
        factors = self.dropout.factors(self.views.positions(step), joined.pixels)
        return replace(joined, feature_factors=factors)

    def _taught(self, pixels: Tensor, label: Tensor) -> tuple[PseudoLabels, Tensor | None]:
        """By weak views, so before anything is mixed; and the discriminator's scores, (n,)."""
        inside = label != IGNORE_INDEX
        logits = at_least_float32(self.teach(pixels))
        # before they are upsampled: the gate brings them to the size that it judges at; and as they
        # are, for it has learned from such
        scores = None if self.gate is None else self.gate.scores(pixels, inside, logits)
        probabilities = upsample(self.corrected(logits), pixels.shape[-2:]).softmax(1)
        confidence, index = probabilities.max(1)
        pseudo = index.to(torch.uint8).where(inside, IGNORE_INDEX)
        return PseudoLabels(pseudo, confidence, probabilities if self.soft else None), scores

    def corrected(self, logits: Tensor) -> Tensor:
        """The teacher's logits (n, C, h, w) with what is added to each class, in fp32 or fp64: what
        pseudo-labels are made of.
        """
        logits = at_least_float32(logits)
        if self.alignment is not None:
            logits = logits + self.alignment.shift().to(logits)
        if self.adjustment is not None:
            logits = logits + self.adjustment.to(logits)
        return logits

    def _with_share(self, weak: Images) -> Images:
        """With how much of each one is confident, which what is laid over it does not change."""
        assert weak.pseudo is not None
        inside = weak.label != IGNORE_INDEX
        confident = inside & (weak.pseudo.confidence >= self.threshold)
        share = confident_share(confident, inside)
        return replace(weak, pseudo=replace(weak.pseudo, share=share))

    def _strong(self, weak: Images, labelled: Images, step: int, number: int) -> Images:
        """The `number`-th view of each."""
        draws = self.views.draws(step, number)
        # colours before mixing: each piece keeps those of its own image
        changed = self.views.changed(weak, weak.label != IGNORE_INDEX, draws)
        partners = self._known(labelled) if self.with_labelled else self.views.partners(changed)
        return self.views.mixed(changed, partners, draws)

    def _known(self, labelled: Images) -> Images:
        """Labelled images as if a teacher had labelled them, who is sure of all but void."""
        valid, num_classes = labelled.label != IGNORE_INDEX, self.views.num_classes
        every = None
        if self.soft:
            index = labelled.label.where(valid, 0).long()[:, None]
            every = torch.zeros(
                len(index), num_classes, *valid.shape[1:], device=index.device
            ).scatter_(1, index, 1.0)
        # in the type of the teacher's: float64 where the run is
        confidence = valid.to(at_least_float32(labelled.pixels).dtype)
        pseudo = PseudoLabels(labelled.label, confidence, every)
        # void counts for nothing, so it is as if outside of the image
        where = torch.full_like(labelled.label, GROUND_TRUTH).where(valid, IGNORE_INDEX)
        return replace(labelled, label=where, pseudo=pseudo)


def counts_unlabelled(config: Config) -> bool:
    """Whether labelled images are normalised together with the unlabelled ones of their step."""
    if config.mode in ADAPTATION:
        return config.adaptation.batch_norm == "joint"
    return not has_teacher(config) or _is_tracked(config)


def _is_tracked(config: Config) -> bool:
    """Whether batch norm's running statistics are of the strong views too."""
    chosen = config.consistency.batch_norm
    # between domains they are what the network is to predict, which labelled images are not
    if config.mode in ADAPTATION:
        return True  # and those may be left out, see tracked_by
    return chosen == "joint" or (chosen == "auto" and bool(config.data.unlabelled_shards))


def logit_adjustment(strength: float, class_pixels: np.ndarray) -> Tensor:
    """- strength x log of each class's share of the labelled pixels, (C, 1, 1) float64: what is
    added to logits so that rare classes are not pushed out (Menon et al. 2021, section 4.1).

    class_pixels: (samples, C), how many each has.
    """
    return torch.from_numpy(-strength * log_shares(class_pixels))[:, None, None]


def _joined_views(views: list[Images]) -> Images:
    pixels, label = torch.cat([v.pixels for v in views]), torch.cat([v.label for v in views])
    pseudo = _joined([v.pseudo for v in views if v.pseudo is not None])
    joined = Images(pixels, label, pseudo, views[0].is_tracked)
    # image by image: a micro-batch has all views of its images, as a rank has of its own, so that
    # batch normalisation sees the same ones together
    return joined.each(
        lambda values: values.unflatten(0, (len(views), -1)).transpose(0, 1).flatten(0, 1)
    )


def _joined(parts: list[PseudoLabels]) -> PseudoLabels:
    """Of several micro-batches or views, in their order."""
    every = [part.probabilities for part in parts if part.probabilities is not None]
    shares = [part.share for part in parts if part.share is not None]
    return PseudoLabels(
        torch.cat([part.label for part in parts]),
        torch.cat([part.confidence for part in parts]),
        torch.cat(every) if every else None,
        torch.cat(shares) if shares else None,
    )
