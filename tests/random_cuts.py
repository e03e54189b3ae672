"""Random partitions of both kinds, each with the reference's own cut."""

from itertools import pairwise

from hypothesis import strategies as st

from configs.task import StagedPartition
from pretrain.partition import Partition, make_partition, published_partition
from tests.reference import Cut, published_cut, staged_cut


@st.composite
def stages(draw: st.DrawFn, num_timesteps: int | None = None) -> StagedPartition:
    last = num_timesteps or draw(st.integers(1, 300))
    ends = (
        (*sorted(draw(st.sets(st.integers(1, last - 1), max_size=4))), last) if last > 1 else (1,)
    )
    dims = tuple(draw(st.integers(1, 40)) for _ in ends)
    lengths = [end - start for start, end in pairwise((0, *ends))]
    subsets = tuple(draw(st.integers(1, min(pair))) for pair in zip(lengths, dims, strict=True))
    return StagedPartition(stage_ends=ends, stage_dims=dims, stage_subsets=subsets)


@st.composite
def staged_cuts(draw: st.DrawFn, num_timesteps: int | None) -> tuple[Partition, Cut]:
    config = draw(stages(num_timesteps))
    cut = staged_cut(config.stage_ends, config.stage_dims, config.stage_subsets)
    return make_partition(config, sum(config.stage_dims)), cut


@st.composite
def published_cuts(draw: st.DrawFn, num_timesteps: int | None) -> tuple[Partition, Cut]:
    """Balanced and unbalanced ones, also with subsets that have no dimension."""
    config = draw(stages(num_timesteps))
    ends, dims, last = config.stage_ends, config.stage_dims, config.num_timesteps
    latent_dim = sum(dims) + 1  # the balanced cut of a single one may lose it
    num_subsets = draw(st.integers(1, min(last, 100)))
    stage_ends, stage_dims = (ends, dims) if draw(st.booleans()) else (None, None)
    partition = published_partition(
        num_subsets,
        latent_dim,
        stage_ends=stage_ends,
        stage_dims=stage_dims,
        num_timesteps=last,
        allow_empty=True,
    )
    return partition, published_cut(num_subsets, latent_dim, stage_ends, stage_dims, last)


def cuts(num_timesteps: int | None = None) -> st.SearchStrategy[tuple[Partition, Cut]]:
    """Of so many time-steps, or of up to 300."""
    return staged_cuts(num_timesteps) | published_cuts(num_timesteps)
