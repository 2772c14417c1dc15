"""Where values come from: a preset, files, the command line; later ones count."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distseg.config.names import KEYS, OLD_NAMES, SECTIONS, flattened, full_name, with_full_names
from shards.errors import InputError
from shards.storage import is_file, read_text
from shards.words import nearest

CONFIG_FILE = "config.yaml"  # in a run directory
PRESETS = Path(__file__).parent.parent / "presets"
COMMAND_LINE = "command line"
_BASE_60 = re.compile(r"[0-9]+(:[0-9]+)+")
SUFFIXES = (".yaml", ".yml")
# Networks: with another name the options of the former one are dropped.
NETWORKS = tuple(name for name in SECTIONS if f"{name}.name" in KEYS and f"{name}.options" in KEYS)
_CHECKPOINTS = "checkpoints"  # the folder by which a run directory is known

_log = logging.getLogger(__name__)
_noted: set[str] = set()  # old names that a note was printed for


@dataclass(frozen=True)
class Layer:
    """Values by dotted names, and where they are from: "preset NAME", a file's path, COMMAND_LINE.

    In their order, as the options of a network go with the name before them.
    """

    origin: str
    values: list[tuple[str, Any]]


def layers(words: list[str]) -> list[Layer]:
    """The preset, files and the command line that the words of a command name, the last on top.

    The command line is always the last. Raises InputError for words that are neither key=value nor
    a file, for a file that cannot be read, an unknown preset, and two different ones.
    """
    files = [word for word in words if _is_file(word)]
    command_line = Layer(COMMAND_LINE, [split(word) for word in words if word not in files])
    named = dict(command_line.values)
    read = [
        Layer(path, list(_file_values(Path(path), "run_dir" in named).items())) for path in files
    ]
    presets = {}
    for layer in (*read, command_line):
        name = dict(layer.values).get("preset")
        if name is not None:
            presets[layer.origin] = name
    if len(set(presets.values())) > 1:
        got = ", ".join(f"preset={name} ({place})" for place, name in presets.items())
        action = "leave it out on the command line, or in the file"
        raise InputError(got, "one preset, which the file stands on", action)
    below = [
        Layer(f"preset {name}", list(_preset_values(str(name)).items()))
        for name in dict.fromkeys(presets.values())
    ]
    return [*below, *read, command_line]


def preset_names() -> list[str]:
    """Names that `preset=` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def names_network(key: str) -> bool:
    """Whether a key is the name of a network that has options."""
    return key.removesuffix(".name") in NETWORKS


def split(word: str) -> tuple[str, Any]:
    """A word of the command line as its key's full name and its value, read as YAML.

    Raises InputError for another word, with what it may have been meant for.
    """
    # at the first "=": a value may hold more of them
    name, separator, value = word.partition("=")
    if not separator or not name:
        raise InputError(f"argument {word!r}", "key=value, or a FILE.yaml of such", _meant(word))
    if name in OLD_NAMES and name not in _noted:
        _noted.add(name)
        _log.warning("note: %s is now called %s", name, OLD_NAMES[name])
    return full_name(name), _parse(full_name(name), value)


def _parse(key: str, value: str) -> Any:
    # which YAML takes for hours and minutes, a number to the base of 60
    if _BASE_60.fullmatch(value):
        return value
    try:
        # by OmegaConf's own rules for a command line: 1e-3 is a number, null is None
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except YAMLError:
        raise InputError(f"{key}={value}", "a YAML value", f"correct {key}") from None
    return parsed["value"]


def _meant(word: str) -> str:
    """What to write instead of a word that is no key=value."""
    if word in preset_names():
        return f"write preset={word}"
    if is_file(Path(word) / CONFIG_FILE):
        return f"write {Path(word) / CONFIG_FILE} to go on with that run"
    # shards mostly; what is no shards is told where they are opened
    if Path(word).is_dir():
        return f"write data.shards={word}"
    if full_name(word) in KEYS:
        return f"write {word}=VALUE; `--help {word}` explains it"
    return "write for example steps=500 or loss.adv_weight=0.01"


def _is_file(word: str) -> bool:
    # a folder may have "=" in its name, as runs of sweeps do, and a value may end in .yaml
    return word.endswith(SUFFIXES) and ("=" not in word or is_file(Path(word)))


def _file_values(path: Path, has_place: bool) -> dict[str, Any]:
    """A file's values by dotted names; old names of keys are understood.

    has_place: whether the command line says where the run is written.
    """
    if not is_file(path):
        needed = "a YAML file of keys, as RUN/config.yaml or `distseg train --dry-run` have them"
        raise InputError(f"no {path}", needed, "check the path, or write key=value")
    try:
        read: Any = OmegaConf.to_container(OmegaConf.create(read_text(path)))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}", "YAML", "correct it") from None
    if not isinstance(read, dict):
        raise InputError(f"{path}: a list", "keys with values, as `steps: 500`", "correct it")
    names = flattened(with_full_names(read))
    values = {full_name(str(name)): value for name, value in names.items()}
    # filled in by the training that wrote the file, and again by this one
    values = {name: value for name, value in values.items() if name.partition(".")[0] != "code"}
    if not has_place:
        _check_place(path, values.get("run_dir"))
    return values


def _check_place(path: Path, run_dir: str | None) -> None:
    """Raise InputError for the file of a run that is not where the file says that it is."""
    if not run_dir or path.name != CONFIG_FILE or not (path.parent / _CHECKPOINTS).is_dir():
        return
    # else a run that was moved or copied would begin anew in its former place, or go on in another
    if Path(run_dir).resolve() != path.parent.resolve():
        got = f"{path}, whose run_dir={run_dir} is another folder from here"
        action = f"write run_dir={path.parent} to go on with it, or run_dir=NEW for another like it"
        raise InputError(got, "the folder of the run", action)


def _preset_values(name: str) -> dict[str, Any]:
    """A preset's values by dotted names, on top of those of the preset that it is based on."""
    if name not in preset_names():
        needed = f"one of: {', '.join(preset_names())}"
        raise InputError(f"preset={name}", needed, nearest(name, preset_names()))
    values: Any = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{name}.yaml"))
    base = values.pop("base", None)  # another preset, which this one changes
    own, inherited = flattened(values), _preset_values(base) if base else {}
    # an inherited network's options go with it
    options = tuple(f"{network}.options." for network in NETWORKS if f"{network}.name" in own)
    return {key: value for key, value in inherited.items() if not key.startswith(options)} | own
