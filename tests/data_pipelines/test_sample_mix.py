"""Mixing: exact shares, each source whole and in its own order, the state still one integer."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.sample_mix import SampleMix, deal_lanes
from data_pipelines.sample_order import SampleOrder, batch_positions

SIZES = ([5, 9, 2], [7], [4, 4, 4, 4])
shard_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def make_mix(lanes: int = 16, weights=(4, 1, 3), seed: int = 0, sizes=SIZES) -> SampleMix:
    return SampleMix(sizes, weights, seed=seed, lanes=lanes, window_rows=3)


def of_source(mix: SampleMix, number: int, positions: np.ndarray) -> np.ndarray:
    return positions[mix.sources_of(positions) == number]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 4096))
def test_lanes_are_dealt_by_weight_to_the_nearest_whole(weights: list[float], lanes: int) -> None:
    exact = [Fraction(w) * lanes / sum(map(Fraction, weights)) for w in weights]
    if any(share < 1 for share in exact):
        return  # such a source may be refused
    counts = deal_lanes(weights, lanes)
    assert sum(counts) == lanes
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(shard_sizes, st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 2),
    st.integers(0, 2**32),
)
def test_every_source_is_read_once_per_pass_in_shares_that_never_waver(
    sources: list[tuple[list[int], int]], lanes_per_weight: int, seed: int
) -> None:
    sizes, weights = zip(*sources, strict=True)
    lanes = sum(weights) * lanes_per_weight
    mix = make_mix(lanes, weights, seed, sizes)
    turns = 3 * max(map(sum, sizes))
    positions = np.arange(lanes * turns)
    shards, rows = mix.locate(positions)
    firsts = np.cumsum([0, *map(len, sizes)])
    for number, source in enumerate(sizes):
        mine = mix.sources_of(positions) == number
        per_turn = mine.reshape(turns, lanes).sum(axis=1)
        assert set(per_turn.tolist()) == {weights[number] * lanes // sum(weights)}
        found = list(zip(shards[mine] - firsts[number], rows[mine], strict=True))
        whole = [(shard, row) for shard, size in enumerate(source) for row in range(size)]
        for start in range(0, len(found) - len(whole) + 1, len(whole)):
            assert sorted(found[start : start + len(whole)]) == whole


def test_a_source_keeps_the_order_that_it_would_have_alone() -> None:
    mix = make_mix()
    positions = of_source(mix, 2, np.arange(400))
    alone = SampleOrder(
        SIZES[2], seed=mix.sources[2].seed, lanes=mix.lane_counts[2], window_rows=3
    ).locate(np.arange(len(positions)))
    shards, rows = mix.locate(positions)
    assert (shards - 4).tolist() == alone[0].tolist()
    assert rows.tolist() == alone[1].tolist()


def test_sources_of_the_same_sizes_are_not_shuffled_alike() -> None:
    mix = SampleMix([(50, 50), (50, 50)], (1, 1), seed=0, lanes=4, window_rows=50)
    rows = [mix.locate(of_source(mix, number, np.arange(200)))[1].tolist() for number in (0, 1)]
    assert rows[0] != rows[1]


def test_a_lane_reads_one_window_after_the_other() -> None:
    """What a rank keeps in memory is one window a lane, so no window may come back."""
    big = ([300, 200], [900])
    mix = SampleMix(big, (1, 3), seed=1, lanes=8, window_rows=10)
    positions = np.arange(8 * 60)
    shards, rows = mix.locate(positions)
    lanes = mix.lanes_of(positions)
    assert set(lanes.tolist()) == set(range(8))
    for lane in range(8):
        windows = list(zip(shards[lanes == lane], rows[lanes == lane] // 10, strict=True))
        changes = sum(a != b for a, b in pairwise(windows))
        assert len(windows) == 60
        assert changes + 1 == len(set(windows)) <= 8


def test_every_rank_has_a_bit_of_every_source() -> None:
    mix = make_mix(lanes=256, weights=(1, 1, 2))
    for rank in range(4):
        share = batch_positions(3, global_batch=256, rank=rank, world_size=4)
        counts = np.bincount(mix.sources_of(share), minlength=3)
        assert (counts >= (8, 8, 16)).all(), counts


def test_positions_do_not_depend_on_what_else_is_asked_for() -> None:
    mix = make_mix()
    together = mix.locate(np.arange(200))
    one_by_one = [make_mix().locate(position) for position in range(200)]
    assert together[0].tolist() == [int(shards[0]) for shards, _ in one_by_one]
    assert together[1].tolist() == [int(rows[0]) for _, rows in one_by_one]


def test_a_weight_too_small_for_the_lanes_is_refused_with_the_lanes_it_needs() -> None:
    with pytest.raises(ValueError, match=r"without any of 4 lanes; use at least data\.lanes=100"):
        deal_lanes((99, 1), 4)
    assert deal_lanes((99, 1), 100) == [99, 1]
