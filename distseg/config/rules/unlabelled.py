"""Rules of the terms on images without labels: a teacher's, a domain's."""

from __future__ import annotations

from distseg.config.schema import ADAPTATION, WITH_DISCRIMINATOR, WITH_UNLABELLED, Config
from shards.errors import InputError
from shards.user_code import is_reference
from shards.words import counted


def unlabelled_images_have_a_term(config: Config) -> None:
    """The semi-supervised mode has a weight above 0."""
    weights = [config.loss.adv_weight, config.semi.adv_weight, config.semi.weight]
    weights += [config.consistency.weight, config.semi.entropy_weight, config.loss.feature_weight]
    # one of the user's own may be of unlabelled images, which is known when it is imported
    weights += [term.weight for term in config.loss.terms.values() if is_reference(term.use)]
    # their forward passes would cost time at every step, for nothing
    if config.mode == "semi_supervised" and not any(weights):
        got = "mode=semi_supervised with loss.adv_weight, loss.feature_weight, semi.adv_weight, "
        got += "semi.weight, semi.entropy_weight and consistency.weight all 0"
        raise InputError(got, "a term on unlabelled images", "write mode=supervised, or a weight")


def consistency_with_a_teacher(config: Config) -> None:
    """mode=consistency has a term, and that of a teacher its teacher."""
    chosen = config.consistency
    if config.mode == "consistency" and not (chosen.weight or config.semi.entropy_weight):
        got = "mode=consistency with consistency.weight=0 and semi.entropy_weight=0"
        raise InputError(got, "a weight above 0", "write consistency.weight=1")
    if config.mode not in WITH_UNLABELLED or not chosen.weight:
        return
    if chosen.teacher == "ema" and not config.ema_decay:
        action = "write for example ema_decay=0.99, or consistency.teacher=segmentor"
        raise InputError("consistency.teacher=ema with ema_decay=0", "an EMA", action)
    if config.parallel.strategy == "deepspeed" and config.parallel.zero_stage == 3:
        got = "consistency.weight with parallel.strategy=deepspeed, parallel.zero_stage=3"
        needed = "whole parameters for the teacher, which stage 3 does not keep"
        raise InputError(got, needed, "write parallel.zero_stage=2, or parallel.strategy=fsdp")


def two_views_that_complement(config: Config) -> None:
    """consistency.feature_perturbation=complementary has two strong views to share channels."""
    chosen = config.consistency
    # of others there is none that has what all the rest lack
    if chosen.feature_perturbation == "complementary" and chosen.num_views != 2:
        got = "consistency.feature_perturbation=complementary with consistency.num_views="
        got += f"{chosen.num_views}"
        needed = "two strong views, of which each has the channels that the other lacks"
        raise InputError(got, needed, "write consistency.num_views=2")


def a_labelled_partner_for_each(config: Config) -> None:
    """consistency.mix_with=labelled has something to lay over every unlabelled image."""
    if config.mode not in WITH_UNLABELLED or config.consistency.mix_with != "labelled":
        return
    if config.strong.mix not in ("cutmix", "classmix"):
        got = f"consistency.mix_with=labelled with strong.mix={config.strong.mix}"
        needed = "a way to mix two images"
        raise InputError(got, needed, "write strong.mix=classmix or cutmix")
    # the k-th labelled image lies over the k-th unlabelled one, on any number of ranks
    size = config.semi.batch_size or config.batch_size
    if size != config.batch_size:
        got = f"consistency.mix_with=labelled with batch_size={config.batch_size} and "
        got += f"semi.batch_size={size}"
        needed = "as many labelled images as unlabelled ones"
        raise InputError(got, needed, f"write semi.batch_size={config.batch_size}")


def rectangles_in_order(config: Config) -> None:
    """strong.mix_area_min is the smaller one."""
    strong = config.strong
    # each is within its own bounds, which say nothing of the other
    if strong.mix_area_min > strong.mix_area_max:
        got = f"strong.mix_area_min={strong.mix_area_min} above "
        got += f"strong.mix_area_max={strong.mix_area_max}"
        raise InputError(got, "mix_area_min <= mix_area_max", "swap them")


def a_discriminator_at_the_gate(config: Config) -> None:
    """consistency.gate has a discriminator that has learned."""
    chosen, loss = config.consistency, config.loss
    if config.mode not in WITH_UNLABELLED or not chosen.weight or chosen.gate == "none":
        return
    if config.mode not in WITH_DISCRIMINATOR:
        got = f"consistency.gate={chosen.gate} with mode={config.mode}"
        action = "write mode=semi_supervised, or consistency.gate=none"
        raise InputError(got, "a discriminator", action)
    # up to its first update, at that step's end, it has random weights, and still would choose
    first, starts = loss.adv_start_step, f"loss.adv_start_step={loss.adv_start_step}"
    if config.alternation.name == "blocks":
        first += config.alternation.segmentor  # whose block comes first
        starts += f", alternation.segmentor={config.alternation.segmentor}"
    if chosen.start_step <= first:
        got = f"consistency.gate={chosen.gate} with consistency.start_step={chosen.start_step} "
        needed = f"a discriminator that has learned; its first update ends step {first}"
        raise InputError(f"{got}({starts})", needed, f"write consistency.start_step={first + 1}")
    size = config.semi.batch_size or config.batch_size
    if chosen.gate == "rank" and not round(chosen.gate_share * size):
        got = f"consistency.gate_share={chosen.gate_share} of {counted(size, 'unlabelled image')}"
        action = f"write consistency.gate_share={1 / size:.3g} or more"
        raise InputError(got, "one image of each step at least", action)
    if chosen.gate == "score" and loss.adv_form not in ("non_saturating", "saturating"):
        # which only the cross entropy makes of the scores
        got = f"consistency.gate=score with loss.adv_form={loss.adv_form}"
        needed = "a probability, of a discriminator trained by BCE"
        raise InputError(got, needed, "write consistency.gate=rank")


def domains_without_ground_truth(config: Config) -> None:
    """mode=domain_adaptation has images of another domain to look at, and not pieces of both."""
    if config.mode not in ADAPTATION:
        return
    chosen, asked = config.consistency, _told_apart(config)
    if chosen.weight and chosen.mix_with == "labelled" and asked:
        got = f"mode={config.mode} with consistency.mix_with=labelled and {' and '.join(asked)}"
        needed = "images of one domain each, for the discriminator to tell them apart"
        action = "write consistency.mix_with=unlabelled, or mode=consistency without an adversary"
        raise InputError(got, needed, action)


def _told_apart(config: Config) -> list[str]:
    """The weights by which a discriminator between domains teaches the segmentor."""
    weights = {"loss.adv_weight": config.loss.adv_weight}
    weights["adaptation.aux_adv_weight"] = config.adaptation.aux_adv_weight
    return [f"{name}={weight}" for name, weight in weights.items() if weight]


def domains_in_views_of_one_kind(config: Config) -> None:
    """mode=domain_adaptation with a teacher changes both domains' images in the same ways."""
    chosen = config.consistency
    if config.mode not in ADAPTATION or not chosen.weight or not _told_apart(config):
        return
    taught = f"mode={config.mode} with consistency.weight={chosen.weight}"
    if not config.strong.labelled:
        got, action = f"{taught} and strong.labelled=false", "write strong.labelled=true"
        raise InputError(got, _ONE_KIND, action)
    if chosen.feature_perturbation != "none":
        got = f"{taught} and consistency.feature_perturbation={chosen.feature_perturbation}"
        raise InputError(got, _ONE_KIND, "write consistency.feature_perturbation=none")


def classes_cut_out_in_both_domains(config: Config) -> None:
    """mode=domain_adaptation with ClassMix has a teacher from the discriminator's first step on."""
    strong, chosen, start = config.strong, config.consistency, config.loss.adv_start_step
    is_cut = strong.labelled and strong.mix == "classmix" and strong.mix_probability > 0
    if config.mode not in ADAPTATION or not is_cut or not _told_apart(config):
        return
    # the source is cut by its labels, the target by what a teacher says
    late, action = "no teacher", "write strong.mix=none or cutmix"
    if chosen.weight:
        late = f"consistency.start_step={chosen.start_step}"
        # a gate asks for a discriminator that begins before it
        if chosen.gate == "none":
            action += f", or loss.adv_start_step={chosen.start_step}"
    if not chosen.weight or chosen.start_step > start:
        got = f"mode={config.mode} with strong.mix=classmix, loss.adv_start_step={start} and {late}"
        raise InputError(got, _ONE_KIND, action)


_ONE_KIND = "both domains in views of one kind: a discriminator tells others apart by these"
RULES = (
    unlabelled_images_have_a_term,
    consistency_with_a_teacher,
    two_views_that_complement,
    a_labelled_partner_for_each,
    rectangles_in_order,
    a_discriminator_at_the_gate,
    domains_without_ground_truth,
    domains_in_views_of_one_kind,
    classes_cut_out_in_both_domains,
)
