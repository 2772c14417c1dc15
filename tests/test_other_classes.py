"""Scores on data with other classes, and of each image, against brute force."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distseg
from distseg.cli import main
from distseg.evaluate.class_map import class_map, parsed
from distseg.tracking import figures
from shards.errors import InputError
from shards.maps import write_maps
from shards.pack import pack
from shards.sample import IGNORE_INDEX, STANFORD, ClassSet, decode_image
from tests.conftest import toy_samples
from tests.ranks import Job
from tests.tiny import SETTINGS, no_curves

NAMES = STANFORD.names


@pytest.fixture(scope="module")
@no_curves()
def run(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "run"
    distseg.fit([f"data.shards={toy_shards}", f"run_dir={folder}"], **SETTINGS)
    return folder


def packed(folder: Path, names: Sequence[str], index_of: dict[str, int]) -> Path:
    """The toy shards with other classes; index_of: of each Stanford class among `names`."""
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for index, name in enumerate(NAMES):
        table[index] = index_of[name]
    classes = ClassSet(tuple(names), STANFORD.palette[: len(names)])
    samples = [replace(sample, label=table[sample.label]) for sample in toy_samples()]
    folder.mkdir(parents=True)
    write_maps(folder / "maps.h5", "other", classes, samples, total=len(samples))
    pack(folder / "maps.h5", folder / "shards", samples_per_shard=3)
    return folder / "shards"


def scores(run: Path, pattern: str) -> dict[str, Any]:
    (path,) = run.glob(pattern)
    return json.loads(path.read_text())


def test_classes_of_other_spelling_and_order_are_found_by_name(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spelt = [f" {name.upper()}/" if index % 2 else name for index, name in enumerate(NAMES)]
    order = np.random.default_rng(0).permutation(len(NAMES)).tolist()
    places = {name: order.index(index) for index, name in enumerate(NAMES)}
    other = packed(tmp_path / "a", [spelt[index] for index in order], places)
    assert main(["evaluate", str(run), f"data.shards={other}"]) == 0
    assert f"classes: {NAMES[1]} -> {spelt[1]}, " in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    found, expected = scores(run, "*-other-*.json"), scores(run, "*-val.json")
    # a mere change of order changes no bit
    for index, name in enumerate(NAMES):
        for score in ("iou", "boundary_iou"):
            assert found[f"val/{score}/{spelt[index]}"] == expected[f"val/{score}/{name}"]
    assert found["val/loss"] == expected["val/loss"]
    assert found["class_map"] == dict(zip(NAMES, spelt, strict=True))
    confusion = np.array(expected["confusion"])[np.ix_(order, order)]
    assert found["confusion"] == confusion.tolist()
    drawn = []
    monkeypatch.setattr(figures, "sample_panel", lambda *of_one: drawn.append(of_one))
    for shards in ([], [f"data.shards={other}"]):
        assert main(["pictures", str(run), *shards, "evaluate.num_pictures=1"]) == 0
    # the same picture, in the data's order
    assert np.array_equal(drawn[1][2], drawn[0][2][order])
    assert drawn[1][3].names == tuple(spelt[index] for index in order)


def test_several_classes_may_be_one_and_some_none(run: Path, tmp_path: Path) -> None:
    names = ["plants", "Sky", "rest", "lake"]
    groups = {"sky": 1, "tree": 0, "grass": 0, "water": 3}
    other = packed(tmp_path / "a", names, {name: groups.get(name, 2) for name in NAMES})
    rest = [name for name in NAMES if name not in groups]
    kept = dict.fromkeys(rest[:-1], "rest") | {"tree": "plants", "grass": "plants"}
    # the last has none in the data, and the data's lake is none of the run's
    wanted = {**kept, rest[-1]: None, "water": None, None: ["lake"]}
    text = ",".join(f"{name or ''}={target or ''}" for name, target in wanted.items() if name)
    assert parsed(f"{text},=lake") == wanted
    file = tmp_path / "map.yaml"
    file.write_text(json.dumps({name or "": target for name, target in wanted.items()}))
    assert parsed(str(file)) == wanted
    assert main(["evaluate", str(run), f"data.shards={other}", "--map", str(file)]) == 0
    trained = distseg.load(run, device="cpu")
    confusion, targets = np.zeros((4, 4), int), dict.fromkeys(NAMES, None) | kept | {"sky": "Sky"}
    for sample in toy_samples()[8:]:
        chances = trained.probabilities(decode_image(sample.image))
        mapped = np.zeros((4, *chances.shape[1:]), np.float32)
        for index, name in enumerate(NAMES):
            if targets[name] is not None:
                mapped[names.index(targets[name])] += chances[index]
        for row in range(3):
            inside = np.isin(
                sample.label, [i for i, n in enumerate(NAMES) if groups.get(n, 2) == row]
            )
            confusion[row] += np.bincount(mapped.argmax(0)[inside], minlength=4)
    found = scores(run, "*-other-*-map-*.json")
    assert found["confusion"] == confusion.tolist() and found["val/iou/lake"] is None
    assert trained.evaluate(shards=other, classes=wanted)["confusion"] == confusion.tolist()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            None,
            r"run's lorry \(near: lory\), bus; no counterpart of the data's lory \(near: lorry\)",
        ),
        ("lorry=lory,bus=", None),
        ("lory=lorry", r"'lory'\n.*the run's: car, lorry, bus\n.*did you mean lorry\?"),
        ("lorry=trunk", r"'trunk'\n.*the data's: Car, lory\n"),
        ("lorry", "each of the run's once"),
        ("bus=Car,bus=lory", "each of the run's once"),
        ("bus=Car,Bus=lory,lorry=lory", "'bus' twice"),
        ("lorry=lory,bus=,=lory", "data's lory as none of the run's, and as one of them"),
        ("car=,lorry=,bus=,=Car,=lory", "none of the data's classes"),
        ("missing.yaml", "no missing.yaml"),
    ],
)
def test_what_is_left_without_counterpart_is_told_with_the_nearest(
    wanted: str | None, message: str | None
) -> None:
    def mapped() -> Any:
        given = None if wanted is None else parsed(wanted)
        return class_map(["car", "lorry", "bus"], ["Car", "lory"], given)

    if message is None:
        assert mapped().targets == (0, 1, None)
        return
    with pytest.raises(InputError, match=message):
        mapped()
    assert class_map(["car"], ["car"]) is None
    # two that differ in what does not count are not chosen between
    with pytest.raises(InputError, match="the run's car"):
        class_map(["car"], ["Car", "CAR"])


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_the_scores_of_each_image_are_brute_force_over_any_number_of_ranks(
    run: Path, tmp_path: Path, quick: list[str]
) -> None:
    path = tmp_path / "folder" / "images.csv"
    if quick:
        output = Job(2, ["evaluate", str(run), "--per-image", str(path), *quick]).communicate()[0]
        assert f"wrote {path}" in output, output
    else:
        assert main(["evaluate", str(run), "--per-image", str(path)]) == 0
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    trained = distseg.load(run, device="cpu")
    samples = sorted(toy_samples()[8:], key=lambda sample: sample.key)
    assert [row["key"] for row in rows] == [sample.key for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        guess = trained.predict(decode_image(sample.image))
        valid = sample.label != IGNORE_INDEX
        each = {}
        for index, name in enumerate(NAMES):
            truth, said = (sample.label == index) & valid, (guess == index) & valid
            if (truth | said).any():
                each[name] = float((truth & said).sum() / (truth | said).sum())
            assert row[f"iou/{name}"] == (repr(each[name]) if name in each else "")
        assert float(row["mean_iou"]) == pytest.approx(np.mean(list(each.values())), abs=1e-15)
        assert float(row["pixel_accuracy"]) == (guess == sample.label)[valid].mean()
        assert int(row["void_pixels"]) == (~valid).sum()
        assert (int(row["height"]), int(row["width"])) == sample.label.shape
    assert not math.isnan(float(rows[0]["mean_iou"]))


def test_a_place_that_cannot_be_written_is_refused_before_scoring(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", str(run), "--per-image", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "a folder\n" in captured.err and "mIoU" not in captured.out
