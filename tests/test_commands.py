"""Commands that start several ranks, in the pages and in slurm/: their ranks share the batch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distseg.config import loading
from distseg.config.world_size import check_world_size

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHED = re.compile(r"torchrun (?P<options>[^\n]*?) -m distseg\.train (?P<words>[^\n]*)")
SCRIPT = re.compile(r"on_all_nodes distseg\.train (?P<words>.*) \"\$@\"")


def launches() -> dict[str, tuple[list[str], int]]:
    """Words of the configuration and number of ranks, by where they stand."""
    found: dict[str, tuple[list[str], int]] = {}
    for page in PAGES:
        # one line each, whatever way it is broken
        text = re.sub(r"\\\n\s*", "", page.read_text())
        for match in LAUNCHED.finditer(text):
            numbers = dict(re.findall(r"--(nnodes|nproc_per_node)=(\d+)", match["options"]))
            if "nproc_per_node" not in numbers:
                continue  # "..." in a sentence
            ranks = int(numbers.get("nnodes", 1)) * int(numbers["nproc_per_node"])
            # a capital letter stands for what the reader writes there
            words = [word for word in match["words"].split() if re.fullmatch(r"\w[\w.]*=\S*", word)]
            words = [word for word in words if not re.search(r"=[A-Z]+$", word)]
            found[f"{page.name}: {match['words'][:40]} on {ranks}"] = (words, ranks)
    for script in sorted((ROOT / "slurm").glob("train_*.sh")):
        text = script.read_text()
        match = SCRIPT.search(text)
        nodes = re.search(r"--nodes=(\d+)", text.split("#SBATCH", 1)[1])
        assert match and nodes, script
        for gpus in (1, 2, 4, 8):
            ranks = gpus * int(nodes[1])
            found[f"{script.name} on {ranks}"] = (match["words"].split(), ranks)
    return found


@pytest.mark.parametrize("where", launches())
def test_the_ranks_share_the_batch(where: str) -> None:
    words, ranks = launches()[where]
    assert any(word.startswith("preset=") for word in words)
    check_world_size(loading.load([*words, "data.shards=unused", "run_dir=none"]), ranks)
