"""Which sample goes into which training shard: a pure function of counts and seed.

The raw tars are put in a shuffled order and their samples laid end to end. That line is cut into
training shards of equal size; neighbouring ones form a group, and samples are shuffled inside it.
So one worker makes a group out of few tars, each read once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipelines.sample_order import mix64, permute

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Training shards that are made together, and of what."""

    first_shard: int
    sources: Ints
    """Number of the tar that each sample comes from, shard by shard; (n,)."""
    rows: Ints
    """Its row there; (n,)."""
    ends: tuple[int, ...]
    """Where each of the shards ends in these; the first one begins at 0."""


def groups_of(
    rows_kept: Sequence[Ints], *, rows_per_shard: int, mix_shards: int, seed: int
) -> Iterator[Group]:
    """Every group, in order.

    Args:
        rows_kept: rows that stay, of each tar, rising; together at least one.
    """
    order = permute(np.arange(len(rows_kept)), len(rows_kept), seed)
    in_order = [rows_kept[tar] for tar in order.tolist()]
    all_rows = np.concatenate(in_order)
    tars = np.repeat(order, [len(rows) for rows in in_order])
    total = len(all_rows)
    shards = -(-total // rows_per_shard)
    bounds = [number * total // shards for number in range(shards + 1)]
    for first in range(0, shards, mix_shards):
        start, *ends = bounds[first : first + mix_shards + 1]
        size = ends[-1] - start
        mixed = start + permute(np.arange(size), size, mix64(seed, first))
        yield Group(first, tars[mixed], all_rows[mixed], tuple(end - start for end in ends))
