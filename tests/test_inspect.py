"""`distseg inspect` finds every damage and every kind of bad data, names where, and decides what
training accepts.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import webdataset
from conftest import toy_samples
from PIL import Image

from distseg.cli import main
from distseg.config.schema import Config, DataConfig
from distseg.inspection.run import conclusion, contact_sheet
from distseg.tracking.bars import iou_bars
from distseg.tracking.figures import sample_panel
from distseg.tracking.palettes import safe_colors
from distseg.train.inputs import open_data
from shards import pack as packing
from shards.errors import InputError
from shards.inspect import inspect
from shards.look import Finding
from shards.manifest import Manifest, ShardInfo, SplitInfo, sha256_of
from shards.maps import write_maps
from shards.reader import ShardReader
from shards.sample import IGNORE_INDEX, STANFORD, Sample, decode_image, encode_label
from shards.similar import BITS, MAX_BITS, close_pairs, fingerprint
from shards.verified import is_verified
from shards.words import train_command
from tests import faults


@pytest.fixture
def directory(toy_shards: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(toy_shards, tmp_path / "shards")
    return tmp_path / "shards"


def packed(samples: list[Sample], place: Path) -> Path:
    write_maps(place / "maps.h5", "toy blobs", STANFORD, samples, len(samples))
    packing.pack(place / "maps.h5", place / "packed", samples_per_shard=3)
    return place / "packed"


def kinds(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.check, finding.sample) for finding in findings}


def spans(path: Path) -> list[tuple[str, int, int]]:
    """(key, first byte, end) of the members of a tar, from the tar itself."""
    with tarfile.open(path) as tar:
        return [(m.name.partition(".")[0], m.offset_data, m.offset_data + m.size) for m in tar]


def test_no_damage_is_missed_and_each_is_located(toy_shards: Path, directory: Path) -> None:
    """Bits flipped and files cut anywhere, 240 times.

    Always an error, at the shard and at the sample that was hit.
    """
    assert not inspect(toy_shards).errors
    readers = [ShardReader(toy_shards, split) for split in ("train", "val")]
    expected = {(r.split, r.key(i)): r.read(i) for r in readers for i in range(len(r))}
    rng, tars, given = np.random.default_rng(5), sorted(toy_shards.glob("*.tar")), 0
    for trial in range(240):
        source = tars[trial % len(tars)]
        if trial % 6 == 5:
            source = source.with_suffix(".index.json")
        whole, place = source.read_bytes(), int(rng.integers(source.stat().st_size))
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << int(rng.integers(8))
        (directory / source.name).write_bytes(damaged)
        errors = inspect(directory, num_threads=2).errors
        assert {error.shard for error in errors} == {source.name} and {
            error.check for error in errors
        } == {"checksum"}
        # every byte belongs to a member, its header, or the end behind the last one
        if source.suffix == ".tar":
            members = spans(source)
            hit = next((key for key, _, end in members if place < end + -end % 512), members[-1][0])
            assert hit in {error.sample for error in errors}
            if trial % 3:
                assert {error.sample for error in errors} <= {"", *_neighbours(hit, members)}
        for split in ("train", "val"):
            try:
                reader = ShardReader(directory, split)
            except InputError as error:
                assert source.name.split(".")[0] in str(error)
                continue
            for index in range(len(reader)):
                try:
                    assert reader.read(index) == expected[split, reader.key(index)]
                    given += 1
                except InputError as error:
                    assert source.name in str(error) and reader.key(index) in str(error)
        (directory / source.name).write_bytes(whole)
    assert given > 1000


def _neighbours(key: str, members: list[tuple[str, int, int]]) -> set[str]:
    """A sample and the next one: the padding between two belongs to either."""
    keys = list(dict.fromkeys(name for name, _, _ in members))
    return set(keys[keys.index(key) : keys.index(key) + 2])


def test_what_is_missing_is_named(directory: Path, capsys: pytest.CaptureFixture) -> None:
    (directory / "train-000001.tar").unlink()
    (directory / "val-000000.index.json").unlink()
    errors = inspect(directory).errors
    assert {(error.shard, error.what.split(",")[0]) for error in errors} == {
        ("train-000001.tar", "missing"),
        ("val-000000.index.json", "missing"),
    }
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    assert main(["inspect", str(directory)]) == 2
    assert "version 2\n  needed: version 1" in capsys.readouterr().err


def forged(directory: Path, change: Callable[[str, dict[str, bytes]], None]) -> None:
    """Write all shards anew with changed members, and all checksums to match.

    As another program would.
    """
    manifest, splits = Manifest.load(directory), {}
    for name, split in manifest.splits.items():
        infos = []
        for info in split.shards:
            path, samples = directory / info.file, {}
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, kind = member.name.partition(".")
                    samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
            shapes = {key: decode_image(members["jpg"]).shape for key, members in samples.items()}
            sizes = {key: {"height": shape[0], "width": shape[1]} for key, shape in shapes.items()}
            with webdataset.TarWriter(str(path), encoder=False, mtime=0, compress=False) as tar:
                for key, members in samples.items():
                    change(key, members)
                    tar.write({"__key__": key, **members})
            index = path.with_suffix(".index.json")
            index.write_text(json.dumps(packing._index(path, sizes)))
            sums = (sha256_of(path), sha256_of(index))
            infos.append(ShardInfo(info.file, info.num_samples, path.stat().st_size, *sums))
        splits[name] = SplitInfo(
            tuple(infos), split.num_samples, split.class_pixels, split.void_pixels
        )
    replace(manifest, splits=splits).save(directory)


def png(image: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(file, "PNG")
    return file.getvalue()


def test_bad_samples_of_other_writers_are_errors(directory: Path) -> None:
    labels = {sample.key: sample.label for sample in toy_samples()}
    colors = np.zeros((256, 3), np.uint8)
    colors[:8] = STANFORD.palette
    gray = cv2.cvtColor(colors[labels["toy_02"]], cv2.COLOR_RGB2GRAY)

    def spoil(key: str, members: dict[str, bytes]) -> None:
        if key == "toy_00":
            members["jpg"] = members["jpg"][: len(members["jpg"]) // 2]
        if key == "toy_01":
            members["png"] = encode_label(np.ascontiguousarray(labels[key].T))
        if key == "toy_02":
            members["png"] = encode_label(gray)
        if key == "toy_03":
            members["png"] = png(labels[key], "P")
        if key == "toy_04":
            members["png"] = png(colors[labels[key]])
        if key == "toy_05":
            members["png"] = encode_label(
                np.where(labels[key] == 7, 8, labels[key]).astype(np.uint8)
            )
        if key == "toy_08":
            members["jpg"] = simplejpeg.encode_jpeg(decode_image(members["jpg"])[2:].copy())

    forged(directory, spoil)
    errors = {error.sample: error for error in inspect(directory).errors}
    assert {(key, error.check, error.shard[:9]) for key, error in errors.items()} == {
        ("toy_00", "unreadable image", "train-000"),
        ("toy_01", "size", "train-000"),
        ("toy_02", "label range", "train-000"),
        ("toy_03", "label format", "train-000"),
        ("toy_04", "label format", "train-000"),
        ("toy_05", "label range", "train-000"),
        ("toy_08", "size", "val-00000"),
    }
    assert "the image turned" in errors["toy_01"].what and "palette" in errors["toy_03"].what
    assert (
        "a colour mask was read as indices" in errors["toy_02"].what
        and "colour mask" in errors["toy_04"].what
    )
    assert "of 8: indices end at 7" in errors["toy_05"].what


def test_a_manifest_that_counts_wrongly_is_an_error(directory: Path) -> None:
    label = {sample.key: sample.label for sample in toy_samples()}["toy_09"]

    def change(key: str, members: dict[str, bytes]) -> None:
        if key == "toy_09":
            members["png"] = encode_label((7 - label.astype(int)).clip(0).astype(np.uint8))

    forged(directory, change)
    assert kinds(inspect(directory).errors) == {("manifest", "")}


def jpeg(image: np.ndarray, quality: int = 40) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality)


def test_what_may_be_meant_is_a_warning(tmp_path: Path) -> None:
    samples = toy_samples()
    pictures = [decode_image(sample.image) for sample in samples]
    labels = [np.where(sample.label == 6, 0, sample.label).astype(np.uint8) for sample in samples]
    labels[0][0, 0] = 1
    labels[9][:40] = 6  # mountain: in val only
    labels[1][:] = IGNORE_INDEX
    samples = [replace(sample, label=label) for sample, label in zip(samples, labels, strict=True)]
    half = cv2.resize(pictures[7], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    samples[10] = replace(samples[10], image=jpeg(half), label=np.zeros(half.shape[:2], np.uint8))
    samples[11] = replace(samples[11], image=samples[4].image, label=labels[4])
    turned, file = Image.fromarray(pictures[2]), io.BytesIO()
    turned.getexif()[274] = 6
    turned.save(file, "JPEG", exif=turned.getexif())
    samples[2] = replace(samples[2], image=file.getvalue())
    samples[5] = replace(samples[5], image=jpeg(np.full((300, 420, 3), 9, np.uint8)))
    samples[5] = replace(samples[5], label=np.zeros((300, 420), np.uint8))
    samples[8] = replace(samples[8], label=None)
    found = inspect(packed(samples, tmp_path))
    assert not found.errors
    assert kinds(found.findings) - {("class shares", "")} == {
        ("class never trained", ""),
        ("all void", "toy_01"),
        ("nearly same picture in two splits", "toy_07"),
        ("same picture in two splits", "toy_04"),
        ("turned image", "toy_02"),
        ("blank image", "toy_05"),
        ("unlabelled", ""),
        ("image sizes", "toy_06"),
    }
    assert any("'mountain' (6) is never in train" in finding.what for finding in found.findings)


def test_each_step_names_the_next_one(
    toy_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps, shards = toy_shards.parent / "maps.h5", tmp_path / "my shards"
    assert main(["pack", str(maps), "--out", str(shards)]) == 0
    train = f"distseg train preset=own 'data.shards={shards}' 'run_dir=runs/my shards'"
    assert f"next: distseg inspect '{shards}'\nthen: {train}\n" in capsys.readouterr().out
    assert main(["inspect", str(shards)]) == 0
    assert capsys.readouterr().out.endswith(f"next: {train}\n")
    # refused by training, and by one split alone nothing can be scored
    (shards / "train-000000.tar").unlink()
    assert main(["inspect", str(shards)]) == 1
    assert "next:" not in capsys.readouterr().out
    assert train_command(shards, ["train"]) == ""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "my shards").mkdir(parents=True)
    assert "'run_dir=runs/my shards-own'" in train_command(shards, ["train", "val"])
    assert train_command(shards, ["a", "b"]).endswith(" data.train_split=NAME data.val_split=NAME")


def test_frames_of_a_video_in_a_split_are_one_finding(tmp_path: Path) -> None:
    samples = toy_samples()
    frame = decode_image(samples[0].image).astype(np.int16)
    label = samples[0].label
    for index in (0, 1, 2, 3, 8):  # the last one validates
        image = (frame + index).clip(0, 255).astype(np.uint8)
        samples[index] = replace(samples[index], image=jpeg(image), label=label)
    found = [one for one in inspect(packed(samples, tmp_path)).findings if "nearly" in one.check]
    assert sorted(one.check for one in found) == [
        "nearly same picture in a split",
        *["nearly same picture in two splits"] * 4,
    ]
    (within,) = [one for one in found if one.check.endswith("a split")]
    assert within.sample in ("toy_00", "toy_01", "toy_02") and "4 of 8 pictures" in within.what
    assert "video" in within.action


def test_names_with_signs_of_markup_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ("[/x] a", "$5 {$6", "[red]r", "_background_", *STANFORD.names[4:])
    keys = ("a$b {$", "[bold]", "[red]")
    samples = toy_samples()
    samples[:3] = [replace(one, key=key) for one, key in zip(samples, keys, strict=False)]
    write_maps(tmp_path / "m.h5", "[red]set", replace(STANFORD, names=names), samples, 12)
    packing.pack(tmp_path / "m.h5", tmp_path / "s")
    assert main(["inspect", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    for name in ("[red]set: splits", *names):
        assert name in said
    iou_bars(dict.fromkeys(names, 0.5), tmp_path / "iou.png")
    classes = replace(STANFORD, names=names)
    planes = np.full((8, *samples[0].label.shape), 1 / 8, np.float32)
    image = decode_image(samples[0].image)
    sample_panel(image, samples[0].label, planes, classes, tmp_path / "p.png")


def test_a_split_of_void_is_not_said_to_be_accepted(tmp_path: Path) -> None:
    samples = [
        replace(sample, label=np.full_like(sample.label, IGNORE_INDEX))
        if sample.split == "val"
        else sample
        for sample in toy_samples()
    ]
    said = conclusion(tmp_path, inspect(packed(samples, tmp_path)), writable=True)
    assert said.endswith("training refuses val: void everywhere")


@pytest.mark.parametrize(
    "case", ["0/255 mask", "one class", "void", "frayed labels", "class absent"]
)
def test_labels_of_a_wrong_conversion_are_suspected(case: str, tmp_path: Path) -> None:
    samples = []
    for sample in toy_samples():
        label = sample.label.copy()
        if case == "0/255 mask":
            label = np.where(label < 4, 0, 255).astype(np.uint8)
        elif case == "one class":
            label[:] = 3
        elif case == "void":
            label[: len(label) // 2] = IGNORE_INDEX
        elif case == "frayed labels":
            label = cv2.resize(
                label % 8 // 7 * 7, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_LINEAR
            )
            label = cv2.resize(label, sample.label.shape[::-1], interpolation=cv2.INTER_LINEAR)
        else:  # indices from 1 on
            label = np.where(label == 0, 1, label).astype(np.uint8)
        samples.append(replace(sample, label=label))
    found = inspect(packed(samples, tmp_path))
    assert (case, "") in kinds(found.findings) and not found.errors


def test_close_pairs_are_those_of_brute_force() -> None:
    prints = np.random.default_rng(1).random((60, BITS)) < 0.5
    prints[40:] = prints[:20]
    for row in range(20):
        prints[40 + row, : 2 * row] ^= True
    expected = {
        (a, b, int((prints[a] != prints[b]).sum())) for a in range(60) for b in range(a + 1, 60)
    }
    assert set(close_pairs(prints)) == {pair for pair in expected if pair[2] <= MAX_BITS}
    assert fingerprint(np.full((50, 60, 3), 7, np.uint8)) is None


def test_training_takes_what_was_verified_only(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = Config(run_dir=str(tmp_path / "run"), data=DataConfig(shards=str(directory)))
    open_data(config, 1)  # pack has verified them
    Manifest.load(directory).save(directory)
    open_data(config, 1)  # the same manifest
    (directory / "verified.json").unlink()
    with pytest.raises(
        InputError, match=rf"distseg inspect {directory}.*data\.allow_unverified=true"
    ):
        open_data(config, 1)
    open_data(replace(config, data=replace(config.data, allow_unverified=True)), 1)
    assert main(["inspect", str(directory), "--out", str(tmp_path / "out")]) == 0
    open_data(config, 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "inspection.json",
        "contact_sheet.png",
    }
    found = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert found["sound"] and found["splits"]["train"]["samples"] == 8

    path = directory / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[spans(path)[0][1] + 50] ^= 4
    path.write_bytes(content)
    capsys.readouterr()
    assert main(["inspect", str(directory)]) == 1
    printed = capsys.readouterr().out
    assert "toy_03" in printed and "train-000001.tar" in printed and "training refuses" in printed
    assert not json.loads((directory / "inspection.json").read_text())["sound"]
    assert not is_verified(directory, Manifest.load(directory))
    forged(directory, lambda key, members: None)  # sound, but by whom?
    with pytest.raises(InputError, match="not verified"):
        open_data(config, 1)


def test_contact_sheet_shows_each_label_over_its_picture(directory: Path) -> None:
    """The share of every class's colour, mixed with the picture's equal one, is on the sheet."""
    assert main(["inspect", str(directory)]) == 0
    sheet = (
        np.asarray(Image.open(directory / "contact_sheet.png").convert("RGB"))
        .reshape(-1, 3)
        .astype(int)
    )
    # toy pictures have their classes' colours, so an overlay repeats them
    for color in STANFORD.palette:
        assert (np.abs(sheet - color).max(1) <= 12).mean() > 0.002
    # in the legend alone colours are as they are
    safe = safe_colors(STANFORD.num_classes)
    assert not all((sheet == color).all(1).any() for color in safe)
    contact_sheet(directory, inspect(directory), directory / "safe.png", "safe")
    other = np.asarray(Image.open(directory / "safe.png").convert("RGB")).reshape(-1, 3)
    assert all((other == color).all(1).any() for color in safe)


Lines = list[dict[str, Any]]


def _swapped(lines: Lines, kind: str) -> None:
    first, second = (line["members"] for line in lines[:2])
    first[kind], second[kind] = second[kind], first[kind]


# what another program may write: an index whose checksum is the manifest's, and which is not the
# tar's
WRONG_LINES: dict[str, Callable[[Lines], object]] = {
    "'../toy_00' is no name": lambda lines: lines[0].update(key="../toy_00"),
    "its .jpg is nowhere in the tar": lambda lines: lines[0].update(key="toy_99"),
    "'toy_00.png' is in the tar": lambda lines: lines[0]["members"].pop("png"),
    "its .jpg lies at": lambda lines: _swapped(lines, "jpg"),
    "its .png lies at": lambda lines: _swapped(lines, "png"),
    "its pixels per class": lambda lines: lines[0]["pixels"].update({"3": 1}),
    "the manifest says 3": lambda lines: lines.pop(),
}


def reindexed(directory: Path, change: Callable[[Lines], object]) -> None:
    """Change the first shard's member index, and the manifest to match."""
    manifest = Manifest.load(directory)
    train = manifest.splits["train"]
    path = directory / train.shards[0].index_file
    lines = json.loads(path.read_text())
    change(lines)
    path.write_text(json.dumps(lines))
    info = replace(train.shards[0], index_sha256=sha256_of(path), num_unlabelled=None)
    splits = manifest.splits | {"train": replace(train, shards=(info, *train.shards[1:]))}
    replace(manifest, splits=splits).save(directory)


@pytest.mark.parametrize("said", WRONG_LINES)
def test_an_index_that_is_not_its_tars_is_an_error(said: str, directory: Path) -> None:
    reindexed(directory, WRONG_LINES[said])
    errors = inspect(directory, num_threads=1).errors
    assert any(said in error.what for error in errors), errors
    assert {error.shard.split(".")[0] for error in errors} <= {"train-000000", ""}


def test_a_shard_of_another_split_is_an_error(directory: Path) -> None:
    """The manifest calls training images validation: all checksums are right."""
    manifest = Manifest.load(directory)
    train, val = manifest.splits["train"], manifest.splits["val"]
    shards = val.shards[:1], (*train.shards, *val.shards[1:])
    splits = {}
    for name, some in zip(("train", "val"), shards, strict=True):
        splits[name] = replace(train, shards=some, num_samples=sum(s.num_samples for s in some))
    replace(manifest, splits=splits).save(directory)
    assert {(error.check, error.sample) for error in inspect(directory).errors} == {
        ("split", f"toy_{number:02d}") for number in range(11)
    }


def test_a_miscounted_shard_is_an_error(directory: Path) -> None:
    manifest = Manifest.load(directory)
    train = manifest.splits["train"]
    info = replace(train.shards[0], num_unlabelled=1)
    splits = manifest.splits | {"train": replace(train, shards=(info, *train.shards[1:]))}
    replace(manifest, splits=splits).save(directory)
    (error,) = inspect(directory).errors
    assert error.what == "0 samples have no label; the manifest says 1"


def test_a_member_twice_is_an_error(directory: Path) -> None:
    path = directory / "train-000000.tar"
    with tarfile.open(path, "a") as tar:
        info = tar.getmember("toy_00.png")
        tar.addfile(info, io.BytesIO(encode_label(np.zeros((60, 80), np.uint8)).ljust(info.size)))
    manifest = Manifest.load(directory)
    train = manifest.splits["train"]
    info = replace(train.shards[0], sha256=sha256_of(path), num_bytes=path.stat().st_size)
    splits = manifest.splits | {"train": replace(train, shards=(info, *train.shards[1:]))}
    replace(manifest, splits=splits).save(directory)
    assert any("is twice in the tar" in error.what for error in inspect(directory).errors)


def test_random_faults_are_found_and_never_trained_on(toy_shards: Path, tmp_path: Path) -> None:
    """In small; `python -m tests.faults 200` makes more of them."""
    sound = faults.samples_of(toy_shards)
    for seed in range(20):
        fault, found, training = faults.trial(toy_shards, tmp_path / "copy", seed, sound)
        assert found and training in ("refused", "not read by it"), (seed, fault)
