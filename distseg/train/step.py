"""The alternating step of a segmentor and a discriminator.

What is computed, in which order, and the means.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from distseg.config.schema import LossConfig, SemiConfig
from distseg.distributed.ranks import all_reduce_sum
from distseg.losses import functional
from distseg.parallel import BackwardStart, Learner, backward
from distseg.train import diagnostics
from distseg.train.schedules import Phase
from shards.sample import IGNORE_INDEX

Metrics = dict[str, Tensor]


@dataclass
class Pair:
    """The two networks of a run and how they are held against each other.

    No discriminator in supervised mode.
    """

    segmentor: Learner
    discriminator: Learner | None
    loss: LossConfig
    semi: SemiConfig


@dataclass
class Images:
    """This rank's part of a batch, on its device.

    pixels: (n, 3, H, W) float in [0, 1]; label: (n, H, W) uint8, 255 = void. Of unlabelled images
    the label says only where they are: 0 inside, 255 outside.
    """

    pixels: Tensor
    label: Tensor


def adversarial_step(
    pair: Pair, now: Phase, labelled: Images, unlabelled: Images | None = None, num_parts: int = 1
) -> Metrics:
    """Gradients of one alternating step: predict; discriminator on real and fake; segmentor. No
    update yet.

    Luc et al. 2016: the segmentor minimises CE + adv_weight * BCE(D(s(x)), real), the discriminator
    BCE(D(y), real) + BCE(D(s(x)), fake). Hung et al. 2018 add, on unlabelled images, the same
    adversarial term with a weight of its own and the cross entropy against the segmentor's own
    classes where the discriminator believes them. Every loss is a mean over the GLOBAL batch; that
    of the believed pixels, whose number is only known when a part has been predicted, is the mean
    over the parts of their global means.

    num_parts: how many times as little memory: the images are taken in so many parts, one after the
    other, whose gradients add up and are exchanged once. Returns the metrics, scalars without
    graph.
    """
    assert pair.discriminator is not None  # the caller chose a mode with one
    counts = _global_counts(pair, labelled, unlabelled)
    learners = [pair.segmentor] * now.segmentor + [pair.discriminator] * now.discriminator
    metrics: Metrics = {}
    for part in range(num_parts):
        some = _part(labelled, part, num_parts)
        more = None if unlabelled is None else _part(unlabelled, part, num_parts)
        with ExitStack() as later:
            for learner in learners if part < num_parts - 1 else []:
                later.enter_context(learner.no_sync())
            judged = _judge(pair, now, some, more, replace(counts, num_parts=num_parts))
            values = judged.backward(some.label, now)
        metrics = {name: value.detach() + metrics.get(name, 0) for name, value in values.items()}
    return metrics


def supervised_step(pair: Pair, labelled: Images, num_parts: int = 1) -> Metrics:
    """Gradients of one plain step: cross entropy alone, reduced as in `adversarial_step`."""
    counts, total = (
        _global_counts(pair, labelled, None),
        torch.zeros((), device=labelled.label.device),
    )
    for part in range(num_parts):
        some = _part(labelled, part, num_parts)
        with pair.segmentor.no_sync() if part < num_parts - 1 else nullcontext():
            loss = counts.mean(
                functional.cross_entropy_sum(pair.segmentor(some.pixels), some.label), counts.ce
            )
            backward([(pair.segmentor, [(pair.segmentor.scaled(loss), None)])])
        total = total + loss.detach()
    return {"loss/segmentor": total, "loss/cross_entropy": total}


@dataclass(frozen=True)
class Counts:
    """What the sums over the global batch are divided by, each a float64 scalar, the same on every
    rank.
    """

    ce: Tensor  # labelled pixels; with reduction "sum", labelled images
    adv: Tensor  # the discriminator's (valid) outputs on labelled images; or those images
    adv_unlabelled: Tensor  # the same on unlabelled images
    semi_images: Tensor  # unlabelled images
    inside: Tensor  # label map cells inside unlabelled images
    outputs: Tensor  # the discriminator's valid outputs on labelled images, whatever the reduction
    outputs_unlabelled: Tensor
    num_parts: int = 1

    @staticmethod
    def mean(local_sum: Tensor, count: Tensor) -> Tensor:
        """A mean whose gradient, averaged over the ranks, is that of (sum over ranks) / count.

        A count of 0 gives 0 with a live graph: a rank that skipped its backward would leave the
        others waiting.
        """
        return local_sum * (dist.get_world_size() / count.clamp(min=1)).to(local_sum.dtype)


def _global_counts(pair: Pair, labelled: Images, unlabelled: Images | None) -> Counts:
    """The counts follow from the labels alone, so one all-reduce before the first forward gives
    them all.
    """
    label = labelled.label
    is_patch = pair.discriminator is not None and pair.discriminator.network.head == "patch"

    def of(images: Images | None) -> list[Tensor]:
        if images is None:
            return [torch.zeros((), dtype=torch.float64, device=label.device)] * 3
        number = torch.tensor(len(images.label), dtype=torch.float64, device=label.device)
        if pair.discriminator is None:
            return [number, number, number]
        cells = functional.label_at(images.label, _map_size(pair, images))[1].sum().double()
        return [number, cells, cells if is_patch else number]

    pixels = (label != IGNORE_INDEX).sum().double()
    sums = all_reduce_sum(torch.stack([pixels, *of(labelled), *of(unlabelled)]))
    num_pixels, num_images, _, outputs, num_unlabelled, inside, outputs_unlabelled = sums
    ce_sum, adv_sum = pair.loss.ce_reduction == "sum", pair.loss.adv_reduction == "sum"
    return Counts(
        ce=num_images if ce_sum else num_pixels,
        adv=num_images if adv_sum else outputs,
        adv_unlabelled=num_unlabelled if adv_sum else outputs_unlabelled,
        semi_images=num_unlabelled,
        inside=inside,
        outputs=outputs,
        outputs_unlabelled=outputs_unlabelled,
    )


def _map_size(pair: Pair, images: Images) -> tuple[int, int]:
    """Height and width of the label maps that the discriminator sees."""
    height, width = images.pixels.shape[-2:]
    if pair.loss.map_resolution == "image":
        return height, width
    stride = int(pair.segmentor.network.output_stride)  # type: ignore[arg-type]
    return -(-height // stride), -(-width // stride)


def _judge(
    pair: Pair, now: Phase, labelled: Images, unlabelled: Images | None, counts: Counts
) -> Judged:
    """Both forwards: the segmentor on all images, the discriminator on the ground truth and on all
    predictions.
    """
    segmentor, discriminator, n = pair.segmentor, pair.discriminator, len(labelled.label)
    assert discriminator is not None
    images = labelled if unlabelled is None else _joined(labelled, unlabelled)
    with torch.set_grad_enabled(now.segmentor):
        logits = segmentor(images.pixels)  # (n, C, h, w)
        if pair.loss.map_resolution == "image":
            logits = functional.upsample(
                functional.at_least_float32(logits), images.pixels.shape[-2:]
            )
        # a gradient asked for here passes no hook on the network's own output
        logits = logits.view_as(logits)
        probabilities = functional.at_least_float32(logits).softmax(dim=1)
    index, valid = functional.label_at(images.label, probabilities.shape[-2:])
    tau = pair.loss.scaling_tau if pair.loss.real_map == "scaling" else None
    real = functional.real_label_map(index[:n], valid[:n], probabilities[:n], tau)
    fake = probabilities.detach().requires_grad_(now.segmentor)
    if now.discriminator:
        on_real, on_fake = discriminator(images.pixels, real, fake)
    else:
        on_real, (on_fake,) = None, discriminator.forward_frozen(images.pixels, fake)
    return Judged(pair, counts, n, logits, probabilities, valid, fake, on_real, on_fake)


@dataclass
class Judged:
    """What both networks said of this rank's images, the labelled ones first; and the losses made
    of it.

    logits, probabilities: (n, C, h, w); valid: (n, h, w) bool; fake: the probabilities as a leaf,
    which receives the adversary's gradient; on_real (labelled only; None when the discriminator is
    not updated), on_fake: its logits.
    """

    pair: Pair
    counts: Counts
    num_labelled: int
    logits: Tensor
    probabilities: Tensor
    valid: Tensor
    fake: Tensor
    on_real: Tensor | None
    on_fake: Tensor

    def backward(self, label: Tensor, now: Phase) -> Metrics:
        """Gradients of the networks that the phase updates.

        The adversary's gradient enters the segmentor through a proxy, the gradient at its
        probabilities. So one D(fake) forward serves both losses, the discriminator's parameters see
        nothing of the segmentor's loss, and no network needs to be frozen, under any parallel
        strategy.
        """
        segmentor, discriminator = self.pair.segmentor, self.pair.discriminator
        assert discriminator is not None
        metrics: Metrics = {}
        work: list[tuple[Learner, list[BackwardStart]]] = []
        if now.segmentor:
            own, adversarial, metrics = self._segmentor_losses(label, now)
            scaled = segmentor.scaled(adversarial)
            (proxy,) = torch.autograd.grad(scaled, self.fake, retain_graph=now.discriminator)
            if now.watched:
                ce = segmentor.scaled(metrics["loss/cross_entropy"])
                metrics |= diagnostics.gradients_at_output(
                    ce, self.logits, proxy, self.probabilities
                )
            work += [(segmentor, [(segmentor.scaled(own), None), (self.probabilities, proxy)])]
        if now.discriminator:
            metrics |= self._discriminator_losses(now.watched)
            loss = metrics["loss/discriminator_real"] + metrics["loss/discriminator_fake"]
            work += [(discriminator, [(discriminator.scaled(loss), None)])]
        backward(work)
        return metrics

    def _segmentor_losses(self, label: Tensor, now: Phase) -> tuple[Tensor, Tensor, Metrics]:
        """(what depends on the logits alone, what goes through the discriminator, single terms as
        metrics).
        """
        n, mean = self.num_labelled, self.counts.mean
        own = mean(functional.cross_entropy_sum(self.logits[:n], label), self.counts.ce)
        fooling = mean(self._fooling_sum(slice(0, n)), self.counts.adv)
        metrics = {"loss/cross_entropy": own, "loss/adversarial": fooling}
        adversarial = now.adv_weight * fooling
        if now.semi_adv_weight:
            fooling = mean(self._fooling_sum(slice(n, None)), self.counts.adv_unlabelled)
            metrics["loss/adversarial_unlabelled"] = fooling
            adversarial = adversarial + now.semi_adv_weight * fooling
        if now.semi_weight:
            metrics |= self._semi_loss(slice(n, None))
            own = own + now.semi_weight * metrics["loss/semi"]
        return own, adversarial, metrics | {"loss/segmentor": own + adversarial}

    def _semi_loss(self, part: slice) -> Metrics:
        """The masked cross entropy on unlabelled images, and the share of their cells that is
        believed.
        """
        inside, threshold = self.valid[part], self.pair.semi.threshold
        pseudo = functional.pseudo_label(
            self.probabilities[part], self.on_fake[part], inside, threshold
        )
        kept = (pseudo != IGNORE_INDEX).sum().double()
        count = self.counts.semi_images
        if self.pair.loss.ce_reduction != "sum":
            count = all_reduce_sum(kept.clone()) * self.counts.num_parts
        loss = self.counts.mean(functional.cross_entropy_sum(self.logits[part], pseudo), count)
        return {"loss/semi": loss, "semi/mask_share": self.counts.mean(kept, self.counts.inside)}

    def _discriminator_losses(self, watched: bool) -> Metrics:
        """Real and fake losses.

        When watched, its probabilities, its accuracy, and the gap between its logits.
        """
        assert self.on_real is not None
        counts, n, everywhere = self.counts, self.num_labelled, self.pair.semi.discriminate
        seen = slice(0, None if everywhere else n)
        on_fake, real_part, fake_part = (
            self.on_fake[seen],
            self._valid(slice(0, n)),
            self._valid(seen),
        )
        loss_real = functional.adversarial_sum(self.on_real, real_part, self.pair.loss.real_target)
        loss_fake = functional.adversarial_sum(on_fake, fake_part, 0.0)
        num_fake = counts.adv + (counts.adv_unlabelled if everywhere else 0)
        metrics = {
            "loss/discriminator_real": counts.mean(loss_real, counts.adv),
            "loss/discriminator_fake": counts.mean(loss_fake, num_fake),
        }
        if not watched:
            return metrics
        outputs, outputs_fake = (
            counts.outputs,
            counts.outputs + (counts.outputs_unlabelled if everywhere else 0),
        )
        real, fake = (
            functional.verdict_sums(logits, valid, real=is_real)
            for logits, valid, is_real in (
                (self.on_real, real_part, True),
                (on_fake, fake_part, False),
            )
        )
        on_real, on_fake_mean = counts.mean(real, outputs), counts.mean(fake, outputs_fake)
        return metrics | {
            "discriminator/accuracy": counts.mean(real[0] + fake[0], outputs + outputs_fake),
            "discriminator/on_real": on_real[1],
            "discriminator/on_fake": on_fake_mean[1],
            "discriminator/logit_gap": on_real[2] - on_fake_mean[2],
        }

    def _fooling_sum(self, part: slice) -> Tensor:
        """The segmentor's adversarial term on some images."""
        on_fake, valid = self.on_fake[part], self._valid(part)
        if self.pair.loss.adv_form == "saturating":
            return -functional.adversarial_sum(on_fake, valid, 0.0)
        return functional.adversarial_sum(on_fake, valid, 1.0)

    def _valid(self, part: slice) -> Tensor | None:
        """The valid mask of some images for the discriminator's outputs.

        One score per image has no void.
        """
        discriminator = self.pair.discriminator
        assert discriminator is not None
        return self.valid[part] if discriminator.network.head == "patch" else None


def _part(images: Images, part: int, num_parts: int) -> Images:
    if num_parts == 1:
        return images
    size = len(images.label) // num_parts  # the configuration makes sure that it divides
    chosen = slice(part * size, (part + 1) * size)
    return Images(images.pixels[chosen], images.label[chosen])


def _joined(one: Images, other: Images) -> Images:
    channels_last = one.pixels.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    pixels = torch.cat([one.pixels, other.pixels]).contiguous(memory_format=layout)
    return Images(pixels, torch.cat([one.label, other.label]))
