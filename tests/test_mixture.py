"""Several data sets in one run: shares, epochs and order, classes by name, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

import distseg
from distseg.cli import main
from distseg.config import loading
from distseg.config.schema import Config, DataConfig
from distseg.data.mixture import Mixture, mixed_plan
from distseg.data.partners import partners
from distseg.data.plan import BalancedPlan, BlockPlan, MixedPlan, Plan
from distseg.data.samples import SampleSet
from distseg.data.stream import TrainStream
from distseg.data.transforms import TrainView
from distseg.distributed.ranks import Ranks
from distseg.evaluate.run import open_samples
from distseg.runs.checkpoint import Checkpoint, read_best
from distseg.train.assembly import _checkpoints
from distseg.train.headline import _scored_too, about_scores
from distseg.train.inputs import open_data
from shards.errors import InputError
from shards.manifest import Manifest
from shards.maps import write_maps
from shards.pack import pack
from shards.reader import ShardReader
from shards.sample import STANFORD, ClassSet, Sample
from tests.conftest import toy_samples
from tests.ranks import leave_out
from tests.test_remote import Server, needs
from tests.tiny import SETTINGS, contents

ORDER = (5, 2, 7, 0, 3, 6, 1, 4)  # of the other set's classes: which of Stanford's each is
OTHER = ClassSet(
    tuple(STANFORD.names[index] for index in ORDER),
    tuple(STANFORD.palette[index] for index in ORDER),
)


def flipped(classes: ClassSet) -> list[Sample]:
    """Other images than the toy ones, five to train on: the same labels whatever the classes' order
    is.
    """
    table = np.full(256, 255, np.uint8)
    for index, name in enumerate(STANFORD.names):
        table[index] = classes.names.index(name)
    samples = []
    for sample in (*toy_samples()[:5], *toy_samples()[8:10]):
        pixels = simplejpeg.decode_jpeg(sample.image)[:, ::-1]
        image = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95)
        label = table[sample.label[:, ::-1]]
        samples.append(replace(sample, image=image, label=label))
    return samples


def packed(folder: Path, name: str, classes: ClassSet, samples: list[Sample]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_maps(folder / "maps.h5", name, classes, samples, total=len(samples))
    pack(folder / "maps.h5", folder / "shards", samples_per_shard=2)
    return folder / "shards"


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of the same names in another order."""
    return packed(tmp_path_factory.mktemp("other"), "flipped", OTHER, flipped(OTHER))


@pytest.fixture(scope="module")
def same_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images and labels, the classes in the order of the first set."""
    return packed(tmp_path_factory.mktemp("same"), "flipped", STANFORD, flipped(STANFORD))


MODE = "mode=semi_supervised"
WEIGHTS = [(1, 1), (3, 1), (0, 2), (2, 3, 7), (Fraction(1, 10), Fraction(1, 3), 5, 1)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("block", [1, 4, 16, 30])
def test_every_block_has_each_sets_share_and_none_drifts(weights: Any, block: int) -> None:
    """By Fractions, position by position: counts, and each plan's positions 0, 1, 2, ..."""
    weights = [Fraction(weight) for weight in weights]
    plan = MixedPlan([Plan(7 + n, n) for n in range(len(weights))], weights, block, seed=3)
    counts, own = [0] * len(weights), [[] for _ in weights]
    for position in range(block * 200):
        number, place = plan.place(position)
        counts[number] += 1
        own[number].append(place)
        if (position + 1) % block == 0:
            assert plan.taken(position + 1) == counts
            exact = [weight / sum(weights) * (position + 1) for weight in weights]
            bound = len(weights) - 1
            assert all(
                abs(got - want) < bound + (want == got)
                for got, want in zip(counts, exact, strict=True)
            )
    assert all(sorted(places) == list(range(len(places))) for places in own)
    # far away: as quickly, and as exactly
    start = 10**15 * block
    taken = [plan.taken(start), plan.taken(start + block)]
    there = Counter(plan.place(position)[0] for position in range(start, start + block))
    assert [b - a for a, b in zip(*taken, strict=True)] == [
        there[number] for number in range(len(weights))
    ]


def test_where_in_a_block_a_set_comes_is_by_chance() -> None:
    """Chi-square of the places that the rarer set has, of pairs of neighbouring blocks too."""
    plan = MixedPlan([Plan(50, 1), Plan(50, 2)], [Fraction(3), Fraction(1)], 8, seed=11)
    numbers = np.array([plan.place(position)[0] for position in range(8 * 2000)]).reshape(-1, 8)
    assert (numbers.sum(axis=1) == 2).all()
    counts = numbers.sum(axis=0)
    # 7 degrees of freedom: 29.9 is passed once in 10,000 draws; without replacement even less
    assert ((counts - 500) ** 2 / 500).sum() < 29.9
    both = (numbers[:-1] & numbers[1:]).sum()
    assert abs(both - 1999 * 8 / 16) < 5 * (1999 * 8 / 16) ** 0.5
    other = MixedPlan([Plan(50, 1), Plan(50, 2)], [Fraction(3), Fraction(1)], 8, seed=12)
    assert [other.place(p) for p in range(800)] != [plan.place(p) for p in range(800)]


def mixture(*shards: Path | str, cache: Path | None = None) -> Mixture:
    options = {"cache_dir": str(cache)} if cache else {}
    readers = [ShardReader(folder, "train", **options) for folder in shards]
    table = partners(STANFORD.names, readers[-1].classes.names, {}, name="flipped")
    sets = [SampleSet(readers[0])]
    sets += [SampleSet(reader, mapped=(STANFORD, table)) for reader in readers[1:]]
    return Mixture(sets, [f"set {number}" for number in range(len(sets))])


def stream(samples: Mixture, rank: int, world_size: int, start_step: int = 0) -> TrainStream:
    plan = mixed_plan(samples, DataConfig(), [2, 1], batch_size=12, seed=5)
    return TrainStream(
        samples,
        plan,
        TrainView(48, 0.5, 1.5),
        batch_size=12,
        rank=rank,
        world_size=world_size,
        num_threads=0,
        start_step=start_step,
    )


def batches(samples: Mixture, world_size: int, start: int, end: int) -> list[torch.Tensor]:
    """Images and labels of the global batches of these steps, put together from the ranks."""
    parts = []
    for rank in range(world_size):
        with closing(stream(samples, rank, world_size, start)) as source:
            parts.append([next(source) for _ in range(start, end)])
    joined = []
    for step in zip(*parts, strict=True):
        joined += [torch.cat([part.image for part in step]), torch.cat([p.label for p in step])]
    return joined


def test_any_number_of_ranks_and_a_stop_in_the_middle_give_the_same_images(
    toy_shards: Path, other_shards: Path
) -> None:
    samples = mixture(toy_shards, other_shards)
    whole = batches(samples, 1, 0, 4)
    for world_size in (2, 3, 4):
        parts = batches(samples, world_size, 0, 2) + batches(samples, 6 - world_size, 2, 4)
        assert all(torch.equal(*pair) for pair in zip(parts, whole, strict=True))


def test_each_set_goes_through_its_own_epochs(toy_shards: Path, other_shards: Path) -> None:
    """8 images to 2 of 3, and 5 to 1 of 3: the second ends and begins again by itself."""
    samples = mixture(toy_shards, other_shards)
    plan = mixed_plan(samples, DataConfig(), [2, 1], batch_size=12, seed=5)
    drawn = [plan.sample_index(position) for position in range(12 * 20)]
    first, second = ([i for i in drawn if (i < 8) == of_first] for of_first in (True, False))
    assert (len(first), len(second)) == (160, 80)
    for indices, size, begin in ((first, 8, 0), (second, 5, 8)):
        for epoch in range(len(indices) // size):
            part = indices[epoch * size : (epoch + 1) * size]
            assert sorted(part) == list(range(begin, begin + size))
    with closing(stream(samples, 0, 1)) as source:
        assert source.told(20) == {
            "data/share/set 0": 160 / 240,
            "data/epochs/set 0": 20.0,
            "data/share/set 1": 80 / 240,
            "data/epochs/set 1": 16.0,
        }


def test_one_set_is_in_its_own_order(toy_shards: Path) -> None:
    samples = mixture(toy_shards)
    plan = mixed_plan(samples, DataConfig(), [], batch_size=6, seed=9)
    assert [plan.sample_index(p) for p in range(100)] == [
        Plan(8, 9).sample_index(p) for p in range(100)
    ]
    with closing(TrainStream(samples, plan, TrainView(48), batch_size=6, **ALONE)) as source:
        assert source.told(3) == {}


ALONE: dict[str, Any] = {"rank": 0, "world_size": 1, "num_threads": 0}


def test_each_set_is_sampled_as_configured(toy_shards: Path, other_shards: Path) -> None:
    samples = mixture(toy_shards, other_shards)
    for options, kind in (
        (DataConfig(sampling="class_balanced"), BalancedPlan),
        (DataConfig(shuffle_block=2), BlockPlan),
    ):
        plan = mixed_plan(samples, options, [], batch_size=13, seed=1)
        assert [type(one) for one in plan.plans] == [kind, kind]
        assert plan.plans[0].seed != plan.plans[1].seed  # or sets of one size would go in step
        # by default as many as each has: 8 to 5
        assert plan.taken(13) == [8, 5]


@pytest.fixture
def server(other_shards: Path) -> Iterator[Server]:
    needs("fsspec", "aiohttp")
    serving = Server(other_shards)
    yield serving
    serving.close()


def test_a_far_set_beside_a_near_one(
    server: Server, toy_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    near = mixture(toy_shards, other_shards)
    far = mixture(toy_shards, server.url, cache=tmp_path)
    pairs = zip(batches(near, 1, 0, 3), batches(far, 1, 0, 3), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(count == 1 for name, count in server.counts().items() if name.endswith(".tar"))


def test_the_counts_of_pixels_follow_the_classes(toy_shards: Path, other_shards: Path) -> None:
    samples = mixture(toy_shards, other_shards)
    counts = samples.class_pixels()
    for index in range(len(samples)):
        label = samples.load(index)[2]
        assert np.array_equal(np.bincount(label.ravel(), minlength=256)[:8], counts[index])
    # three quarters of every batch are of the first set, and so of what is counted
    weighted = samples.class_pixels([3, 1])
    of_first = weighted[: len(samples.sets[0])].sum() / samples.sets[0].class_pixels().sum()
    of_second = weighted[len(samples.sets[0]) :].sum() / samples.sets[1].class_pixels().sum()
    sizes = [len(one) for one in samples.sets]
    assert of_first / of_second == pytest.approx(3 * sizes[1] / sizes[0])
    # the last class of the set stands for two of the run's, and its first for none
    run = ("b", "c")
    table = partners(run, ("A", "x", "c"), {"b": "x", "void": "A"}, name="set")
    assert table is not None and table[:3].tolist() == [255, 0, 1] and (table[3:] == 255).all()
    with pytest.raises(InputError):
        partners(run, ("A", "x", "c"), {"b": "x"}, name="set")


def fit(shards: list[Path], run_dir: Path, *words: str, **keys: Any) -> Any:
    named = "[" + ",".join(map(str, shards)) + "]"
    overrides = [f"data.shards={named}", f"run_dir={run_dir}", *words]
    return distseg.fit(overrides, **SETTINGS | keys)


@pytest.fixture(scope="module", autouse=True)
def bare_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch.setattr)
        yield


@pytest.mark.slow
def test_classes_in_another_order_train_and_score_as_in_the_same(
    toy_shards: Path, other_shards: Path, same_shards: Path, tmp_path: Path
) -> None:
    """To the bit, on several sets and where the second one is scored."""
    runs = []
    for name, second in (("other", other_shards), ("same", same_shards)):
        words = [f"data.val_shards={second}", "data.weights=[3,1]", "mode=supervised"]
        runs.append(fit([toy_shards, second], tmp_path / name, *words))
    step = "checkpoints/step-00000002"
    weights = [contents(run.run_dir / step, "segmentor*") for run in runs]
    assert weights[0] == weights[1]
    scores = [{k: v for k, v in run.scores.items() if k.startswith("val/")} for run in runs]
    assert scores[0] == scores[1] and scores[0]["val/mean_iou"] > 0
    # afterwards as well, by the names of the other set's classes
    again = distseg.load(runs[0].run_dir, device="cpu").evaluate(quick=True)
    assert again["val/mean_iou"] == pytest.approx(scores[0]["val/mean_iou"], abs=1e-12)
    rows = [json.loads(line) for line in (runs[0].run_dir / "metrics.jsonl").open()]
    told = [row for row in rows if "data/share/flipped" in row]
    assert [row["data/share/toy_blobs"] for row in told] == [0.75, 0.75]
    assert [row["data/epochs/flipped"] for row in told] == [1 / 5, 2 / 5]


def test_a_run_is_held_to_all_of_its_sets(
    toy_shards: Path, other_shards: Path, same_shards: Path, tmp_path: Path
) -> None:
    labelled = {"data": SETTINGS["data"] | {"labelled": "1/2"}, "batch_size": 2, "steps": 1}
    both, run_dir = [toy_shards, other_shards], tmp_path / "run"
    fit(both, run_dir, "mode=supervised", **labelled)
    listed = (run_dir / "labelled.txt").read_text().split()
    # half of each, drawn as if it were alone
    assert [line.rpartition("/")[0] for line in listed] == ["toy_blobs"] * 4 + ["flipped"] * 2
    alone = Config(data=DataConfig(shards=[str(toy_shards)], labelled="1/2"), run_dir="none")
    assert [f"toy_blobs/{key}" for key in open_data(alone, 1).train.keys] == listed[:4]
    # the list that was written is what a further attempt goes by
    config = loading.from_file(run_dir / "config.yaml")
    assert open_data(config, 1).train.keys == listed
    assert open_data(replace(config, data=replace(config.data, labelled_seed=1)), 1).train.keys == (
        listed
    )
    with pytest.raises(InputError, match="manifests_sha256"):
        fit([toy_shards, same_shards], run_dir, "mode=supervised", **labelled)


def test_unlabelled_images_may_be_of_sets_of_their_own(
    toy_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    """Their labels are not read, so that their classes may be any."""
    strange = ClassSet(tuple("abcdefgh"), STANFORD.palette)
    third = [replace(sample, key=f"third_{sample.key}") for sample in toy_samples()[::-1][4:]]
    third_shards = packed(tmp_path / "third", "third", strange, third)
    words = [f"data.unlabelled_shards=[{other_shards},{third_shards}]", "mode=consistency"]
    words += ["data.unlabelled_weights=[1,3]", "consistency.weight=1", "semi.batch_size=4"]
    done = fit([toy_shards], tmp_path / "run", *words)
    rows = [json.loads(line) for line in (done.run_dir / "metrics.jsonl").open()]
    told = [row for row in rows if "data/unlabelled_share/third" in row]
    assert [row["data/unlabelled_share/third"] for row in told] == [0.75, 0.75]
    assert not any(name.startswith("data/share") for row in rows for name in row)
    config = loading.from_file(done.run_dir / "config.yaml")
    data = open_data(config, 1)
    assert data.unlabelled is not None and len(data.unlabelled) == 5 + 8 and len(data.train) == 8
    assert not data.unlabelled.load(0)[2].any()
    assert data.unlabelled.classes == STANFORD


def test_the_source_is_scored_beside_the_target(
    toy_shards: Path, other_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A class that is neither there nor predicted has no IoU, which JSON says as null."""
    samples = toy_samples()
    for sample in samples:
        sample.label[sample.label != sample.label[0, 0]] = 255  # one class is left
    source = packed(tmp_path / "source", "source", STANFORD, samples)
    words = [f"data.unlabelled_shards={other_shards}", f"data.val_shards={other_shards}"]
    words += ["mode=domain_adaptation", "consistency.weight=1"]
    words += ["adaptation.input=self_information", "consistency.gate=rank", "ema_decay=0.9"]
    words += ["strong.labelled=true"]
    words += ["consistency.start_step=1", "evaluate.subsets={two: [Sky, road]}"]
    done = fit([source], tmp_path / "run", *words, steps=2, discriminator={"name": "large_fov"})
    written = json.loads((done.run_dir / "evaluation.json").read_text())
    assert None in [written[f"source/iou/{name}"] for name in STANFORD.names]
    assert 0 <= written["source/mean_iou"] <= 1 and written["data"] == "flipped"
    rows = [json.loads(line) for line in (done.run_dir / "metrics.jsonl").open()]
    assert 0 < rows[0]["adaptation/target_entropy"] <= 1
    assert 0 < rows[0]["adaptation/source_entropy"] <= 1
    # one class is left of the source's labels, and shares are of all that is predicted there
    for prefix in ("val", "source"):
        shares = [written[f"{prefix}/predicted_share/{name}"] for name in STANFORD.names]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    predicted = np.array(written["confusion"]).sum(0)
    assert written["val/predicted_share/sky"] == pytest.approx(predicted[0] / predicted.sum())
    other = shutil.copytree(done.run_dir, tmp_path / "other")
    call = ["pictures", str(done.run_dir), "--out", str(tmp_path / "out"), "device=cpu"]
    call += ["evaluate.num_pictures=1", "--beside"]
    assert main([*call, str(other)]) == 0 and len([*(tmp_path / "out/beside").iterdir()]) == 1
    assert (tmp_path / "out" / "shares.png").is_file()
    assert main([*call, str(done.run_dir)]) == 2  # beside itself
    two = (written["val/iou/sky"] + written["val/iou/road"]) / 2
    assert written["val/mean_iou_of/two"] == pytest.approx(two)
    for asked, got in (("[sky, rode]", "'rode'"), ("[sky, Sky]", "['sky', 'Sky']")):
        with pytest.raises(InputError, match=re.escape(got)):
            overrides = [f"evaluate.subsets={{two: {asked}}}"]
            distseg.load(done.run_dir, device="cpu").evaluate(quick=True, overrides=overrides)
    with pytest.raises(InputError, match=r"subsets\.two=sky"):
        named(source, other_shards, "evaluate.subsets={two: sky}")
    best = read_best(done.run_dir / "checkpoints")
    assert best["chosen_by"] == {"data": "flipped", "split": "val", "domain": "target"}
    caplog.clear()
    distseg.load(done.run_dir, device="cpu")
    assert not caplog.records
    distseg.load(done.run_dir, "best", device="cpu")
    (line,) = caplog.messages
    assert line.endswith("chosen by labels of the target (flipped, val); `last` is not")


def test_the_source_is_scored_wherever_validation_is_on_other_data(
    toy_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    """Of a run on it alone too, by what the sets hold; and older runs go on, by their manifests."""
    copy = shutil.copytree(toy_shards, tmp_path / "copy")
    alone = ["mode=supervised", "run_dir=none", "batch_size=4"]
    taught = [*alone, "mode=consistency", "consistency.weight=1", "ema_decay=0.9"]
    taught.append(f"data.unlabelled_shards={other_shards}")
    for words, shards, val, expected, listed in (
        (alone, toy_shards, other_shards, None, [0, 1]),
        ([*alone, "evaluate.first_set=true"], toy_shards, other_shards, 4, [0, 1]),
        (taught, toy_shards, other_shards, 4, [0, 1, 1, 0]),
        ([*alone, "evaluate.first_set=true"], toy_shards, copy, None, None),
        ([*alone, "evaluate.first_set=true"], toy_shards, f"{toy_shards}/", None, None),
    ):
        config = loading.load([f"data.shards={shards}", f"data.val_shards={val}", *words])
        data = open_data(config, 1)
        assert (None if data.source is None else len(data.source)) == expected
        identity = _checkpoints(config, Ranks(0, 1, 0, torch.device("cpu")), data)._identity
        sums = [Manifest.load(Path(folder)).sha256 for folder in (shards, val)]
        wanted = None if listed is None else [sums[number] for number in listed]
        assert identity.get("manifests_sha256") == wanted


@pytest.mark.parametrize("key", ["schedule.name=plateau", "schedule.early_stop_patience=3"])
def test_no_label_of_the_target_decides_on_the_course_of_a_run(
    toy_shards: Path, other_shards: Path, key: str
) -> None:
    adapts = [f"data.unlabelled_shards={other_shards}", key, "evaluate.every_steps=1"]
    adapts += ["mode=domain_adaptation", "discriminator=large_fov"]
    on_target = [*adapts, f"data.val_shards={other_shards}"]
    refused([toy_shards], f"{key} with validation on flipped, the target", *on_target)
    # the source's labels are there
    alone = [f"data.shards={toy_shards}", "run_dir=none", "batch_size=4"]
    assert open_data(loading.load([*alone, *adapts]), 1).domain == "own"


def test_whose_labels_validate_follows_from_what_a_data_set_holds(
    toy_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(other_shards, tmp_path / "copy")
    alone = [f"data.shards={toy_shards}", "run_dir=none", "batch_size=4"]
    taught = ["mode=consistency", "consistency.weight=1", "ema_decay=0.9"]
    target = [f"data.unlabelled_shards={other_shards}", f"data.val_shards={copy}"]
    adversary = ["mode=domain_adaptation", "discriminator=large_fov"]
    half, val = "data.labelled=1/2", f"data.val_shards={copy}"
    for words, domain, warning in (
        ([*adversary, half], "own", None),
        (
            [*adversary, target[0]],
            "own",
            r"toy_blobs \(val\), which has the labels: no score",
        ),
        ([*adversary, *target], "target", None),
        ([*taught, *target], "target", None),
        ([*adversary, val, half], "target", r"flipped \(val\), none of the unlabelled"),
        ([*taught, val, half], "other", None),
        (["mode=supervised", val], "other", None),
        (["mode=supervised", f"data.val_shards={toy_shards}/"], "own", None),
    ):
        config = loading.load([*alone, *words])
        data = open_data(config, 1)
        name = "toy_blobs" if domain == "own" else "flipped"
        assert data.chosen_by == {"data": name, "split": "val", "domain": domain}
        told = about_scores(config, data)
        assert len(told) == (warning is not None) and (not told or re.search(warning, told[0]))


def refused(shards: list[Path], message: str, *words: str, **data: Any) -> None:
    named = "[" + ",".join(map(str, shards)) + "]"
    with pytest.raises(InputError, match=message):
        config = loading.load([f"data.shards={named}", "run_dir=none", "batch_size=4", *words])
        open_data(replace(config, data=replace(config.data, **data)), 1)


def test_what_cannot_be_mixed_is_refused_before_training(
    toy_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    both = [toy_shards, other_shards]
    for weights in ("[1]", "[0,0]", "[1,1,1]"):
        refused(both, "a number from 0 on for each", f"data.weights={weights}")
    refused(both, "(?s)data.weights=.*from 0 on", "data.weights=[2,-1]")
    refused(both, "each data set once", f"data.shards=[{toy_shards},{toy_shards}]")
    refused(both, "a mode with unlabelled", f"data.unlabelled_shards={toy_shards}")
    refused(both, "without data.unlabelled_shards", "data.unlabelled_split=extra", MODE)
    refused(both, "5 samples of flipped, whose share is 8", "batch_size=16", "data.weights=[1,1]")
    copy = shutil.copytree(toy_shards, tmp_path / "copy")
    refused([toy_shards, copy], "the same images in .*'toy_00' for one")
    semi = ["mode=consistency", "consistency.weight=1", "ema_decay=0.9"]
    refused(
        [toy_shards], "leave out data.unlabelled_shards", *semi, f"data.unlabelled_shards={copy}"
    )
    # the images of the validation are none of those that are learned by heart
    seen = [replace(sample, split="val") for sample in toy_samples()[6:8]]
    kept = [replace(sample, key=f"kept_{sample.key}") for sample in toy_samples()[8:]]
    scored = packed(tmp_path / "scored", "scored", STANFORD, [*seen, *kept])
    refused([toy_shards], "2 images of val of .*'toy_06' for one", f"data.val_shards={scored}")
    partly = packed(tmp_path / "partly", "partly", STANFORD, toy_samples()[7:8])
    refused([toy_shards, partly], "'toy_07' for one", "data.weights=[8,1]")
    refused(both, "data.class_map.nobody", "data.class_map={nobody: {sky: a}}")
    refused(both, "names as text", "data.class_map={flipped: [sky]}")
    refused(both, "a class of flipped: building", "data.class_map={flipped: {sky: skyy}}")
    listed = tmp_path / "list.txt"
    listed.write_text("toy_00\n")  # in both sets there is one of that name
    refused(both, "(?s)toy_blobs and flipped.*SET/KEY", f"data.labelled={listed}")
    (copy / "verified.json").unlink()
    refused([other_shards, copy], "not verified")


def test_unlabelled_images_that_are_scored_too_are_told(toy_shards: Path, tmp_path: Path) -> None:
    taught = ["mode=consistency", "consistency.weight=1", "ema_decay=0.9"]
    alone = [f"data.shards={toy_shards}", "run_dir=none", "batch_size=4", *taught]
    seen = [replace(sample, split="train") for sample in toy_samples()[9:]]
    other = packed(tmp_path / "other", "other", STANFORD, [*seen, *flipped(STANFORD)[:1]])
    for words, number in (
        ([f"data.unlabelled_shards={toy_shards}", "data.unlabelled_split=val"], 4),
        ([f"data.unlabelled_shards={other}"], 3),
        (["data.labelled=1/2"], 0),
    ):
        told = _scored_too(open_data(loading.load([*alone, *words]), 1))
        line = f"note: {number} of the 4 images for validation are trained on too, without their"
        assert [it.startswith(line) for it in told] == [True] * bool(number)


def test_classes_without_partner_are_listed_with_what_to_write(
    toy_shards: Path, tmp_path: Path
) -> None:
    names = ("Sky", "trees", *OTHER.names[2:3], "grass", "water", "building", "moutain", "car")
    classes = ClassSet(names, OTHER.palette)
    shards = packed(tmp_path, "city", classes, flipped(OTHER)[:5])
    with pytest.raises(InputError) as caught:
        open_data(named(toy_shards, shards), 1)
    error = caught.value
    assert (
        "no partner of the run's tree, road, mountain and of city's trees, moutain, car"
        in error.got
    )
    assert ", ".join(STANFORD.names) in error.got and ", ".join(names) in error.got
    # as it stands it can be written: what looks alike is offered, the rest is void
    word = (
        error.action.removeprefix("write data.class_map=")
        .partition("' ")[0]
        .strip("'")
        .split("'")[0]
    )
    assert word == "{city: {tree: trees, road: void, mountain: moutain, void: [car]}}"
    config = named(toy_shards, shards, f"data.class_map={word}")
    samples = open_data(config, 1).train
    table = samples.sets[1].table
    assert table is not None
    expected = ["sky", "tree", "foreground", "grass", "water", "building", "mountain"]
    assert [STANFORD.names[index] for index in table[:7]] == expected and table[7] == 255
    # kept classes: whatever has none of their names is "other"
    config = named(toy_shards, shards, "data.keep_classes=[sky,grass]")
    table = open_data(config, 1).train.sets[1].table
    assert table is not None and table[:8].tolist() == [1, 0, 0, 2, 0, 0, 0, 0]


def test_classes_that_are_told_are_scored_so_in_training_and_afterwards(
    toy_shards: Path, tmp_path: Path
) -> None:
    """Two classes of the set are one of the run's, and its sky is void: not what names say."""
    names = ("ground", "sky", *(f"thing {number}" for number in range(6)))
    shards = packed(tmp_path, "city", ClassSet(names, OTHER.palette), flipped(OTHER))
    asked = (
        "{sky: thing 1, road: [ground, thing 0], void: [sky, thing 2, thing 3, thing 4, thing 5]"
    )
    asked += "".join(f", {name}: void" for name in STANFORD.names if name not in ("sky", "road"))
    words = [f"data.val_shards={shards}", f"data.class_map={{city: {asked}}}}}", "mode=supervised"]
    done = fit([toy_shards], tmp_path / "run", *words, steps=1)
    scored = [f"val/iou/{name}" for name in ("sky", "road")]
    assert all(done.scores[name] is not None for name in scored)
    again = distseg.load(done.run_dir, device="cpu").evaluate(quick=True)
    for name in (*scored, "val/mean_iou", "val/num_pixels"):
        assert again[name] == done.scores[name]
    # afterwards the classes may be told otherwise, and other data be scored
    other = distseg.load(done.run_dir, device="cpu").evaluate(shards=toy_shards, quick=True)
    assert other["num_images"] == 4


@pytest.mark.parametrize("of_one_name", [False, True])
def test_afterwards_a_data_set_is_mapped_as_in_training(
    toy_shards: Path, tmp_path: Path, of_one_name: bool
) -> None:
    """Where kept names are spelt otherwise, and where data.class_map tells two of a name apart."""
    names = ("Sky", "trees", *OTHER.names[2:3], "grass", "water", "building", "moutain", "car")
    classes = ClassSet(names, OTHER.palette)
    name = "toy blobs" if of_one_name else "city"
    shards = packed(tmp_path, name, classes, flipped(OTHER))
    words = [f"data.val_shards={shards}"]
    if of_one_name:
        asked = "{toy_blobs-2: {tree: trees, road: car, mountain: moutain}}"
        config = named(toy_shards, shards, f"data.class_map={asked}", *words)
    else:
        given = [f"data.shards={toy_shards}", "run_dir=none", "batch_size=4"]
        config = loading.load([*given, "data.keep_classes=[sky,grass]", *words])
    data = open_data(config, 1)
    identity = _checkpoints(config, Ranks(0, 1, 0, torch.device("cpu")), data)._identity
    found = Checkpoint(tmp_path / "run/checkpoints/step-00000001", {"step": 1}, identity, {}, None)
    samples = open_samples(config, found)
    assert samples.classes == data.val.classes
    for index in range(len(samples)):
        assert np.array_equal(samples.load(index)[2], data.val.load(index)[2])
    # the first data set is as it was packed, whatever the others are called
    config = replace(config, data=replace(config.data, val_shards=str(toy_shards)))
    samples, expected = open_samples(config, found), open_data(config, 1).val
    assert np.array_equal(samples.load(0)[2], expected.load(0)[2])
    assert samples.classes == data.train.classes
    if not of_one_name:
        strange = ClassSet(("a", *names[1:]), OTHER.palette)
        other = packed(tmp_path / "other", "other", strange, flipped(OTHER))
        config = replace(config, data=replace(config.data, val_shards=str(other)))
        with pytest.raises(InputError, match=r"the run's sky(?s:.)*data\.shards=DIR"):
            open_samples(config, found)


def named(first: Path, second: Path, *words: str) -> Config:
    given = [f"data.shards=[{first},{second}]", "run_dir=none", "batch_size=4"]
    return loading.load([*given, *words])


def test_older_files_name_one_folder_as_a_word(toy_shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"data:\n  shards: {toy_shards}\nloss:\n  ce_weight: 1.0\n")
    assert loading.from_file(path).data.shards == [str(toy_shards)]
    assert DataConfig(shards=str(toy_shards)).shards == [str(toy_shards)]  # type: ignore[arg-type]
    assert Manifest.load(toy_shards).sha256  # the set itself is as it was
