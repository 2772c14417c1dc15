"""The alternating step of a segmentor and a discriminator: what is computed, in which order, and the means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distseg import losses
from distseg.config import LossConfig, SemiConfig
from distseg.distributed import all_reduce_sum
from distseg.parallel import Learner, Root, backward
from distseg.schedules import Phase
from shards.sample import IGNORE_INDEX

Metrics = dict[str, Tensor]


@dataclass
class Pair:
    """The two networks of a run and how they are held against each other; no discriminator in supervised mode."""

    segmentor: Learner
    discriminator: Learner | None
    loss: LossConfig
    semi: SemiConfig


@dataclass
class Images:
    """This rank's part of a batch, on its device.

    pixels: (n, 3, H, W) float in [0, 1]; label: (n, H, W) uint8, 255 = void. Of unlabelled images the label says
    only where they are: 0 inside, 255 outside.
    """

    pixels: Tensor
    label: Tensor


def adversarial_step(pair: Pair, now: Phase, labelled: Images, unlabelled: Images | None = None) -> Metrics:
    """Gradients of one alternating step: predict; discriminator on real and fake; segmentor. No update yet.

    Luc et al. 2016: the segmentor minimises CE + adv_weight * BCE(D(s(x)), real), the discriminator
    BCE(D(y), real) + BCE(D(s(x)), fake). Hung et al. 2018 add, on unlabelled images, the same adversarial term with
    a weight of its own and the cross entropy against the segmentor's own classes where the discriminator believes
    them. Every loss is a mean over the GLOBAL batch.

    The adversary's gradient enters the segmentor through a proxy, the gradient at its probabilities. So one
    D(fake) forward serves both losses, the discriminator's parameters see nothing of the segmentor's loss, and
    no network needs to be frozen, under any parallel strategy.
    """
    segmentor, discriminator = pair.segmentor, pair.discriminator
    assert discriminator is not None  # the caller chose a mode with one
    num_labelled = len(labelled.label)
    images = labelled if unlabelled is None else _joined(labelled, unlabelled)
    with torch.set_grad_enabled(now.segmentor):
        logits = segmentor(images.pixels)  # (n, C, h, w)
        if pair.loss.map_resolution == "image":
            logits = losses.upsample(losses.at_least_float32(logits), images.pixels.shape[-2:])
        probabilities = losses.at_least_float32(logits).softmax(dim=1)
    index, valid = losses.label_at(images.label, probabilities.shape[-2:])
    tau = pair.loss.scaling_tau if pair.loss.real_map == "scaling" else None
    real = losses.real_label_map(index[:num_labelled], valid[:num_labelled], probabilities[:num_labelled], tau)
    fake = probabilities.detach().requires_grad_(now.segmentor)
    if now.discriminator:
        on_real, on_fake = discriminator(images.pixels, real, fake)
    else:
        on_real, (on_fake,) = None, discriminator.frozen(images.pixels, fake)
    maps = Judged(pair, num_labelled, logits, probabilities, valid, fake, on_real, on_fake)

    terms = maps.segmentor_terms(labelled.label, now) if now.segmentor else {}
    terms |= maps.discriminator_terms() if now.discriminator else {}
    metrics = _global_means(terms)
    work: list[tuple[Learner, list[Root]]] = []
    if now.segmentor:
        work += [(segmentor, maps.segmentor_roots(metrics, now))]
    if now.discriminator:
        work += [(discriminator, [(metrics["loss/discriminator_real"] + metrics["loss/discriminator_fake"], None)])]
    backward(work)
    return {name: value.detach() for name, value in metrics.items()}


Terms = dict[str, tuple[Tensor, Tensor]]  # metric -> this rank's sum, and the count that the global sum is divided by


@dataclass
class Judged:
    """What both networks said of this rank's images, the labelled ones first; and the losses made of it.

    logits, probabilities: (n, C, h, w); valid: (n, h, w) bool; fake: the probabilities as a leaf, which receives
    the adversary's gradient; on_real (labelled only; None when the discriminator is not updated), on_fake: its logits.
    """

    pair: Pair
    num_labelled: int
    logits: Tensor
    probabilities: Tensor
    valid: Tensor
    fake: Tensor
    on_real: Tensor | None
    on_fake: Tensor

    def segmentor_terms(self, label: Tensor, now: Phase) -> Terms:
        """Cross entropy, adversarial term, and what the phase asks for on unlabelled images."""
        n = self.num_labelled
        pixels = (label != IGNORE_INDEX).sum().double()
        count = _num_images(label) if self.pair.loss.ce_reduction == "sum" else pixels
        terms = {"loss/cross_entropy": (losses.cross_entropy_sum(self.logits[:n], label), count)}
        terms["loss/adversarial"] = self._fooling(slice(0, n))
        if now.semi_adv_weight:
            terms["loss/adversarial_unlabelled"] = self._fooling(slice(n, None))
        if now.semi_weight:
            inside = self.valid[n:]
            pseudo = losses.pseudo_label(self.probabilities[n:], self.on_fake[n:], inside, self.pair.semi.threshold)
            kept = (pseudo != IGNORE_INDEX).sum().double()
            count = _num_images(pseudo) if self.pair.loss.ce_reduction == "sum" else kept
            terms["loss/semi"] = (losses.cross_entropy_sum(self.logits[n:], pseudo), count)
            terms["semi/mask_share"] = (kept, inside.double().sum())
        return terms

    def discriminator_terms(self) -> Terms:
        """Real and fake losses, and the share of outputs on the right side."""
        assert self.on_real is not None
        seen = slice(0, None if self.pair.semi.discriminate else self.num_labelled)
        on_fake, real_part, fake_part = self.on_fake[seen], self._part(slice(0, self.num_labelled)), self._part(seen)
        real_count, fake_count = self._count(self.on_real, real_part), self._count(on_fake, fake_part)
        loss_real = losses.adversarial_sum(self.on_real, real_part, self.pair.loss.real_target)
        loss_fake = losses.adversarial_sum(on_fake, fake_part, 0.0)
        correct = losses.correct_sum(self.on_real, real_part, real=True)
        correct = correct + losses.correct_sum(on_fake, fake_part, real=False)
        outputs = losses.adversarial_count(self.on_real, real_part) + losses.adversarial_count(on_fake, fake_part)
        return {
            "loss/discriminator_real": (loss_real, real_count),
            "loss/discriminator_fake": (loss_fake, fake_count),
            "discriminator/accuracy": (correct, outputs),
        }

    def segmentor_roots(self, means: Metrics, now: Phase) -> list[Root]:
        """Where the segmentor's backward begins: its own losses, and the adversary's gradient at the label maps."""
        own = means["loss/cross_entropy"]
        if now.semi_weight:
            own = own + now.semi_weight * means["loss/semi"]
        adversarial = now.adv_weight * means["loss/adversarial"]
        if now.semi_adv_weight:
            adversarial = adversarial + now.semi_adv_weight * means["loss/adversarial_unlabelled"]
        (proxy,) = torch.autograd.grad(adversarial, self.fake, retain_graph=now.discriminator)
        means["loss/segmentor"] = own + adversarial
        return [(own, None), (self.probabilities, proxy)]

    def _fooling(self, part: slice) -> tuple[Tensor, Tensor]:
        """The segmentor's adversarial term on some images: sum and count."""
        on_fake, valid = self.on_fake[part], self._part(part)
        if self.pair.loss.adv_form == "saturating":
            total = -losses.adversarial_sum(on_fake, valid, 0.0)
        else:
            total = losses.adversarial_sum(on_fake, valid, 1.0)
        return total, self._count(on_fake, valid)

    def _part(self, part: slice) -> Tensor | None:
        """The valid mask of some images for the discriminator's outputs; one score per image has no void."""
        discriminator = self.pair.discriminator
        assert discriminator is not None
        return self.valid[part] if discriminator.network.head == "patch" else None

    def _count(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        return _num_images(scores) if self.pair.loss.adv_reduction == "sum" else losses.adversarial_count(scores, valid)


def supervised_step(pair: Pair, labelled: Images) -> Metrics:
    """Gradients of one plain step: cross entropy alone, reduced as in `adversarial_step`."""
    logits, label = pair.segmentor(labelled.pixels), labelled.label
    count = _num_images(label) if pair.loss.ce_reduction == "sum" else (label != IGNORE_INDEX).sum().double()
    means = _global_means({"loss/cross_entropy": (losses.cross_entropy_sum(logits, label), count)})
    backward([(pair.segmentor, [(means["loss/cross_entropy"], None)])])
    cross_entropy = means["loss/cross_entropy"].detach()
    return {"loss/segmentor": cross_entropy, "loss/cross_entropy": cross_entropy}


def _joined(one: Images, other: Images) -> Images:
    layout = torch.channels_last if one.pixels.is_contiguous(memory_format=torch.channels_last) else None
    pixels = torch.cat([one.pixels, other.pixels])
    if layout is not None:
        pixels = pixels.contiguous(memory_format=layout)
    return Images(pixels, torch.cat([one.label, other.label]))


def _num_images(tensor: Tensor) -> Tensor:
    return torch.tensor(len(tensor), dtype=torch.float64, device=tensor.device)


def _global_means(terms: Terms) -> Metrics:
    """Means whose gradients, averaged over the ranks, are those of (sum over ranks) / (count over ranks).

    One all-reduce for all counts. A count of 0 gives 0 with a live graph: a rank that skipped its backward would
    leave the others waiting.
    """
    counts = all_reduce_sum(torch.stack([count for _, count in terms.values()]))
    factors = dist.get_world_size() / counts.clamp(min=1)
    return {
        name: part * factor.to(part.dtype) for (name, (part, _)), factor in zip(terms.items(), factors, strict=True)
    }
