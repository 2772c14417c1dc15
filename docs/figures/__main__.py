"""Draw the figures again: all, or those named."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import matplotlib as mpl

from docs.figures.style import FOLDER, SETTINGS, png, svg
from shards.files import published

FIGURES = {
    **dict.fromkeys(("data_flow", "step", "rooms", "job", "label_maps", "curves"), ".svg"),
    "palette": ".svg",
    "adversary": ".png",
    "unlabelled": ".png",
}


def drawn(name: str) -> bytes:
    """The file that a module of this folder draws."""
    write = svg if FIGURES[name] == ".svg" else png
    with mpl.rc_context(SETTINGS):
        return write(importlib.import_module(f"docs.figures.{name}").draw())


def committed(name: str) -> Path:
    """Where the file lies that the pages show."""
    return FOLDER / f"{name}{FIGURES[name]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], metavar="NAME")
    for name in parser.parse_args().names or FIGURES:
        with published(committed(name)) as partial:
            partial.write_bytes(drawn(name))
        print(committed(name))


if __name__ == "__main__":
    main()
