"""Numbers of things in messages."""

from __future__ import annotations

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
