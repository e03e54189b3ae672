"""How z is cut by time-step: one immutable value (METHOD section 2).

Subset i owns the time-steps [timestep_ends[i-1], timestep_ends[i]) and the dimensions
[dim_ends[i-1], dim_ends[i]). Noise destroys fine attributes first, so the first subsets, which the
smallest time-steps see, hold the finest ones.

Letters: B batch, D = latent_dim, T time-steps, K subsets.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from configs.task import PublishedPartition, StagedPartition

PartitionConfig = StagedPartition | PublishedPartition


@dataclass(frozen=True, slots=True)
class Subset:
    """One cell of the partition; both ranges are half-open."""

    name: str
    timesteps: tuple[int, int]
    dims: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Partition:
    """K subsets, fine to coarse; ends are exclusive and rise strictly.

    Raises:
        ValueError: the ends do not rise, or the two tuples differ in length.
    """

    timestep_ends: tuple[int, ...]
    dim_ends: tuple[int, ...]
    allow_empty: bool = False
    """Subsets without a dimension, which some published recipes have; only to read them."""

    def __post_init__(self) -> None:
        if not self.timestep_ends or len(self.timestep_ends) != len(self.dim_ends):
            raise ValueError(
                f"a partition needs as many timestep_ends as dim_ends, at least one; "
                f"got {len(self.timestep_ends)} and {len(self.dim_ends)}"
            )
        for what, ends, least in (
            ("timestep_ends", self.timestep_ends, 1),
            ("dim_ends", self.dim_ends, 0 if self.allow_empty else 1),
        ):
            for before, after in pairwise((0, *ends)):
                if after - before < least:
                    raise ValueError(f"{what} must rise from above 0, got {after} after {before}")
        if self.latent_dim < 1:
            raise ValueError("a partition needs at least one dimension, got none")

    @property
    def num_subsets(self) -> int:
        return len(self.dim_ends)

    @property
    def num_timesteps(self) -> int:
        return self.timestep_ends[-1]

    @property
    def latent_dim(self) -> int:
        return self.dim_ends[-1]

    @property
    def subsets(self) -> tuple[Subset, ...]:
        """All subsets, fine to coarse, named z000, z001, ..."""
        steps = pairwise((0, *self.timestep_ends))
        dims = pairwise((0, *self.dim_ends))
        return tuple(
            Subset(f"z{i:03d}", s, d) for i, (s, d) in enumerate(zip(steps, dims, strict=True))
        )

    def select(self, start: int, end: int) -> tuple[Subset, ...]:
        """Every subset whose time-step range intersects [start, end).

        Raises:
            ValueError: the range is empty or lies outside [0, num_timesteps).
        """
        if not 0 <= start < end <= self.num_timesteps:
            raise ValueError(
                f"time-steps must be a range inside [0, {self.num_timesteps}), got [{start}, {end})"
            )
        return tuple(s for s in self.subsets if s.timesteps[0] < end and start < s.timesteps[1])

    def subset_of_timestep(self) -> Tensor:
        """Index of the subset that owns each time-step; int64, (T,)."""
        ends = torch.tensor(self.timestep_ends)
        return torch.searchsorted(ends, torch.arange(self.num_timesteps), right=True)

    def cumulative_masks(self) -> Tensor:
        """float32 (K, D): row i keeps the dimensions of subsets 0..i (METHOD's `masks`)."""
        dims = torch.arange(self.latent_dim)
        return (dims < torch.tensor(self.dim_ends)[:, None]).float()

    def own_masks(self) -> Tensor:
        """float32 (K, D): row i keeps the dimensions of subset i (METHOD's `k_masks`)."""
        return self.cumulative_masks() - self.receding_masks()

    def receding_masks(self) -> Tensor:
        """float32 (K, D): row i keeps the dimensions of subsets 0..i-1."""
        masks = self.cumulative_masks()
        return torch.cat([torch.zeros_like(masks[:1]), masks[:-1]])

    def masks(self, steps_T: Tensor | None = None) -> "Masks":
        """All tables that training and sampling look things up in.

        Args:
            steps_T: the partition's step for each one of another schedule; None where these agree.
        """
        subset_T = self.subset_of_timestep()
        return Masks(
            subset_T if steps_T is None else subset_T[steps_T],
            self.cumulative_masks(),
            self.own_masks(),
            self.receding_masks(),
        )

    def named_ranges(self, start: int, end: int) -> dict[str, tuple[Subset, ...]]:
        """The subsets of time-steps [start, end) as `fine`, `middle`, `coarse`: thirds of them."""
        subsets = self.select(start, end)
        cuts = [round(i * len(subsets) / 3) for i in range(4)]
        return {
            name: subsets[first:last]
            for name, (first, last) in zip(
                ("fine", "middle", "coarse"), pairwise(cuts), strict=True
            )
            if first < last
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest; `partition_from_json` reads them back."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Masks:
    """A partition's tables, on one device: one set for training and sampling alike."""

    subset_T: Tensor
    cumulative_KD: Tensor
    own_KD: Tensor
    receding_KD: Tensor

    def to(self, device: torch.device) -> "Masks":
        tables = (self.subset_T, self.cumulative_KD, self.own_KD, self.receding_KD)
        return Masks(*(table.to(device) for table in tables))


def partition_from_json(value: dict[str, Any]) -> Partition:
    """The inverse of `Partition.to_json`."""
    return Partition(
        tuple(value["timestep_ends"]), tuple(value["dim_ends"]), value.get("allow_empty", False)
    )


def make_partition(config: PartitionConfig, latent_dim: int) -> Partition:
    """The partition that a run describes.

    Raises:
        ValueError: its dimensions do not add up to `latent_dim`, or a subset would have none.
    """
    if isinstance(config, StagedPartition):
        partition = staged_partition(config.stage_ends, config.stage_dims, config.stage_subsets)
    else:
        partition = published_partition(
            config.num_subsets,
            latent_dim,
            stage_ends=config.stage_ends,
            stage_dims=config.stage_dims,
            num_timesteps=config.num_timesteps,
            allow_empty=config.allow_empty,
        )
    if partition.latent_dim != latent_dim:
        raise ValueError(
            f"the partition has {partition.latent_dim} dimensions, the encoder {latent_dim}; make "
            f"them agree (for some numbers of subsets the published formula loses a dimension to "
            f"rounding: choose another one)"
        )
    return partition


def staged_partition(
    stage_ends: Sequence[int], stage_dims: Sequence[int], stage_subsets: Sequence[int]
) -> Partition:
    """Each stage is cut evenly in time-steps and in dimensions; its last subset takes the rest.

    Subset j of a stage of length T_s with k_s subsets ends at the first time-step that the map
    floor((t - start) / T_s * k_s) sends to j + 1: METHOD's corrected `k_per_stage`.
    """
    timestep_ends: list[int] = []
    dim_ends: list[int] = []
    first_dim = start = 0
    for end, dims, subsets in zip(stage_ends, stage_dims, stage_subsets, strict=True):
        for j in range(1, subsets + 1):
            timestep_ends.append(start + -(-j * (end - start) // subsets))
            dim_ends.append(first_dim + (dims if j == subsets else dims // subsets * j))
        start, first_dim = end, first_dim + dims
    return Partition(tuple(timestep_ends), tuple(dim_ends))


def published_partition(
    num_subsets: int,
    latent_dim: int,
    *,
    stage_ends: Sequence[int] | None = None,
    stage_dims: Sequence[int] | None = None,
    num_timesteps: int = 1000,
    allow_empty: bool = False,
) -> Partition:
    """The published recipes' partition, bit for bit (METHOD section 2).

    Time-step t belongs to subset floor(t / (T / K)), in double precision, whatever the stages. A
    subset belongs to the stage that holds its first time-step; a stage deals its dimensions evenly
    to its subsets, and the last of them takes the remainder. A stage in which no subset begins
    leaves its dimensions to the next subset.

    Raises:
        ValueError: a subset would have no time-step, or no dimension (unless `allow_empty`).
    """
    subset_of = [int(t / (num_timesteps / num_subsets)) for t in range(num_timesteps)]
    starts = [bisect_left(subset_of, i) for i in range(num_subsets)]
    timestep_ends = (*starts[1:], num_timesteps)
    if stage_ends is None or stage_dims is None:
        dim_ends = [int(latent_dim / num_subsets * (i + 1)) for i in range(num_subsets)]
        return Partition(timestep_ends, tuple(dim_ends), allow_empty)
    dim_ends = []
    first = first_dim = 0
    for end, dims in zip(stage_ends, stage_dims, strict=True):
        last = bisect_left(starts, end)
        each = dims // max(1, last - first)
        dim_ends += [first_dim + each * (j + 1) for j in range(last - first)]
        if last > first:
            dim_ends[-1] = first_dim + dims
        first, first_dim = last, first_dim + dims
    return Partition(timestep_ends, tuple(dim_ends), allow_empty)
