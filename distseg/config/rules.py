"""Every check of a configuration that needs no data: of each value alone, then of several."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.config.forms import FORMS
from distseg.config.keys import Key
from distseg.config.names import KEYS
from distseg.config.schema import (
    ADAPTATION,
    WITH_DISCRIMINATOR,
    WITH_GROUND_TRUTH,
    WITH_UNLABELLED,
    Config,
    OptimizerConfig,
)
from shards.errors import InputError
from shards.remote import PACKAGES, check_plain, check_url
from shards.user_code import FORMS as REFERENCES
from shards.user_code import check_complete, is_reference
from shards.words import closest, counted, nearest

# of distseg/losses/terms.py, by the names of their metrics
# here too, and not imported: the schema must not wait for torch, which losses need
BUILT_IN_TERMS = (
    *("cross_entropy", "auxiliary", "adversarial", "adversarial_unlabelled", "semi", "consistency"),
    *("segmentor", "discriminator", "discriminator_real", "discriminator_fake"),
    *("feature_matching", "discriminator_mismatched", "entropy", "r1"),
    *("adversarial_auxiliary", "discriminator_auxiliary_real", "discriminator_auxiliary_fake"),
)


def check(config: Config, values: Mapping[str, Any]) -> None:
    """Raise InputError for the first value or combination that no run can have.

    values: the same configuration by dotted names.
    """
    for entry in KEYS.values():
        if entry.choices:
            check_choice(entry, values[entry.name])
    for entry in KEYS.values():
        if entry.is_bounded:
            check_bounds(entry, values[entry.name])
    # last, so that rules can rely on each value by itself
    for rule in RULES:
        rule(config)


def check_choice(entry: Key, value: Any) -> None:
    """Raise InputError for a word that the key does not accept."""
    if entry.own_code and is_reference(str(value)):
        return
    if value not in entry.choices:
        if entry.own_code:
            check_complete(entry.name, str(value))
        needed = f"one of: {entry.told or ', '.join(entry.choices)}"
        needed += f"; or your own, as {REFERENCES}" if entry.own_code else ""
        # of many names some one has half of any word's letters
        action = nearest(str(value), entry.choices)
        if entry.own_code:
            found = closest(str(value), entry.choices, 0.5)
            own = "choose one of them, or write your own (docs/own_code.md)"
            action = f"did you mean {found}?" if found else own
        raise InputError(f"{entry.name}={value}", needed, action)


def check_bounds(entry: Key, value: Any) -> None:
    """Raise InputError for a number outside the key's bounds, NaN and infinity included.

    None is a default that is filled in later; of a list every number is checked.
    """
    numbers = value if isinstance(value, list) else [value]
    if not all(number is None or _is_within(entry, number) for number in numbers):
        number = "a number" if entry.high is not None else "a finite number"
        kind = "numbers" if isinstance(value, list) else number
        raise InputError(f"{entry.name}={value}", f"{kind} {entry.range}", f"correct {entry.name}")


def _is_within(entry: Key, number: float) -> bool:
    # NaN fails every comparison, so it is refused where there is any bound
    above = entry.low is None or number >= entry.low
    return above and (entry.high is None or number <= entry.high) and number < math.inf


def scales_in_order(config: Config) -> None:
    """data.scale_min is the smaller one."""
    data = config.data
    # each is within its own bounds, which say nothing of the other
    if data.scale_min > data.scale_max:
        got = f"data.scale_min={data.scale_min} above data.scale_max={data.scale_max}"
        raise InputError(got, "scale_min <= scale_max", "swap them")


def one_order_of_samples(config: Config) -> None:
    """Samples are drawn by class, or block by block."""
    data = config.data
    # one class may lie in a few shards only, which no block need hold
    if data.sampling != "each_once" and data.shuffle_block:
        got = f"data.sampling={data.sampling} with data.shuffle_block={data.shuffle_block}"
        needed = "one of them: classes are drawn from all shards"
        raise InputError(got, needed, "write data.shuffle_block=0")


def no_encoder_in_the_discriminator(config: Config) -> None:
    """encoder_lr_factor is of the segmentor's optimizer only."""
    factor = config.discriminator_optimizer.encoder_lr_factor
    # both optimizers have the same keys, and this one would be passed over in silence
    if factor != 1:
        got = f"discriminator_optimizer.encoder_lr_factor={factor}"
        needed = "1: a discriminator has no encoder"
        raise InputError(got, needed, "set discriminator_optimizer.lr alone")


def a_scale_to_evaluate_at(config: Config) -> None:
    """Test-time augmentation averages over one scale or more."""
    # an empty list is within every bound
    if not config.evaluate.scales:
        action = "write for example evaluate.scales=[0.75,1,1.25]"
        raise InputError("evaluate.scales=[]", "at least one scale", action)


def windows_that_fit(config: Config) -> None:
    """A sliding window and its overlap are multiples of 32, and neighbours only overlap."""
    window_px, overlap_px = config.evaluate.window_px, config.evaluate.overlap_px
    # every built-in encoder's stride divides 32: so windows begin on its grid
    if window_px and (window_px % 32 or overlap_px % 32 or 2 * overlap_px > window_px):
        got = f"evaluate.window_px={window_px} with evaluate.overlap_px={overlap_px}"
        needed = "multiples of 32, the overlap at most half the window"
        action = "write for example evaluate.window_px=512 evaluate.overlap_px=128"
        raise InputError(got, needed, action)


def frozen_statistics_are_trained(config: Config) -> None:
    """Batch normalisation is frozen only where weights come with statistics."""
    if config.segmentor.batch_norm == "frozen" and config.segmentor.init == "random":
        got = "segmentor.batch_norm=frozen with segmentor.init=random"
        needed = "stored statistics; those of random weights let deep networks explode"
        action = "write segmentor.batch_norm=per_rank, or segmentor.init=FILE"
        raise InputError(got, needed, action)


def nesterov_has_a_momentum(config: Config) -> None:
    """Nesterov's is a form of sgd's momentum, for either network."""
    _check_nesterov("segmentor_optimizer", config.segmentor_optimizer)
    _check_nesterov("discriminator_optimizer", config.discriminator_optimizer)


def _check_nesterov(section: str, optimizer: OptimizerConfig) -> None:
    # adamw would ignore it, and torch's sgd refuses it only when it is made
    if optimizer.nesterov and not (optimizer.name == "sgd" and optimizer.beta1 > 0):
        needed = f"{section}.name=sgd with a momentum ({section}.beta1) above 0"
        raise InputError(f"{section}.nesterov=true", needed, f"correct {section}")


def scores_of_a_form(config: Config) -> None:
    """What is meant for the scores of one form of the adversary's losses stands with no other."""
    loss = config.loss
    if config.mode not in WITH_DISCRIMINATOR:
        return
    form = FORMS[loss.adv_form]
    if loss.real_target != 1 and not form.has_target:
        got = f"loss.real_target={loss.real_target} with loss.adv_form={loss.adv_form}, which has "
        got += "no target"
        raise InputError(got, "loss.real_target=1", "remove it, or write another loss.adv_form")
    if config.mode == "semi_supervised" and config.semi.weight and not form.has_probability:
        got = f"semi.weight={config.semi.weight} with loss.adv_form={loss.adv_form}"
        needed = "scores that are probabilities, for the mask of semi.threshold"
        raise InputError(got, needed, "write semi.weight=0, or loss.adv_form=non_saturating")


def penalty_of_second_order(config: Config) -> None:
    """The R1 penalty is trained through a gradient, which not every way of computing allows."""
    if config.mode not in WITH_GROUND_TRUTH or not config.loss.r1_weight:
        return
    got, strategy = f"loss.r1_weight={config.loss.r1_weight} with ", config.parallel.strategy
    if strategy != "ddp":
        needed = "parallel.strategy=ddp: the others gather parameters, and reduce gradients, by "
        needed += "hooks of one backward, and R1 is a backward through a backward"
        action = "write parallel.strategy=ddp, or loss.r1_weight=0"
        raise InputError(f"{got}parallel.strategy={strategy}", needed, action)
    if config.compile:
        needed = "compile=false: compiled networks have no second derivative"
        raise InputError(f"{got}compile=true", needed, "write compile=false, or loss.r1_weight=0")
    if config.precision == "fp16":
        needed = "another precision: fp16 has no room for gradients at a label map's pixels"
        raise InputError(f"{got}precision=fp16", needed, "write precision=bf16 or fp32")


def spectral_norm_of_whole_weights(config: Config) -> None:
    """A discriminator's spectral norm is computed of its parameters, which are whole under ddp."""
    asked = config.discriminator.options.get("spectral_norm")
    strategy = config.parallel.strategy
    if config.mode in WITH_DISCRIMINATOR and asked and strategy != "ddp":
        got = f"discriminator.options.spectral_norm={asked} with parallel.strategy={strategy}"
        needed = "parallel.strategy=ddp: the others exchange a layer's gradient when its backward "
        needed += "is done, and the norm's comes after it"
        action = "write parallel.strategy=ddp, or remove the option"
        raise InputError(got, needed, action)


def evaluations_for_the_schedule(config: Config) -> None:
    """What goes by the validation loss needs evaluations."""
    schedule = config.schedule
    goes_by_loss = schedule.name == "plateau" or schedule.early_stop_patience
    # otherwise the rate would stay as it is for the whole run, without a word
    if goes_by_loss and not config.evaluate.every_steps:
        needed = (
            "evaluations: schedule.name=plateau and schedule.early_stop_patience go by their loss"
        )
        action = "write for example evaluate.every_steps=100"
        raise InputError("evaluate.every_steps=0", needed, action)


def shards_of_fsdp(config: Config) -> None:
    """parallel.shard_size is fsdp's."""
    parallel = config.parallel
    # ignored it would look as if the memory had been split
    if parallel.shard_size and parallel.strategy != "fsdp":
        got = (
            f"parallel.shard_size={parallel.shard_size} with parallel.strategy={parallel.strategy}"
        )
        action = "write parallel.strategy=fsdp, or parallel.shard_size=0"
        raise InputError(got, "networks in parameter shards", action)


def gathered_in_bf16(config: Config) -> None:
    """parallel.gather_dtype=bf16 is fsdp's, for steps that compute in bf16."""
    strategy = config.parallel.strategy
    # fp16 would need its loss scale before the sum, and fp32 would no longer be one
    if config.parallel.gather_dtype == "fp32" or (
        strategy == "fsdp" and config.precision == "bf16"
    ):
        return
    got = f"parallel.gather_dtype=bf16 with parallel.strategy={strategy} and "
    got += f"precision={config.precision}"
    action = "write parallel.strategy=fsdp precision=bf16, or parallel.gather_dtype=fp32"
    raise InputError(got, "parameter shards, and steps that compute in bf16", action)


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


def domains_without_ground_truth(config: Config) -> None:
    """mode=domain_adaptation has images of another domain to look at, and not pieces of both."""
    if config.mode not in ADAPTATION:
        return
    chosen = config.consistency
    weights = {"loss.adv_weight": config.loss.adv_weight}
    weights["adaptation.aux_adv_weight"] = config.adaptation.aux_adv_weight
    asked = [f"{name}={weight}" for name, weight in weights.items() if weight]
    if chosen.weight and chosen.mix_with == "labelled" and asked:
        got = f"mode={config.mode} with consistency.mix_with=labelled and {' and '.join(asked)}"
        needed = "images of one domain each, for the discriminator to tell them apart"
        action = "write consistency.mix_with=unlabelled, or mode=consistency without an adversary"
        raise InputError(got, needed, action)


def rectangles_in_order(config: Config) -> None:
    """strong.mix_area_min is the smaller one."""
    strong = config.strong
    # each is within its own bounds, which say nothing of the other
    if strong.mix_area_min > strong.mix_area_max:
        got = f"strong.mix_area_min={strong.mix_area_min} above "
        got += f"strong.mix_area_max={strong.mix_area_max}"
        raise InputError(got, "mix_area_min <= mix_area_max", "swap them")


def a_discriminator_at_the_gate(config: Config) -> None:
    """consistency.gate has a discriminator that has begun to learn."""
    chosen, loss = config.consistency, config.loss
    if config.mode not in WITH_UNLABELLED or not chosen.weight or chosen.gate == "none":
        return
    if config.mode not in WITH_DISCRIMINATOR:
        got = f"consistency.gate={chosen.gate} with mode={config.mode}"
        action = "write mode=semi_supervised, or consistency.gate=none"
        raise InputError(got, "a discriminator", action)
    # before it the discriminator has its first, random weights, and still would choose
    if chosen.start_step < loss.adv_start_step:
        got = f"consistency.gate={chosen.gate} with consistency.start_step={chosen.start_step} "
        got += f"before loss.adv_start_step={loss.adv_start_step}"
        needed = "a discriminator that has begun to learn"
        raise InputError(got, needed, f"write consistency.start_step={loss.adv_start_step} or more")
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


def class_weights_of_a_kind(config: Config) -> None:
    """loss.class_weights is a word, or a number for every class."""
    weights, words = config.loss.class_weights, ("none", "balanced", "median_frequency")
    if isinstance(weights, str) and weights in words:
        return
    # whether it is one for every class is only known with the data
    numbers = weights if isinstance(weights, list) else []
    if not all(_is_weight(number) for number in numbers) or not any(numbers):
        needed = f"one of: {', '.join(words)}; or a number from 0 on for every class, not all 0"
        raise InputError(f"loss.class_weights={weights}", needed, "correct loss.class_weights")


def _is_weight(value: Any) -> bool:
    # True is an int to Python
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


def steps_to_profile(config: Config) -> None:
    """There are such steps."""
    if config.profile.steps and profiled_steps(config.profile.steps)[-1] > config.steps:
        got = f"profile.steps={config.profile.steps} of {config.steps} steps"
        raise InputError(got, "steps that the run has", "choose earlier ones")


def profiled_steps(text: str) -> range:
    """Of "10:13" the steps 10 to 13, counted from 1. Raises InputError for what is none."""
    # in a file without quotes YAML has made a number of it, to the base of 60
    found = re.fullmatch(r"(\d{1,8}):(\d{1,8})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        needed = "FIRST:LAST, from 1 on and both included"
        raise InputError(f"profile.steps={text}", needed, "write 10:13, in a file in quotes")
    return range(first, last + 1)


def focal_or_smoothed(config: Config) -> None:
    """The focal loss looks at the true class alone, label smoothing at all."""
    loss = config.loss
    if loss.focal_gamma and loss.label_smoothing:
        got = (
            f"loss.focal_gamma={loss.focal_gamma} with loss.label_smoothing={loss.label_smoothing}"
        )
        raise InputError(got, "one of them", "write loss.label_smoothing=0")


def further_terms_within_bounds(config: Config) -> None:
    """Weights and steps of loss.terms are not negative, and no name is taken twice."""
    for name, term in config.loss.terms.items():
        # a part of names of metrics: a slash would make another family of it
        if not re.fullmatch(r"[\w-]+", str(name)):
            needed = "a name of letters, digits, _ and -"
            raise InputError(f"loss.terms.{name}", needed, "write loss.terms.NAME")
        # both would be logged as loss/NAME, one over the other
        if name in BUILT_IN_TERMS:
            action = "give it another name, and name what it is in use"
            raise InputError(f"loss.terms.{name}", "a name that no built-in term has", action)
        # here, as keys inside of a dictionary have no bounds in the schema
        numbers = {"weight": term.weight, "start_step": term.start_step}
        numbers["warmup_steps"] = term.warmup_steps
        for field, value in numbers.items():
            if not _is_weight(value):
                where = f"loss.terms.{name}.{field}"
                raise InputError(f"{where}={value}", "a number from 0 on", f"correct {where}")


def a_loss_to_minimise(config: Config) -> None:
    """The segmentor has a term above 0; that of an adversary will do."""
    loss, named = config.loss, "loss.ce_weight=0"
    weights = [loss.ce_weight, *(term.weight for term in loss.terms.values())]
    if config.mode == "adversarial":
        weights += [loss.adv_weight, loss.feature_weight]
        named += ", loss.adv_weight=0, loss.feature_weight=0"
    if config.mode in ADAPTATION:
        weights += [loss.adv_weight, config.semi.entropy_weight, config.consistency.weight]
        weights.append(config.adaptation.aux_adv_weight)
        named += ", loss.adv_weight=0, semi.entropy_weight=0, consistency.weight=0"
    # of the other modes: unlabelled_images_have_a_term, consistency_with_a_teacher
    others = config.mode in WITH_UNLABELLED and config.mode not in ADAPTATION
    if not (others or any(weights)):
        got = f"mode={config.mode} with {named} and no loss.terms"
        raise InputError(got, "a loss", "write loss.ce_weight=1, or for example loss.terms.dice=1")


def options_of_the_network_alone(config: Config) -> None:
    """No option stands in for what the package gives to each network by itself."""
    given = ("name", "num_classes", "init", "init_partial")
    for section, options in (
        ("segmentor", config.segmentor.options),
        ("discriminator", config.discriminator.options),
    ):
        for name in given:
            if name in options:
                got, action = f"{section}.options.{name}", f"remove {section}.options.{name}"
                raise InputError(got, f"options other than {', '.join(given)}", action)


def a_view_by_reference(config: Config) -> None:
    """data.view names code, and its options are of one."""
    data = config.data
    if data.view and not is_reference(data.view):
        check_complete("data.view", data.view)
        raise InputError(f"data.view={data.view}", REFERENCES, "correct data.view")
    # they would be passed over in silence
    if data.view_options and not data.view:
        got = f"data.view_options.{next(iter(data.view_options))} without data.view"
        raise InputError(got, "a view that takes it", "write data.view=FILE.py:NAME")


def data_sets_once(config: Config) -> None:
    """Each folder of shards is named once, and each URL is of a kind that is read."""
    data = config.data
    for key, folders in (
        ("data.shards", data.shards),
        ("data.unlabelled_shards", data.unlabelled_shards),
        ("data.val_shards", [data.val_shards]),
    ):
        for folder in folders:
            # its form alone; whether it answers is found when the manifest is read
            if "://" in folder:
                check_url(folder)
            if folders.count(folder) > 1:
                got, needed = f"{key} with {folder} twice", "each data set once"
                raise InputError(got, needed, "give it a larger weight instead")


def weights_of_data_sets(config: Config) -> None:
    """data.weights has a number for each of data.shards, and not all are 0; unlabelled ones too."""
    data = config.data
    _check_weights("data.weights", data.weights, data.shards)
    _check_weights("data.unlabelled_weights", data.unlabelled_weights, data.unlabelled_shards)


def _check_weights(key: str, weights: list[float], folders: list[str]) -> None:
    if weights and (len(weights) != len(folders) or not any(weights)):
        got = f"{key}={weights} for {counted(len(folders), 'data set')}"
        action = f"write for example {key}={[1] * len(folders)}" if folders else f"leave out {key}"
        raise InputError(got, "a number from 0 on for each, not all 0", action)


def unlabelled_images_are_used(config: Config) -> None:
    """data.unlabelled_shards goes with a mode that looks at them, and a split of theirs with
    them.
    """
    split = config.data.unlabelled_split
    # without them the unlabelled images are the rest of data.train_split
    if split and not config.data.unlabelled_shards:
        got = f"data.unlabelled_split={split} without data.unlabelled_shards"
        action = "write data.unlabelled_shards=DIR (that of data.shards may be it), or leave it out"
        raise InputError(got, "the data sets that it is a split of", action)
    if config.data.unlabelled_shards and config.mode not in WITH_UNLABELLED:
        got = f"data.unlabelled_shards={config.data.unlabelled_shards} with mode={config.mode}"
        action = f"write mode={' or '.join(WITH_UNLABELLED)}, or leave it out"
        raise InputError(got, "a mode with unlabelled images", action)


def a_class_map_for_each_set(config: Config) -> None:
    """data.class_map has a mapping of names for each data set that it names."""
    for name, asked in config.data.class_map.items():
        words = [*asked.values()] if isinstance(asked, dict) else [1]
        flat = [word for value in words for word in (value if isinstance(value, list) else [value])]
        if not all(word is None or isinstance(word, str) for word in flat):
            got = f"data.class_map.{name}={asked}"
            needed = "{CLASS OF THE RUN: CLASS OF THE SET, ...}, names as text"
            raise InputError(got, needed, "correct data.class_map")


def copies_behind_a_url(config: Config) -> None:
    """checkpoint.copy_to is a URL that can be written to, and holds no credentials."""
    url = config.checkpoint.copy_to
    if not url:
        return
    scheme, separator, place = url.partition("://")
    # a page is read only; whether a bucket may be written to is found when the run starts
    has_place = bool(place.strip("/")) and not (scheme in PACKAGES and place.startswith("/"))
    if not separator or not has_place or scheme in ("", "http", "https"):
        got = f"checkpoint.copy_to={scheme}://..." if separator else f"checkpoint.copy_to={url}"
        needed = (
            "a URL that can be written to: s3://bucket/prefix, gs://bucket/prefix, file:///path"
        )
        raise InputError(got, needed, "correct checkpoint.copy_to")
    check_plain(url, "checkpoint.copy_to")
    if scheme in ("file", "local") and config.run_dir:
        run_dir, copies = Path(config.run_dir).absolute(), Path(place).absolute()
        if copies == run_dir or run_dir in copies.parents:
            got = f"checkpoint.copy_to={url}, which is in run_dir"
            raise InputError(got, "another place", "correct checkpoint.copy_to")


def subsets_by_name(config: Config) -> None:
    """evaluate.subsets has a list of class names for each subset."""
    for name, members in config.evaluate.subsets.items():
        is_list = isinstance(members, list) and members
        if not is_list or not all(isinstance(word, str) for word in members):
            got = f"evaluate.subsets.{name}={members}"
            raise InputError(got, "{NAME: [CLASS, ...]}", "correct evaluate.subsets")


RULES = (
    scales_in_order,
    one_order_of_samples,
    no_encoder_in_the_discriminator,
    a_scale_to_evaluate_at,
    windows_that_fit,
    frozen_statistics_are_trained,
    nesterov_has_a_momentum,
    scores_of_a_form,
    penalty_of_second_order,
    spectral_norm_of_whole_weights,
    evaluations_for_the_schedule,
    shards_of_fsdp,
    gathered_in_bf16,
    unlabelled_images_have_a_term,
    consistency_with_a_teacher,
    a_discriminator_at_the_gate,
    two_views_that_complement,
    a_labelled_partner_for_each,
    domains_without_ground_truth,
    rectangles_in_order,
    a_view_by_reference,
    class_weights_of_a_kind,
    focal_or_smoothed,
    steps_to_profile,
    further_terms_within_bounds,
    options_of_the_network_alone,
    a_loss_to_minimise,
    data_sets_once,
    weights_of_data_sets,
    unlabelled_images_are_used,
    a_class_map_for_each_set,
    copies_behind_a_url,
    subsets_by_name,
)


def shards_to_train_on(config: Config) -> None:
    """There is a folder or a URL of shards: for all but a look at the configuration."""
    if not config.data.shards or not all(config.data.shards):
        action = "write data.shards=DIR (`distseg prepare` and `distseg pack` make one)"
        raise InputError("no data.shards", "a directory of packed shards", action)
