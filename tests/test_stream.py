"""The stream gives the same pixels for every number of ranks and threads, from every step on."""

from __future__ import annotations

import itertools
import tarfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import toy_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.data import stream as module
from distseg.data.plan import BalancedPlan, BlockPlan, Plan, augmentation_rng
from distseg.data.samples import SampleSet
from distseg.data.stream import STEPS_EXPECTED, TrainStream, evaluation_samples
from distseg.data.transforms import TrainView
from shards.errors import InputError
from shards.reader import ShardReader
from shards.sample import decode_image, decode_label, encode_label

VIEW = TrainView(48, 0.5, 1.5, horizontal_flip=True, color_jitter=0.4)


@pytest.fixture(scope="module")
def reader(toy_shards):
    return ShardReader(toy_shards, "train")


class AlteredReader:
    """A reader whose samples pass through a function first, which may also record, wait or fail."""

    def __init__(self, reader, alter):
        self.reader, self.alter, self.classes = reader, alter, reader.classes

    def __len__(self):
        return len(self.reader)

    def __getattr__(self, name):
        return getattr(self.reader, name)

    def read(self, index, with_label=True):
        return self.alter(index, self.reader.read(index))


def stream(
    reader,
    *,
    rank=0,
    world_size=1,
    num_threads=0,
    start_step=0,
    batch_size=6,
    view=VIEW,
    plan=None,
    keep=0,
):
    return TrainStream(
        SampleSet(reader, keep_decoded_bytes=keep),
        Plan(8, seed=5) if plan is None else plan,
        view,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        num_threads=num_threads,
        start_step=start_step,
    )


def batches(reader, count, **options):
    with closing(stream(reader, **options)) as source:
        return list(islice(source, count))


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("distseg-data")]


@pytest.fixture(scope="module")
def expected(reader):
    """Eight global batches, six samples each, put together by hand from the plan, the codecs and
    the view.
    """
    plan, result = Plan(8, seed=5), []
    for step in range(8):
        image, label = np.empty((6, 48, 48, 3), np.uint8), np.empty((6, 48, 48), np.uint8)
        for i in range(6):
            position = 6 * step + i
            raw = reader.read(plan.sample_index(position))
            rng = plan.augmentation_rng(position)
            VIEW(decode_image(raw.image), decode_label(raw.label), rng, image[i], label[i])
        result.append((torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(label)))
    return result


@pytest.mark.parametrize("num_threads", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_pixels_are_the_same_for_all_worlds_and_threads(reader, expected, world_size, num_threads):
    ranks = [
        batches(reader, 8, rank=rank, world_size=world_size, num_threads=num_threads)
        for rank in range(world_size)
    ]
    for step, (image, label) in enumerate(expected):
        assert [rank[step].step for rank in ranks] == [step] * world_size
        assert torch.equal(torch.cat([rank[step].image for rank in ranks]), image)
        assert torch.equal(torch.cat([rank[step].label for rank in ranks]), label)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_pixels_are_the_same_from_samples_that_stay_decoded(reader, expected, num_threads):
    num_bytes = [4 * height * width for height, width in map(reader.size, range(8))]
    for room in (sum(num_bytes), sum(num_bytes) // 2):
        reads = Counter()
        altered = AlteredReader(
            reader, lambda index, raw, reads=reads: reads.update([index]) or raw
        )
        found = batches(altered, 16, num_threads=num_threads, keep=room)
        for batch, (image, label) in zip(found, expected, strict=False):
            assert torch.equal(batch.image, image) and torch.equal(batch.label, label)
        # in twelve epochs; a thread may begin a sample while another still decodes it for the first
        # time
        kept = [index for index in range(8) if reads[index] <= 3]
        assert room - max(num_bytes) < sum(num_bytes[index] for index in kept) <= room
        assert all(reads[index] >= 12 for index in range(8) if index not in kept)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_sample_once_per_epoch_over_the_ranks(reader, world_size):
    """Eight samples, batches of six.

    After four steps the ranks together have read each three times.
    """
    read = []
    recording = AlteredReader(reader, lambda index, raw: (read.append(index), raw)[1])
    for rank in range(world_size):
        batches(recording, 4, rank=rank, world_size=world_size)
    assert sorted(read) == sorted(3 * list(range(8)))


@pytest.mark.parametrize("start_step", range(1, 8))
def test_resume_continues_the_same_batches(reader, expected, start_step):
    for num_threads in (0, 2):
        for batch, (image, label) in zip(
            batches(reader, 8 - start_step, start_step=start_step, num_threads=num_threads),
            expected[start_step:],
            strict=True,
        ):
            assert torch.equal(batch.image, image) and torch.equal(batch.label, label)


PLANS = {
    "blocks": lambda reader: BlockPlan(reader.shard_sizes, 2, seed=5),
    "balanced": lambda reader: BalancedPlan(reader.class_pixels(), seed=5),
}


@given(
    kind=st.sampled_from(sorted(PLANS)),
    worlds=st.tuples(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 3, 6])),
    num_threads=st.integers(0, 3),
    start=st.integers(0, 40),
    steps=st.integers(1, 3),
)
@settings(deadline=None, max_examples=40)
def test_any_order_goes_on_anywhere_on_another_world(
    reader, kind, worlds, num_threads, start, steps
):
    """From `start` on one world, then on another, against one plan walked from 0 and views put
    together by hand.
    """
    plan, seen = PLANS[kind](reader), []
    for first, world_size in ((start, worlds[0]), (start + steps, worlds[1])):
        options = {"num_threads": num_threads, "start_step": first, "world_size": world_size}
        ranks = [
            batches(reader, steps, rank=rank, plan=PLANS[kind](reader), **options)
            for rank in range(world_size)
        ]
        seen += [torch.cat([rank[step].image for rank in ranks]) for step in range(steps)]
    order = [plan.sample_index(position) for position in range(6 * (start + 2 * steps))]
    for position, image in enumerate(torch.cat(seen), start=6 * start):
        raw, expected = reader.read(order[position]), np.empty((48, 48, 3), np.uint8)
        rng, label = augmentation_rng(5, position), np.empty((48, 48), np.uint8)
        VIEW(decode_image(raw.image), decode_label(raw.label), rng, expected, label)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_resume_on_another_world_size(reader, expected):
    """Two ranks up to step 3, three ranks from there."""
    ranks = [
        batches(reader, 5, rank=rank, world_size=3, start_step=3, num_threads=1)
        for rank in range(3)
    ]
    for i, (image, _) in enumerate(expected[3:]):
        assert torch.equal(torch.cat([rank[i].image for rank in ranks]), image)


def test_batches_are_uint8_and_channels_last(reader):
    (batch,) = batches(reader, 1)
    assert batch.image.shape == (6, 3, 48, 48) and batch.label.shape == (6, 48, 48)
    assert batch.image.dtype == batch.label.dtype == torch.uint8
    assert batch.image.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_stays_as_it_is_while_the_stream_goes_on(reader, expected):
    """Buffers are not handed out twice."""
    kept = batches(reader, 8, num_threads=3)
    assert all(
        torch.equal(batch.image, image) for batch, (image, _) in zip(kept, expected, strict=True)
    )


def bad_label(index, raw):
    label = decode_label(raw.label).copy()
    label[-1, -1] = 8
    return replace(raw, label=encode_label(label))


def key_in(shard, key):
    with tarfile.open(shard) as tar:
        return any(name.startswith(key + ".") for name in tar.getnames())


BAD = {
    "no label": lambda index, raw: replace(raw, label=None),
    "class index 8": bad_label,
    "image of": lambda index, raw: replace(raw, label=encode_label(np.zeros((5, 7), np.uint8))),
    "image": lambda index, raw: replace(raw, image=raw.image[:20]),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_bad_sample_is_named_at_its_step_and_not_before(
    toy_shards, reader, expected, fault, num_threads
):
    bad_index = Plan(8, seed=5).sample_index(7)  # the last of the first epoch, in step 1
    altered = AlteredReader(reader, lambda i, raw: BAD[fault](i, raw) if i == bad_index else raw)
    source = stream(altered, num_threads=num_threads)
    assert torch.equal(next(source).image, expected[0][0])
    with pytest.raises(InputError, match=fault) as caught:
        next(source)
    [shard] = {
        path.name for path in toy_shards.glob("*.tar") if key_in(path, reader.key(bad_index))
    }
    assert reader.key(bad_index) in caught.value.got and shard in caught.value.got
    assert not data_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(source)
    with pytest.raises(InputError, match=fault):
        list(evaluation_samples(SampleSet(altered), 0, 1, num_threads))
    assert not data_threads()


def test_an_error_comes_at_once_and_not_after_the_rest_of_the_batch(reader):
    bad_index = Plan(8, seed=5).sample_index(0)

    def slow_or_bad(index, raw):
        if index == bad_index:
            raise InputError("damaged", "sound", "pack again")
        time.sleep(0.1)
        return raw

    source = stream(AlteredReader(reader, slow_or_bad), num_threads=1, batch_size=48)
    start = time.perf_counter()
    with pytest.raises(InputError, match="damaged"):
        next(source)
    assert time.perf_counter() - start < 1  # 47 samples of 0.1 s each were queued behind it


@pytest.mark.parametrize("interrupted", [False, True])
def test_close_drops_what_is_queued(reader, interrupted):
    """With 0.1 s a sample and dozens queued, the threads are gone after the sample at hand."""
    started = []

    def slow(index, raw):
        started.append(index)
        time.sleep(0.1)
        if interrupted:
            raise KeyboardInterrupt
        return raw

    source = stream(AlteredReader(reader, slow), num_threads=2, batch_size=12)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            next(source)
    else:
        next(source)
    start, count = time.perf_counter(), len(started)
    source.close()
    source.close()
    assert time.perf_counter() - start < 1 and len(started) <= count + 2
    assert not data_threads()


def test_prefetch_is_bounded(reader):
    """However long the caller takes, the threads stay a few batches ahead."""
    read = []
    source = stream(
        AlteredReader(reader, lambda index, raw: (read.append(index), raw)[1]),
        num_threads=2,
        batch_size=4,
    )
    with closing(source):
        next(source)
        time.sleep(0.3)
        assert len(read) == 3 * 4  # the batch at hand and two more


def test_readers_hear_of_samples_well_before_they_are_read(reader, monkeypatch):
    samples, plan, heard = SampleSet(reader), Plan(8, seed=5), []
    monkeypatch.setattr(samples, "expect", heard.extend)
    options = {"batch_size": 6, "rank": 1, "world_size": 2, "num_threads": 0, "start_step": 3}
    with closing(TrainStream(samples, plan, VIEW, **options)) as stream:
        next(stream)
        positions = [6 * step + 3 + i for step in range(3, 4 + STEPS_EXPECTED) for i in range(3)]
        assert heard == [plan.sample_index(position) for position in positions]
        next(stream)  # each step once
        positions += [6 * (4 + STEPS_EXPECTED) + 3 + i for i in range(3)]
        assert heard == [plan.sample_index(position) for position in positions]


def test_waits_add_up(reader, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    options = {"batch_size": 2, "rank": 0, "world_size": 1, "num_threads": 0}
    with closing(TrainStream(SampleSet(reader), Plan(8, seed=5), VIEW, **options)) as stream:
        for _ in range(3):
            next(stream)
        assert stream.wait_seconds == 3


def test_waits_are_measured(reader):
    def slow(index, raw):
        time.sleep(0.02)
        return raw

    for num_threads in (0, 1):
        with closing(stream(AlteredReader(reader, slow), num_threads=num_threads)) as source:
            assert source.wait_seconds == 0
            next(source)
            assert 6 * 0.02 <= source.wait_seconds < 3


@pytest.mark.parametrize("num_threads", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_gives_each_original_once_in_order(toy_shards, world_size, num_threads):
    originals = [sample for sample in toy_samples() if sample.split == "val"]
    reader = ShardReader(toy_shards, "val")
    seen = {}
    for rank in range(world_size):
        indices = []
        for index, key, image, label in evaluation_samples(
            SampleSet(reader), rank, world_size, num_threads
        ):
            indices.append(index)
            seen[index] = key
            assert np.array_equal(image, decode_image(originals[index].image))
            assert np.array_equal(label, originals[index].label)
            assert all(
                array.flags.c_contiguous and array.flags.writeable for array in (image, label)
            )
        assert indices == list(range(rank, 4, world_size))
    assert [seen[i] for i in range(4)] == [sample.key for sample in originals]


def test_evaluation_that_stops_early_leaves_no_thread(reader):
    samples = evaluation_samples(SampleSet(reader), 0, 1, num_threads=3)
    next(samples)
    samples.close()
    assert not data_threads()


def test_bad_arguments_are_refused_before_any_thread_starts(reader):
    with pytest.raises(InputError, match="batch_size=6 or 8"):
        stream(reader, batch_size=7, world_size=2)
    with pytest.raises(InputError, match="num_threads"):
        stream(reader, num_threads=-1)
    with pytest.raises(InputError, match="rank"):
        evaluation_samples(SampleSet(reader), 2, 2, 0)
    assert not data_threads()
