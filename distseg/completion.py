"""`distseg completion`: the script with which a shell completes commands, options, keys and values.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from distseg.config.keys import Key
from distseg.config.names import KEYS
from shards.command_line import Commands, Parser, add_command
from shards.errors import InputError

TEXT = """\
Print the script that lets a shell complete commands, options, files, keys and their values.

bash  distseg completion bash > ~/.local/share/bash-completion/completions/distseg
zsh   distseg completion zsh > DIR/_distseg, DIR a folder of $fpath, before compinit runs
fish  distseg completion fish > ~/.config/fish/completions/distseg.fish
For this terminal alone: source <(distseg completion bash). A folder that is not there: mkdir -p"""
SHELLS = ("bash", "zsh", "fish")

# Keys are told from values by "=", at which bash divides words, and zsh and fish do not.
BASH_KEYS = """\
%(name)s() {
  local key="" word="$1"
  if [[ "$word" == "=" ]]; then
    key="${COMP_WORDS[COMP_CWORD-1]}" word=""
  elif [[ "${COMP_WORDS[COMP_CWORD-1]}" == "=" ]]; then
    key="${COMP_WORDS[COMP_CWORD-2]}"
  fi
  case "$key" in
    "") compgen -W %(keys)s -- "$word" ;;
%(values)s
    *) compgen -f -- "$word" ;;
  esac
}"""
# no blank behind a key, whose value comes next
BASH_END = """
_distseg() {
  _shtab_distseg "$@"
  if [[ "${COMPREPLY[0]}" == *= ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _distseg distseg
"""
ZSH_KEYS = """\
%(name)s() {
  if [[ "$PREFIX" != *=* ]]; then
    compadd -S '' -- %(keys)s
    return
  fi
  local key="${PREFIX%%%%=*}"
  compset -P '*='
  case "$key" in
%(values)s
    *) _files ;;
  esac
}"""
FISH_KEYS = """\
function %(name)s
  switch (commandline -ct)
%(values)s
    case '*=*'
      set -l parts (string split -m 1 '=' -- (commandline -ct))
      for path in (__fish_complete_path $parts[2])
        echo $parts[1]=$path
      end
    case '*'
      printf '%%s\\n' %(keys)s
  end
end"""


def add_completion(commands: Commands) -> None:
    """Add `completion` to the commands."""
    parser = add_command(commands, "completion", "tab completion for bash, zsh and fish", TEXT)
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(handler=_completion)


def _completion(options: argparse.Namespace) -> int:
    print(script(options.root, options.shell))
    return 0


def script(parser: Parser, shell: str) -> str:
    """The completion script of a parser with subcommands for one of SHELLS."""
    try:
        import shtab
    except ImportError:
        needed = "the package shtab, which is installed with distseg"
        raise InputError("no tab completion", needed, "pip install 'shtab>=1.13'") from None
    for name, command in _commands(parser, "distseg"):
        for action in command._actions:
            found = _completed(name, action, shtab)
            if found:
                action.complete = found
    text = shtab.complete(parser, shell)
    return text + BASH_END if shell == "bash" else text


def _commands(parser: argparse.ArgumentParser, name: str) -> list[tuple[str, Any]]:
    """All parsers with the names that functions of a shell can have."""
    found = [(name, parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                found += _commands(command, f"{name}_{word}")
    return found


def _completed(name: str, action: argparse.Action, shtab: Any) -> dict[str, Any]:
    """What an argument is completed with; {} for nothing, or for its choices."""
    allowed = {
        "distseg_train": lambda key: True,
        "distseg_submit": lambda key: True,
        "distseg_evaluate": lambda key: key.at_evaluation,
        "distseg_predict": lambda key: key.at_prediction,
    }
    if action.dest == "overrides" and name in allowed:
        return _keys(f"_{name}_keys", [key for key in KEYS.values() if allowed[name](key)])
    if action.type is Path:
        is_folder = action.metavar in ("DIR", "RUN")
        return shtab.DIRECTORY if is_folder else shtab.FILE
    return {}


def _keys(name: str, keys: list[Key]) -> dict[str, Any]:
    """A function for each shell that completes key=value."""
    words = {key.name.removesuffix(".name"): _values(key) for key in keys}
    valued = {word: values for word, values in words.items() if values}
    listed = [f"{word}=" for word in words]
    bash = [f'    {word}) compgen -W {shlex.quote(" ".join(values))} -- "$word" ;;'
            for word, values in valued.items()]  # fmt: skip
    zsh = [f"    {word}) compadd -- {shlex.join(values)} ;;" for word, values in valued.items()]
    fish = []
    for word, values in valued.items():
        pairs = shlex.join(f"{word}={value}" for value in values)
        fish += [f"    case '{word}=*'", f"      printf '%s\\n' {pairs}"]

    def filled(text: str, joined: str, lines: list[str]) -> str:
        return text % {"name": name, "keys": joined, "values": "\n".join(lines)}

    preamble = {
        "bash": filled(BASH_KEYS, shlex.quote(" ".join(listed)), bash),
        "zsh": filled(ZSH_KEYS, shlex.join(listed), zsh),
        "fish": filled(FISH_KEYS, shlex.join(listed), fish),
    }
    return {"bash": name, "zsh": name, "fish": f"({name})", "preamble": preamble}


def _values(key: Key) -> list[str]:
    """The words that a key may have; [] where it has any."""
    if key.name == "preset":
        # by the files, without the YAML that reads them
        return sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.yaml"))
    return ["true", "false"] if key.type == "bool" else list(key.choices)
