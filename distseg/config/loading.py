"""Configurations from presets, `key=value` overrides and files; which of them resume a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distseg.config import code, from_data
from distseg.config.keys import Key
from distseg.config.layers import CONFIG_FILE, layers, names_network, split
from distseg.config.names import (
    KEYS,
    abbreviated,
    find,
    flattened,
    with_full_names,
    with_lists,
    without_empty,
)
from distseg.config.rules import check
from distseg.config.rules.data import shards_to_train_on
from distseg.config.schema import Config, TermConfig
from distseg.config.world_size import has_teacher
from shards import user_code
from shards.errors import InputError
from shards.storage import is_file, read_text
from shards.words import nearest

TERMS = "loss.terms."
# of terms that only some modes have; a key's `modes` say which
WEIGHTS = (
    *("loss.adv_weight", "loss.feature_weight", "loss.mismatched_weight", "loss.r1_weight"),
    *("semi.adv_weight", "semi.weight", "semi.entropy_weight", "consistency.weight"),
    "adaptation.aux_adv_weight",
)


def load(overrides: list[str]) -> Config:
    """Defaults, then the preset, then files, then `key=value` overrides; what a preset leaves to
    the data is found in the shards.

    What comes back is checked, and can be run.
    A file is named by its path alone, FILE.yaml, among the overrides. Raises InputError for an
    unknown preset or key (naming the nearest), a value of the wrong type or outside its choices or
    bounds, and for a file that cannot be read.
    """
    config = _loaded(overrides, from_data.fill)
    shards_to_train_on(config)
    return config


def outline(overrides: list[str]) -> tuple[Config, list[str]]:
    """As `load`, where the data may be made later; with the keys that wait for them.

    Shards that are not named, or not there yet, are no error then. The values of those keys are
    numbers that only serve to check the rest; where there is data, no key waits.
    """
    waiting: list[str] = []

    def fill(config: Config, keys: Iterable[str]) -> dict[str, int]:
        if from_data.are_there(config.data.shards):
            return from_data.fill(config, keys)
        waiting.extend(keys)
        return from_data.fill_without(config, keys)

    return _loaded(overrides, fill), waiting


def _loaded(
    overrides: list[str], fill: Callable[[Config, Iterable[str]], dict[str, int]]
) -> Config:
    """fill: finds the values of the keys that are left to the data."""
    # typed: OmegaConf refuses values of another type from here on
    merged = OmegaConf.structured(Config)
    *below, command_line = layers(overrides)
    for layer in below:
        # left to the data, where a rule finds it there; else the word is a value like another
        left = {key for key, value in layer.values if value == from_data.FROM_DATA}
        known = [
            (key, value) for key, value in layer.values if key not in left & {*from_data.RULES}
        ]
        try:
            merged = _applied(merged, known)
        except InputError as error:
            # of a preset: it is ours, and has no wrong values
            raise InputError(f"{layer.origin}: {error.got}", error.needed, error.action) from None
    stated = {key: value for layer in below for key, value in layer.values}
    waiting = from_data.waiting(stated, [key for key, _ in command_line.values])
    if waiting:
        # all that is said names the shards, and what the other values go by
        config = _resolved(_applied(merged, command_line.values))
        merged = _merge(merged, fill(config, waiting))
    return _override(merged, command_line.values)


def origins(overrides: list[str], config: Config) -> dict[str, str]:
    """Where the value of each key of `load(overrides)` is from, by dotted names.

    The origin of a Layer, "default", or "from other keys" for what was filled in.
    """
    named: list[tuple[str, str]] = []
    for layer in layers(overrides):
        named += [(key, layer.origin) for key, _ in layer.values]
    found = {}
    for name, value in flattened(to_dict(config)).items():
        entry = find(name)
        is_default = entry is not None and entry.default == value
        found[name] = "default" if is_default else "from other keys"
        for key, origin in named:
            # of a dictionary's part, or of the dictionary as a whole
            if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}."):
                found[name] = origin
    return found


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Values from Python as `key=value` arguments: {"data": {"crop_px": 48}} -> data.crop_px=48.

    Values: strings, numbers (of NumPy too), booleans, None, paths, and lists of them. Raises
    InputError for others.
    """
    return [f"{key}={_as_text(key, value)}" for key, value in flattened(dict(values)).items()]


def _as_text(key: str, value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)

    def plain(other: Any) -> Any:
        if isinstance(other, Path):
            return str(other)
        # numbers and arrays of NumPy, and tensors, have it
        if hasattr(other, "tolist"):
            return other.tolist()
        got = f"{key}={other!r}, a {type(other).__name__}"
        raise InputError(
            got, "a string, a number, a bool, None, a path or a list", f"correct {key}"
        )

    # JSON is YAML too: lists, true and null are read back as they were
    return json.dumps(value, default=plain)


def words(overrides: Sequence[str]) -> list[str]:
    """A list of `key=value` from Python. Raises InputError for one string, which is none."""
    if isinstance(overrides, str):
        needed, action = "a list of key=value", f"write [{overrides!r}]"
        raise InputError(f"overrides {overrides!r}", needed, action)
    return list(overrides)


def override(config: Config, overrides: list[str]) -> Config:
    """The configuration of a run that has been trained, with `key=value` overrides on top. Raises
    InputError as `load` does, but for rules of training.
    """
    pairs = [split(item) for item in overrides]
    changed = _override(OmegaConf.structured(config), pairs, is_trained=True)
    shards_to_train_on(changed)
    return changed


def check_changes(run_dir: Path, overrides: list[str], allowed: Callable[[Key], bool]) -> None:
    """Raise InputError for overrides that a run cannot be scored or used with, as `refuse_others`
    and `override` do; all that can be known without torch.
    """
    refuse_others(overrides, allowed)
    override(from_file(run_dir / CONFIG_FILE), overrides)


def of_validation(overrides: list[str]) -> list[str]:
    """Overrides for a run that is scored: data.shards=DIR names what it is scored on. The data sets
    that it was trained on stay, with what the configuration says of them.
    """
    named = [item.partition("=") for item in overrides]
    return [
        f"data.val_shards={value}" if name == "data.shards" else f"{name}{separator}{value}"
        for name, separator, value in named
    ]


def refuse_others(overrides: list[str], allowed: Callable[[Key], bool]) -> None:
    """Raise InputError for an override of a key that may not differ from the run that was trained.

    allowed: says of a key whether it may. Unknown keys are left to `override`.
    """
    for item in overrides:
        found = find(split(item)[0])
        # one message for all commands; what is allowed is said beside each key in the schema
        if found is not None and not allowed(found):
            needed = f"one of: {', '.join(abbreviated(allowed))}"
            raise InputError(f"argument {item!r}", needed, "the rest is as the run was trained")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def runs_inside(folder: Path) -> str:
    """What to do about a folder that holds runs but is none: name one of them; "" without any."""
    runs = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_FILE}"))
    more = f" or another of its {len(runs)} runs" if len(runs) > 3 else ""
    return f"name a run in it: {', '.join(runs[:3])}{more}" if runs else ""


def from_file(path: Path) -> Config:
    """The configuration that a run saved; old names of keys are understood.

    Raises InputError when it is not one of this version.
    """
    # told apart from a damaged file: a wrong path is the usual mistake
    if not is_file(path):
        raise InputError(
            f"no {path}",
            "a run directory of distseg (with config.yaml)",
            runs_inside(path.parent) or "check the path of the run",
        )
    return _read(lambda: read_text(path), path)


def from_bytes(content: bytes, place: str) -> Config:
    """As `from_file`, of a file's content; place: where it lies, for messages."""
    return _read(content.decode, place)


def _read(text: Callable[[], str], place: Path | str) -> Config:
    try:
        # first as plain values, in which old names can be replaced
        saved: Any = OmegaConf.to_container(OmegaConf.create(text()))
        if not isinstance(saved, dict):
            raise ValueError("not a mapping")
        # keys that are newer than the file get their defaults
        known = with_lists(with_full_names(saved))
        merged = OmegaConf.merge(OmegaConf.structured(Config), known)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        got = f"{place}: {_first_line(error)}"
        raise InputError(
            got, "a configuration of this version", "restore it, or start a new run"
        ) from None


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two configurations and must not when a run is
    resumed.
    """
    before, after = (without_empty(flattened(to_dict(config))) for config in (old, new))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    # defaults of what neither has may change from version to version
    if not (has_teacher(old) or has_teacher(new)):
        names = [name for name in names if not name.startswith("consistency.")]
    names = [name for name in names if not _is_free(name) and not code.is_moved(name, old, new)]
    return {name: (before.get(name), after.get(name)) for name in names}


def check_same(run_dir: Path, config: Config) -> int | None:
    """Raise InputError when `run_dir` holds a run of another configuration or other code.

    Returns the steps that the run had until now where `extend` has made them more, else None.
    """
    saved = run_dir / CONFIG_FILE
    # a look that is answered wrongly would begin the run anew
    if not is_file(saved):
        return None
    way_out = f"write run_dir=DIR to start a new run, or remove {run_dir}"
    return check_goes_on(from_file(saved), config, str(run_dir), way_out)


def check_goes_on(before: Config, config: Config, place: str, way_out: str) -> int | None:
    """As `check_same`, for a configuration that was read already.

    place: where it stands; way_out: what to do where it is another run's.
    """
    code.check_unchanged(before, config)
    changed = differences(before, config)
    steps_before, steps = changed.get("steps", (config.steps, config.steps))
    if config.extend and steps > steps_before:
        del changed["steps"]
    if config.extend and steps < steps_before:
        got = f"extend=true with steps={steps}, and {place} is a run of {steps_before} steps"
        action = f"write a larger steps, or evaluate the checkpoint of step {steps}"
        raise InputError(got, f"more than {steps_before} steps", action)
    if changed:
        values = ", ".join(
            f"{key}: {before!r} there, {now!r} now" for key, (before, now) in changed.items()
        )
        action = way_out
        kept = {key: both for key, both in changed.items() if key != "steps"}
        if steps > steps_before and kept.keys() <= from_data.RULES.keys():
            action = _how_to_extend(kept, steps)
        raise InputError(
            f"{place} holds a run of another configuration ({values})",
            "the same configuration to resume it, or another directory",
            action,
        )
    return steps_before if steps > steps_before else None


def _how_to_extend(kept: Mapping[str, tuple[Any, Any]], steps: int) -> str:
    """What to do about a run that is to have more steps.

    kept: keys that preset=own takes from the steps, with the run's value and the one now.
    """
    words = ["extend=true", *(f"{key}={before}" for key, (before, _) in kept.items())]
    return f"write {' '.join(words)} to train on to step {steps}, or run_dir=DIR for a new run"


def _is_free(name: str) -> bool:
    found = find(name)
    return found is not None and found.on_resume


def _override(merged: Any, pairs: list[tuple[str, Any]], is_trained: bool = False) -> Config:
    # from here on a plain dataclass: the rest of the package knows nothing of OmegaConf
    config = _resolved(_applied(merged, pairs))
    # by what was written here: defaults and presets have weights for other modes too
    _refuse_weights(pairs, config.mode)
    # after all overrides, as the preset's name is in it
    config.run_dir = config.run_dir or f"runs/{config.preset or 'run'}"
    # before the check and the saving: config.yaml is read from other folders
    _make_references_absolute(config)
    check(config, flattened(to_dict(config)), is_trained)
    return config


def _applied(merged: Any, pairs: list[tuple[str, Any]]) -> Any:
    """What is merged so far, with the values of one layer on top."""
    for key, value in _behind_their_network(pairs):
        section = key.rpartition(".")[0]
        # options of one network mean nothing, or something else, to another
        if names_network(key) and value != OmegaConf.select(merged, key):
            OmegaConf.update(merged, f"{section}.options", {}, merge=False)
            if section == "segmentor" and user_code.is_reference(str(value)):
                merged.segmentor.init = "random"  # as its constructor makes it
        if key.partition(".")[0] == "code":
            raise InputError("code=... as a setting", "none: training fills it in", "leave it out")
        # one by one, so that an error names the argument that it is in
        merged = _merge(merged, {key: value})
    return merged


def _behind_their_network(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The overrides, with what is said of a network before it is first named moved behind that.

    It is of the network that is named. What is said after a name goes with it when another follows.
    """
    first: dict[str, int] = {}
    for place, (key, _) in enumerate(pairs):
        if names_network(key):
            first.setdefault(key.rpartition(".")[0], place)

    def order(place: int) -> tuple[int, int]:
        named = first.get(pairs[place][0].partition(".")[0], -1)
        return (named, 1) if place < named else (place, 0)

    return [pairs[place] for place in sorted(range(len(pairs)), key=order)]


def _make_references_absolute(config: Config) -> None:
    """So that files of the user's own are found again, wherever the run is evaluated or goes on."""
    config.segmentor.name = user_code.absolute(config.segmentor.name)
    config.discriminator.name = user_code.absolute(config.discriminator.name)
    config.data.view = user_code.absolute(config.data.view)
    for term in config.loss.terms.values():
        term.use = user_code.absolute(term.use)


def _resolved(merged: Any) -> Config:
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:  # an interpolation of nothing, or a missing value
        got = f"a value that cannot be resolved: {_first_line(error)}"
        raise InputError(got, "plain values", "write the value itself") from None


def _refuse_weights(pairs: list[tuple[str, Any]], mode: str) -> None:
    """Of terms that the mode has none of: they would be passed over in silence."""
    for key, value in dict(pairs).items():  # the last of a key counts
        entry = find(key) if key in WEIGHTS else None
        if value and entry is not None and mode not in entry.modes:
            action = f"write mode={' or '.join(entry.modes)}, or leave it out"
            raise InputError(f"{key}={value} with mode={mode}", "a mode with its term", action)


def _merge(config: Any, values: dict[str, Any]) -> Any:
    for key, value in values.items():
        # before OmegaConf, whose error does not name the nearest key
        if find(key) is None:
            action = nearest(key, KEYS)
            raise InputError(f"unknown key {key!r}", "a key of the configuration", action)
        if isinstance(value, str) and isinstance(OmegaConf.select(config, key), ListConfig):
            value = [value]  # a word for a list is a list of one
        try:
            if f"{key}.".startswith(TERMS):
                for term in _of_terms(key, value):
                    config = OmegaConf.merge(config, term)
            else:
                OmegaConf.update(config, key, value, merge=True)
        except InputError:
            raise
        except (OmegaConfBaseException, ValueError) as error:
            default = KEYS[key].default if key in KEYS else None
            kind = "a value of the field's type" if default is None else f"a value like {default!r}"
            got = f"{key}={value}: {_first_line(error)}"
            raise InputError(got, kind, f"correct {key}") from None
    return config


def _of_terms(key: str, value: Any) -> Iterator[dict[str, Any]]:
    """`loss.terms`, or a key in it, nested: OmegaConf makes no typed entry of a dotted name."""
    if f"{key}." != TERMS:
        yield _of_term(key, value)
        return
    if not isinstance(value, dict):
        action = "write for example loss.terms.dice=0.5"
        raise InputError(f"{key}={value}", "terms by their names", action)
    for name, term in value.items():
        yield _of_term(f"{TERMS}{name}", term)


def _of_term(key: str, value: Any) -> dict[str, Any]:
    name, _, rest = key.removeprefix(TERMS).partition(".")
    if not rest and isinstance(value, int | float):
        rest = "weight"  # the short form loss.terms.dice=0.5
    if not rest and not isinstance(value, dict):
        action = f"write for example {TERMS}{name}=0.5, or {TERMS}{name}.use={value or 'dice'}"
        raise InputError(f"{key}={value}", "the term's weight, a number", action)
    known = [field.name for field in fields(TermConfig)]
    for part in [rest.partition(".")[0]] if rest else value:
        if part not in known:
            action = nearest(str(part), known)
            raise InputError(
                f"unknown key {TERMS}{name}.{part}", f"one of: {', '.join(known)}", action
            )
    for part in reversed([part for part in rest.split(".") if part]):
        value = {part: value}
    return {"loss": {"terms": {name: value}}}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
