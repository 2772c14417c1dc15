"""Numbers of things in messages, the nearest to a wrong word, and the commands that come next."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

IS, WAS = ("is", "are"), ("was", "were")


def counted(number: int, noun: str, plural: str = "", verb: tuple[str, str] | None = None) -> str:
    """A number with its noun: "1 image", "2 images", and with its verb: "1 image is", "2 images
    are".

    plural: where it is not the noun with an s. verb: for one and for more, IS or WAS.
    """
    words = [str(number), noun if number == 1 else plural or noun + "s"]
    if verb is not None:
        words.append(verb[number != 1])
    return " ".join(words)


def nearest(word: str, choices: Iterable[str], likeness: float = 0.3) -> str:
    """What to do about a word that is none of the choices: take the `closest`, or any of them."""
    choices = list(choices)
    found = closest(word, choices, likeness)
    return f"did you mean {found}?" if found else f"choose one of: {', '.join(choices)}"


def closest(word: str, choices: Iterable[str], likeness: float = 0.3) -> str | None:
    """The most similar of the choices; None where none is similar.

    Of dotted names those with the same last part come first. likeness: what it has at least, from 0
    to 1.
    """
    choices = list(choices)
    last = word.rpartition(".")[2]
    # mostly a key in a wrong section, or without one; likeness alone would miss it
    same_last = [choice for choice in choices if choice.rpartition(".")[2] == last]
    # letters alone: Road is as near to road as it can be
    plain = {choice.casefold(): choice for choice in reversed(choices)}
    similar = difflib.get_close_matches(word.casefold(), plain, n=1, cutoff=likeness)
    # a word cut short is far from the whole one, by its letters
    begun = [choice for choice in choices if word and choice.casefold().startswith(word.casefold())]
    found = same_last or begun or [plain[choice] for choice in similar]
    return found[0] if found else None


def same_name(name: str, names: Collection[str]) -> str | None:
    """The name itself, or the only one that differs in case, space and punctuation alone."""
    if name in names:
        return name
    alike = [other for other in names if _folded(other) == _folded(name)]
    return alike[0] if len(alike) == 1 and _folded(name) else None


def _folded(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def making(raw: Path | None, out: Path, data_set: str = "NAME --root DIR") -> str:
    """The commands that make packed shards in `out`, or only those of them that are left to call.

    raw: a folder of images and masks of the user's own; None: of the `data_set`, as it is named to
    `distseg prepare`.
    """
    # "." and ".." have no name of their own
    out = out if out.name.strip(".") else out.resolve()
    maps = out.with_name(f"{out.name}.h5")
    pack = f"`{_command('pack', maps, '--out', out)}`"
    if maps.is_file():
        return pack
    words = f"folder {shlex.join(['--root', str(raw)])}" if raw else data_set
    return f"`distseg prepare {words} {shlex.join(['--out', str(maps)])}`, then {pack}"


def _command(*words: str | Path) -> str:
    return f"distseg {shlex.join(map(str, words))}"


def place_for_shards(raw: Path) -> Path:
    """Where shards of a raw folder go by default: never among its own files."""
    out = Path("data", raw.resolve().name)
    return out if out.resolve() != raw.resolve() else out.with_name(f"{out.name}-shards")


def train_command(shards: Path, splits: Collection[str]) -> str:
    """How to train on packed shards; "" where one split is all there is."""
    if len(splits) < 2:
        return ""
    run = Path("runs", shards.resolve().name)
    # another run's, of the quickstart for example, would refuse these settings
    run = run.with_name(f"{run.name}-own") if run.exists() else run
    words = ["preset=own", f"data.shards={shards}", f"run_dir={run}"]
    # by other names the splits are not found, and which is which is the user's to say
    named = {"train", "val"} <= {*splits}
    other = "" if named else " data.train_split=NAME data.val_split=NAME"
    return f"distseg train {shlex.join(words)}{other}"
