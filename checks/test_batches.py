"""batches/: sizes, plans and the sample order: exact sizes, exact coverage, schedules against written-out values."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batches
from adadagrad.order import SampleOrder


@given(
    st.integers(0, 10**6), st.integers(1, 500), st.integers(1, 7), st.integers(1, 40), st.integers(1, 5), st.booleans()
)
def test_plan_is_exact(start, batch_size, world_size, max_micro_batch_size, min_steps, even):
    if batch_size < world_size:
        with pytest.raises(ValueError):
            batches.cut(start, batch_size, world_size, max_micro_batch_size, min_steps, even=even)
        return
    plan = batches.cut(start, batch_size, world_size, max_micro_batch_size, min_steps, even=even)
    ranks = [plan.micro_batches(rank) for rank in range(world_size)]
    assert max(len(micro_batches) for micro_batches in ranks) == plan.steps
    sizes = [len(micro_batch) for micro_batches in ranks for micro_batch in micro_batches]
    assert min(sizes) >= 1 and max(sizes) <= max_micro_batch_size and max(sizes) == plan.micro_batch_size
    if even or plan.size is None:
        assert max(sizes) - min(sizes) <= 2  # one between ranks, one between micro-batches
    else:
        for *fixed, last in ([len(micro_batch) for micro_batch in micro_batches] for micro_batches in ranks):
            lent = last == 2 and max_micro_batch_size > 2 and fixed[-1:] == [max_micro_batch_size - 1]
            assert set(fixed[:-1] if lent else fixed) <= {max_micro_batch_size}
            assert last > 1 or not fixed or max_micro_batch_size <= 2  # no sample is left alone
    if even and max_micro_batch_size > 1:  # as layers need it that exchange statistics in every micro-batch
        assert len({len(micro_batches) for micro_batches in ranks}) == 1
    totals = [sum(map(len, micro_batches)) for micro_batches in ranks]
    assert max(totals) - min(totals) <= 1
    positions = sorted(p for micro_batches in ranks for micro_batch in micro_batches for p in micro_batch)
    assert positions == list(range(start, start + batch_size))
    assert plan.steps >= min(min_steps, batch_size // world_size)
    assert {len(micro_batches) for micro_batches in ranks} <= {plan.steps, plan.steps - 1}


@example(7, 2, 3, 2)  # shares of 4 and 3: two micro-batches and one
@given(st.integers(1, 300), st.integers(1, 5), st.integers(3, 40), st.integers(1, 9))
def test_plan_keeps_two_samples_together(batch_size, world_size, max_micro_batch_size, min_steps):
    """For BatchNorm on 1×1 maps: no micro-batch of one, and still none above the largest size."""
    if batch_size < 2 * world_size:
        return
    plan = batches.cut(5, batch_size, world_size, max_micro_batch_size, min_steps, min_micro_batch_size=2)
    sizes = [len(micro_batch) for rank in range(world_size) for micro_batch in plan.micro_batches(rank)]
    assert min(sizes) >= 2 and max(sizes) <= max_micro_batch_size and sum(sizes) == batch_size
    assert max(sizes) == plan.micro_batch_size


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.lists(st.integers(1, 90), min_size=1, max_size=30),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 5),
)
def test_each_sample_once_an_epoch(num_samples, batch_sizes, worlds, shuffle, seed):
    """Over random batch sizes and a world size that changes between batches (as after a resume)."""
    order = SampleOrder(num_samples, seed, shuffle)
    cursor, used = 0, []
    for i, batch_size in enumerate(batch_sizes):
        world_size = worlds[i % len(worlds)]
        if batch_size < world_size:
            continue
        plan = batches.cut(cursor, batch_size, world_size, 7)
        pairs = [
            pair
            for rank in range(world_size)
            for positions in plan.micro_batches(rank)
            for pair in zip(positions, order.samples(positions).tolist())
        ]
        used += [sample for _, sample in sorted(pairs)]
        cursor += batch_size
    for epoch in range(cursor // num_samples):
        assert Counter(used[epoch * num_samples : (epoch + 1) * num_samples]) == Counter(range(num_samples))
    partial = used[cursor // num_samples * num_samples :]
    assert len(set(partial)) == len(partial)
    if not shuffle:
        assert used == [p % num_samples for p in range(cursor)]


def test_order_changes_with_epoch_and_seed():
    orders = [
        SampleOrder(50, seed, True).samples(range(e * 50, e * 50 + 50)).tolist() for seed in (0, 1) for e in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_quickest_size():
    """The smallest within 5 % of the best; no size is tried beyond what does not fit, or brings nothing any more."""

    def tried(rates: dict[int, float], largest: int = 100) -> tuple[int, list[int]]:
        size, found = batches.quickest(lambda size: rates.get(size, 0.0), 8, largest)
        return size, list(found)

    assert tried({8: 10, 16: 20, 32: 19.1, 64: 20.5, 100: 20.4}) == (16, [8, 16, 32, 64])
    assert tried({8: 10, 16: 20, 32: 40, 64: 80, 100: 120}) == (100, [8, 16, 32, 64, 100])
    assert tried({8: 10, 16: 20, 32: 40}) == (32, [8, 16, 32, 64])
    assert tried({8: 10, 16: 5, 32: 5}) == (8, [8, 16, 32])
    assert tried({8: 10}, largest=8) == (8, [8])
    assert tried({}) == (0, [8])
