"""What the two networks are trained for: the segmentor's terms and the discriminator's task."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from distseg.config.schema import (
    ADAPTATION,
    WITH_DISCRIMINATOR,
    WITH_GROUND_TRUTH,
    WITH_UNLABELLED,
    Config,
    TermConfig,
)
from distseg.data.mixture import Mixture
from distseg.data.samples import SampleSet
from distseg.evaluate.judged import judges_auxiliary, sees_self_information
from distseg.losses.adversarial import FORMS, Form
from distseg.losses.class_weights import balanced, log_shares, median_frequency
from distseg.losses.cross_entropy import PixelOptions
from distseg.losses.predicted import Head, Kind, Predicted, Targets
from distseg.losses.terms import (
    TERMS,
    Adversarial,
    Auxiliary,
    Consistency,
    CrossEntropy,
    Entropy,
    FeatureMatching,
    FunctionTerm,
    MaskedCrossEntropy,
    Term,
    count_scores,
)
from distseg.models.trial import shaped
from distseg.train.schedules import Phase
from shards import user_code
from shards.errors import InputError
from shards.sample import IGNORE_INDEX
from shards.words import counted


@dataclass(frozen=True)
class Judging:
    """How the discriminator looks at label maps, and what it is trained for.

    at_image_size: label maps have the image's resolution, not that of the segmentor's output.
    scaling_tau: of the softened ground truth (Luc et al. 2016); None: one-hot. real_target: for
    real label maps; below 1 is one-sided label smoothing. form: of its loss.
    per_cell: its scores are one per cell, not one per image. per_image: its losses are sums over
    cells for each image. on_unlabelled: it learns from the label maps of unlabelled images too.
    mismatched_weight: of (image, its neighbour's ground truth) among what is fake to it.
    of_domains: real are predictions of labelled images, fake those of unlabelled ones, and it never
    sees ground truth. as_self_information: of predictions it sees that. on_auxiliary: another one
    judges the predictions of the auxiliary head.
    """

    at_image_size: bool = False
    scaling_tau: float | None = None
    real_target: float = 1.0
    form: Form = FORMS["non_saturating"]
    per_cell: bool = True
    per_image: bool = False
    on_unlabelled: bool = True
    mismatched_weight: float = 0.0
    of_domains: bool = False
    as_self_information: bool = False
    on_auxiliary: bool = False

    def mask(self, targets: Targets) -> Tensor | None:
        """The valid mask of its scores, (n, h, w); None where each image has one score."""
        return targets.valid if self.per_cell else None

    def num_scores(self, targets: Targets) -> Tensor:
        """How many scores it gives on one label map of each image: a scalar, float64."""
        return count_scores(targets, self.per_cell)

    def divisor(self, targets: Targets) -> Tensor:
        """What its loss on those is divided by: a scalar, float64."""
        return count_scores(targets, self.per_cell and not self.per_image)


@dataclass(frozen=True)
class Scored:
    """The discriminator's scores on real or on fake label maps of this rank's images.

    scores: (n, 1, h', w') or (n, 1, 1, 1); mask: of Judging.mask. Over all ranks: divisor, of the
    loss, and num_scores.
    """

    scores: Tensor
    mask: Tensor | None
    divisor: Tensor
    num_scores: Tensor


@dataclass(frozen=True)
class Objective:
    """The terms of the segmentor's loss, and the discriminator's task.

    of_domains: whether the unlabelled images are of another domain than the labelled ones, or of
    data that may well be.
    """

    terms: tuple[Term, ...]
    judging: Judging
    of_domains: bool = False

    def active(self, phase: Phase) -> Iterator[tuple[Term, float]]:
        """The terms that a phase asks for, with their weights.

        The adversarial one is computed at weight 0 too, where the discriminator only watches.
        """
        for term in self.terms:
            weight = phase.weights.get(term.name, 0.0)
            watched = phase.adversary and term.name == "adversarial"
            if (weight or watched) and (phase.adversary or not _needs_adversary(term)):
                yield term, weight

    def uses_unlabelled(self, phase: Phase) -> bool:
        """Whether anything in a phase looks at unlabelled images."""
        if phase.discriminator and self.judging.on_unlabelled:
            return True
        return any(term.images == "unlabelled" for term, _ in self.active(phase))

    def matched(self, phase: Phase) -> Kind | None:
        """On which images' predictions a term of a phase needs the discriminator's features."""
        kinds = [term.images for term, _ in self.active(phase) if term.needs_features]
        return kinds[0] if kinds else None

    def weights(self, phase: Phase) -> dict[str, float]:
        """The weights of the terms beside the cross entropy, under their names in the metrics."""
        if not phase.segmentor:
            return {}
        others = [term.name for term in self.terms if term.name != "cross_entropy"]
        return {f"weight/{name}": phase.weights[name] for name in others if name in phase.weights}


def _needs_adversary(term: Term) -> bool:
    of_unlabelled = term.images == "unlabelled" and not term.without_adversary
    return term.through_discriminator or of_unlabelled


def build_objective(
    config: Config,
    segmentor: nn.Module,
    discriminator: nn.Module | None = None,
    samples: Mixture | SampleSet | None = None,
) -> Objective:
    """The objective of a run, of its bare networks.

    samples: the labelled ones, whose pixels may give the weights of classes. Raises InputError for
    class weights that do not fit, and for a term that is none or cannot be trained.
    """
    loss = config.loss
    pixels = PixelOptions(
        class_weights=None if samples is None else class_weights(config, samples),
        label_smoothing=loss.label_smoothing,
        focal_gamma=loss.focal_gamma,
        ohem_threshold=loss.ohem_threshold,
        ohem_min_share=loss.ohem_min_share,
        prior=None if samples is None else class_prior(config, samples),
    )
    in_sums = loss.ce_reduction == "sum"
    terms: list[Term] = [CrossEntropy(pixels, in_sums)]
    has_auxiliary = getattr(segmentor, "has_auxiliary", False)
    if has_auxiliary:
        terms.append(Auxiliary(pixels, in_sums))
    further = [build_term(name, asked) for name, asked in loss.terms.items()]
    _check_places(further, config, has_auxiliary)
    if samples is not None and further:
        # steps before it look as those of mode=supervised do
        late = config.mode not in WITH_DISCRIMINATOR or loss.adv_start_step > 0
        side = _score_side(config, segmentor, discriminator)
        num_classes = samples.classes.num_classes
        check_terms(further, num_classes, without_adversary=late, score_side=side)
    terms += further
    judging = _judging(config, discriminator)
    of_domains = config.mode in ADAPTATION
    # self-training and MinEnt from one domain to another have no mode of their own
    of_domains |= config.mode == "consistency" and bool(config.data.unlabelled_shards)
    return Objective((*terms, *_of_the_mode(config, judging)), judging, of_domains)


def _of_the_mode(config: Config, judging: Judging) -> Iterator[Term]:
    """The terms that an adversary or a teacher brings."""
    loss, chosen = config.loss, config.consistency
    # source predictions are what target ones are to look like: they get no such term
    if config.mode in ADAPTATION:
        yield _adversarial("adversarial", "unlabelled", judging)
        if judging.on_auxiliary:
            of_auxiliary = _adversarial("adversarial_auxiliary", "unlabelled", judging)
            yield replace(of_auxiliary, head="auxiliary")
    if config.mode in WITH_GROUND_TRUTH:
        yield _adversarial("adversarial", "labelled", judging)
        if loss.feature_weight:
            with_unlabelled = config.mode == "semi_supervised"
            yield FeatureMatching("unlabelled" if with_unlabelled else "labelled")
    if config.mode == "semi_supervised":
        yield _adversarial("adversarial_unlabelled", "unlabelled", judging)
        in_sums = loss.ce_reduction == "sum"
        yield MaskedCrossEntropy(config.semi.threshold, in_sums, judging.form)
    if config.mode in WITH_UNLABELLED and config.semi.entropy_weight:
        yield Entropy()
    if config.mode in WITH_UNLABELLED and chosen.weight:
        soft, by_image = chosen.target == "probabilities", chosen.weighting == "image"
        weights = _view_weights(config)
        yield Consistency(chosen.threshold, by_image=by_image, soft=soft, view_weights=weights)


def _view_weights(config: Config) -> tuple[float, ...]:
    """How much each view of an image weighs in the term, 1 on average; (): all the same."""
    if config.consistency.feature_perturbation != "dropout":
        return ()
    # Yang et al. 2023 (UniMatch), eq. 7: the perturbed weak view as much as all strong ones
    num_strong = config.consistency.num_views
    half = (num_strong + 1) / 2
    return (*[half / num_strong] * num_strong, half)


def _adversarial(name: str, images: Kind, judging: Judging) -> Adversarial:
    return Adversarial(name, images, judging.form, judging.per_cell, judging.per_image)


def _judging(config: Config, discriminator: nn.Module | None) -> Judging:
    loss = config.loss
    return Judging(
        at_image_size=loss.map_resolution == "image",
        scaling_tau=loss.scaling_tau if loss.real_map == "scaling" else None,
        real_target=loss.real_target,
        form=FORMS[loss.adv_form],
        per_cell=getattr(discriminator, "head", None) == "patch",
        per_image=loss.adv_reduction == "sum",
        on_unlabelled=config.semi.discriminate or config.mode in ADAPTATION,
        mismatched_weight=loss.mismatched_weight,
        of_domains=config.mode in ADAPTATION,
        as_self_information=sees_self_information(config),
        on_auxiliary=judges_auxiliary(config),
    )


def build_term(name: str, asked: TermConfig) -> Term:
    """A term of `loss.terms`. Raises InputError for one that there is not, or wrong options."""
    use, key = asked.use or name, f"loss.terms.{name}"
    if user_code.is_reference(use):
        return _own_term(name, use, asked.options)
    if use not in TERMS:
        user_code.check_complete(f"{key}.use", use)
        needed = f"one of: {', '.join(TERMS)}; or your own, as {user_code.FORMS}"
        raise InputError(f"{key}.use={use}", needed, f"correct {key}.use")
    try:
        term = TERMS[use](**asked.options)
    except TypeError as error:
        got = f"{key}.options={asked.options}: {error}"
        raise InputError(got, f"options of {use}", "correct or remove them") from None
    term.name = name
    return term


def _own_term(name: str, reference: str, options: dict[str, Any]) -> Term:
    """A term of the user's own: a class like Term, or a function of logits and label."""
    key = f"loss.terms.{name}"
    loaded = user_code.load(reference, f"{key}.use")
    if not inspect.isclass(loaded.value):
        given = tuple(user_code.parameters(loaded.value))[:2]
        user_code.check_options(loaded, options, f"{key}.options", given)
        return FunctionTerm(loaded.value, name, options)
    term = user_code.call(loaded, f"{key}.use", options, f"{key}.options")
    if not isinstance(term, Term):
        needed = "a class that derives from distseg.losses.Term, or a function"
        raise InputError(f"{key}.use={reference}", needed, f"correct {loaded.name}")
    term.name = name
    return term


def _check_places(terms: Sequence[Term], config: Config, has_auxiliary: bool) -> None:
    """Raise InputError for a term of what this run does not have."""
    for term in terms:
        _check_head(term, has_auxiliary)
        if config.loss.terms[term.name].weight:
            _check_mode(term, config.mode)


def _check_mode(term: Term, mode: str) -> None:
    """Raise InputError for a term that no step of this mode would compute."""
    modes, what = ["semi_supervised", *ADAPTATION], "on unlabelled images"
    if term.images == "labelled":
        modes, what = ["adversarial", "semi_supervised"], "through the discriminator"
    if _needs_adversary(term) and mode not in modes:
        action = f"write mode={modes[0]}, or loss.terms.{term.name}.weight=0"
        got = f"loss.terms.{term.name}, a term {what}, with mode={mode}"
        raise InputError(got, f"mode={' or '.join(modes)}", action)


def _check_head(term: Term, has_auxiliary: bool) -> None:
    """Raise InputError for a term of images or of a head that there are not."""
    key = f"loss.terms.{term.name}"
    for name, choices in (("images", get_args(Kind)), ("head", get_args(Head))):
        value = getattr(term, name)
        if value not in choices:
            got, needed = f"{key}: {name}={value!r}", f"one of: {', '.join(choices)}"
            raise InputError(got, needed, f"correct {name} of the term")
    if term.head == "auxiliary" and not has_auxiliary:
        needed = "a segmentor that has an auxiliary head"
        raise InputError(f"{key}, a term of the auxiliary logits", needed, f"remove {key}")


def check_terms(
    terms: Sequence[Term],
    num_classes: int,
    *,
    without_adversary: bool = False,
    score_side: int = 8,
) -> None:
    """Raise InputError for a term that gives no finite sum with a gradient, on random images.

    So that what a term of the user's own gets wrong is said before data are read.
    without_adversary: there are steps in which nothing is known of probabilities and scores.
    score_side: how many scores the discriminator gives on a label map of 8 x 8, on a side.
    """
    for term in terms:
        _try(term, _random(num_classes, score_side))
        if without_adversary and not _needs_adversary(term):
            bare = replace(_random(num_classes), probabilities=None, scores=None)
            _try(term, bare, " in a step without the adversary, which has no probabilities")


def _try(term: Term, seen: Predicted, when: str = "") -> None:
    """Raise InputError for what a term gets wrong on images."""
    source = seen.scores if term.through_discriminator else seen.logits
    assert source is not None  # of `_random`
    # copies, to see whether it writes into what the other terms get, too
    given = {"label": seen.label, "logits": seen.logits, "full_logits": seen.full_logits}
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    try:
        count = term.count(seen.targets) if term.is_counted else None
        found = term.local_sum(seen)
    except InputError as error:  # says itself what is needed
        said = f"loss.terms.{term.name}"
        got = error.got if said in error.got else f"{said}: {error.got}"
        raise InputError(got + when, error.needed, error.action) from error
    except BaseException as error:  # whatever the user's own code raises
        if not user_code.is_own(error):
            raise
        got = f"loss.terms.{term.name}{when}: {type(error).__name__}: {error}"
        raise InputError(got, _NEEDED, "correct the term") from error
    problem = _problem_of_counts(term, count, found)
    for name, tensor in given.items():
        if not torch.equal(tensor, before[name]):
            problem = f"changes its {name} in place, which other terms read: work on a clone"
    problem = problem or _problem_of(found[0] if term.chooses else found, source)
    if problem:
        raise InputError(f"loss.terms.{term.name}: {problem}", _NEEDED, "correct the term")


_NEEDED = "a sum and a count (or of a Term the sum alone), the sum a finite scalar with a gradient"


def _problem_of_counts(term: Term, count: Any, found: Any) -> str:
    """What is wrong with what a term's sum is divided by; "" for nothing."""
    counts = [count] if term.is_counted else []
    if term.chooses:
        if not isinstance(found, tuple) or len(found) != 2:
            return f"a {type(found).__name__} instead of a sum and how many took part"
        # a plain number will do here: nothing is stacked with it
        counts.append(torch.tensor(found[1]) if isinstance(found[1], int | float) else found[1])
    if not all(isinstance(each, Tensor) and not each.ndim for each in counts):
        return "a count that is no tensor of one number"
    # a count of 0 is of images without a valid pixel; these below would be taken for one
    wrong = [float(each) for each in counts if not 0 <= float(each) < math.inf]
    return f"a count of {wrong[0]}" if wrong else ""


def _problem_of(total: Any, source: Tensor) -> str:
    """What is wrong with a term's sum on random images; "" for nothing."""
    if not isinstance(total, Tensor):
        return f"a {type(total).__name__} instead of a tensor"
    if total.ndim:
        return f"a sum of shape {tuple(total.shape)}"
    if not total.isfinite():
        return f"a sum of {float(total.detach())}"
    if not total.requires_grad:
        return "no gradient: the sum does not depend on the networks"
    (gradient,) = torch.autograd.grad(total, source, allow_unused=True)
    return "" if gradient is not None and gradient.any() else "no gradient at the networks' output"


def _score_side(config: Config, segmentor: nn.Module, discriminator: nn.Module | None) -> int:
    """How many scores on a side a run's discriminator gives, where label maps have 8 cells."""
    if discriminator is None or getattr(discriminator, "head", None) != "patch":
        return 1
    crop_px, stride = config.data.crop_px, int(segmentor.output_stride)  # type: ignore[arg-type]
    side = crop_px if config.loss.map_resolution == "image" else -(-crop_px // stride)
    image = torch.zeros(1, 3, crop_px, crop_px)
    num_classes = int(segmentor.num_classes)  # type: ignore[arg-type]
    scores = shaped(discriminator, image, torch.zeros(1, num_classes, side, side))[0]
    return max(1, round(8 * scores.shape[-1] / side))


def _random(num_classes: int, score_side: int = 8) -> Predicted:
    """Two random images of 32 px at stride 4, with void, and what networks could say of them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 32, 32, generator=generator)
    label = torch.randint(0, num_classes, (2, 32, 32), generator=generator).to(torch.uint8)
    label[:, :4] = IGNORE_INDEX
    logits = torch.randn(2, num_classes, 8, 8, generator=generator).requires_grad_()
    scores = torch.randn(2, 1, score_side, score_side, generator=generator).requires_grad_()
    targets = Targets.at(label, (8, 8))
    return Predicted(pixels, targets, logits, logits, logits.softmax(1), scores)


def class_weights(config: Config, samples: Mixture | SampleSet) -> Tensor | None:
    """The weights (C,) of `loss.class_weights`; None: none. Raises InputError for a wrong list.

    balanced and median_frequency follow from the pixels of the samples that are labelled, as often
    as they are seen.
    """
    asked, names = config.loss.class_weights, samples.classes.names
    if asked == "none":
        return None
    if isinstance(asked, str):
        formulas = {"balanced": balanced, "median_frequency": median_frequency}
        return torch.from_numpy(formulas[asked](_seen_pixels(config, samples)))
    if len(asked) != len(names):
        got = f"loss.class_weights with {counted(len(asked), 'number')} for "
        got += counted(len(names), "class", "classes")
        raise InputError(got, f"one for each of: {', '.join(names)}", "correct loss.class_weights")
    return torch.tensor(asked, dtype=torch.float64)


def class_prior(config: Config, samples: Mixture | SampleSet) -> Tensor | None:
    """What `loss.logit_adjustment` adds to the logits of each class, (C,); None: nothing."""
    if not config.loss.logit_adjustment:
        return None
    shares = log_shares(_seen_pixels(config, samples))
    return torch.from_numpy(config.loss.logit_adjustment * shares)


def _seen_pixels(config: Config, samples: Mixture | SampleSet) -> np.ndarray:
    """Of each sample and class, several sets in the shares in which they are trained on."""
    if isinstance(samples, Mixture):
        return samples.class_pixels(config.data.weights)
    return samples.class_pixels()
