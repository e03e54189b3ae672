"""How z is cut by time-step: one immutable value (METHOD section 2).

Subset i owns the time-steps [timestep_ends[i-1], timestep_ends[i]) and the dimensions
[dim_ends[i-1], dim_ends[i]). Noise destroys fine attributes first, so the first subsets, which the
smallest time-steps see, hold the finest ones.

Letters: B batch, D = latent_dim, T time-steps, K subsets.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from configs.schema import PartitionConfig


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

    def __post_init__(self) -> None:
        if not self.timestep_ends or len(self.timestep_ends) != len(self.dim_ends):
            raise ValueError(
                f"a partition needs as many timestep_ends as dim_ends, at least one; "
                f"got {len(self.timestep_ends)} and {len(self.dim_ends)}"
            )
        for what, ends in (("timestep_ends", self.timestep_ends), ("dim_ends", self.dim_ends)):
            for before, after in pairwise((0, *ends)):
                if after <= before:
                    raise ValueError(f"{what} must rise from above 0, got {after} after {before}")

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
        masks = self.cumulative_masks()
        return torch.cat([masks[:1], masks[1:] - masks[:-1]])

    def to_json(self) -> dict[str, list[int]]:
        return {"timestep_ends": list(self.timestep_ends), "dim_ends": list(self.dim_ends)}


def partition_from_json(value: dict[str, list[int]]) -> Partition:
    """The inverse of `Partition.to_json`."""
    return Partition(tuple(value["timestep_ends"]), tuple(value["dim_ends"]))


def make_partition(config: PartitionConfig) -> Partition:
    """Each stage is cut evenly in time-steps and in dimensions; its last subset takes the rest.

    Subset j of a stage of length T_s with k_s subsets ends at the first time-step that the map
    floor((t - start) / T_s * k_s) sends to j + 1: METHOD's corrected `k_per_stage`.
    """
    timestep_ends: list[int] = []
    dim_ends: list[int] = []
    dim_starts = (0, *accumulate(config.stage_dims))
    for start, end, dims, first_dim, subsets in zip(
        (0, *config.stage_ends[:-1]),
        config.stage_ends,
        config.stage_dims,
        dim_starts,
        config.stage_subsets,
        strict=False,
    ):
        length = end - start
        for j in range(1, subsets + 1):
            timestep_ends.append(start + -(-j * length // subsets))
            dim_ends.append(first_dim + (dims if j == subsets else dims // subsets * j))
    return Partition(tuple(timestep_ends), tuple(dim_ends))
