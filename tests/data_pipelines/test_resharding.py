"""Every sample that stays is in one training shard, mixed with others, in shards of one size."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.resharding import Group, groups_of


def rows_kept(counts: list[int]) -> list[np.ndarray]:
    """Every other row of each tar."""
    return [np.arange(0, 2 * count, 2) for count in counts]


def cut(counts: list[int], **changes: int) -> list[Group]:
    how = {"rows_per_shard": 10, "mix_shards": 6, "seed": 1, **changes}
    return list(groups_of(rows_kept(counts), **how))


COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any)


@settings(deadline=None)
@given(COUNTS, st.integers(1, 25), st.integers(1, 5))
def test_every_sample_goes_to_one_place(counts: list[int], rows: int, mix: int) -> None:
    groups = cut(counts, rows_per_shard=rows, mix_shards=mix)
    found = [
        (source, row)
        for group in groups
        for source, row in zip(group.sources.tolist(), group.rows.tolist(), strict=True)
    ]
    wanted = [(tar, 2 * row) for tar, count in enumerate(counts) for row in range(count)]
    assert sorted(found) == wanted
    sizes = [size for group in groups for size in np.diff((0, *group.ends)).tolist()]
    assert len(sizes) == -(-len(wanted) // rows)
    assert max(sizes) <= rows
    assert max(sizes) - min(sizes) <= 1
    assert [group.first_shard for group in groups] == list(range(0, len(sizes), mix))


def test_samples_of_a_shard_come_from_several_tars_and_not_in_order() -> None:
    for group in cut([30] * 10):
        first = group.sources[: group.ends[0]]
        assert len(set(first.tolist())) > 1
        assert (np.diff(group.sources) < 0).any()


def test_tars_and_samples_are_in_an_order_of_their_own() -> None:
    groups = cut([30] * 10)
    first_tars = list(dict.fromkeys(np.concatenate([g.sources for g in groups]).tolist()))
    assert sorted(set(groups[0].sources.tolist())) != [0, 1], "neighbours of a shuffled list"
    assert sorted(first_tars) == list(range(10))
    orders = [np.argsort(np.argsort(group.rows + 100 * group.sources)) for group in groups]
    assert not np.array_equal(orders[0], orders[1]), "each group is shuffled in its own way"


def test_the_seed_and_nothing_else_decides() -> None:
    def places(seed: int) -> list[list[int]]:
        return [group.sources.tolist() for group in cut([30] * 10, seed=seed)]

    assert places(1) == places(1)
    assert places(1) != places(2)
