"""Which samples are labelled, which classes stay apart, and labels that are never read."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import toy_samples

from distseg.config import loading
from distseg.config.schema import Config, DataConfig
from distseg.data.plan import BalancedPlan, Plan
from distseg.data.samples import DecodedSamples, SampleSet, open_reader, plan_for, split_labelled
from distseg.train.inputs import open_data
from shards.errors import InputError
from shards.manifest import Manifest, sha256_of
from shards.maps import write_maps
from shards.pack import pack
from shards.reader import RawSample, ShardReader
from shards.sample import IGNORE_INDEX, STANFORD, decode_label


@pytest.fixture(scope="module")
def reader(toy_shards: Path) -> ShardReader:
    return ShardReader(toy_shards, "train")


class WithoutLabels:
    """A reader some of whose samples have no label, and which fails when a label is asked for in
    vain.
    """

    def __init__(self, reader: ShardReader, unlabelled: set[int]):
        self._reader, self._without = reader, unlabelled
        self.unlabelled = [reader.key(index) for index in sorted(unlabelled)]

    def __len__(self) -> int:
        return len(self._reader)

    def __getattr__(self, name: str):
        return getattr(self._reader, name)

    def read(self, index: int, *, with_label: bool = True) -> RawSample:
        assert not with_label or index not in self._without
        return self._reader.read(index, with_label=with_label)


def test_a_share_is_seeded_exact_and_nested(reader: ShardReader) -> None:
    eighth, rest = split_labelled(reader, "1/8", seed=3)
    half, other_half = split_labelled(reader, "0.5", seed=3)
    assert len(eighth) == 1 and len(half) == 4
    assert set(eighth) < set(half)
    for chosen, left in ((eighth, rest), (half, other_half)):
        assert sorted(chosen + left) == list(range(8))
    assert split_labelled(reader, "1/2", seed=3) == (half, other_half)
    assert len({tuple(split_labelled(reader, "1/2", seed)[0]) for seed in range(20)}) > 5
    chosen, left = split_labelled(reader, "all", 0)
    assert [*chosen] == list(range(8)) and not left


def test_a_list_file_names_the_labelled_samples(reader: ShardReader, tmp_path: Path) -> None:
    path = tmp_path / "labelled.txt"
    path.write_text(f"{reader.key(5)}\n\n{reader.key(2)}\n")
    assert split_labelled(reader, str(path), 0) == ([2, 5], [0, 1, 3, 4, 6, 7])
    path.write_text("nobody\n")
    with pytest.raises(InputError, match="'nobody'"):
        split_labelled(reader, str(path), 0)


@pytest.mark.parametrize("labelled", ["0", "1.5", "6", "-1/8", "1/0", "some", "1/9"])
def test_a_bad_share_is_refused(reader: ShardReader, labelled: str) -> None:
    with pytest.raises(InputError, match=r"data\.labelled") as caught:
        split_labelled(reader, labelled, 0)
    # a number of images is what people try first
    assert ("write 6/N" in str(caught.value)) == (labelled == "6")


def test_samples_without_a_label_are_never_in_a_share(reader: ShardReader, tmp_path: Path) -> None:
    partly = WithoutLabels(reader, {0, 3, 6})
    assert split_labelled(partly, "all", 0) == ([1, 2, 4, 5, 7], [0, 3, 6])
    labelled, rest = split_labelled(partly, "0.5", 1)
    assert len(labelled) == 2 and not set(labelled) & {0, 3, 6} and {0, 3, 6} < set(rest)
    path = tmp_path / "list.txt"
    path.write_text(reader.key(3))
    with pytest.raises(InputError, match="no label"):
        split_labelled(partly, str(path), 0)
    with pytest.raises(InputError, match="no label"):
        SampleSet(partly)


def test_an_unlabelled_images_label_is_not_read(reader: ShardReader) -> None:
    samples = SampleSet(WithoutLabels(reader, set(range(8))), [1, 4], labelled=False)
    assert samples.keys == [reader.key(1), reader.key(4)]
    for place, index in enumerate((1, 4)):
        key, image, label = samples.load(place)
        assert key == reader.key(index)
        assert image.shape[:2] == label.shape == reader.size(index)
        assert (label == 0).all()


def test_decoded_samples_are_bounded_and_read_only(reader: ShardReader) -> None:
    sizes = [4 * height * width for height, width in map(reader.size, range(4))]
    samples = SampleSet(reader, range(4), keep_decoded_bytes=sum(sizes[:3]))
    first = [samples.peek(index) for index in range(4)]
    for again in (samples.peek, samples.load):
        for index in range(4):
            assert all(
                np.array_equal(x, y)
                for x, y in zip(first[index][1:], again(index)[1:], strict=True)
            )
    assert [samples.peek(index)[1] is first[index][1] for index in range(4)] == [
        True,
        True,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="read-only"):
        samples.peek(0)[1][0] = 0
    assert all(array.flags.writeable for array in samples.load(0)[1:])
    assert (
        samples.decoded_bytes(1e9) == sum(sizes)
        and samples.decoded_bytes(sizes[0] + 1) == sizes[0] + 1
    )


def test_another_process_keeps_no_copies(reader: ShardReader) -> None:
    decoded = DecodedSamples(1e9)
    decoded.add(0, SampleSet(reader).peek(0))
    there = pickle.loads(pickle.dumps(decoded))
    there.add(1, SampleSet(reader).peek(1))
    assert 0 in decoded and 0 not in there and 1 not in there


def test_a_decoded_sample_is_not_awaited_from_afar(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, list[int]]] = []
    for name in ("expect", "used"):
        monkeypatch.setattr(reader, name, lambda indices, name=name: said.append((name, indices)))
    samples = SampleSet(reader, [2, 3, 4], keep_decoded_bytes=1e9)
    samples.expect([0, 1])
    samples.peek(0)
    samples.peek(0)
    samples.expect([0, 1, 2])
    assert said == [("expect", [2, 3]), ("used", [2]), ("expect", [3, 4])]


@pytest.mark.parametrize("of_all", [0, 0.6, 1])
def test_a_run_keeps_what_it_decodes_the_labelled_first(
    toy_shards: Path, of_all: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = SampleSet(ShardReader(toy_shards, "train"), labelled=False).decoded_bytes(1e9)
    keep = f"data.keep_decoded_bytes={of_all * everything}"
    semi = ("mode=semi_supervised", "data.labelled=1/2", "loss.adv_weight=0.01", keep)
    data = open_data(loading.load([f"data.shards={toy_shards}", *semi]), 1)
    assert data.unlabelled is not None
    reads, read = [], ShardReader.read
    monkeypatch.setattr(
        ShardReader,
        "read",
        lambda *args, **options: reads.append(args[1]) or read(*args, **options),
    )
    anew = {}
    for _ in range(2):
        for samples in (data.unlabelled, data.train):
            reads.clear()
            for index in range(len(samples)):
                samples.peek(index)
            anew[samples.labelled] = len(reads)
    assert anew[True] == (0 if of_all else len(data.train))
    assert (anew[False] == 0) == (of_all == 1)


def test_kept_classes_stay_apart_and_the_rest_is_one(reader: ShardReader) -> None:
    samples = SampleSet(reader, keep=["road", "sky"])
    assert samples.classes.names == ("other", "road", "sky")
    assert samples.classes.palette[1:] == (reader.classes.palette[2], reader.classes.palette[0])
    other, *kept = samples.classes.palette
    assert min(math.dist(other, color) for color in kept) > 60  # a picture shows which is which
    for index in range(len(reader)):
        before = decode_label(reader.read(index).label)
        after = samples.load(index)[2]
        expected = np.where(
            before == 255, 255, np.where(before == 2, 1, np.where(before == 0, 2, 0))
        )
        assert np.array_equal(after, expected)


@pytest.mark.parametrize("keep", [["rood"], ["road", "road"]])
def test_unknown_or_repeated_classes_are_refused(reader: ShardReader, keep: list[str]) -> None:
    with pytest.raises(InputError, match="keep_classes"):
        SampleSet(reader, keep=keep)


def class_counts(reader: ShardReader) -> np.ndarray:
    """By decoding every label."""
    labels = [decode_label(reader.read(index).label) for index in range(len(reader))]
    return np.array([np.bincount(label.ravel(), minlength=256)[:8] for label in labels])


def test_class_pixels_are_the_labels_without_reading_any(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = class_counts(reader)
    monkeypatch.setattr(ShardReader, "read", None)
    assert np.array_equal(SampleSet(reader).class_pixels(), counts)
    kept = SampleSet(reader, [1, 3, 6], keep=["road", "sky"]).class_pixels()
    others = [1, 3, 4, 5, 6, 7]
    expected = np.column_stack([counts[:, others].sum(1), counts[:, 2], counts[:, 0]])
    assert np.array_equal(kept, expected[[1, 3, 6]])


def test_plans_are_as_configured(reader: ShardReader) -> None:
    samples, some = SampleSet(reader), SampleSet(reader, [0, 4, 5, 7])
    assert type(plan_for(samples, DataConfig(), 1)) is Plan
    in_blocks = plan_for(some, DataConfig(shuffle_block=1), 1)
    firsts = [[in_blocks.sample_index(4 * epoch + i) for i in range(4)] for epoch in range(30)]
    # 4 and 5 share a shard
    assert all(abs(epoch.index(1) - epoch.index(2)) == 1 for epoch in firsts)
    assert len({tuple(epoch) for epoch in firsts}) > 6  # of 12
    for sampling, temperature in (("class_balanced", None), ("rare_class", 0.5)):
        options = DataConfig(sampling=sampling, rare_class_temperature=0.5)
        plan, expected = (
            plan_for(samples, options, 1),
            BalancedPlan(class_counts(reader), 1, temperature),
        )
        assert [plan.sample_index(p) for p in range(50)] == [
            expected.sample_index(p) for p in range(50)
        ]
        unlabelled = SampleSet(reader, [0, 4, 5, 7], labelled=False)
        assert type(plan_for(unlabelled, options, 1)) is Plan


def renamed(shards: Path, folder: Path, key: str) -> Path:
    """A copy of shards whose first sample is called by another key, with checksums that agree."""
    shutil.copytree(shards, folder)
    manifest = Manifest.load(folder)
    first = manifest.splits["train"].shards[0]
    path = folder / first.index_file
    index = json.loads(path.read_text())
    index[0]["key"] = key
    path.write_text(json.dumps(index, indent=0, sort_keys=True) + "\n")
    shards_of = (replace(first, index_sha256=sha256_of(path)), *manifest.splits["train"].shards[1:])
    split = replace(manifest.splits["train"], shards=shards_of)
    replace(manifest, splits=manifest.splits | {"train": split}).save(folder)
    return folder


@pytest.mark.parametrize("key", ["../../victim", "/tmp/victim", "a/b", "..\\victim", "", "a\nb"])
def test_a_key_that_leads_out_of_a_folder_is_refused_when_it_is_read(
    key: str, toy_shards: Path, tmp_path: Path
) -> None:
    shards = renamed(toy_shards, tmp_path / "shards", key)
    with pytest.raises(InputError):
        SampleSet(ShardReader(shards, "train")).load(0)
    with pytest.raises(InputError):
        SampleSet(ShardReader(shards, "train")).keys  # noqa: B018  # a list of labelled ones


def test_a_data_set_whose_name_leads_out_of_a_folder_is_refused(
    toy_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy_shards, tmp_path / "shards")
    replace(Manifest.load(toy_shards), name="/../../victim").save(tmp_path / "shards")
    with pytest.raises(InputError, match="victim"):
        open_reader(DataConfig(shards=str(tmp_path / "shards")), "train")


@pytest.mark.parametrize("void", ["train", "val", "toy_03"])
def test_labels_that_are_void_everywhere_are_refused_before_training(
    void: str, tmp_path: Path
) -> None:
    samples = []
    for sample in toy_samples():
        label = sample.label
        if void in (sample.split, sample.key):
            label = np.full_like(label, IGNORE_INDEX)
        samples.append(replace(sample, label=label))
    write_maps(tmp_path / "maps.h5", "toy", STANFORD, samples, len(samples))
    pack(tmp_path / "maps.h5", tmp_path / "shards")
    config = Config(run_dir=str(tmp_path / "run"), data=DataConfig(shards=str(tmp_path / "shards")))
    if void == "toy_03":
        open_data(config, 1)  # the others have pixels
        (tmp_path / "list.txt").write_text("toy_03\n")
        config = replace(config, data=replace(config.data, labelled=str(tmp_path / "list.txt")))
        with pytest.raises(InputError, match="all 1 labels of train are void everywhere"):
            open_data(config, 1)
    else:
        count = 8 if void == "train" else 4
        with pytest.raises(InputError, match=f"all {count} labels of {void} are void everywhere"):
            open_data(config, 1)
