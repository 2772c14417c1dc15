"""Messages: numbers with their nouns, and paths that begin elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distseg.config import loading
from distseg.evaluate.run import open_samples
from distseg.runs.checkpoint import Checkpoint
from shards.errors import InputError
from shards.words import IS, WAS, counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 images are"), (1, "1 image is"), (2, "2 images are")]
)
def test_a_number_has_the_noun_and_the_verb_that_go_with_it(number: int, text: str) -> None:
    assert counted(number, "image", verb=IS) == text
    assert counted(number, "class", "classes") == f"{number} class{'' if number == 1 else 'es'}"
    assert counted(number, "rank", verb=WAS).endswith("was" if number == 1 else "were")


def test_shards_at_a_relative_path_are_told_from_shards_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, shards = tmp_path / "work" / "runs" / "a", tmp_path / "work" / "data" / "toy"
    path = run_dir / "checkpoints" / "step-00000001"
    for folder in (path, tmp_path / "home"):
        folder.mkdir(parents=True)
    found = Checkpoint(path, {"step": 1}, {"classes": ["a"]}, {}, None)
    config = loading.load(["data.shards=data/toy", "run_dir=runs/a"])
    monkeypatch.chdir(tmp_path / "home")
    with pytest.raises(InputError, match=r"a relative path, and not in .*home\n.*\n.*the folder"):
        open_samples(config, found)
    shards.mkdir(parents=True)
    with pytest.raises(InputError, match=f"write data.shards={shards}"):
        open_samples(config, found)
    # from where it begins, what is wrong with the folder itself is said
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InputError, match=r"manifest\.json"):
        open_samples(config, replace(found, path=Path("runs/a/checkpoints/step-00000001")))
