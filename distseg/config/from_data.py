"""Values that a preset leaves to the data: `crop_px: from_data` becomes a number when it is loaded.

The numbers stand in the run's config.yaml like all others, and an override counts more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from distseg.config.schema import Config
from shards.errors import InputError
from shards.storage import is_file, read_text
from shards.words import counted

FROM_DATA = "from_data"
CELL_PX = 32  # crops are whole cells of the deepest grid that encoders have
MIN_CROP_PX, MAX_CROP_PX = 64, 512
# 16 crops of 240 px are what `preset=stanford` was tried with; of larger ones fewer, so that a step
# costs about as much
BATCH_SIZE, LARGE_CROP_PX, LARGE_CROP_BATCH_SIZE = 16, 256, 8
EPOCHS = 30  # preset=stanford has 25
# a few images learn nothing in 30 epochs; very large sets have enough when 30 would take weeks
MIN_STEPS, MAX_STEPS = 300, 20_000
MAX_SIZES = 1000  # images whose sizes are looked up, evenly from the first to the last

_log = logging.getLogger(__name__)
_told: set[str] = set()  # each once in a process, which may load a configuration several times


@dataclass(frozen=True)
class _Images:
    """Of the training split: how many have a label, and the median height and width."""

    num_labelled: int
    height: int
    width: int


# in the place of images that are not there yet: what is checked before they are must hold for any
_SOME = _Images(1000, 240, 320)


def _crop_px(config: Config, images: _Images) -> int:
    cells = min(images.height, images.width) // CELL_PX
    return min(max(cells * CELL_PX, MIN_CROP_PX), MAX_CROP_PX)


def _batch_size(config: Config, images: _Images) -> int:
    # not fewer where there are fewer images, which then come twice, in other crops: batch
    # normalisation wants several
    return BATCH_SIZE if config.data.crop_px <= LARGE_CROP_PX else LARGE_CROP_BATCH_SIZE


def _steps(config: Config, images: _Images) -> int:
    # to hundreds, which are easier to read in a log
    steps = round(EPOCHS * images.num_labelled / max(1, config.batch_size), -2)
    return int(min(max(steps, MIN_STEPS), MAX_STEPS))


# in this order, as the later ones go by the earlier ones, or by what was said in their place
RULES: dict[str, Callable[[Config, _Images], int]] = {
    "data.crop_px": _crop_px,
    "batch_size": _batch_size,
    "steps": _steps,
    "schedule.warmup_steps": lambda config, images: min(50, config.steps // 10),
    "evaluate.every_steps": lambda config, images: max(1, config.steps // 5),
    "checkpoint.every_steps": lambda config, images: max(1, config.steps // 10),
}


def waiting(values: Mapping[str, Any], given: Iterable[str]) -> list[str]:
    """The keys of a preset that wait for the data, in the order in which they are found.

    given: keys that are overridden.
    """
    asked = {key for key, value in values.items() if value == FROM_DATA} - set(given)
    return [key for key in RULES if key in asked]


def are_there(locations: Sequence[str]) -> bool:
    """Whether something is at each place of shards; of a URL it is taken for granted."""
    return bool(locations) and all("://" in one or Path(one).exists() for one in locations)


def fill(config: Config, keys: Iterable[str]) -> dict[str, int]:
    """Values of these keys for the shards that the configuration names, in which they are set.

    Raises InputError where it names none, or what is there are no shards with the split that is
    trained on. The values and what they are from are told in one line.
    """
    images = _look(config)
    found = _filled(config, keys, images)
    values = " ".join(f"{key}={value}" for key, value in found.items())
    what = f"{counted(images.num_labelled, 'labelled image')} of median"
    text = f"note: {values} (from {what} {images.height}x{images.width} px, height x width)"
    if text not in _told:
        _told.add(text)
        _log.warning(text)
    return found


def fill_without(config: Config, keys: Iterable[str]) -> dict[str, int]:
    """As `fill`, for images that are not there: numbers to check the rest with, and to tell
    nobody.
    """
    return _filled(config, keys, _SOME)


def _filled(config: Config, keys: Iterable[str], images: _Images) -> dict[str, int]:
    found = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        found[key] = RULES[key](config, images)
        setattr(getattr(config, section) if section else config, name, found[key])
    return found


def _look(config: Config) -> _Images:
    # here, as numpy and what reads shards are more than --help should wait for
    import numpy as np

    from shards.reader import ShardReader

    options = config.data
    if not options.shards:
        got = f"preset={config.preset} without data.shards"
        action = "write data.shards=DIR, which `distseg pack` wrote (docs/your_data.md)"
        raise InputError(got, "your shards, which sizes and steps are taken from", action)
    sizes, num_with_label = [], 0
    for shards in options.shards:
        reader = ShardReader(
            shards,
            options.train_split,
            cache_dir=options.cache_dir,
            cache_bytes=options.cache_bytes,
        )
        count = len(reader)
        if not count:
            got, needed = f"no sample in {options.train_split} of {shards}", "one at least"
            raise InputError(got, needed, "pack the data again, with images to train on")
        some = np.linspace(0, count - 1, min(count, MAX_SIZES)).astype(int).tolist()
        sizes += [reader.size(index) for index in some]
        num_with_label += count - len(reader.unlabelled)
    height, width = np.median(sizes, axis=0).astype(int).tolist()
    # of all sets together: one file lists the keys of all
    return _Images(_num_labelled(num_with_label, options.labelled), height, width)


def _num_labelled(count: int, labelled: str) -> int:
    """How many of so many labels `data.labelled` keeps; one that is wrong is told with the data."""
    if labelled == "all":
        return count
    if is_file(Path(labelled)):
        return len(read_text(Path(labelled)).split())
    try:
        return int(Fraction(labelled) * count)
    except (ValueError, ZeroDivisionError):
        return count
