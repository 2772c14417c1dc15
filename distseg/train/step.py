"""The alternating step of a segmentor and a discriminator: `alternate` shows the whole of it.

The discriminator judges predictions that are a leaf of its graph, and the adversary's gradient at
that leaf, the proxy, is handed on to the segmentor's probabilities. So one D(fake) serves the
losses of both networks, the discriminator's parameters see nothing of the segmentor's loss, and
neither network needs to be frozen, under any parallel strategy.

`training_step` accumulates the gradients of micro-batches around it. Which terms there are stands
in objective.py, what their sums are divided by in counts.py, and what a logged step is looked at
for besides in diagnostics.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.losses.adversarial import (
    Form,
    real_label_map,
    self_information,
    squared_gradient_sum,
    sum_of,
)
from distseg.losses.predicted import Kind, Predicted, Targets
from distseg.losses.tensors import at_least_float32, of_neighbours, upsample
from distseg.losses.terms import Term, no_auxiliary
from distseg.parallel import BackwardStart, Learner, backward
from distseg.train import diagnostics
from distseg.train.adversary import feature_means
from distseg.train.batch import Images, MicroBatch
from distseg.train.counts import Counts, mean
from distseg.train.objective import Judging, Objective, Scored, build_objective
from distseg.train.schedules import Phase
from distseg.train.strong_views import StrongViews
from distseg.train.teacher import WeakToStrong

Metrics = dict[str, Tensor]
Starts = list[tuple[Learner, list[BackwardStart]]]  # of one backward through several networks


@dataclass
class Pair:
    """The two networks of a run and what they are trained for.

    No discriminator in supervised mode.
    """

    segmentor: Learner
    discriminator: Learner | None
    objective: Objective
    weak_to_strong: WeakToStrong | None = None  # of a run with a teacher
    strong_labelled: StrongViews | None = None  # where labelled images have strong views too
    strong_unlabelled: StrongViews | None = None  # and unlabelled ones without a teacher's labels

    @classmethod
    def of(cls, config: Config, segmentor: Learner, discriminator: Learner | None = None) -> Pair:
        """With the objective of a configuration."""
        judge = None if discriminator is None else discriminator.network
        objective = build_objective(config, segmentor.network, judge)
        return cls(segmentor, discriminator, objective)

    @property
    def learners(self) -> list[Learner]:
        """Those that there are."""
        return [self.segmentor, *([] if self.discriminator is None else [self.discriminator])]

    @property
    def adversary(self) -> Learner:
        """The discriminator, of a mode that has one."""
        assert self.discriminator is not None  # else no phase asks for it
        return self.discriminator


def training_step(
    pair: Pair,
    phase: Phase,
    labelled: Images,
    unlabelled: Images | None = None,
    num_micro_batches: int = 1,
) -> Metrics:
    """Gradients of one step, exchanged over the ranks; no update yet.

    Gradient accumulation: the images are taken in so many micro-batches, one after the other, whose
    gradients add up and are exchanged once. Every loss is a mean over the GLOBAL batch; of a term
    that chooses its pixels, it is the mean over the micro-batches of their global means. Returns
    the metrics, scalars without graph.
    """
    batch = MicroBatch(labelled, unlabelled)
    counts = Counts.over_ranks(pair.objective, _targets(pair, batch), num_micro_batches)
    gradients = alternate if phase.adversary else supervise
    metrics: Metrics = {}
    for index, micro_batch in enumerate(batch.split(num_micro_batches)):
        with _exchanging(pair, phase, at_once=index == num_micro_batches - 1):
            values = gradients(pair, phase, micro_batch, counts)
        metrics = {name: value.detach() + metrics.get(name, 0) for name, value in values.items()}
    return metrics


def alternate(pair: Pair, phase: Phase, batch: MicroBatch, counts: Counts) -> Metrics:
    """Gradients of an alternating step: predict, judge, losses, one backward.

    Luc et al. 2016: the segmentor minimises CE + adv_weight * BCE(D(s(x)), real), the discriminator
    BCE(D(y), real) + BCE(D(s(x)), fake); other forms and terms stand in distseg/losses.
    """
    segmentor, discriminator, judging = pair.segmentor, pair.adversary, pair.objective.judging

    # Predict
    with torch.set_grad_enabled(phase.segmentor):
        logits, auxiliary = predict(segmentor, batch, judging.at_image_size)
        predictions = probabilities_of(judging, logits, auxiliary)  # (n, C, h, w) each

    # Judge: label maps of the phase and all predictions, these as leaves of the graph
    targets = Targets.at(batch.all.label, logits.shape[-2:])
    fakes = [each.detach().requires_grad_(phase.segmentor) for each in predictions]
    maps = label_maps(pair.objective, phase, batch, targets, fakes)
    seen = Predicted(batch.all.pixels, targets, logits, auxiliary, predictions[0])
    scores, seen = judge(pair, phase, batch, maps, seen)

    # Losses, the adversary's through a proxy: its gradient at the segmentor's probabilities
    starts, metrics = Starts(), Metrics()
    if phase.segmentor:
        own, adversarial, metrics = segmentor_losses(pair.objective, phase, batch, seen, counts)
        own, scaled = segmentor.scaled(own), segmentor.scaled(adversarial)
        proxies = _proxies(discriminator, scaled, fakes, phase.discriminator)
        starts += [(segmentor, [(own, None), *zip(predictions, proxies, strict=True)])]
        if phase.watched:
            weighted = _weighted_cross_entropy(segmentor, phase, metrics, own)
            metrics |= diagnostics.gradients_at_output(weighted, logits, proxies[0], predictions[0])
    if phase.discriminator:
        scored = split_scores(judging, batch, targets, scores, counts)
        loss, values = discriminator_loss(phase, judging, scored, maps, counts)
        starts += [(discriminator, [(discriminator.scaled(loss), None)])]
        metrics |= values
        metrics |= _looked_at(judging, batch, seen, scored, counts) if phase.watched else {}

    # One backward for both, so that the exchange of one's gradients hides behind the other's
    backward(starts)
    return metrics


def _proxies(
    discriminator: Learner, adversarial: Tensor, fakes: list[Tensor], is_kept: bool
) -> tuple[Tensor, ...]:
    """The gradient of what comes through the discriminator at the predictions that it was shown."""
    # else FSDP would exchange here what earlier micro-batches have left, and then once more
    with discriminator.no_sync():
        return torch.autograd.grad(adversarial, fakes, retain_graph=is_kept)


def supervise(pair: Pair, phase: Phase, batch: MicroBatch, counts: Counts) -> Metrics:
    """Gradients of a step without the adversary: of the labelled images, and of unlabelled ones
    where a teacher has labelled them.
    """
    if not pair.objective.uses_unlabelled(phase):
        batch = MicroBatch(batch.labelled)
    images = batch.all
    at_image_size = pair.objective.judging.at_image_size  # as in the steps with the adversary
    logits, auxiliary = predict(pair.segmentor, batch, at_image_size)
    targets = Targets.at(images.label, logits.shape[-2:])
    seen = Predicted(images.pixels, targets, logits, auxiliary)
    loss, _, metrics = segmentor_losses(pair.objective, phase, batch, seen, counts)
    if phase.watched and pair.objective.of_domains and batch.unlabelled is not None:
        probabilities = at_least_float32(logits.detach()).softmax(1)
        metrics |= diagnostics.entropies(probabilities, targets, batch, counts)
    backward([(pair.segmentor, [(pair.segmentor.scaled(loss), None)])])
    return metrics


def predict(
    segmentor: Learner, batch: MicroBatch, at_image_size: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The segmentor's logits (n, C, h, w) of all images and its auxiliary head's, None where it has
    none.

    at_image_size: brought to the size of the pixels (n, 3, H, W).
    """
    pixels, factors = batch.all.pixels, batch.all.feature_factors
    # not to every network: not all of them have such features
    options = {} if factors is None else {"feature_factors": factors}
    output = segmentor(pixels, num_tracked=batch.num_tracked, **options)
    logits, auxiliary = output, None
    if isinstance(output, dict):
        logits, auxiliary = output["out"], output.get("aux")
    if at_image_size:
        logits = upsample(at_least_float32(logits), pixels.shape[-2:])
    # a gradient asked for at a view passes no hook on the network's own output
    return logits.view_as(logits), auxiliary


def probabilities_of(judging: Judging, logits: Tensor, auxiliary: Tensor | None) -> list[Tensor]:
    """Of what is judged: of the logits (n, C, h, w), and of the auxiliary ones, brought to their
    size, where another discriminator judges those.
    """
    outputs = [at_least_float32(logits)]
    if judging.on_auxiliary:
        if auxiliary is None:
            raise no_auxiliary()
        # One size for both: which cells are valid, and how many over all ranks, is known before the
        # forward, and an auxiliary head of the user's own may have any resolution.
        outputs.append(upsample(at_least_float32(auxiliary), logits.shape[-2:]))
    return [output.softmax(dim=1) for output in outputs]


def label_maps(
    objective: Objective, phase: Phase, batch: MicroBatch, targets: Targets, fakes: list[Tensor]
) -> dict[str, Tensor]:
    """What the discriminator is to judge in a step, (k, C, h, w) each: "fake", the predictions of
    all images; of the labelled ones "real", their ground truth, and "mismatched", each other's.
    Where domains are told apart the predictions alone, "auxiliary" those of the auxiliary head.
    """
    judging, n, fake = objective.judging, len(batch.labelled.label), fakes[0]
    if judging.of_domains:
        shown = map(self_information, fakes) if judging.as_self_information else fakes
        return dict(zip(("fake", "auxiliary"), shown, strict=False))  # often the first alone
    maps: dict[str, Tensor] = {}
    if phase.discriminator or objective.matched(phase):
        index, valid = targets.index[:n], targets.valid[:n]
        maps["real"] = real_label_map(index, valid, fake[:n], judging.scaling_tau)
    if phase.discriminator and judging.mismatched_weight:
        maps["mismatched"] = of_neighbours(maps["real"])
    if phase.r1:
        maps["real"].requires_grad_()  # after the others were made of it, which it does not look at
    return maps | {"fake": fake}


def judge(
    pair: Pair, phase: Phase, batch: MicroBatch, maps: dict[str, Tensor], seen: Predicted
) -> tuple[dict[str, Tensor], Predicted]:
    """The discriminator's scores on each kind of label maps, (k, 1, h', w') or (k, 1, 1, 1), and
    what is seen with those on predictions; with its features, where a term of the phase needs them.
    """
    learner, matched = pair.adversary, pair.objective.matched(phase)
    # one that is not updated: its parameters and gradients are left alone
    forward = learner if phase.discriminator else learner.forward_frozen
    if matched is None:
        scores = dict(zip(maps, forward(seen.pixels, *maps.values()), strict=True))
        of_auxiliary = scores.get("auxiliary")
        return scores, replace(seen, scores=scores["fake"], auxiliary_scores=of_auxiliary)
    every, means = forward(seen.pixels, *maps.values(), features=True)
    scores, features = (dict(zip(maps, each, strict=True)) for each in (every, means))
    over_ranks = feature_means(features["real"], features["fake"][batch.slices()[matched]])
    seen = replace(seen, features=features["fake"], feature_means=over_ranks)
    return scores, replace(seen, scores=scores["fake"])


def segmentor_losses(
    objective: Objective, phase: Phase, batch: MicroBatch, seen: Predicted, counts: Counts
) -> tuple[Tensor, Tensor, Metrics]:
    """The weighted terms in two sums, by the way that their gradient takes, and all as metrics.

    Returns what comes through the logits, what comes through the discriminator, and the metrics
    with a graph: loss/<term>, unweighted; loss/segmentor, the sum.
    """
    parts = batch.parts(seen)
    own_parts = {kind: part.with_constant_scores() for kind, part in parts.items()}
    through_logits: list[Tensor] = []
    through_discriminator: list[Tensor] = []
    metrics: Metrics = {}
    unreached = seen.heads()
    for term, weight in objective.active(phase):
        some = (parts if term.through_discriminator else own_parts)[term.images]
        value, share = term_mean(term, some, counts)
        metrics |= {f"loss/{term.name}": value} | share
        if term.through_discriminator:
            through_discriminator.append(weight * value)
            continue
        through_logits.append(weight * value)
        if value.requires_grad:
            unreached.pop(term.head, None)
    # the graph must lead to all of the segmentor's parameters: the ranks wait for each one's
    # gradient
    through_logits += [0 * at_least_float32(head).sum() for head in unreached.values()]
    own = _total(through_logits)
    adversarial = _total(through_discriminator or [torch.zeros_like(own)])
    return own, adversarial, metrics | {"loss/segmentor": own + adversarial}


def term_mean(term: Term, seen: Predicted, counts: Counts) -> tuple[Tensor, Metrics]:
    """A term's mean over the global batch; and the metric of its share, where it has one."""
    if not term.chooses:
        return mean(term.local_sum(seen), counts.of_term(term)), {}
    local_sum, number = term.local_sum(seen)
    if not isinstance(number, Tensor):  # of a term of the user's own
        number = local_sum.new_full((), number, dtype=torch.float64)
    chosen = number.detach().to(local_sum.device, torch.float64)
    count = counts.of_term(term) if term.per_image else counts.chosen(chosen)
    share = {term.share: mean(chosen, counts.candidates(term))} if term.share else {}
    return mean(local_sum, count), share


def split_scores(
    judging: Judging,
    batch: MicroBatch,
    targets: Targets,
    scores: dict[str, Tensor],
    counts: Counts,
) -> dict[str, Scored]:
    """The discriminator's scores on each kind of label maps, as it is trained on them."""
    where, everywhere = batch.slices(), judging.on_unlabelled
    if judging.of_domains:
        return _scored_domains(judging, batch, targets, scores, counts)
    labelled = where["labelled"]
    kinds: list[Kind] = list(where) if everywhere else ["labelled"]
    of_labelled = counts.judged(["labelled"])
    mask = judging.mask(targets[labelled])
    scored = {"real": Scored(scores["real"], mask, *of_labelled)}
    on_fake, of_fake = scores["fake"], targets
    if not everywhere:
        on_fake, of_fake = on_fake[labelled], targets[labelled]
    scored["fake"] = Scored(on_fake, judging.mask(of_fake), *counts.judged(kinds))
    if "mismatched" in scores:
        # void is where the label map has it, whichever image it stands beside
        mask = None if mask is None else of_neighbours(mask)
        scored["mismatched"] = Scored(scores["mismatched"], mask, *of_labelled)
    return scored


def _scored_domains(
    judging: Judging,
    batch: MicroBatch,
    targets: Targets,
    scores: dict[str, Tensor],
    counts: Counts,
) -> dict[str, Scored]:
    """The scores on all predictions, those of labelled images as real."""
    domains: dict[str, Kind] = {"real": "labelled", "fake": "unlabelled"}
    scored = {}
    for name, kind in domains.items():
        # both domains went through the discriminator in one forward
        where = batch.slices()[kind]
        mask, numbers = judging.mask(targets[where]), counts.judged([kind])
        scored[name] = Scored(scores["fake"][where], mask, *numbers)
        if "auxiliary" in scores:
            scored[f"auxiliary_{name}"] = Scored(scores["auxiliary"][where], mask, *numbers)
    return scored


def discriminator_loss(
    phase: Phase,
    judging: Judging,
    scored: dict[str, Scored],
    maps: dict[str, Tensor],
    counts: Counts,
) -> tuple[Tensor, Metrics]:
    """The discriminator's loss, and what it is on each kind of label maps as metrics."""
    metrics: Metrics = {}
    for kind, of_kind in scored.items():
        target = judging.real_target if kind.endswith("real") else 0.0
        metrics[f"loss/discriminator_{kind}"] = _mean_loss(of_kind, target, judging.form)
    on_real, on_fake = metrics["loss/discriminator_real"], metrics["loss/discriminator_fake"]
    loss = on_real + on_fake
    if "mismatched" in scored:
        # Reed et al. 2016 (GAN-CLS), algorithm 1: both kinds of fakes together weigh as one
        share, on_mismatched = judging.mismatched_weight, metrics["loss/discriminator_mismatched"]
        loss = on_real + (1 - share) * on_fake + share * on_mismatched
    if judging.on_auxiliary:
        # A plain sum: no parameter is shared, so that each has the gradient of its own loss, and
        # optimizers that look at one parameter at a time do what two of them would.
        loss = loss + metrics["loss/discriminator_auxiliary_real"]
        loss = loss + metrics["loss/discriminator_auxiliary_fake"]
    if phase.r1:
        penalty = squared_gradient_sum(scored["real"].scores, maps["real"])
        metrics["loss/r1"] = mean(penalty, counts.images("labelled"))
        loss = loss + phase.r1 * metrics["loss/r1"]
    return loss, metrics


def _looked_at(
    judging: Judging,
    batch: MicroBatch,
    seen: Predicted,
    scored: dict[str, Scored],
    counts: Counts,
) -> Metrics:
    """What the discriminator's scores say of it, and of two domains how sure predictions are."""
    found = diagnostics.of_scores(scored, judging.form)
    if judging.of_domains and seen.probabilities is not None:
        found |= diagnostics.entropies(seen.probabilities, seen.targets, batch, counts)
    return found


def _mean_loss(scored: Scored, target: float, form: Form) -> Tensor:
    """Of the discriminator, on label maps of one kind."""
    loss = functools.partial(form.of_discriminator, target=target)
    return mean(sum_of(loss, scored.scores, scored.mask), scored.divisor)


def _weighted_cross_entropy(
    segmentor: Learner, phase: Phase, metrics: Metrics, own: Tensor
) -> Tensor:
    """Of the labelled pixels; all terms that come through the logits, `own`, where there is none;
    on the loss scale.
    """
    if "loss/cross_entropy" not in metrics:
        return own
    return segmentor.scaled(phase.weights["cross_entropy"] * metrics["loss/cross_entropy"])


def _total(values: list[Tensor]) -> Tensor:
    return functools.reduce(operator.add, values)


@contextmanager
def _exchanging(pair: Pair, phase: Phase, at_once: bool) -> Iterator[None]:
    """Gradients of the networks that the phase updates are exchanged at once, or later."""
    learners = [pair.segmentor] if phase.segmentor else []
    if phase.discriminator and pair.discriminator is not None:
        learners.append(pair.discriminator)
    with ExitStack() as stack:
        for learner in [] if at_once else learners:
            stack.enter_context(learner.no_sync())
        yield


def _targets(pair: Pair, batch: MicroBatch) -> dict[Kind, Targets]:
    """The targets of each kind of images, at the size of the label maps."""
    height, width = batch.labelled.pixels.shape[-2:]
    if not pair.objective.judging.at_image_size:
        stride = int(pair.segmentor.network.output_stride)  # type: ignore[arg-type]
        height, width = -(-height // stride), -(-width // stride)
    every = Targets.at(batch.all.label, (height, width))
    return {kind: every[where] for kind, where in batch.slices().items()}
