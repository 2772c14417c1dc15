"""Views and data sets of the user's own: the same pixels for all ranks and workers, and bad ones
refused.
"""

from __future__ import annotations

import json
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distseg.cli import main
from distseg.config import loading
from distseg.data.own_view import OwnView
from distseg.data.plan import Plan, augmentation_rng
from distseg.data.samples import SampleSet
from distseg.data.stream import Batch, TrainStream
from distseg.data.transforms import TrainView
from distseg.train.inputs import open_data
from shards import user_code
from shards.errors import InputError
from shards.maps import MapsReader
from shards.prepare import prepare
from shards.reader import ShardReader

EXAMPLES = Path(__file__).parent.parent / "examples"
CUT_OUT = f"{EXAMPLES}/own_view.py:CutOut"
NUM_CLASSES = 8

VIEWS = """
import random
import numpy as np
def flipped(image, label, rng):
    return image[:, ::-1], label[:, ::-1]
def shifted(image, label, rng, by):
    return image + np.uint8(by), label
def nothing(image, label, rng): pass
def cropped(image, label, rng): return image[1:], label
def floats(image, label, rng): return image / 255, label
def lists(image, label, rng): return image, label.tolist()
def classes(image, label, rng): return image, np.full_like(label, 77)
def fails(image, label, rng): raise IndexError("of what")
def own_numbers(image, label, rng):
    return image if random.random() < 0.5 else image[:, ::-1], label
class NoCall:
    pass
"""


@pytest.fixture
def views(tmp_path: Path) -> str:
    (tmp_path / "views.py").write_text(VIEWS)
    return f"{tmp_path}/views.py"


def batches(shards: Path, own: OwnView | None, rank: int, world_size: int, how: str) -> list[Batch]:
    source = TrainStream(
        SampleSet(ShardReader(shards, "train")),
        Plan(8, seed=5),
        TrainView(48, 0.5, 1.5, color_jitter=0.4, own=own),
        batch_size=6,
        rank=rank,
        world_size=world_size,
        num_threads=0 if how == "caller" else 2,
        worker_type="process" if how == "process" else "thread",
    )
    with closing(source):
        return list(islice(source, 3))


def test_an_own_view_gives_the_same_pixels_on_all_ranks_and_workers(toy_shards: Path) -> None:
    own = OwnView(CUT_OUT, {"side_px": 20}, NUM_CLASSES)
    plain = batches(toy_shards, None, 0, 1, "caller")
    expected = batches(toy_shards, own, 0, 1, "caller")
    cut_out = user_code.load(CUT_OUT, "data.view").value(20)
    for step, (before, after) in enumerate(zip(plain, expected, strict=True)):
        for place in range(6):
            # by hand: the plain view, and the square from the generator after the view's own draws
            rng = augmentation_rng(5, 6 * step + place)
            rng.random(10 * 7), rng.random(10 * 3)
            image = before.image[place].permute(1, 2, 0).contiguous().numpy()
            image, label = cut_out(image, before.label[place].numpy(), rng)
            assert np.array_equal(after.image[place].permute(1, 2, 0).numpy(), image)
            assert np.array_equal(after.label[place].numpy(), label)
            assert (image == 128).all(2).sum() >= 1
    for how in ("thread", "process"):
        ranks = [batches(toy_shards, own, rank, 2, how) for rank in range(2)]
        for step, whole in enumerate(expected):
            assert torch.equal(torch.cat([of[step].image for of in ranks]), whole.image)
            assert torch.equal(torch.cat([of[step].label for of in ranks]), whole.label)


def test_a_view_may_be_a_function_and_return_views_of_its_arguments(views: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    label = rng.integers(0, 8, (6, 6), dtype=np.uint8)
    mirrored = image[:, ::-1].copy(), label[:, ::-1].copy()
    OwnView(f"{views}:flipped", {}, NUM_CLASSES)(image, label, rng)
    assert np.array_equal(image, mirrored[0]) and np.array_equal(label, mirrored[1])
    OwnView(f"{views}:shifted", {"by": 3}, NUM_CLASSES)(image, label, rng)
    assert np.array_equal(image, mirrored[0] + np.uint8(3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "answers with a NoneType"),
        ("cropped", {}, r"gives image \(47, 48, 3\) uint8 for \(48, 48, 3\)"),
        ("floats", {}, r"gives image \(48, 48, 3\) float64"),
        ("lists", {}, "gives a list as label"),
        ("classes", {}, "(?s)gives class 77.*0 to 7, or 255"),
        ("fails", {}, "IndexError: of what .*views.py, line"),
        ("own_numbers", {}, "(?s)with the same rng, differ.*all randomness from rng"),
        ("NoCall", {}, "a class without __call__"),
        ("shifted", {}, "(?s)without by.*data.view_options.by="),
        ("flipped", {"by": 1}, "data.view_options.by, which flipped does not have"),
        ("absent", {}, "no absent in"),
    ],
)
def test_what_is_no_view_is_refused(
    toy_shards: Path, views: str, name: str, options: dict[str, int], message: str
) -> None:
    overrides = [f"data.view_options.{key}={value}" for key, value in options.items()]
    config = loading.load(
        [f"data.shards={toy_shards}", "data.crop_px=48", f"data.view={views}:{name}", *overrides]
    )
    with pytest.raises(InputError, match=message):
        open_data(config, 1)


def test_keys_of_a_view_are_checked() -> None:
    for key, value in (("view", "flip"), ("view_options.by", "1")):
        with pytest.raises(InputError, match=f"data.{key}"):
            loading.load(["data.shards=unused", f"data.{key}={value}"])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Ten images with masks of two classes."""
    root, rng = tmp_path / "raw", np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(10):
        pixels = rng.integers(0, 256, (20, 30 + number, 3), dtype=np.uint8)
        mask = rng.choice(np.array([0, 1, 255], np.uint8), (20, 30 + number))
        Image.fromarray(pixels).save(root / "images" / f"{number}.jpg")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


def test_a_data_set_is_prepared_alike_in_both_forms_and_by_workers(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = f"{EXAMPLES}/own_data.py"
    for out, name, more in (
        ("tasks", "samples", []),
        ("workers", "samples", ["--workers", "2"]),
        ("generator", "one_by_one", []),
    ):
        arguments = ["prepare", f"{source}:{name}", "--root", str(raw), "val_share=0.3", *more]
        assert main([*arguments, "--out", str(tmp_path / f"{out}.h5")]) == 0
    assert "7 train, 3 val" in capsys.readouterr().out
    contents = []
    for out in ("tasks", "workers", "generator"):
        with MapsReader(tmp_path / f"{out}.h5") as reader:
            assert reader.name == "own_data"
            keys = [key for split in reader.splits.values() for key in split]
            samples = [reader.read(key) for key in keys]
            contents.append([(it.key, it.image, it.label.tobytes(), it.split) for it in samples])
            for it in samples:
                mask = np.array(Image.open(raw / "masks" / f"{it.key}.png"))
                assert np.array_equal(it.label, mask)
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 10


def test_a_changed_preparer_goes_on_from_nothing(raw: Path, tmp_path: Path) -> None:
    """Parts that the file as it was has written must not be mixed with those of the new one."""
    file = tmp_path / "mine.py"
    text = (EXAMPLES / "own_data.py").read_text()
    broken = text.replace(
        "    return Sample(", "    if key == '9': raise OSError('gone')\n    return Sample("
    )
    file.write_text(broken.replace("shards.prepare.parts", ""))
    (raw / "images" / "0.jpg").rename(raw / "images" / "00.jpg")
    (raw / "masks" / "0.png").rename(raw / "masks" / "00.png")
    for number in range(10, 40):  # more than one part
        for folder, suffix in (("images", "jpg"), ("masks", "png")):
            content = (raw / folder / f"1.{suffix}").read_bytes()
            (raw / folder / f"{number}.{suffix}").write_bytes(content)
    out = tmp_path / "maps.h5"
    with pytest.raises(InputError, match="9: OSError: gone"):
        prepare(f"{file}:samples", raw, out)
    assert list((tmp_path / ".maps.h5.parts").glob("*.h5"))
    file.write_text(
        text.replace("np.array(Image.open(mask))", "1 - np.array(Image.open(mask)) // 255")
    )
    prepare(f"{file}:samples", raw, out)
    with MapsReader(out) as reader:
        for key in (key for split in reader.splits.values() for key in split):
            mask = np.array(Image.open(raw / "masks" / f"{key}.png"))
            assert np.array_equal(reader.read(key).label, 1 - mask // 255)


def test_bad_samples_of_an_own_data_set_are_left_out_on_request(raw: Path, tmp_path: Path) -> None:
    (raw / "masks" / "3.png").unlink()
    (raw / "masks" / "4.png").write_bytes(b"no picture")
    name = f"{EXAMPLES}/own_data.py:samples"
    with pytest.raises(
        InputError, match=r"1 of 10 samples are not whole, the first: 3: no .*3.png"
    ):
        prepare(name, raw, tmp_path / "maps.h5")
    made = prepare(name, raw, tmp_path / "maps.h5", skip_bad=True)
    assert set(made.left_out) == {"3", "4"} and sum(made.num_samples.values()) == 8


PREPARERS = """
from shards.prepare.dataset import DataSet, Task
from shards.sample import ClassSet, Sample
def number(root): return 3
def without_classes(root):
    yield 1
def fails(root): return 1 / 0
def needs(root, year): return 1
"""
GENERATORS = """
from shards.sample import ClassSet
CLASSES = ClassSet(("a",), ((0, 0, 0),))
def numbers(root):
    yield 1
def none(root):
    yield from ()
def fails(root):
    yield from [1 / 0]
"""


@pytest.mark.parametrize(
    ("source", "name", "how", "message"),
    [
        (PREPARERS, "number", {}, "gives a int"),
        (PREPARERS, "without_classes", {}, "(?s)has no CLASSES.*CLASSES = ClassSet"),
        (PREPARERS, "fails", {}, "ZeroDivisionError: division by zero .*mine.py, line"),
        (PREPARERS, "needs", {}, "without year"),
        (PREPARERS, "needs", {"yeer": "1"}, "(?s)option 'yeer'.*one of: year"),
        (PREPARERS, "absent", {}, "no absent in"),
        (GENERATORS, "numbers", {}, "(?s)gives a int.*shards.sample.Sample"),
        (GENERATORS, "none", {}, "gives no sample"),
        (GENERATORS, "fails", {}, "ZeroDivisionError"),
        (GENERATORS, "none", {"skip_bad": True}, "--workers or --skip-bad"),
        (GENERATORS, "none", {"workers": 2}, "--workers or --skip-bad"),
    ],
)
def test_what_is_no_preparer_is_refused_and_nothing_written(
    tmp_path: Path, source: str, name: str, how: dict, message: str
) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(InputError, match=message):
        prepare(f"{tmp_path}/mine.py:{name}", tmp_path, tmp_path / "maps.h5", **how)
    assert not list(tmp_path.glob("*.h5"))


@pytest.mark.slow
def test_three_small_images_go_the_whole_way(tmp_path: Path) -> None:
    for name in "abc":
        label = np.zeros((60, 80), np.uint8)
        label[20 + 10 * (ord(name) % 3) :] = 1
        for folder, array in (
            ("images", label[..., None] * np.uint8([90, 80, 70])),
            ("masks", label),
        ):
            (tmp_path / "street" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "street" / folder / f"{name}.png")
    (tmp_path / "street" / "distseg.yaml").write_text("classes: [sky, road]\n")
    maps, shards, run_dir = (str(tmp_path / name) for name in ("maps.h5", "shards", "run"))
    street = str(tmp_path / "street")
    assert main(["prepare", "folder", "--root", street, "--out", maps]) == 0
    assert main(["pack", maps, "--out", shards]) == 0
    own = ["preset=own", f"data.shards={shards}", f"run_dir={run_dir}", "steps=2", "batch_size=4"]
    quick = ["precision=fp32", "segmentor.init=random", "tracking.wandb=disabled"]
    assert main(["train", *own, *quick, "evaluate.num_pictures=1"]) == 0
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["num_images"] == 1 and scores["step"] == 2
    images = str(tmp_path / "street" / "images")
    assert main(["predict", run_dir, images, "--out", str(tmp_path / "out")]) == 0
    found = np.array(Image.open(tmp_path / "out" / "a.png"))
    assert found.shape == (60, 80) and set(np.unique(found)) <= {0, 1}
