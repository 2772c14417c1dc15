"""The presets that come with the package: what each is, for `--help preset` and a page.

`python -m distseg.config.presets` prints the page, which docs/presets.md holds.
"""

from __future__ import annotations

import re

from distseg.config import loading
from distseg.config.layers import PRESETS, preset_names
from distseg.config.schema import WITH_DISCRIMINATOR, WITH_UNLABELLED, Config

COMMAND = "python -m distseg.config.presets > docs/presets.md"
# a full stop before a capital, a quotation or the end: not the one of "et al. 2018"
_SENTENCE = re.compile(r"(.+?)(?:\.(?=\s+[A-Z\"`])|\.?$)")


def described(name: str) -> str:
    """What a preset is: the first sentence of the comment that its file begins with."""
    lines = []
    for line in (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        # commands that make its data, or the end of the comment
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line[2:])
    found = _SENTENCE.match(" ".join(lines))
    assert found is not None, name
    return found[1]


def text() -> list[str]:
    """A line a preset, in columns."""
    names = preset_names()
    width = max(map(len, names))
    return [f"{name:{width}}  {described(name)}" for name in names]


def markdown() -> str:
    """The page: a table with a row a preset."""
    columns = ["preset", "what it is", "mode", "segmentor", "discriminator", "labels", "batch"]
    columns += ["crop, px", "steps"]
    lines = ["# Presets", "", _TOP, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in preset_names():
        config, waiting = loading.outline([f"preset={name}", "data.shards=unused", "run_dir=none"])
        cells = [f"`{name}`", described(name).replace("|", "\\|"), *_numbers(config, waiting)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_TOP = f"""`preset=NAME` on the command line of `distseg train`; every key can be overridden, and
`distseg train preset=NAME --dry-run` prints them all. Batches are global, those of all ranks
together: they have to divide by the number of ranks. A batch of "8 + 8" has as many unlabelled
images besides. What is reached with them, where it was measured: [results](results.md); how they
differ from their papers: [systems](systems.md). This page is generated: `{COMMAND}`."""


def _numbers(config: Config, waiting: list[str]) -> list[str]:
    """Cells of a row; waiting: keys that the data tell, which the reader has."""
    adversary = config.discriminator.name if config.mode in WITH_DISCRIMINATOR else ""
    batch = str(config.batch_size)
    if config.mode in WITH_UNLABELLED:
        batch += f" + {config.semi.batch_size or config.batch_size}"
    sizes = {"batch_size": batch, "data.crop_px": str(config.data.crop_px)}
    sizes["steps"] = f"{config.steps:,}"
    told = ["by your data" if key in waiting else size for key, size in sizes.items()]
    return [config.mode, config.segmentor.name, adversary, str(config.data.labelled), *told]


if __name__ == "__main__":
    print(markdown(), end="")
