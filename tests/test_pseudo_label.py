"""Unlabelled images with a run's predictions as labels: which, and how sure; all else stays."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

import distseg
from distseg.cli import main
from distseg.data.samples import LABELLED_FILE
from distseg.pseudo_label.run import Choice, Labelled, surest
from distseg.tracking import bars
from shards.maps import MapsReader, write_maps
from shards.pack import pack
from shards.reader import ShardReader
from shards.sample import STANFORD, ClassSet, decode_image
from tests.conftest import toy_samples
from tests.test_train import SMALL
from tests.tiny import SETTINGS, no_curves


@pytest.fixture(scope="module")
def trained(toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on half of the labels: four images have none."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    some = ["data.labelled=1/2", "steps=2", "evaluate.every_steps=0", "evaluate.num_pictures=0"]
    some += ["segmentor=multiscale", "segmentor.options.hidden=16", "checkpoint.every_steps=2"]
    assert main(["train", *SMALL, *some, f"data.shards={toy_shards}", f"run_dir={run_dir}"]) == 0
    return run_dir


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def test_labels_are_the_networks_where_it_is_sure_and_all_else_stays(
    toy_shards: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[dict[str, tuple[float, float]]] = []
    original_bars = bars.kept_bars
    monkeypatch.setattr(
        bars, "kept_bars", lambda shares, out: (drawn.append(shares), original_bars(shares, out))
    )
    network, before = distseg.load(trained, device="cpu"), MapsReader(toy_shards.parent / "maps.h5")
    by_people = (trained / LABELLED_FILE).read_text().split()
    # that of half of the pixels: the network knows little yet
    unlabelled = {*before.splits["train"]} - {*by_people}
    pictures = [decode_image(before.read(key).image) for key in unlabelled]
    every = [network.probabilities(picture).max(0).ravel() for picture in pictures]
    out, threshold = tmp_path / "of a run.h5", float(np.median(np.concatenate(every)))
    words = ["--out", str(out), "--threshold", str(threshold), "--compare"]
    assert main(["pseudo-label", str(trained), *words]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 unlabelled images kept" in said and f"next: distseg pack '{out}'" in said
    rows, labels = table(out.with_suffix(".csv")), []
    state = trained / "checkpoints/step-00000002/state.json"
    expected = {"made_by": "pseudo-label", "run": "run", "step": 2, "threshold": threshold}
    expected |= {"keep": 1.0, "rank": "confidence", "scales": [1.0], "horizontal_flip": False}
    expected |= {"state_sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
    expected |= {"precision": "fp32"}
    with MapsReader(out) as maps:
        assert maps.name == "toy blobs-pseudo" and maps.classes == before.classes
        assert maps.splits["val"] == before.splits["val"]
        assert sorted(maps.splits["train"]) == sorted(before.splits["train"])
        for key in [*maps.splits["train"], *maps.splits["val"]]:
            sample, original = maps.read(key), before.read(key)
            assert sample.image == original.image and sample.label is not None
            if key in by_people or key in maps.splits["val"]:
                assert np.array_equal(sample.label, original.label)
                assert key not in rows and not sample.origin
                continue
            chances = network.probabilities(decode_image(sample.image))
            sure = chances.max(0) >= threshold
            assert np.array_equal(sample.label, np.where(sure, chances.argmax(0), 255))
            assert sample.source_id == f"pseudo-label of run at step 2: {key}"
            assert sample.origin == expected
            row = rows.pop(key)
            assert math.isclose(float(row["confidence"]), chances.max(0).mean(), abs_tol=1e-5)
            assert math.isclose(float(row["labelled_share"]), sure.mean(), abs_tol=1e-5)
            valid = sure & (original.label != 255)
            labels.append((original.label.ravel(), sample.label.ravel()))
            right = (chances.argmax(0) == original.label)[valid].mean()
            assert math.isclose(float(row["agreement"]), right, abs_tol=1e-5)
            assert row["kept"] == "1" and row["realness"] == ""
    assert not rows
    truth, found = (np.concatenate(each) for each in zip(*labels, strict=True))
    (shares,) = drawn
    for index, name in enumerate(STANFORD.names):
        of_class = found[truth == index]
        labelled, right = (of_class != 255).mean(), (of_class[of_class != 255] == index)
        assert shares[name] == pytest.approx(
            (labelled, right.mean() if len(right) else math.nan), nan_ok=True
        )
    assert f"wrote {out}, of a run.csv and of a run.png" in said
    pack(out, tmp_path / "packed")
    assert len(ShardReader(tmp_path / "packed", "train")) == 8
    of_shards = webdataset.WebDataset(str(tmp_path / "packed/train-000000.tar"), shardshuffle=False)
    origins = {row["__key__"]: json.loads(row["json"]).get("origin") for row in of_shards}
    assert origins == {key: None if key in by_people else expected for key in origins}
    assert len(origins) == 8


def test_the_share_kept_is_the_surest_by_either_measure(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "half.h5"
    words = ["--out", str(out), "--threshold", "0", "--keep", "0.5", "--rank", "discriminator"]
    assert main(["pseudo-label", str(trained), *words]) == 0
    rows = table(out.with_suffix(".csv"))
    network, maps = distseg.load(trained, device="cpu"), MapsReader(out)
    kept = {key for key, row in rows.items() if row["kept"] == "1"}
    assert kept == {key for key in maps.splits["train"] if key in rows} and len(kept) == 2
    realness = {key: float(row["realness"]) for key, row in rows.items()}
    assert [*realness.values()] == sorted(realness.values(), reverse=True)  # the surest first
    assert min(realness[key] for key in kept) >= max(realness[key] for key in rows.keys() - kept)
    for key in kept:
        real = network.confidence(decode_image(maps.read(key).image)).mean()
        assert math.isclose(realness[key], real, abs_tol=1e-5)
        label = maps.read(key).label
        assert label is not None and (label != 255).all()  # no threshold
    # in their own order, of equals the first
    images = [Labelled(i, str(i), b"", 0.5 + (i == 2), 1.0) for i in range(4)]
    assert [image.index for image in surest(images, Choice(keep=0.5))] == [0, 2]
    assert [image.index for image in surest(images, Choice(keep=0.01))] == [2]
    images[0].labelled = 0.0  # void everywhere: for nothing
    assert [image.index for image in surest(images, Choice(keep=0.5))] == [2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "1.5"], "--threshold 1.5"),
        (["--keep", "0"], "above 0 and at most 1"),
        (["--keep", "nan"], "above 0 and at most 1"),
        (["--out", "{tmp}/maps"], "write --out"),
        (["--out", "{tmp}/taken.h5"], "exists"),
        (["--out", "{tmp}/mended.h5"], "mended.csv exists"),
        (["data.val_split=train"], "nothing is scored on"),
        (["data.train_split=val"], "data.train_split"),
        (["steps=4"], "steps"),
    ],
)
def test_bad_input_is_told_before_anything_is_labelled(
    words: list[str], said: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "taken.h5").touch()
    (tmp_path / "mended.csv").touch()
    words = [word.format(tmp=tmp_path) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "new.h5")]
    assert main(["pseudo-label", str(trained), *out, *words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mended.csv", "taken.h5"]


def test_where_no_pixel_becomes_a_label_nothing_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["pseudo-label", str(trained), "--out", str(tmp_path / "x.h5")]) == 2
    said = capsys.readouterr().err
    assert "no pixel of 4 unlabelled images" in said and "a lower --threshold" in said
    assert not [*tmp_path.iterdir()]


def test_shards_of_other_classes_are_told_whatever_their_images_are(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    classes = ClassSet(tuple("abcdefgh"), STANFORD.palette)
    samples = [replace(sample, key=f"other_{sample.key}") for sample in toy_samples()]
    write_maps(tmp_path / "maps.h5", "other", classes, samples, total=len(samples))
    pack(tmp_path / "maps.h5", tmp_path / "shards")
    words = ["--out", str(tmp_path / "x.h5"), f"data.shards={tmp_path / 'shards'}"]
    assert main(["pseudo-label", str(trained), *words]) == 2
    assert "shards with the classes a, b, c, d, e, f, g, h" in capsys.readouterr().err


def test_images_that_the_run_was_scored_on_are_not_labelled_as_other_data_either(
    toy_shards: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Another pack has two images of its validation split to train on."""
    moved = {"toy_08", "toy_09"}
    samples = [replace(s, split="train") if s.key in moved else s for s in toy_samples()]
    write_maps(tmp_path / "maps.h5", "other", STANFORD, samples, total=len(samples))
    pack(tmp_path / "maps.h5", tmp_path / "shards")
    words = ["--out", str(tmp_path / "x.h5"), f"data.shards={tmp_path / 'shards'}"]
    assert main(["pseudo-label", str(trained), *words]) == 2
    said = capsys.readouterr().err
    assert f"2 unlabelled images are in val of {toy_shards}, the first: toy_08" in said


@no_curves()
def test_a_run_without_a_discriminator_is_told_to_rank_by_confidence(
    toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = SETTINGS | {"mode": "supervised", "steps": 1, "data.labelled": "1/2"}
    distseg.fit(**keys | {"data.shards": toy_shards, "run_dir": tmp_path / "run"})
    words = ["--out", str(tmp_path / "x.h5"), "--rank", "discriminator"]
    assert main(["pseudo-label", str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert "has no discriminator" in said and "write --rank confidence, or name a run" in said


def test_a_run_that_used_all_labels_has_nothing_to_label(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in trained.iterdir():
        if path.name not in ("config.yaml", LABELLED_FILE):
            (other / path.name).symlink_to(path)
    config = (trained / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("labelled: 1/2", "labelled: all"))
    assert main(["pseudo-label", str(other), "--out", str(tmp_path / "x.h5")]) == 2
    assert "all 8 images of train were used with their labels" in capsys.readouterr().err
