"""Draw the figures again: all, or those named."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import matplotlib as mpl

from docs.figures.style import FOLDER, SETTINGS, svg
from shards.files import published

DRAWINGS = ("data_flow", "step", "rooms", "job")  # as SVG


def drawn(name: str) -> str:
    """The SVG that a module of this folder draws."""
    with mpl.rc_context(SETTINGS):
        return svg(importlib.import_module(f"docs.figures.{name}").draw())


def committed(name: str) -> Path:
    """Where the SVG lies that the pages show."""
    return FOLDER / f"{name}.svg"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *DRAWINGS], metavar="NAME")
    for name in parser.parse_args().names or DRAWINGS:
        with published(committed(name)) as partial:
            partial.write_text(drawn(name), encoding="utf-8")
        print(committed(name))


if __name__ == "__main__":
    main()
