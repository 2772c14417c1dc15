"""Which code of the user's own a run is made of, and whether it is still what it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distseg.config.schema import WITH_DISCRIMINATOR, Config
from shards import user_code
from shards.errors import InputError
from shards.neighbours import neighbours


def references(config: Config) -> dict[str, str]:
    """Part of the configuration -> the reference to code that it holds (see shards.user_code)."""
    named = {"segmentor": config.segmentor.name, "data.view": config.data.view}
    # without an adversary the key stays as it is, and its code is never imported
    if config.mode in WITH_DISCRIMINATOR:
        named["discriminator"] = config.discriminator.name
    for name, term in config.loss.terms.items():
        named[f"loss.terms.{name}.use"] = term.use
    return {part: text for part, text in named.items() if user_code.is_reference(text)}


def recorded(config: Config) -> Config:
    """The configuration with the sha256 of each file of the user's own, which are imported.

    Files beside it that it imports are recorded as PART:FILE. Raises InputError as user_code.load
    does, and for a file in the run's own directory.
    """
    run_dir, code = Path(config.run_dir).resolve(), {}
    for part, reference in references(config).items():
        loaded = user_code.load(reference, part)
        if loaded.path.resolve().is_relative_to(run_dir):
            got = f"{part}={reference}: {loaded.path} lies in run_dir={config.run_dir}"
            raise InputError(got, "code outside of run directories", "move the file elsewhere")
        code[part] = loaded.sha256
        code |= {f"{part}:{name}": sha256 for name, sha256 in neighbours(loaded).items()}
    return replace(config, code=code)


def changed(before: Config, now: Config) -> list[str]:
    """Parts whose file is no more what it was when `before` was recorded."""
    # parts that are new have no hash from before to be compared with
    return [part for part, sha256 in before.code.items() if now.code.get(part, sha256) != sha256]


def check_unchanged(before: Config, now: Config) -> None:
    """Raise InputError when a run would go on with other code, unless `now` allows that."""
    parts = changed(before, now)
    # an edit of a comment changes the hash too, so there is a way to go on
    if not parts or now.allow_changed_code:
        return
    names = ", ".join(_named(part, now) for part in parts)
    got = f"{names}: the file has changed since the run in {now.run_dir} started"
    action = "restore it, write run_dir=DIR to start a new run, or allow_changed_code=true"
    raise InputError(got, "the same code to resume a run", action)


def _named(part: str, config: Config) -> str:
    """A part with its reference, and with the file that it imports where that is meant."""
    part, _, file = part.partition(":")
    said = f"{part}={references(config)[part]}"
    return f"{said} imports {file}" if file else said


def is_moved(key: str, before: Config, now: Config) -> bool:
    """Whether a key names code that is the same but for the folder its file lies in."""
    part = key.removesuffix(".name")
    was, is_ = references(before).get(part), references(now).get(part)
    # only the folder may be another: with another name in the file it is other code
    if was is None or is_ is None or user_code.short(was) != user_code.short(is_):
        return False
    # by the hash: a folder moved to another machine has other paths and the same bytes
    return part in before.code and before.code[part] == now.code.get(part)
