"""Numbers of things in messages, and the commands that come next."""

from __future__ import annotations

import shlex
from collections.abc import Collection
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


def train_command(shards: Path, splits: Collection[str]) -> str:
    """How to train on packed shards; "" where one split is all there is."""
    if len(splits) < 2:
        return ""
    words = ["preset=own", f"data.shards={shards}", f"run_dir=runs/{shards.resolve().name}"]
    # by other names the splits are not found, and which is which is the user's to say
    named = {"train", "val"} <= {*splits}
    other = "" if named else " data.train_split=NAME data.val_split=NAME"
    return f"distseg train {shlex.join(words)}{other}"
