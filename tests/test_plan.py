"""The order of samples is a function of seed and position alone."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.data import plan as module
from distseg.data.plan import BalancedPlan, BlockPlan, Plan, rank_positions
from shards.errors import InputError
from shards.manifest import Manifest, ShardInfo, SplitInfo
from shards.sample import STANFORD

SEEDS = st.integers(0, 2**64 - 1)


@given(num_samples=st.integers(1, 60), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_every_sample_once_per_epoch(num_samples, seed, epoch):
    plan = Plan(num_samples, seed)
    indices = [plan.sample_index(epoch * num_samples + offset) for offset in range(num_samples)]
    assert sorted(indices) == list(range(num_samples))


@given(
    num_samples=st.integers(1, 40),
    seed=SEEDS,
    world=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    share=st.integers(1, 4),
    start=st.integers(0, 50),
)
@settings(deadline=None)
def test_ranks_share_one_sequence(num_samples, seed, world, share, start):
    """The ranks' slices, joined, are the positions that one rank would have."""
    batch = 24 * share
    steps = range(start, start + 3)
    joined = [
        p
        for step in steps
        for rank in range(world)
        for p in rank_positions(step, batch, rank, world)
    ]
    assert joined == list(range(start * batch, (start + 3) * batch))
    shares = {
        len(rank_positions(step, batch, rank, world)) for step in steps for rank in range(world)
    }
    assert shares == {batch // world}
    # a plan asked for the tail alone gives what one asked from the beginning gives: nothing is
    # carried along
    from_start = Plan(num_samples, seed)
    order = [from_start.sample_index(p) for p in range(joined[-1] + 1)]
    tail = Plan(num_samples, seed)
    assert [tail.sample_index(p) for p in joined] == order[joined[0] :]


def test_order_is_fixed_for_ever():
    """Stored values: a change of numpy or of this file that moves the order breaks the resume of
    old runs.
    """
    plan = Plan(10, seed=3)
    assert [plan.sample_index(p) for p in range(20)] == [
        6,
        8,
        4,
        1,
        3,
        5,
        9,
        7,
        0,
        2,
        2,
        4,
        0,
        5,
        8,
        1,
        3,
        9,
        7,
        6,
    ]
    expected = [0.88042035, 0.22880855, 0.78687668]
    assert plan.augmentation_rng(0).random(3).tolist() == pytest.approx(expected, abs=1e-8)


def test_epochs_and_seeds_differ():
    seeds = (1, 2, 2**64 - 2, 2**64 - 1)  # the last two are one number to a float
    plans = [Plan(50, seed) for seed in seeds]
    orders = {
        tuple(plan.sample_index(50 * epoch + offset) for offset in range(50))
        for plan in plans
        for epoch in range(20)
    }
    assert len(orders) == 20 * len(seeds)
    assert len(
        {plan.augmentation_rng(2**63 + p).random() for plan in plans for p in range(3)}
    ) == 3 * len(seeds)


def test_only_two_orders_are_kept():
    plan = Plan(100, seed=0)
    for position in range(0, 5000, 10):
        plan.sample_index(position)
    assert plan._permutation.cache_info().currsize == 2
    assert plan._permutation.cache_info().misses == 50  # and none is drawn twice


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_augmentation_is_independent_of_the_order(seed):
    """No shared numbers with the stream that an order is drawn from, nor between positions."""
    plan = Plan(5, seed)
    words = [plan.augmentation_rng(p).integers(0, 2**63, 40).tolist() for p in range(40)]
    words += [
        np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(0, 2**63, 40).tolist()
        for epoch in range(40)
    ]
    flat = [word for row in words for word in row]
    assert len(set(flat)) == len(flat)
    assert (
        plan.augmentation_rng(3).random(4).tolist() == plan.augmentation_rng(3).random(4).tolist()
    )


@given(batch=st.integers(-3, 200), world=st.integers(1, 64))
def test_a_batch_that_the_world_does_not_divide_names_those_that_work(batch, world):
    if batch >= 1 and batch % world == 0:
        return
    with pytest.raises(InputError) as caught:
        rank_positions(0, batch, 0, world)
    sizes = [int(size) for size in caught.value.action.removeprefix("batch_size=").split(" or ")]
    works = [size for size in range(1, 400) if size % world == 0]
    nearest_above = min(size for size in works if size > batch)
    nearest_below = [size for size in works if size < batch][-1:]
    assert sizes == [*nearest_below, nearest_above]


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world(rank, world):
    with pytest.raises(InputError, match="rank"):
        rank_positions(0, 4, rank, world)


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(sizes=SIZES, per_block=st.integers(1, 14), seed=SEEDS, epoch=st.integers(0, 2**40))
@settings(deadline=None)
def test_blocks_give_every_sample_once_and_use_few_shards_at_a_time(sizes, per_block, seed, epoch):
    """From its first sample to its last a shard is in use: never more than `per_block` of them."""
    plan, num_samples = BlockPlan(sizes, per_block, seed), sum(sizes)
    indices = [plan.sample_index(epoch * num_samples + offset) for offset in range(num_samples)]
    assert sorted(indices) == list(range(num_samples))
    shards = np.repeat(np.arange(len(sizes)), sizes)[indices]
    spans = [np.flatnonzero(shards == shard)[[0, -1]] for shard in range(len(sizes))]
    in_use = [
        sum(first <= offset <= last for first, last in spans) for offset in range(num_samples)
    ]
    assert max(in_use) <= per_block


@given(
    sizes=SIZES,
    per_block=st.integers(1, 5),
    seed=SEEDS,
    asked=st.lists(st.integers(0, 80), min_size=1, max_size=10),
)
@settings(deadline=None)
def test_blocks_carry_nothing_along(sizes, per_block, seed, asked):
    """Any positions in any order, by plans that have seen other things, as from the beginning."""
    plan = BlockPlan(sizes, per_block, seed)
    order = [plan.sample_index(position) for position in range(81)]
    assert [BlockPlan(sizes, per_block, seed).sample_index(position) for position in asked] == [
        order[p] for p in asked
    ]


def test_blocks_are_shuffled_within_and_over_epochs():
    """One block of all shards is any order of all samples.

    Each pair of shards meets in some epoch's block.
    """
    plan = BlockPlan([4] * 6, 2, seed=1)
    epochs = [
        [plan.sample_index(24 * epoch + offset) for offset in range(24)] for epoch in range(60)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 60
    pairs = {
        frozenset(i // 4 for i in epoch[8 * b : 8 * b + 8]) for epoch in epochs for b in range(3)
    }
    assert len(pairs) == 15  # of six shards
    assert len({epoch[0] for epoch in epochs}) > 15  # of 24; 22 expected
    mixed = sum(len({i // 4 for i in epoch[:4]}) == 2 for epoch in epochs)
    assert mixed > 50  # two shards joined in one block alternate; 58 expected of 60


def test_the_order_in_blocks_is_fixed_for_ever():
    plan = BlockPlan([3, 2, 4, 1], 2, seed=3)
    assert [plan.sample_index(p) for p in range(20)] == [
        *(2, 0, 1, 4, 3, 9, 6, 8, 7, 5),
        *(7, 3, 5, 8, 4, 6, 1, 0, 9, 2),
    ]
    balanced = BalancedPlan(np.eye(5, dtype=np.int64), seed=3)
    assert [balanced.sample_index(p) for p in range(10)] == [1, 2, 1, 3, 1, 0, 1, 4, 1, 3]


@pytest.mark.parametrize("temperature", [None, 0.1, 1.0])
def test_classes_are_drawn_as_the_formula_says(temperature):
    """Over 20,000 positions.

    The frequency of each sample is the sum over its classes of P(class) / samples with it.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 100, (12, 5)) * (rng.random((12, 5)) < [0.9, 0.5, 0.3, 0.1, 0.0])
    pixels[3] = 0  # void all over
    pixels[7, 3] = 5  # the rarest, whatever was drawn
    share = pixels.sum(0) / pixels.sum()
    weight = (pixels.sum(0) > 0) * (
        1.0 if temperature is None else np.exp((1 - share) / temperature)
    )
    weight = weight / weight.sum()
    shows = pixels > 0
    expected = sum(weight[c] * shows[:, c] / max(1, shows[:, c].sum()) for c in range(5))
    plan = BalancedPlan(pixels, seed=5, temperature=temperature)
    order = [plan.sample_index(position) for position in range(20_000)]
    counts = np.bincount(order, minlength=12)
    assert counts[3] == 0
    assert np.abs(counts / 20_000 - expected).max() < 5 * np.sqrt(0.25 / 20_000)
    assert [BalancedPlan(pixels, 5, temperature).sample_index(p) for p in (777, 5)] == [
        order[777],
        order[5],
    ]
    with pytest.raises(InputError, match="without a pixel"):
        BalancedPlan(np.zeros((3, 2), np.int64), 0)


def test_the_largest_draw_is_still_of_a_class(monkeypatch):
    """Ten tenths add up to less than 1, and the largest draw is not below that sum."""

    class Largest:
        def random(self, count):
            return np.full(count, np.nextafter(1, 0))

    balanced = BalancedPlan(np.eye(10, dtype=np.int64), seed=0)
    monkeypatch.setattr(module, "_generator", lambda *words: Largest())
    assert balanced.sample_index(0) == 9


STARTUP = """
import resource, sys, time
from distseg.config.schema import DataConfig
from distseg.data.samples import SampleSet, open_reader, plan_for, split_labelled
before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = DataConfig(shards=sys.argv[1], shuffle_block=16)
reader = open_reader(options, "train")
samples = SampleSet(reader, split_labelled(reader, "all", 0)[0])
plan = plan_for(samples, options, seed=1)
ahead = [plan.sample_index(position) for position in range(10**12, 10**12 + 1000)]
samples.expect(ahead)
assert len(samples) == plan.num_samples == 10_000_128 and len(set(ahead)) == 1000
seconds = time.process_time() - before[0]
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1]) / 1e6)
"""


def test_ten_million_samples_start_within_two_seconds_and_a_gigabyte(tmp_path):
    """39,063 shards of 256, of which only the manifest is there.

    Nothing else is looked at before the first sample.
    """
    infos = tuple(
        ShardInfo(f"train-{i:06d}.tar", 256, 10**7, f"{i:064x}", f"{i:064x}", 0)
        for i in range(39_063)
    )
    split = SplitInfo(infos, 256 * len(infos), (1,) * 8, 0)
    Manifest(1, "synthetic", STANFORD, {"train": split}).save(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", STARTUP, str(tmp_path)], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    seconds, gigabytes = map(float, child.stdout.split())
    # of processor time, so that a busy machine does not matter
    assert seconds < 2 and gigabytes < 1


def test_bad_plans():
    with pytest.raises(InputError, match="at least one sample"):
        Plan(0, seed=0)
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match="seed"):
            Plan(3, seed=seed)


def test_a_thousand_ranks_show_what_one_does_and_go_on_on_fewer():
    plan, batch, stop = Plan(3000, seed=5), 2048, 3
    alone = [plan.sample_index(position) for step in range(6) for position in range_of(step, batch)]
    shown = []
    for step in range(6):
        # stopped at a step boundary, and gone on with on half of the nodes
        world = 1024 if step < stop else 512
        for rank in range(world):
            shown += map(plan.sample_index, rank_positions(step, batch, rank, world))
    # a rank's slice is a run of positions, so that in their order the ranks are one rank
    assert shown == alone
    # every sample of an epoch once, over the boundary between two steps, ranks and worlds
    assert sorted(shown[:3000]) == sorted(shown[3000:6000]) == list(range(3000))


def range_of(step: int, batch: int) -> range:
    return range(step * batch, (step + 1) * batch)
