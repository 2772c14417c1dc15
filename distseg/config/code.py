"""Which code of the user's own a run is made of, and whether it is still what it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distseg.config.schema import Config
from shards import user_code
from shards.errors import InputError


def references(config: Config) -> dict[str, str]:
    """Part of the configuration -> the reference to code that it holds (see shards.user_code)."""
    named = {"segmentor": config.segmentor.name, "data.view": config.data.view}
    if config.mode != "supervised":
        named["discriminator"] = config.discriminator.name
    for name, term in config.loss.terms.items():
        named[f"loss.terms.{name}.use"] = term.use
    return {part: text for part, text in named.items() if user_code.is_reference(text)}


def recorded(config: Config) -> Config:
    """The configuration with the sha256 of each file of the user's own, which are imported.

    Raises InputError as user_code.load does, and for a file in the run's own directory.
    """
    run_dir, code = Path(config.run_dir).resolve(), {}
    for part, reference in references(config).items():
        loaded = user_code.load(reference, part)
        if loaded.path.resolve().is_relative_to(run_dir):
            got = f"{part}={reference}: {loaded.path} lies in run_dir={config.run_dir}"
            raise InputError(got, "code outside of run directories", "move the file elsewhere")
        code[part] = loaded.sha256
    return replace(config, code=code)


def changed(before: Config, now: Config) -> list[str]:
    """Parts whose file is no more what it was when `before` was recorded."""
    return [part for part, sha256 in before.code.items() if now.code.get(part, sha256) != sha256]


def check_unchanged(before: Config, now: Config) -> None:
    """Raise InputError when a run would go on with other code, unless `now` allows that."""
    parts = changed(before, now)
    if not parts or now.allow_changed_code:
        return
    names = ", ".join(f"{part}={references(now)[part]}" for part in parts)
    got = f"{names}: the file has changed since the run in {now.run_dir} started"
    action = "restore it, write run_dir=DIR to start a new run, or allow_changed_code=true"
    raise InputError(got, "the same code to resume a run", action)


def is_moved(key: str, before: Config, now: Config) -> bool:
    """Whether a key names code that is the same but for the folder its file lies in."""
    part = key.removesuffix(".name")
    was, is_ = references(before).get(part), references(now).get(part)
    if was is None or is_ is None or user_code.short(was) != user_code.short(is_):
        return False
    return part in before.code and before.code[part] == now.code.get(part)
