"""The scripts of examples/ that are cells, run at a tiny size: the second looks at the first's run.

Their cell "Settings" is followed by one of other values, as tools for notebooks do it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import distseg
from shards.errors import InputError
from tests.tiny import SETTINGS, no_curves

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {
    "NUM_SCENES": 10,
    "NUM_SHOWN": 1,
    "TRAINING": SETTINGS | {"discriminator": {"options": {"width": 0.125, "head": "patch"}}},
}


def run(script: str, **settings: Any) -> dict[str, Any]:
    """The names that a script leaves, with other settings."""
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    before, found, after = text.partition("# %% Settings")
    own, mark, rest = after.partition("# %%")
    assert found and mark
    assert settings.keys() <= set(re.findall(r"^(\w+) =", own, re.M)), "settings that it has"
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(before + own, script, "exec"), names)
    names |= settings
    exec(compile(mark + rest, script, "exec"), names)
    return names


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        return run("ten_minutes.py", FOLDER=folder / "street", OUT=folder / "out", **TINY)


def test_own_data_end_in_pictures_of_the_largest_errors(own_data: dict[str, Any]) -> None:
    out, trained, samples = own_data["OUT"], own_data["trained"], own_data["samples"]
    assert (out / "contact_sheet.png").is_file() and own_data["result"].step == 2
    assert [path.name for path in sorted((out / "overlays").glob("*_overlay.png"))]
    shares = {}
    for index in range(len(samples)):
        key, image, label = samples.load(index)
        counted = label != 255
        shares[key] = (trained.predict(image) != label)[counted].mean()
    (drawn,) = (out / "errors").iterdir()
    assert len(shares) == 2 and shares[drawn.stem] == max(shares.values())
    text = (out / "confusions.svg").read_text()
    truth, guess = own_data["largest"][0]
    assert f"{trained.classes[truth]} taken for {trained.classes[guess]}" in text


def test_a_trained_adversary_is_shown_with_its_means(own_data: dict[str, Any]) -> None:
    out = own_data["OUT"] / "adversary"
    names = run("trained_adversary.py", RUN=own_data["OUT"] / "run", OUT=out, NUM_SHOWN=1)
    assert Image.open(out / "confidence.png").width > 500
    means, samples = names["means"], names["samples"]
    assert [len(values) for values in means.values()] == [len(samples)] * len(names["ORDER"])
    text = (out / "means.svg").read_text()
    for kind, values in means.items():
        assert kind.replace("\n", " ") in text and f"{np.mean(values):.2f}" in text
    label = samples.load(0)[2]
    assert label is not None
    for damage in ("shifted", "swapped", "with_holes"):
        changed = names[damage](label)
        assert changed.shape == label.shape and 0.02 < (changed != label).mean() < 1, damage
        assert {*np.unique(changed)} <= {*range(8), 255}


def test_the_confidence_is_the_discriminators_on_what_training_shows_it(
    own_data: dict[str, Any],
) -> None:
    trained = own_data["trained"]
    _, image, label = own_data["samples"].load(0)
    assert label is not None
    right, own = trained.confidence(image, label), trained.confidence(image)
    for found in (right, own):
        assert found.shape == label.shape and found.dtype == np.float32
        assert 0 <= found.min() < found.max() <= 1
    # nothing but void is no label at all: what the segmentor says stands in its place
    np.testing.assert_allclose(trained.confidence(image, np.full_like(label, 255)), own, atol=1e-6)
    assert np.abs(right - own).max() > 1e-5
    for mask, message in ((label[1:], "a mask of shape"), (label * 0 + 8, "a mask with 8 in it")):
        with pytest.raises(InputError, match=message):
            trained.confidence(image, mask)


@no_curves()
def test_a_run_without_a_discriminator_says_so(toy_shards: Path, tmp_path: Path) -> None:
    keys = SETTINGS | {"mode": "supervised", "data.shards": toy_shards, "steps": 1}
    distseg.fit(**keys, run_dir=tmp_path / "run")
    with pytest.raises(InputError, match="has no discriminator"):
        distseg.load(tmp_path / "run", device="cpu").confidence(np.zeros((64, 64, 3), np.uint8))
