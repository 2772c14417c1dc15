"""Presets, command-line overrides, files, and every check of a configuration that needs no data."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distseg.config import code
from distseg.config.schema import BOUNDS, CHOICES, Config
from shards import user_code
from shards.errors import InputError
from shards.remote import check_url

CONFIG_FILE = "config.yaml"  # in a run directory
PRESETS = Path(__file__).parent.parent / "presets"
OPTIONS = ("segmentor.options.", "discriminator.options.", "data.view_options.")

ADVERSARIAL_WEIGHTS = ("loss.adv_weight", "semi.adv_weight", "semi.weight")

# These may change when a run is resumed: they alter neither the networks nor the order of samples.
FREE_ON_RESUME = frozenset(
    {
        "run_dir",
        "device",
        "data.shards",
        "data.allow_unverified",
        "data.cache_dir",
        "data.cache_bytes",
    }
    | {"data.num_threads", "data.worker_type", "data.keep_decoded_bytes", "max_skips"}
    | {"evaluate", "checkpoint", "tracking", "parallel"}
    | {"code", "allow_changed_code"}  # code.check_unchanged looks at both
)


def preset_names() -> list[str]:
    """Names that `preset=` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(overrides: list[str]) -> Config:
    """Defaults, then the preset, then `key=value` overrides; checked, so that what comes back can
    be run.

    Raises InputError for an unknown preset or key (naming the nearest), a value of the wrong type
    or outside its choices or bounds.
    """
    pairs = [_split(item) for item in overrides]
    presets = [value for key, value in pairs if key == "preset"]
    merged = OmegaConf.structured(Config)
    if presets:
        merged = _merge(merged, _preset_values(presets[-1]))
    return _override(merged, pairs)


def override(config: Config, overrides: list[str]) -> Config:
    """A configuration with `key=value` overrides on top. Raises InputError as `load` does."""
    return _override(OmegaConf.structured(config), [_split(item) for item in overrides])


def _override(merged: Any, pairs: list[tuple[str, str]]) -> Config:
    for key, value in pairs:
        key = _full_key(key)
        if key in ("segmentor.name", "discriminator.name") and value != OmegaConf.select(
            merged, key
        ):
            # they were the other's
            OmegaConf.update(merged, key.replace(".name", ".options"), {}, merge=False)
            if key == "segmentor.name" and user_code.is_reference(value):
                merged.segmentor.init = "random"  # as its constructor makes it
        if key == "code":
            raise InputError("code=... as a setting", "none: training fills it in", "leave it out")
        merged = _merge(merged, {key: _parse(key, value)})
    try:
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # an interpolation of nothing, or a missing value
        action = "write the value itself"
        raise InputError(
            f"a value that cannot be resolved: {_first_line(error)}", "plain values", action
        ) from None
    if config.mode == "supervised":
        weighted = [
            f"{key}={value}"
            for key, value in dict(pairs).items()  # the last of a key counts
            if key in ADVERSARIAL_WEIGHTS and value not in ("0", "0.0")
        ]
        if weighted:
            action = "write mode=adversarial (or semi_supervised), or leave it out"
            raise InputError(
                f"{weighted[0]} with mode=supervised", "an adversary for its weight", action
            )
    config.run_dir = config.run_dir or f"runs/{config.preset or 'run'}"
    # wherever the run is evaluated or goes on, the files are found again
    config.segmentor.name = user_code.absolute(config.segmentor.name)
    config.discriminator.name = user_code.absolute(config.discriminator.name)
    config.data.view = user_code.absolute(config.data.view)
    _check(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the classes above."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def from_file(path: Path) -> Config:
    """The configuration that a run saved. Raises InputError when it is not one of this version."""
    if not path.is_file():
        raise InputError(
            f"no {path}",
            "a run directory of distseg (with config.yaml)",
            "check the path of the run",
        )
    try:
        return OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        )  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        got = f"{path}: {_first_line(error)}"
        raise InputError(
            got, "a configuration of this version", "restore it, or start a new run"
        ) from None


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two configurations and must not when a run is
    resumed.
    """
    before, after = flattened(to_dict(old)), flattened(to_dict(new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    keys = [key for key in keys if not _is_free(key) and not code.is_moved(key, old, new)]
    return {key: (before.get(key), after.get(key)) for key in keys}


def check_same(run_dir: Path, config: Config) -> None:
    """Raise InputError when `run_dir` holds a run of another configuration or other code."""
    saved = run_dir / CONFIG_FILE
    if not saved.exists():
        return
    before = from_file(saved)
    code.check_unchanged(before, config)
    changed = differences(before, config)
    if changed:
        values = ", ".join(
            f"{key}: {before!r} there, {now!r} now" for key, (before, now) in changed.items()
        )
        raise InputError(
            f"{run_dir} holds a run of another configuration ({values})",
            "the same configuration to resume it, or another directory",
            f"write run_dir=DIR to start a new run, or remove {run_dir}",
        )


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)


def _split(item: str) -> tuple[str, str]:
    key, separator, value = item.partition("=")
    if not separator or not key:
        raise InputError(
            f"argument {item!r}", "key=value", "write for example steps=500 or loss.adv_weight=0.01"
        )
    return key, value


def _parse(key: str, value: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index, call-overload]
    except YAMLError:
        raise InputError(f"{key}={value}", "a YAML value", f"correct {key}") from None


def _preset_values(name: str) -> dict[str, Any]:
    path = PRESETS / f"{name}.yaml"
    if name not in preset_names():
        raise InputError(
            f"preset={name}", f"one of: {', '.join(preset_names())}", _nearest(name, preset_names())
        )
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    base = values.pop("base", None)  # another preset, which this one changes
    own, inherited = flattened(values), _preset_values(base) if base else {}
    named = tuple(
        f"{part}.options." for part in ("segmentor", "discriminator") if f"{part}.name" in own
    )
    return {key: value for key, value in inherited.items() if not key.startswith(named)} | own


def _full_key(key: str) -> str:
    """`segmentor=NAME` is short for `segmentor.name=NAME`, for every part that has a name."""
    return f"{key}.name" if f"{key}.name" in _known() else key


@cache  # a structure takes long to make, and every override asks
def _known() -> tuple[str, ...]:
    """All keys."""
    return tuple(flattened(to_dict(Config())))


def _merge(config: Any, values: dict[str, Any]) -> Any:
    known = _known()
    for key, value in values.items():
        if not key.startswith(OPTIONS) and key not in known:
            raise InputError(
                f"unknown key {key!r}", "a key of the configuration", _nearest(key, known)
            )
        try:
            OmegaConf.update(config, key, value, merge=True)
        except (OmegaConfBaseException, ValueError) as error:
            needed = OmegaConf.select(OmegaConf.structured(Config), key)
            kind = "a value of the field's type" if needed is None else f"a value like {needed!r}"
            raise InputError(
                f"{key}={value}: {_first_line(error)}", kind, f"correct {key}"
            ) from None
    return config


def _check(config: Config) -> None:
    values = flattened(to_dict(config))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise InputError(
                f"{key}={values[key]}",
                f"one of: {', '.join(choices)}",
                _nearest(values[key], choices),
            )
    for key, (low, high) in BOUNDS.items():
        value = values[key]
        # written so that NaN fails too; None is a default to be filled in
        if value is not None and not (
            (low is None or value >= low)
            and (high is None or value <= high)
            and value < float("inf")
        ):
            needed = (
                f"a number from {low} to {high}"
                if high is not None
                else f"a finite number from {low} on"
            )
            raise InputError(f"{key}={value}", needed, f"correct {key}")
    if config.data.scale_min > config.data.scale_max:
        got = f"data.scale_min={config.data.scale_min} above data.scale_max={config.data.scale_max}"
        raise InputError(got, "scale_min <= scale_max", "swap them")
    if config.data.sampling != "each_once" and config.data.shuffle_block:
        got = f"data.sampling={config.data.sampling} with data.shuffle_block={config.data.shuffle_block}"
        raise InputError(
            got, "one of them: classes are drawn from all shards", "write data.shuffle_block=0"
        )
    if config.discriminator_optimizer.encoder_lr_factor != 1:
        got = f"discriminator_optimizer.encoder_lr_factor={config.discriminator_optimizer.encoder_lr_factor}"
        raise InputError(
            got, "1: a discriminator has no encoder", "set discriminator_optimizer.lr alone"
        )
    if not config.evaluate.scales or not all(0.1 <= scale <= 8 for scale in config.evaluate.scales):
        got = f"evaluate.scales={config.evaluate.scales}"
        needed = "at least one scale, each from 0.1 to 8"
        raise InputError(got, needed, "write for example evaluate.scales=[0.75,1,1.25]")
    window_px, overlap_px = config.evaluate.window_px, config.evaluate.overlap_px
    if window_px and (window_px % 32 or overlap_px % 32 or 2 * overlap_px > window_px):
        got = f"evaluate.window_px={window_px} with evaluate.overlap_px={overlap_px}"
        needed = "multiples of 32, the overlap at most half the window"
        raise InputError(
            got, needed, "write for example evaluate.window_px=512 evaluate.overlap_px=128"
        )
    if config.segmentor.batch_norm == "frozen" and config.segmentor.init == "random":
        action = "write segmentor.batch_norm=per_rank, or segmentor.init=FILE"
        got = "segmentor.batch_norm=frozen with segmentor.init=random"
        raise InputError(
            got, "stored statistics; those of random weights let deep networks explode", action
        )
    for part in ("segmentor_optimizer", "discriminator_optimizer"):
        if values[f"{part}.nesterov"] and not (
            values[f"{part}.name"] == "sgd" and values[f"{part}.beta1"] > 0
        ):
            needed = f"{part}.name=sgd with a momentum ({part}.beta1) above 0"
            raise InputError(f"{part}.nesterov=true", needed, f"correct {part}")
    if config.schedule.name == "plateau" or config.schedule.early_stop_patience:
        needed = (
            "evaluations: schedule.name=plateau and schedule.early_stop_patience go by their loss"
        )
        if not config.evaluate.every_steps:
            raise InputError(
                "evaluate.every_steps=0", needed, "write for example evaluate.every_steps=100"
            )
    if config.parallel.shard_size and config.parallel.strategy != "fsdp":
        got = f"parallel.shard_size={config.parallel.shard_size} with parallel.strategy={config.parallel.strategy}"
        raise InputError(
            got, "networks in slices", "write parallel.strategy=fsdp, or parallel.shard_size=0"
        )
    if (
        config.mode == "semi_supervised"
        and not config.loss.adv_weight + config.semi.adv_weight + config.semi.weight
    ):
        got = "mode=semi_supervised with loss.adv_weight, semi.adv_weight and semi.weight all 0"
        raise InputError(got, "a term on unlabelled images", "write mode=supervised, or a weight")
    if config.data.view and not user_code.is_reference(config.data.view):
        raise InputError(f"data.view={config.data.view}", user_code.FORMS, "correct data.view")
    if config.data.view_options and not config.data.view:
        got = f"data.view_options.{next(iter(config.data.view_options))} without data.view"
        raise InputError(got, "a view that takes it", "write data.view=FILE.py:NAME")
    if not config.data.shards:
        action = "write data.shards=DIR (`distseg prepare` and `distseg pack` make one)"
        raise InputError("no data.shards", "a directory of packed shards", action)
    if "://" in config.data.shards:
        check_url(config.data.shards)


def _nearest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    names = difflib.get_close_matches(word, choices, n=1, cutoff=0.3)
    last = word.rsplit(".", 1)[-1]
    same_field = [choice for choice in choices if choice.rsplit(".", 1)[-1] == last]
    nearest = same_field[:1] or names
    return f"did you mean {nearest[0]}?" if nearest else f"choose one of: {', '.join(choices)}"


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keyed by dotted names; empty dictionaries are kept as values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
