"""Rules of the images: data sets, orders and views."""

from __future__ import annotations

from distseg.config.schema import WITH_UNLABELLED, Config
from shards.errors import InputError
from shards.remote import check_url
from shards.user_code import FORMS as REFERENCES
from shards.user_code import check_complete, is_reference
from shards.words import counted


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
    # whether there are such sets and classes is known with the data
    for name, asked in config.data.class_map.items():
        words = [*asked.values()] if isinstance(asked, dict) else [1]
        flat = [word for value in words for word in (value if isinstance(value, list) else [value])]
        if not all(word is None or isinstance(word, str) for word in flat):
            got = f"data.class_map.{name}={asked}"
            needed = "{CLASS OF THE RUN: CLASS OF THE SET, ...}, names as text"
            raise InputError(got, needed, "correct data.class_map")


def shards_to_train_on(config: Config) -> None:
    """There is a folder or a URL of shards: for all but a look at the configuration."""
    if not config.data.shards or not all(config.data.shards):
        action = "write data.shards=DIR (`distseg prepare` and `distseg pack` make one)"
        raise InputError("no data.shards", "a directory of packed shards", action)


RULES = (
    scales_in_order,
    one_order_of_samples,
    a_view_by_reference,
    data_sets_once,
    weights_of_data_sets,
    unlabelled_images_are_used,
    a_class_map_for_each_set,
)
