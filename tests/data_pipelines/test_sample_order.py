"""The sample order: a pure function whose epochs are permutations, cheap to read, easy to split."""

import time
import tracemalloc
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.sample_order import (
    SampleOrder,
    batch_positions,
    legal_world_sizes,
    mix64,
    permute,
)

properties = settings(deadline=None, max_examples=60)  # the machine may be busy
KEYS = st.integers(0, 2**64 - 1)
orders = st.builds(
    SampleOrder,
    st.lists(st.integers(1, 40), min_size=1, max_size=10).map(tuple),
    seed=st.integers(0, 2**63 - 1),
    lanes=st.integers(1, 60),
    window_rows=st.integers(1, 50),
)
epochs = st.integers(0, 3) | st.integers(10**5, 10**9)
BIG = (10_000,) * 1_000


def pairs(order: SampleOrder, positions) -> list[tuple[int, int]]:
    shards, rows = order.locate(positions)
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    size = order.samples_per_epoch
    return pairs(order, np.arange(epoch * size, (epoch + 1) * size))


# -------------------------------------------------------------------------------------- permutation


@properties
@given(st.integers(1, 3_000), KEYS)
def test_permute_is_a_bijection_of_every_range(size: int, key: int):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@properties
@given(st.lists(st.tuples(st.integers(1, 500), KEYS, st.integers(0, 499)), min_size=1, max_size=20))
def test_permute_treats_every_element_by_itself(cases: list[tuple[int, int, int]]):
    sizes, keys, indices = (np.array(column, np.uint64) for column in zip(*cases, strict=True))
    indices = (indices % sizes).astype(np.int64)
    together = permute(indices, sizes.astype(np.int64), keys)
    for i, (size, key, _) in enumerate(cases):
        alone = permute(int(indices[i]), size, key)
        assert alone.shape == ()
        assert together[i] == alone


def test_permutations_of_three_are_all_about_equally_frequent():
    seen = permute(np.arange(3)[None, :], 3, np.arange(6_000)[:, None])
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 850
    assert counts.max() < 1_150


def test_every_index_goes_everywhere():
    seen = permute(np.arange(100)[None, :], 100, np.arange(5_000)[:, None])
    for index in range(100):
        counts = np.bincount(seen[:, index], minlength=100)
        assert counts.min() > 15, "50 are expected, give or take 7"


@properties
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.integers(0, 3), KEYS)
def test_mix64_depends_on_every_argument_and_on_their_order(values: list[int], at: int, other: int):
    changed = list(values)
    changed[at % len(values)] = other
    assert (mix64(*changed) == mix64(*values)) == (changed == values)
    assert mix64(*values, 0) != mix64(*values)
    if values != values[::-1]:
        assert mix64(*values) != mix64(*values[::-1])


# ------------------------------------------------------------------------------------------- epochs


@properties
@given(orders, epochs)
def test_an_epoch_visits_every_sample_exactly_once(order: SampleOrder, epoch: int):
    expected = [(s, row) for s, size in enumerate(order.shard_sizes) for row in range(size)]
    assert sorted(epoch_of(order, epoch)) == expected


@properties
@given(orders, st.integers(0, 200), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_position_does_not_depend_on_what_else_is_asked_for(order, start, count, random):
    positions = np.arange(start, start + count)
    together = pairs(order, positions)
    assert [pairs(order, [p])[0] for p in positions[:10]] == together[:10]
    cut = random.randrange(count + 1)
    assert pairs(order, positions[:cut]) + pairs(order, positions[cut:]) == together
    shuffled = list(range(count))
    random.shuffle(shuffled)
    assert pairs(order, positions[shuffled]) == [together[i] for i in shuffled]
    grid_shards, grid_rows = order.locate(np.stack([positions, positions]))
    assert grid_shards.shape == grid_rows.shape == (2, count)
    assert list(zip(grid_shards[1].tolist(), grid_rows[1].tolist(), strict=True)) == together


@properties
@given(orders, epochs)
def test_along_a_lane_each_window_and_each_shard_is_read_in_one_run(order, epoch):
    order_of_epoch = epoch_of(order, epoch)
    first = epoch * order.samples_per_epoch
    lane_of = order.lanes_of(np.arange(first, first + len(order_of_epoch)))
    lanes: list[list[tuple[int, int]]] = [[] for _ in range(order.lanes)]
    for lane, sample in zip(lane_of.tolist(), order_of_epoch, strict=True):
        lanes[lane].append(sample)
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1
    tape = [sample for lane in lanes for sample in lane]

    def windows(samples):
        return [(shard, row // order.window_rows) for shard, row in samples]

    for samples in (*lanes, tape):
        window_runs = [window for window, _ in groupby(windows(samples))]
        shard_runs = [shard for shard, _ in groupby(shard for shard, _ in samples)]
        assert len(window_runs) == len(set(window_runs))
        assert len(shard_runs) == len(set(shard_runs))


@pytest.mark.parametrize("changed", ["epoch", "seed"])
def test_another_epoch_or_seed_is_another_order_of_shards_windows_and_rows(changed: str):
    one = SampleOrder((64,) * 16, seed=3, lanes=1, window_rows=16)
    two = one if changed == "epoch" else SampleOrder((64,) * 16, seed=4, lanes=1, window_rows=16)
    first, second = epoch_of(one, 0), epoch_of(two, 1 if changed == "epoch" else 0)
    assert [s for s, _ in first] != [s for s, _ in second]
    for shard in range(16):
        rows = [[row for s, row in order if s == shard] for order in (first, second)]
        assert rows[0] != rows[1]
        assert rows[0] != sorted(rows[0])
    windows = [[row // 16 for s, row in order if s == 0][::16] for order in (first, second)]
    assert sorted(windows[0]) == [0, 1, 2, 3]
    runs = {tuple(row // 16 for s, row in first if s == shard)[::16] for shard in range(16)}
    assert len(runs) > 5, "windows are permuted differently in each shard"


def test_neighbours_in_a_batch_come_from_far_apart():
    order = SampleOrder(BIG, seed=0, lanes=64, window_rows=128)
    shards, _ = order.locate(np.arange(64))
    assert len(set(shards.tolist())) == 64


@pytest.mark.parametrize("sizes", [(), (3, 0, 2)])
def test_an_order_without_samples_is_refused(sizes: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"at least one sample each.*remove empty shards"):
        SampleOrder(sizes, seed=0, lanes=1, window_rows=1)


# ------------------------------------------------------------------------------------------ batches


@properties
@given(st.integers(1, 240), st.integers(0, 10**9))
def test_the_ranks_shares_joined_are_the_global_batch_at_every_legal_world_size(batch_size, batch):
    for world in legal_world_sizes(batch_size):
        shares = [
            batch_positions(batch, global_batch=batch_size, rank=rank, world_size=world)
            for rank in range(world)
        ]
        assert {len(share) for share in shares} == {batch_size // world}
        joined = np.concatenate(shares)
        assert joined.tolist() == list(range(batch * batch_size, (batch + 1) * batch_size))


def test_legal_world_sizes_are_all_divisors():
    assert legal_world_sizes(24) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert legal_world_sizes(1) == [1]
    assert legal_world_sizes(7) == [1, 7]


@pytest.mark.parametrize("world_size", [5, 7, 48])
def test_a_world_size_that_cannot_split_the_batch_is_refused_with_those_that_can(world_size: int):
    with pytest.raises(
        ValueError,
        match=rf"batch 24 cannot be split over {world_size} ranks; legal world sizes are "
        r"\[1, 2, 3, 4, 6, 8, 12, 24\]",
    ):
        batch_positions(0, global_batch=24, rank=0, world_size=world_size)


# ---------------------------------------------------------------------------------- for all of time


def test_the_order_never_changes_between_versions():
    assert int(mix64(0)) == 5878998237028904013
    assert int(mix64(1, 2, 3)) == 17158900331822030101
    assert permute(np.arange(10), 10, 12345).tolist() == [9, 8, 5, 4, 0, 7, 6, 3, 2, 1]
    small = SampleOrder((5, 3, 7), seed=42, lanes=2, window_rows=3)
    assert epoch_of(small, 0) == [
        (0, 1), (2, 6), (0, 0), (2, 4), (0, 2), (2, 5), (0, 3), (2, 3), (0, 4), (2, 0),
        (1, 2), (2, 2), (1, 1), (2, 1), (1, 0),
    ]  # fmt: skip
    assert epoch_of(small, 1) == [
        (2, 0), (0, 4), (2, 2), (0, 2), (2, 1), (0, 1), (2, 3), (0, 0), (2, 4), (1, 0),
        (2, 5), (1, 1), (2, 6), (1, 2), (0, 3),
    ]  # fmt: skip
    large = SampleOrder(BIG, seed=7, lanes=64, window_rows=128)
    assert pairs(large, [0, 1, 63, 64, 9_999_999, 10_000_000, 123_456_789]) == [
        (177, 7846), (687, 7239), (443, 9050), (177, 7896), (10, 8412), (0, 3022), (170, 269),
    ]  # fmt: skip


def test_an_epoch_of_laion_5b_is_planned_in_seconds_and_little_memory():
    sizes = tuple(10_000 + n % 7 for n in range(585_000))
    tracemalloc.start()
    started = time.monotonic()
    order = SampleOrder(sizes, seed=0, lanes=64, window_rows=128)
    last = order.samples_per_epoch - 1
    for position in (0, last // 2, last):
        order.locate(np.arange(position - position % 64, position + 1))
    seconds = time.monotonic() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 10
    assert peak < 100e6


def test_memory_does_not_grow_with_the_epochs():
    order = SampleOrder(np.full(20_000, 10), seed=0, lanes=8, window_rows=4)

    def held_after(epochs: range) -> int:
        for epoch in epochs:
            order.locate(epoch * order.samples_per_epoch)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few, many = held_after(range(3)), held_after(range(3, 12))
    finally:
        tracemalloc.stop()
    assert many < 1.2 * few
