"""The order of samples is a function of seed and position alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distseg.data.plan import Plan, rank_positions
from shards.errors import InputError

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
    joined = [p for step in steps for rank in range(world) for p in rank_positions(step, batch, rank, world)]
    assert joined == list(range(start * batch, (start + 3) * batch))
    shares = {len(rank_positions(step, batch, rank, world)) for step in steps for rank in range(world)}
    assert shares == {batch // world}
    # a plan asked for the tail alone gives what one asked from the beginning gives: nothing is carried along
    from_start = Plan(num_samples, seed)
    order = [from_start.sample_index(p) for p in range(joined[-1] + 1)]
    tail = Plan(num_samples, seed)
    assert [tail.sample_index(p) for p in joined] == order[joined[0] :]


def test_order_is_fixed_for_ever():
    """Stored values: a change of numpy or of this file that moves the order breaks the resume of old runs."""
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
        tuple(plan.sample_index(50 * epoch + offset) for offset in range(50)) for plan in plans for epoch in range(20)
    }
    assert len(orders) == 20 * len(seeds)
    assert len({plan.augmentation_rng(2**63 + p).random() for plan in plans for p in range(3)}) == 3 * len(seeds)


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
        np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(0, 2**63, 40).tolist() for epoch in range(40)
    ]
    flat = [word for row in words for word in row]
    assert len(set(flat)) == len(flat)
    assert plan.augmentation_rng(3).random(4).tolist() == plan.augmentation_rng(3).random(4).tolist()


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


def test_bad_plans():
    with pytest.raises(InputError, match="at least one sample"):
        Plan(0, seed=0)
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match="seed"):
            Plan(3, seed=seed)
