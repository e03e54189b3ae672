"""The partition: every time-step and every dimension has its subset, fine to coarse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.task import StagedPartition
from pretrain.partition import (
    Partition,
    Subset,
    make_partition,
    partition_from_json,
    published_partition,
)
from tests.random_cuts import cuts, stages
from tests.reference import Cut


def cut(config: StagedPartition) -> Partition:
    return make_partition(config, sum(config.stage_dims))


SMALL = Partition(timestep_ends=(3, 4, 10), dim_ends=(1, 5, 6))
PAPER = cut(StagedPartition())


configs = settings(deadline=None, max_examples=80)


# ------------------------------------------------------------------------------------------ the cut


@settings(deadline=None, max_examples=500)
@given(cuts())
def test_both_cuts_and_their_masks_are_the_references(found: tuple[Partition, Cut]):
    partition, cut = found
    assert partition.subset_of_timestep().dtype == torch.int64
    assert partition.subset_of_timestep().tolist() == cut.of_timestep
    for masks, expected in (
        (partition.cumulative_masks(), cut.cumulative),
        (partition.own_masks(), cut.own),
        (partition.receding_masks(), cut.receding),
    ):
        assert masks.dtype == torch.float32
        assert masks.tolist() == expected.tolist()
    for i, subset in enumerate(partition.subsets):
        assert cut.of_timestep[slice(*subset.timesteps)] == [i] * cut.of_timestep.count(i)
        assert cut.of_dim[slice(*subset.dims)] == [i] * cut.of_dim.count(i)


def test_the_papers_stages_give_the_papers_dimensions():
    widths = [subset.dims[1] - subset.dims[0] for subset in PAPER.subsets]
    assert widths == [
        *(2, 2, 2, 4),
        *(8, 8, 9),
        *[25] * 12, 27,
        *[8] * 11, 12,
        *[1] * 31, 19,
    ]  # fmt: skip
    assert (PAPER.num_subsets, PAPER.latent_dim, PAPER.num_timesteps) == (64, 512, 1000)
    assert [PAPER.timestep_ends[i - 1] for i in (4, 7, 20, 32, 64)] == [50, 100, 300, 500, 1000]
    assert PAPER.timestep_ends[:7] == (13, 25, 38, 50, 67, 84, 100)


def test_a_cut_into_one_is_no_cut():
    whole = cut(StagedPartition(stage_ends=(9,), stage_dims=(4,), stage_subsets=(1,)))
    assert whole.subsets == (Subset("z000", (0, 9), (0, 4)),)
    assert whole.cumulative_masks().tolist() == whole.own_masks().tolist() == [[1, 1, 1, 1]]


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("timestep_ends", "dim_ends", "message"),
    [
        ((), (), "at least one; got 0 and 0"),
        ((1, 2), (1,), "as many timestep_ends as dim_ends, at least one; got 2 and 1"),
        ((0, 2), (1, 2), "timestep_ends must rise from above 0, got 0 after 0"),
        ((2, 2), (1, 2), "timestep_ends must rise from above 0, got 2 after 2"),
        ((1, 2), (2, 1), "dim_ends must rise from above 0, got 1 after 2"),
        ((1, 2), (-1, 1), "dim_ends must rise from above 0, got -1 after 0"),
    ],
)
def test_ends_that_do_not_rise_or_match_are_refused(timestep_ends, dim_ends, message: str):
    with pytest.raises(ValueError, match=message):
        Partition(timestep_ends, dim_ends)
    with pytest.raises(ValueError, match=message):
        partition_from_json({"timestep_ends": list(timestep_ends), "dim_ends": list(dim_ends)})


# ------------------------------------------------------------------------------ masks and selection


def test_masks_of_a_small_partition():
    assert SMALL.cumulative_masks().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert SMALL.own_masks().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert SMALL.cumulative_masks().dtype == SMALL.own_masks().dtype == torch.float32


def test_subsets_have_names_that_sort():
    assert [subset.name for subset in SMALL.subsets] == ["z000", "z001", "z002"]
    names = [subset.name for subset in PAPER.subsets]
    assert names == sorted(names)
    assert names[63] == "z063"


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 1, "0"), (0, 3, "0"), (2, 3, "0"), (2, 4, "01"), (3, 4, "1"), (3, 5, "12"),
        (4, 10, "2"), (9, 10, "2"), (0, 10, "012"), (0, 4, "01"), (2, 5, "012"),
    ],
)  # fmt: skip
def test_a_selection_is_every_subset_that_the_range_touches(start: int, end: int, expected: str):
    assert SMALL.select(start, end) == tuple(SMALL.subsets[int(i)] for i in expected)


@configs
@given(stages(), st.data())
def test_a_selection_is_the_subsets_of_its_time_steps(config: StagedPartition, data):
    partition = cut(config)
    start = data.draw(st.integers(0, partition.num_timesteps - 1))
    end = data.draw(st.integers(start + 1, partition.num_timesteps))
    touched = sorted(set(partition.subset_of_timestep()[start:end].tolist()))
    assert partition.select(start, end) == tuple(partition.subsets[i] for i in touched)


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (0, 11), (3, 3), (4, 3), (10, 11)])
def test_a_range_that_is_empty_or_outside_is_refused(start: int, end: int):
    with pytest.raises(ValueError, match=rf"inside \[0, 10\), got \[{start}, {end}\)"):
        SMALL.select(start, end)


@configs
@given(stages())
def test_a_partition_survives_json(config: StagedPartition):
    partition = cut(config)
    assert partition_from_json(partition.to_json()) == partition


# ---------------------------------------------------------------------- the published recipes' cut


def test_the_published_recipe_cuts_time_steps_evenly_whatever_the_stages():
    found = published_partition(
        64, 512, stage_ends=(50, 100, 300, 500, 1000), stage_dims=(10, 25, 327, 100, 50)
    )
    assert found.subset_of_timestep().tolist() == [int(t / (1000 / 64)) for t in range(1000)]
    assert found.dim_ends == PAPER.dim_ends
    assert found.timestep_ends != PAPER.timestep_ends
    balanced = published_partition(10, 64)
    assert balanced.dim_ends == (6, 12, 19, 25, 32, 38, 44, 51, 57, 64)


def test_a_short_stage_makes_subsets_without_dimensions_which_only_imports_may_have():
    arguments = {"stage_ends": (500, 1000), "stage_dims": (3, 5)}
    with pytest.raises(ValueError, match="dim_ends must rise"):
        published_partition(8, 8, **arguments)
    found = published_partition(8, 8, **arguments, allow_empty=True)
    assert found.dim_ends == (0, 0, 0, 3, 4, 5, 6, 8)
    assert partition_from_json(found.to_json()) == found


def test_a_stage_in_which_no_subset_begins_leaves_its_dimensions_to_the_next_one():
    found = published_partition(2, 9, stage_ends=(400, 450, 1000), stage_dims=(2, 3, 4))
    assert found.dim_ends == (2, 9)


def test_named_ranges_are_thirds_from_fine_to_coarse():
    ranges = SMALL.named_ranges(0, 10)
    assert {name: [s.name for s in subsets] for name, subsets in ranges.items()} == {
        "fine": ["z000"],
        "middle": ["z001"],
        "coarse": ["z002"],
    }
