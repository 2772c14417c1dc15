"""What is about to run, told in a few lines."""

from __future__ import annotations

import torch

from distseg.config.code import references
from distseg.config.loading import to_dict
from distseg.config.names import KEYS, flattened
from distseg.config.schema import (
    ADAPTATION,
    WITH_DISCRIMINATOR,
    WITH_UNLABELLED,
    Config,
    ConsistencyConfig,
    LossConfig,
)
from distseg.config.world_size import has_teacher, unlabelled_as_labelled
from distseg.data.mixture import median_size, shared_with, weights_of
from distseg.distributed.ranks import Ranks
from distseg.evaluate.judged import judges_auxiliary
from distseg.parallel.parameter_shards import num_elements
from distseg.parallel.sync_batch_norm import SynchronisedBatchNorm2d
from distseg.runs.checkpoint import OWN
from distseg.runs.checkpointer import SET_ASIDE, Newest
from distseg.train.inputs import Data
from distseg.train.schedules import lr_factor
from distseg.train.step import Pair
from shards import user_code
from shards.words import counted


def headline(config: Config, ranks: Ranks, pair: Pair, data: Data, step: int) -> str:
    """What is about to run, in a few lines.

    Networks, ranks, losses with their reductions, where it goes.
    """
    lines = [_networks(config, pair), *_frozen(config, pair.segmentor.network), *_modules(config)]
    # on resuming these were replaced by the checkpoint's, and would mislead
    if not step:
        reports = [getattr(it.network, "init_report", None) for it in pair.learners]
        lines += [f"weights: {report}" for report in reports if report is not None]
    has_auxiliary = bool(getattr(pair.segmentor.network, "has_auxiliary", False))
    lines.append(f"loss: {' + '.join(_terms(config, has_auxiliary))}")
    lines += _strong_views(config)
    lines += without_effect(config, pair.segmentor.network) + never_begun(config)
    lines += _batch_norm(pair.segmentor.network) if ranks.world_size > 1 else []
    # over all ranks and per rank: both are called "batch size" elsewhere, and learning rates go by
    # the first
    batch = f"batch {config.batch_size} = "
    batch += f"{ranks.world_size} x {config.batch_size // ranks.world_size}"
    images = f"{len(data.train)} labelled"
    if data.unlabelled is not None:
        images += f" and {len(data.unlabelled)} unlabelled"
        batch += f", + {config.semi.batch_size or config.batch_size} unlabelled"
    scored = f"{len(data.val)} of {data.chosen_by['data']} ({data.chosen_by['split']})"
    lines.append(f"images: {images} for training, {scored} for validation")
    if data.held_out is not None:
        lines[-1] += f", {len(data.held_out)} labelled ones held out to judge the teacher by"
    lines += [*_data_sets(config, data), *_scored_too(data)]
    where = f"{ranks.world_size} x {ranks.device.type} | {config.parallel.strategy}"
    lines.append(f"{where} | {config.precision} | {batch} | {config.run_dir}")
    if step:
        lines.append(f"resumed at step {step} of {config.steps}")
    return "\n".join(lines)


def _data_sets(config: Config, data: Data) -> list[str]:
    """Of several data sets, each with its share of a step and how large its images are."""
    chosen, size = config.data, config.batch_size
    mixtures = [("labelled", data.train, chosen.weights, size)]
    if data.unlabelled is not None:
        size = config.semi.batch_size or size
        mixtures.append(("unlabelled", data.unlabelled, chosen.unlabelled_weights, size))
    lines = []
    for kind, samples, asked, batch_size in mixtures:
        if len(samples.sets) + len(chosen.unlabelled_shards) < 2:
            continue
        shares = weights_of(samples, asked)
        for name, one, share in zip(samples.names, samples.sets, shares, strict=True):
            height, width = median_size(one)
            epochs = float(config.steps * batch_size * share) / len(one)
            # of a target that has labels people ask whether anything is learned from them
            unread = ", labels, if any, not read" if kind == "unlabelled" else ""
            lines.append(
                f"{kind} data {name}: {len(one)} images of median height x width "
                f"{height}x{width} px, "
                f"{float(share):.1%} of each batch, {epochs:.3g} epochs in all{unread}"
            )
    return lines


def about_scores(config: Config, data: Data) -> list[str]:
    """What is to be said where two domains are told apart, and the scores may not be of the one
    that is adapted to.
    """
    readers = [] if data.unlabelled is None else data.unlabelled.readers
    sums = [reader.manifest.sha256 for reader in readers]
    if config.mode not in ADAPTATION or data.val.reader.manifest.sha256 in sums:
        return []
    name = f"{data.chosen_by['data']} ({data.chosen_by['split']})"
    if data.domain == OWN:
        what = "which has the labels: no score says how the target is done"
        return [f"validation is on {name}, {what}. data.val_shards=DIR names the target's"]
    # that of the target may well be packed by itself
    return [f"validation is on {name}, none of the unlabelled data sets: see that it is the target"]


def _scored_too(data: Data) -> list[str]:
    """That images of the validation split are trained on without labels, where some are."""
    keys = [] if data.unlabelled is None else shared_with(data.val, data.unlabelled)
    if not keys:
        return []
    # no error: some compare so on purpose (transductive); but the scores are not of unseen images
    what = f"{len(keys)} of the {counted(len(data.val), 'image')} for validation"
    return [f"note: {what} are trained on too, without their labels"]


def _networks(config: Config, pair: Pair) -> str:
    name = user_code.short(config.segmentor.name)
    text = f"segmentor {name} {_millions(pair.segmentor.network)}"
    if pair.discriminator is None:
        return text
    name = user_code.short(config.discriminator.name)
    what = "a discriminator of each output," if judges_auxiliary(config) else "discriminator"
    return f"{text} | {what} {name} {_millions(pair.discriminator.network)}"


def _modules(config: Config) -> list[str]:
    """Where modules of the user's own were found: several of a name may be on Python's path."""
    named = {part: text for part, text in references(config).items() if ".py:" not in text}
    return [f"{text} of {user_code.load(text, part).path}" for part, text in named.items()]


def _batch_norm(segmentor: torch.nn.Module) -> list[str]:
    """That layers wait for all ranks, where some do."""
    layers = [m for m in segmentor.modules() if isinstance(m, SynchronisedBatchNorm2d)]
    what = "layers that wait for all ranks in forward and backward"
    # worth a line: each layer waits for all ranks twice a step, which is what slows such runs down
    return [f"batch norm: synchronised, {len(layers)} {what}"] if layers else []


def extension(config: Config, steps_before: int) -> str:
    """That a run is trained on, and what that means for its learning rate."""
    text = f"extended from {steps_before} to {config.steps} steps; its history stays"
    # poly alone is a function of the share of the run that is done
    if config.schedule.name != "poly":
        return f"{text}; the learning rate's {config.schedule.name} course knows no last step"
    # the jump of the rate is the one thing that an extended run does not share with a longer one
    before, now = (
        lr_factor(steps_before, steps, config.schedule) for steps in (steps_before, config.steps)
    )
    what = f"the learning rate at step {steps_before} is {now:.3g} of its base, not {before:.3g}"
    return f"{text}; {what}, as in a run of {config.steps} steps from the start"


def about_checkpoints(last: Newest) -> list[str]:
    """What is to be said of the checkpoints that a run goes on from; of sound ones nothing."""
    lines = [] if last.sound is None or not last.sound.caveat else [last.sound.caveat]
    # newest() gives none without a sound one before it
    step = 0 if last.sound is None else last.sound.step
    for path, what in last.damaged.items():
        lost = int(path.name.removeprefix("step-")) - step
        again = "1 step is" if lost == 1 else f"{lost} steps are"
        lines.append(
            f"damaged checkpoint: {what}; set aside as {SET_ASIDE}{path.name}. The run goes on "
            f"from step {step}: {again} done again"
        )
    return lines


def _frozen(config: Config, network: torch.nn.Module) -> list[str]:
    """How many parameters train, where some are chosen not to."""
    if not config.segmentor.freeze:
        return []
    parameters = list(network.parameters())
    # elements of the full parameter: under ZeRO-3 numel() of what this rank holds is often 0
    count = sum(num_elements(p) for p in parameters if p.requires_grad)
    share = f"{count:,} of {sum(map(num_elements, parameters)):,} parameters of the segmentor train"
    return [f"frozen: {', '.join(config.segmentor.freeze)}; {share}"]


def without_effect(config: Config, segmentor: torch.nn.Module) -> list[str]:
    """A line for each setting that this segmentor and the other settings leave without effect."""
    loss, factor = config.loss, config.segmentor_optimizer.encoder_lr_factor
    has_auxiliary = bool(getattr(segmentor, "has_auxiliary", False))
    has_cross_entropy = bool(loss.ce_weight or (has_auxiliary and loss.aux_weight))
    reasons: dict[str, str] = {}
    if factor != 1 and getattr(segmentor, "encoder", None) is None:
        reasons["segmentor_optimizer.encoder_lr_factor"] = "the segmentor has no encoder"
    if not has_auxiliary:
        reasons["loss.aux_weight"] = "the segmentor has no auxiliary head"
    if not loss.ohem_threshold:
        reasons["loss.ohem_min_share"] = "loss.ohem_threshold is 0"
    if not has_cross_entropy:
        names = ["class_weights", "label_smoothing", "focal_gamma", "ohem_threshold"]
        names.append("logit_adjustment")
        reasons |= {f"loss.{name}": "the loss is without cross entropy" for name in names}
    if config.mode in ADAPTATION and has_teacher(config):
        reasons["consistency.batch_norm"] = "adaptation.batch_norm is for the teacher's images too"
    if config.segmentor.batch_norm == "frozen":
        for name in ("adaptation.batch_norm", "consistency.batch_norm"):
            reasons[name] = "segmentor.batch_norm is frozen"
    if not has_teacher(config):
        for key in KEYS:
            if key.startswith("consistency."):
                reasons[key] = "there is no teacher"
            elif key.startswith("strong.") and not config.strong.labelled:
                reasons[key] = "nothing is seen in strong views"
    values = flattened(to_dict(config))
    told: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        if values[key] != KEYS[key].default:
            told.setdefault(reason, []).append(f"{key}={values[key]}")
    return [
        f"note: {', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect, as {reason}"
        for reason, keys in told.items()
    ]


def never_begun(config: Config) -> list[str]:
    """A line for each term that would begin after the last step; defaults are those of long runs.

    No error: a recipe is tried for a few steps first.
    """
    loss, semi = config.loss, config.semi
    used = {name: term for name, term in loss.terms.items() if term.weight}
    begins = {f"loss.terms.{name}.start_step": term.start_step for name, term in used.items()}
    weights = [loss.adv_weight, loss.feature_weight, config.adaptation.aux_adv_weight]
    # the term on unlabelled images does not begin before
    weights.append(semi.adv_weight if config.mode == "semi_supervised" else 0)
    if config.mode in WITH_DISCRIMINATOR and any(weights):
        begins["loss.adv_start_step"] = loss.adv_start_step
    if config.mode == "semi_supervised":
        begins |= {"semi.start_step": semi.start_step} if semi.weight else {}
        begins |= {"semi.adv_start_step": semi.adv_start_step} if semi.adv_weight else {}
    if config.mode in WITH_UNLABELLED and semi.entropy_weight:
        begins["semi.entropy_start_step"] = semi.entropy_start_step
    if has_teacher(config):
        begins["consistency.start_step"] = config.consistency.start_step
    return [
        f"note: {key}={step}, and the run ends at step {config.steps}: the term has no effect"
        for key, step in begins.items()
        if step >= config.steps
    ]


def _terms(config: Config, has_auxiliary: bool) -> list[str]:
    """The segmentor's loss, each term with its weight and reduction.

    A weight means nothing without it.
    """
    loss, semi = config.loss, config.semi
    terms = [_cross_entropy(loss)] if loss.ce_weight else []
    if has_auxiliary and loss.aux_weight:
        terms.append(f"{loss.aux_weight} x cross entropy of the auxiliary head")
    for name, term in loss.terms.items():
        terms.append(f"{term.weight} x {user_code.short(term.use or name)}")
    if config.mode in WITH_DISCRIMINATOR:
        late = f", from step {loss.adv_start_step}" if loss.adv_start_step else ""
        how = f"{loss.adv_form}, {loss.adv_reduction}, {config.alternation.name}{late}"
        what = "adversarial"
        # elsewhere it is that of labelled images, and the unlabelled ones have a term of their own
        if config.mode in ADAPTATION:
            what += f" on unlabelled, by {config.adaptation.input}"
        terms.append(f"{loss.adv_weight} x {what} ({how})")
        if judges_auxiliary(config):
            weight = config.adaptation.aux_adv_weight
            terms.append(f"{weight} x the same of the auxiliary output")
        if loss.feature_weight:
            terms.append(f"{loss.feature_weight} x feature matching")
        if loss.mismatched_weight:
            terms.append(f"discriminator: {loss.mismatched_weight} x mismatched pairs")
        if loss.r1_weight:
            terms.append(f"discriminator: R1, gamma {loss.r1_weight}, every {loss.r1_every}")
    if config.mode == "semi_supervised":
        terms.append(f"{semi.adv_weight} x adversarial on unlabelled ({loss.adv_reduction})")
        where = f"{loss.ce_reduction} where D > {semi.threshold}, from step {semi.start_step}"
        terms.append(f"{semi.weight} x semi-supervised cross entropy ({where})")
    if config.mode in WITH_UNLABELLED and semi.entropy_weight:
        late = f" (from step {semi.entropy_start_step})" if semi.entropy_start_step else ""
        terms.append(f"{semi.entropy_weight} x entropy on unlabelled{late}")
    if config.mode in WITH_UNLABELLED and config.consistency.weight:
        terms.append(_consistency(config.consistency))
    return terms


def _strong_views(config: Config) -> list[str]:
    """Which images have them, where some do."""
    kinds = ["labelled"] if config.strong.labelled else []
    if has_teacher(config) or unlabelled_as_labelled(config):
        kinds.append("unlabelled")
    mixed = "not mixed" if config.strong.mix == "none" else f"mixed by {config.strong.mix}"
    return [f"strong views of {' and '.join(kinds)} images, {mixed}"] if kinds else []


def _consistency(chosen: ConsistencyConfig) -> str:
    """The term on unlabelled images, and its teacher."""
    how = f"teacher {chosen.teacher}, {chosen.target}, confident from {chosen.threshold} by "
    how += chosen.weighting
    if chosen.mix_with == "labelled":
        how += ", mixed with labelled images"
    if chosen.logit_adjustment:
        how += f", logits adjusted by {chosen.logit_adjustment}"
    if chosen.alignment:
        how += f", classes aligned at rate {chosen.alignment}"
    if chosen.gate != "none":
        how += f", gate by {chosen.gate}"
    if chosen.start_step:
        how += f", from step {chosen.start_step}"
    return f"{chosen.weight} x consistency ({how})"


def _cross_entropy(loss: LossConfig) -> str:
    """The cross entropy with whatever is not its default."""
    how = [loss.ce_reduction]
    if loss.class_weights != "none":
        weights = loss.class_weights
        how.append(f"{weights} class weights" if isinstance(weights, str) else "class weights")
    if loss.logit_adjustment:
        how.append(f"logits adjusted by {loss.logit_adjustment}")
    if loss.label_smoothing:
        how.append(f"label smoothing {loss.label_smoothing}")
    if loss.focal_gamma:
        how.append(f"focal, gamma {loss.focal_gamma}")
    if loss.ohem_threshold:
        how.append(f"hard pixels, p < {loss.ohem_threshold}")
    weight = "" if loss.ce_weight == 1 else f"{loss.ce_weight} x "
    return f"{weight}cross entropy ({', '.join(how)})"


def _millions(network: torch.nn.Module) -> str:
    number = sum(num_elements(parameter) for parameter in network.parameters())
    # a first network of one's own may be as small as that, and 0.00 M would look like none
    return f"({number / 1e6:.2f} M)" if number >= 1e4 else f"({number:,} parameters)"
