"""Tars that others wrote train as they are: found, checked, indexed, and never written to."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import tarfile
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from conftest import toy_samples
from PIL import Image

from distseg.cli import main
from distseg.config.schema import Config, DataConfig
from distseg.train.inputs import open_data
from shards.errors import InputError
from shards.foreign import import_tars
from shards.inspect import inspect
from shards.manifest import Manifest, sha256_of
from shards.maps import write_maps
from shards.pack import pack
from shards.patterns import Member, Patterns, chosen_patterns, id_of
from shards.sample import STANFORD, Sample, decode_coded_label, decode_image
from shards.verified import is_verified

NAMES = STANFORD.names


def classes(place: Path, **more: object) -> Path:
    """The YAML: ids are the places in the list, 255 void."""
    content = {"classes": [{"name": name} for name in NAMES], "void": [255], **more}
    place.mkdir(parents=True, exist_ok=True)
    (place / "distseg.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return place / "distseg.yaml"


def png(label: np.ndarray, **how: object) -> bytes:
    """As Pillow writes it: with filters of its choice, unlike our own labels."""
    file = io.BytesIO()
    Image.fromarray(label).save(file, "PNG", **how)
    return file.getvalue()


def by_shard_writer(folder: Path, samples: Sequence[Sample]) -> None:
    """train-000000.tar, ..., val-000000.tar by webdataset's own writer."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        some = [sample for sample in samples if sample.split == split]
        with webdataset.ShardWriter(f"{folder}/{split}-%06d.tar", maxcount=3, verbose=0) as sink:
            for sample in some:
                row = {"__key__": sample.key, "jpg": sample.image, "cls": 3}
                row |= {"seg.png": png(sample.label)} if sample.label is not None else {}
                sink.write(row)


def by_tar(folder: Path, samples: Sequence[Sample], image: str, label: str) -> None:
    """One tar a split by GNU tar over a folder; image, label: names with {}."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        place = folder.parent / f"files-{split}"
        for sample in samples:
            if sample.split != split:
                continue
            for pattern, content in ((image, sample.image), (label, png(sample.label))):
                path = place / pattern.format(sample.key)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        subprocess.run(["tar", "cf", folder / f"{split}-000000.tar", "-C", place, "."], check=True)


def check(folder: Path, samples: Sequence[Sample]) -> None:
    """What training and evaluation read is what was written, and inspect agrees."""
    data = open_data(Config(run_dir="none", data=DataConfig(shards=str(folder))), 1)
    expected = {sample.key: sample for sample in samples}
    found = 0
    for read in (data.train, data.val):
        for index in range(len(read)):
            key, image, label = read.load(index)
            # of names in folders the last part is the sample's
            sample = expected[key[-6:]]
            np.testing.assert_array_equal(image, decode_image(sample.image))
            np.testing.assert_array_equal(label, sample.label)
            found += 1
    assert found == len(expected)
    assert not inspect(folder, num_threads=1).errors


def test_shards_of_shard_writer_train_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    samples, folder = toy_samples(), tmp_path / "tars"
    by_shard_writer(folder, samples)
    before = {path: sha256_of(path) for path in folder.glob("*.tar")}
    classes(folder, name="others")
    for _ in range(2):  # again is the same
        assert main(["import", str(folder)]) == 0
    told = capsys.readouterr()
    assert "images: *.jpg, masks: *.seg.png; passed over: 12 *.cls" in told.err
    assert f"train: 8 samples\n{folder}: val: 4 samples\nnext: distseg train" in told.out
    check(folder, samples)
    assert {path: sha256_of(path) for path in folder.glob("*.tar")} == before
    # all that training asks of a manifest is as if the samples were packed
    write_maps(tmp_path / "maps.h5", "others", STANFORD, samples, len(samples))
    own = pack(tmp_path / "maps.h5", tmp_path / "own", samples_per_shard=3)
    there = Manifest.load(folder)
    assert is_verified(folder, there) and there.name == "others"
    for split, about in there.splits.items():
        assert about.class_pixels == own.splits[split].class_pixels
        assert about.void_pixels == own.splits[split].void_pixels
    there.verify(folder)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("{}.jpg", "{}.png"),
        ("{}.JPEG", "{}.seg.png"),
        ("{}.jpg", "{}_mask.png"),
        ("images/{}.jpg", "masks/{}.png"),
        ("all/images/{}.jpg", "all/labels/{}_gt.png"),
        ("city.1/{}.jpg", "city.1/{}.png"),
    ],
)
def test_tars_of_a_folder_are_understood(image: str, label: str, tmp_path: Path) -> None:
    samples = [*toy_samples()[:2], *toy_samples()[8:9]]
    by_tar(tmp_path / "tars", samples, image, label)
    import_tars(tmp_path / "tars", classes(tmp_path / "yaml"))
    check(tmp_path / "tars", samples)


def test_png_images_are_told_from_masks_by_their_folders(tmp_path: Path) -> None:
    samples = []
    for sample in (toy_samples()[0], toy_samples()[8]):
        samples.append(replace(sample, image=png(decode_image(sample.image))))
    by_tar(tmp_path / "tars", samples, "x/{}.png", "annotations/{}.png")
    import_tars(tmp_path / "tars", classes(tmp_path / "yaml"))
    check(tmp_path / "tars", samples)
    members = [Member(f"{folder}/{i}.png", "", 1, 1) for folder in "ab" for i in range(3)]
    with pytest.raises(InputError, match=r"(?s)could both be the masks.*--image '[ab]/\*\.png'"):
        chosen_patterns(members, Patterns())
    said = Patterns("b/*.png", "a/*.png")
    assert chosen_patterns(members, said) == said
    assert chosen_patterns(members, Patterns(label="b/*.png")) == Patterns("a/*.png", "b/*.png")


def test_ids_of_the_yaml_are_mapped_without_writing_masks_anew(tmp_path: Path) -> None:
    """Ids 1 to 8 with void 0, as in ADE20K: the tar keeps them, training sees 0 to 7 and 255."""
    samples = toy_samples()
    shifted = [replace(s, label=(s.label + np.uint8(1)).astype(np.uint8)) for s in samples]
    by_shard_writer(tmp_path / "tars", shifted)
    content = [{"name": name, "ids": [index + 1]} for index, name in enumerate(NAMES)]
    import_tars(tmp_path / "tars", classes(tmp_path / "yaml", classes=content, void=[0]))
    check(tmp_path / "tars", samples)


def test_splits_are_by_name_or_by_pattern(tmp_path: Path) -> None:
    folder, yaml_file = tmp_path / "tars", classes(tmp_path / "yaml")
    by_shard_writer(folder, toy_samples())
    for new, old in {
        "a-training-00-of-02.tar": "train-000000.tar",
        "b_valid_7.tar": "val-000000.tar",
    }.items():
        (folder / old).rename(folder / new)
    found = import_tars(folder, yaml_file).splits
    assert {name: split.num_samples for name, split in found.items()} == {"train": 8, "val": 4}
    found = import_tars(folder, yaml_file, splits={"x": "a*", "y": "[!a]*"}).splits
    assert {name: split.num_samples for name, split in found.items()} == {"x": 3, "y": 9}
    for splits, said in (
        ({"x": "a*"}, "is of the splits: none"),
        ({"x": "*", "y": "a*"}, "is of the splits: x, y"),
        ({"x": "*", "y": "z*"}, "no tar is called as --split y=z*"),
    ):
        with pytest.raises(InputError) as caught:
            import_tars(folder, yaml_file, splits=splits)
        assert said in caught.value.got
    assert main(["import", str(folder), "--split", "train"]) == 2


def test_unlabelled_samples_stay_so(tmp_path: Path) -> None:
    samples = toy_samples()
    samples[2] = replace(samples[2], label=None)
    by_shard_writer(tmp_path / "tars", samples)
    found = import_tars(tmp_path / "tars", classes(tmp_path / "yaml"))
    assert [info.num_unlabelled for info in found.splits["train"].shards] == [1, 0, 0]
    data = open_data(Config(run_dir="none", data=DataConfig(shards=str(tmp_path / "tars"))), 1)
    assert len(data.train) == 7


def test_who_takes_tars_for_shards_or_maps_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "x.tar").touch()
    for command in (["inspect", str(tmp_path)], ["pack", str(tmp_path), "--out", "x"]):
        assert main(command) == 2
        assert f"distseg import {tmp_path}`" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "tars"
    by_shard_writer(folder, [*toy_samples()[:2], *toy_samples()[8:9]])
    return folder


def rewritten(path: Path, change: dict[str, bytes]) -> None:
    """Other bytes for members whose names end so, or new members; the rest as it was."""
    with tarfile.open(path) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}
    for end, new in change.items():
        names = [name for name in content if name.endswith(end)] or [end]
        content[names[0]] = new
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


GOOD = toy_samples()[0]
WRONG = {
    "id 9 in 4800 pixels": {"toy_00.seg.png": png(np.full_like(GOOD.label, 9))},
    "label of (80, 60), which is the image turned": {"toy_00.seg.png": png(GOOD.label.T.copy())},
    "a mask as JPEG": {"toy_00.seg.png": GOOD.image},
    "a mask in colours": {"toy_00.seg.png": png(decode_image(GOOD.image))},
    "16 bits": {"toy_00.seg.png": png(GOOD.label.astype(np.uint16))},
    "an unreadable mask": {"toy_00.seg.png": png(GOOD.label)[:60]},
    "an unreadable image": {"toy_00.jpg": GOOD.image[:200]},
    "an image that begins with b'RIFF": {"toy_00.jpg": b"RIFF0000WEBP"},
    "1 mask without an image": {"toy_77.seg.png": png(GOOD.label)},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_used_is_one_clear_error(said: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shutil.copytree(sound, folder)
    rewritten(folder / "train-000000.tar", WRONG[said])
    with pytest.raises(InputError, match=r"train-000000\.tar: ") as caught:
        import_tars(folder, classes(tmp_path / "yaml"))
    assert said in caught.value.got
    assert {path.suffix for path in folder.iterdir()} == {".tar"}, "nothing was written"


def written(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_hidden_folders_are_passed_over_as_on_a_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hidden = (".ipynb_checkpoints/1-checkpoint.jpg", "@eaDir/1.jpg", "__MACOSX/._1.jpg", ".2.jpg")
    members = {f"x/{name}": GOOD.image for name in hidden}
    written(tmp_path / "train-0.tar", members | {"x/1.jpg": GOOD.image, "x/1.png": PNG})
    found = import_tars(tmp_path, classes(tmp_path / "yaml"))
    assert found.splits["train"].num_samples == 1
    # ._1.jpg is not worth a word
    assert "passed over: 3 hidden" in capsys.readouterr().err


PNG = png(GOOD.label)
NOT_AS_MASKS = {
    "0_seg.jpg": {"0.jpg": GOOD.image, "0_seg.jpg": GOOD.image},
    "masks/0.jpg": {"images/0.jpg": GOOD.image, "masks/0.jpg": GOOD.image},
    "0.webp": {"0.webp": b"RIFF0000WEBP", "0.png": PNG},
    "0.jpg.gz": {"0.jpg.gz": b"", "0.png": PNG},
    "0.npy": {"0.jpg": GOOD.image, "0.npy": b""},
}


@pytest.mark.parametrize("named", NOT_AS_MASKS)
def test_masks_are_never_taken_for_images(named: str, tmp_path: Path) -> None:
    written(tmp_path / "train-0.tar", NOT_AS_MASKS[named])
    with pytest.raises(InputError, match=f"(?s){named!r}.*prepare folder"):
        import_tars(tmp_path, classes(tmp_path / "yaml"))


def test_tars_joined_by_cat_are_refused(sound: Path, tmp_path: Path) -> None:
    both = b"".join(path.read_bytes() for path in sorted(sound.glob("*.tar")))
    (tmp_path / "train-0.tar").write_bytes(both)
    with pytest.raises(InputError, match="goes on behind its end"):
        import_tars(tmp_path, classes(tmp_path / "yaml"))


def test_masks_of_one_class_and_void_are_refused(tmp_path: Path) -> None:
    mask = png(np.where(GOOD.label > 0, 255, 0).astype(np.uint8))
    written(tmp_path / "train-0.tar", {"0.jpg": GOOD.image, "0.png": mask})
    with pytest.raises(InputError, match=r"(?s)and void, and no other class.*`void: \[\]`"):
        import_tars(tmp_path, classes(tmp_path / "yaml"))


def test_warnings_are_said_by_the_import(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 3
    Image.fromarray(decode_image(GOOD.image)).save(file, "JPEG", exif=exif)
    written(tmp_path / "train-0.tar", {"0.jpg": file.getvalue(), "0.png": PNG})
    import_tars(tmp_path, classes(tmp_path / "yaml"))
    assert "note: 1 sample: turned image" in capsys.readouterr().err


def test_tars_that_cannot_be_read_in_place_are_named(sound: Path, tmp_path: Path) -> None:
    folder, yaml_file = tmp_path / "tars", classes(tmp_path / "yaml")
    shutil.copytree(sound, folder)
    path = folder / "train-000000.tar"
    whole = path.read_bytes()
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("toy_05.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match=r"(?s)'toy_05\.jpg' is a link.*--dereference"):
        import_tars(folder, yaml_file)
    for content, said in (
        (b"\x1f\x8b" + bytes(600), "not compressed"),
        (whole[:3000], "copy it again"),
        # before the two blocks that precede its header
        (whole[: whole.rindex(b"toy_01.cls") - 1024], "is cut off"),
        (b"", "a whole tar"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            import_tars(folder, yaml_file)
        assert said in str(caught.value) and "train-000000.tar" in caught.value.got
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "x.tar.gz").touch()
    with pytest.raises(InputError, match=r"(?s)x\.tar\.gz.*gunzip"):
        import_tars(tmp_path / "top", yaml_file)
    with pytest.raises(InputError, match=r"but tars/train-000000\.tar for one"):
        import_tars(tmp_path, yaml_file)
    with pytest.raises(InputError, match=r"(?s)no .*nothing\.yaml.*--classes"):
        import_tars(folder, tmp_path / "nothing.yaml")


def test_keys_of_others_lead_nowhere(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shutil.copytree(sound, folder)
    rewritten(folder / "train-000000.tar", {"../../x.jpg": GOOD.image, "/y\n.jpg": GOOD.image})
    with pytest.raises(InputError, match=r"sample '_y\\n'"):
        import_tars(folder, classes(tmp_path / "yaml"))
    shutil.copy(sound / "train-000000.tar", folder)
    rewritten(folder / "train-000000.tar", {"../../x.jpg": GOOD.image})
    found = import_tars(folder, classes(tmp_path / "yaml"))
    lines = json.loads((folder / found.splits["train"].shards[0].index_file).read_text())
    assert [line["key"] for line in lines] == ["toy_00", "toy_01", "______x"]


def test_one_key_in_two_tars_is_refused(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shutil.copytree(sound, folder)
    shutil.copy(folder / "train-000000.tar", folder / "val-000001.tar")
    with pytest.raises(InputError, match=r"2 keys .* 'toy_00' in train-000000.tar, val-000001"):
        import_tars(folder, classes(tmp_path / "yaml"))


def test_pack_never_replaces_tars_of_others(sound: Path, toy_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shutil.copytree(sound, folder)
    import_tars(folder, classes(tmp_path / "yaml", name="toy blobs"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for how in ({}, {"overwrite": True}, {"append": True}):
        with pytest.raises(InputError, match="shards of others"):
            pack(toy_shards.parent / "maps.h5", folder, **how)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InputError, match="holds shards of `distseg pack`"):
        import_tars(toy_shards, classes(tmp_path / "yaml"))


def test_damage_after_the_import_is_found(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shutil.copytree(sound, folder)
    import_tars(folder, classes(tmp_path / "yaml"))
    path = folder / "train-000000.tar"
    whole, rng = path.read_bytes(), np.random.default_rng(2)
    for _ in range(8):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert {error.shard for error in inspect(folder, num_threads=1).errors} == {path.name}


@pytest.mark.parametrize(
    ("mode", "bits"), [("L", 8), ("L", 4), ("L", 2), ("P", 8), ("P", 2), ("1", 1), ("RGB", 8)]
)
def test_masks_are_read_as_they_are_stored(mode: str, bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2 ** min(bits, 2), (9, 14)).astype(np.uint8)
    table = np.full(256, -1, np.int16)
    table[:4] = [3, 255, 0, 1]
    if mode == "L" and bits < 8:
        content = low_gray(values, bits)
    elif mode == "P":
        picture = Image.fromarray(values, "P")
        picture.putpalette([*range(256)] * 3 if bits == 8 else [*range(12)])
        file = io.BytesIO()
        picture.save(file, "PNG", bits=bits)
        content = file.getvalue()
    elif mode == "1":
        content = png(values.astype(bool))
    else:
        content = png(np.repeat(values[..., None], 3, axis=2) if mode == "RGB" else values)
    assert content[24] == bits
    np.testing.assert_array_equal(decode_coded_label(content, table), table[values])
    with pytest.raises(InputError, match="id 1 in"):
        decode_coded_label(content, np.where(np.arange(256) == 1, -1, table).astype(np.int16))


def low_gray(values: np.ndarray, bits: int) -> bytes:
    """A gray PNG of few bits, by OpenCV's side of the specification: rows packed from the left."""
    height, width = values.shape
    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row.tolist())
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


def test_an_id_is_what_the_star_stands_for() -> None:
    assert id_of("a/b.JPEG", "*.jpg") == "a/b" and id_of("a/b.jpg", "a/*.jpg") == "b"
    assert id_of("b.jpg", "a/*.jpg") == id_of("b.jpg", "") == id_of(".jpg", "*.jpg") == ""
    with pytest.raises(InputError, match=r"pattern '\*/\*\.png'"):
        chosen_patterns([], Patterns("*/*.png"))
    with pytest.raises(InputError, match=r"members: 2 \*\.webp"):
        chosen_patterns([Member(f"{i}.webp", "", 1, 1) for i in range(2)], Patterns())


def test_the_example_of_the_documentation_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "foreign_shards.md").read_text()
    program = page.partition("<<'END'\n")[2].partition("    END\n")[0]
    layout = "name: street" + page.partition("    name: street")[2].partition("\n\n")[0]
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(program), {})
    Path("classes.yaml").write_text(textwrap.dedent("    " + layout))
    assert main(["import", ".", "--classes", "classes.yaml"]) == 0
    found = Manifest.load(tmp_path)
    assert found.name == "street" and found.classes.names == ("sky", "road")
    assert found.splits["val"].class_pixels == (4 * 48 * 128, 4 * 48 * 128)
