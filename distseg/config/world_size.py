"""What a configuration asks of the number of ranks: that images of a step can be shared evenly.

Arithmetic alone, without data and without torch: launchers ask before there are any ranks.
"""

from __future__ import annotations

from distseg.config.schema import WITH_GROUND_TRUTH, WITH_UNLABELLED, Config
from shards.errors import InputError

PAIRED_MIXES = ("cutmix", "classmix")  # of neighbours with each other


def check_world_size(config: Config, world_size: int) -> None:
    """Raise InputError where a run cannot be trained on so many ranks."""
    check_batches(config, world_size)
    check_neighbours(config, world_size)
    check_shard_size(config.parallel.shard_size, world_size)


def check_batches(config: Config, world_size: int) -> None:
    """Raise InputError for images of a step that ranks and micro-batches cannot share evenly, and
    for half a pair of mixed ones.
    """
    _check_batch("batch_size", config.batch_size, config, world_size)
    if config.mode in WITH_UNLABELLED:
        size = config.semi.batch_size or config.batch_size
        _check_batch("semi.batch_size", size, config, world_size)
    check_pairs(config, world_size)


def _check_batch(key: str, batch_size: int, config: Config, world_size: int) -> None:
    # Equal shares only. Unequal ones would have ranks wait for the largest, and a batch that is
    # padded or cut short is not the configured one.
    num_micro_batches = config.gradient_accumulation_steps
    divisor = world_size * num_micro_batches
    if batch_size % divisor:
        below, above = batch_size // divisor * divisor, -(-batch_size // divisor) * divisor
        got = f"{key}={batch_size} for {world_size} ranks"
        if num_micro_batches > 1:
            got += f" and gradient_accumulation_steps={num_micro_batches}"
        nearest = f"{below} or {above}" if below else str(above)
        action = f"write {key}={nearest}, or start other ranks"
        raise InputError(got, f"a multiple of {divisor}", action)


def has_teacher(config: Config) -> bool:
    """Whether a teacher labels images in a run."""
    return config.mode in WITH_UNLABELLED and config.consistency.weight > 0


def unlabelled_as_labelled(config: Config) -> bool:
    """Whether unlabelled images that no teacher has labelled are in strong views, as the labelled
    ones are: two domains that come in other kinds of views are told apart by these.
    """
    of_domains = config.mode in WITH_UNLABELLED and config.mode not in WITH_GROUND_TRUTH
    return of_domains and config.strong.labelled


def num_views_of(config: Config) -> int:
    """How many views of an unlabelled image a step trains on where there is a teacher."""
    chosen = config.consistency
    # that of dropout is the weak one
    return chosen.num_views + (chosen.feature_perturbation == "dropout")


def mixes_pairs(mix: str, mix_probability: float) -> bool:
    """Whether strong views of these keys of `strong` may hold a part of another image."""
    return mix in PAIRED_MIXES and mix_probability > 0


def check_pairs(config: Config, world_size: int) -> None:
    """Raise InputError where a rank's share of a micro-batch holds half a pair of mixed images."""
    if not mixes_pairs(config.strong.mix, config.strong.mix_probability):
        return
    # each kind by itself: a step may have more of the one than of the other
    if config.strong.labelled:
        _check_even(config, world_size, "batch_size", config.batch_size)
    of_teacher = has_teacher(config) and config.consistency.mix_with == "unlabelled"
    # without a teacher there are no classes to cut by
    if of_teacher or (unlabelled_as_labelled(config) and config.strong.mix == "cutmix"):
        size = config.semi.batch_size or config.batch_size
        _check_even(config, world_size, "semi.batch_size", size)


def _check_even(config: Config, world_size: int, key: str, batch_size: int) -> None:
    # of micro-batches too: on more ranks without them it must be the same run
    num_parts = world_size * config.gradient_accumulation_steps
    share = batch_size // num_parts
    if share % 2:
        kind = "labelled" if key == "batch_size" else "unlabelled"
        got = f"strong.mix={config.strong.mix} with {share} {kind} images a rank and micro-batch"
        needed = "an even number: neighbours are mixed with each other"
        action = f"write {key}={2 * num_parts * max(1, share // 2)} or strong.mix=cutout; of a run "
        action += "that goes on, start fewer ranks"
        raise InputError(got, needed, action)


def check_neighbours(config: Config, world_size: int) -> None:
    """Raise InputError where a rank's share of a micro-batch holds half a pair of labelled images,
    each of which lends the other its ground truth.
    """
    weight = config.loss.mismatched_weight
    if config.mode not in WITH_GROUND_TRUTH or not weight:
        return
    num_parts = world_size * config.gradient_accumulation_steps
    size = config.batch_size // num_parts
    if size % 2:
        got = f"loss.mismatched_weight={weight} with {size} labelled images a rank and micro-batch"
        needed = "an even number: neighbours lend each other their ground truth"
        action = f"write batch_size={num_parts * (size + 1)} or loss.mismatched_weight=0; of a run "
        raise InputError(got, needed, f"{action}that goes on, start fewer ranks")


def check_shard_size(shard_size: int, world_size: int) -> None:
    """Raise InputError unless the ranks divide into groups of `shard_size` (0: one group)."""
    # a mesh of (replicas, shards) is a full rectangle of ranks
    if shard_size and world_size % shard_size:
        got = f"parallel.shard_size={shard_size} for {world_size} ranks"
        raise InputError(
            got,
            "a divisor of the number of ranks",
            "write parallel.shard_size=0 for one group of all",
        )
