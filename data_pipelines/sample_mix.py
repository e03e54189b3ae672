"""Several data sets in one stream, by weight: each has some of the lanes, and an order of its own.

Position p belongs to lane p mod L, as for one set. The lanes are dealt out once, in proportion to
the weights, so every L positions hold exactly the same number of samples of each source, a rank
goes on reading windows that no other rank reads, and the state is still the one integer p. Within
its lanes a source is read as if it were alone: every sample exactly once per pass of that source.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from data_pipelines.sample_order import Ints, SampleOrder, mix64, permute


class SampleMix:
    """Position -> (shard, row) for several shard sets, whose shards are numbered one after another.

    Args:
        shard_sizes: of each source, samples per shard.
        weights: of each source; only their proportions matter.
        lanes: of all sources together; weights are rounded to whole lanes.

    Raises:
        ValueError: a source would get no lane, or has an empty shard.
    """

    def __init__(
        self,
        shard_sizes: Sequence[ArrayLike],
        weights: Sequence[float],
        *,
        seed: int,
        lanes: int,
        window_rows: int,
    ) -> None:
        self.seed, self.lanes, self.window_rows = seed, lanes, window_rows
        self.lane_counts = deal_lanes(weights, lanes)
        self.sources = [
            SampleOrder(
                sizes, seed=int(mix64(seed, number) >> np.uint64(1)), lanes=count,
                window_rows=window_rows,
            )
            for number, (sizes, count) in enumerate(
                zip(shard_sizes, self.lane_counts, strict=True)
            )
        ]  # fmt: skip
        self.samples_per_epoch = sum(source.samples_per_epoch for source in self.sources)
        """Of all sources, once each. Sources do not end together: it is a number, not a seam."""
        shards = [len(source.shard_sizes) for source in self.sources]
        self._first_shards = np.cumsum([0, *shards[:-1]])
        self._first_lanes = np.cumsum([0, *self.lane_counts[:-1]])
        self._source_of_lane, self._place_of_lane = _spread(self.lane_counts, seed)

    def locate(self, positions: Any) -> tuple[Ints, Ints]:
        """Shard numbers and rows of global positions; two int64 arrays of the same shape."""
        positions = np.atleast_1d(np.asarray(positions, np.int64))
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for number, here, own in self._of_sources(positions):
            found, rows[here] = self.sources[number].locate(own)
            shards[here] = found + self._first_shards[number]
        return shards, rows

    def lanes_of(self, positions: Ints) -> Ints:
        """The lane of each position, numbered source by source; it reads window after window."""
        lanes = np.empty_like(positions)
        for number, here, own in self._of_sources(positions):
            lanes[here] = self.sources[number].lanes_of(own) + self._first_lanes[number]
        return lanes

    def sources_of(self, positions: Ints) -> Ints:
        """Number of the source that each position belongs to."""
        return self._source_of_lane[positions % self.lanes]

    def _of_sources(self, positions: Ints) -> list[tuple[int, Any, Ints]]:
        """Each source's number, which of the positions are its own, and those in its own count."""
        turns, lanes = np.divmod(positions, self.lanes)
        numbers, places = self._source_of_lane[lanes], self._place_of_lane[lanes]
        found = []
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found.append((number, here, turns[here] * self.lane_counts[number] + places[here]))
        return found


Order = SampleOrder | SampleMix
"""What reading needs to know of an order: `locate`, `lanes_of`, and the numbers beside them."""


def deal_lanes(weights: Sequence[float], lanes: int) -> list[int]:
    """Lanes for each weight: whole numbers that add up, nearest to the exact shares (Hamilton).

    Raises:
        ValueError: one of them would get none.
    """
    exact = [Fraction(weight) * lanes / sum(map(Fraction, weights)) for weight in weights]
    counts = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
    for number in by_rest[: lanes - sum(counts)]:
        counts[number] += 1
    if 0 in counts:
        least = math.ceil(sum(map(Fraction, weights)) / Fraction(min(weights)))
        raise ValueError(
            f"weights {list(weights)} leave a source without any of {lanes} lanes; use at least "
            f"data.lanes={least}, or raise the smallest weight"
        )
    return counts


def _spread(lane_counts: Sequence[int], seed: int) -> tuple[Ints, Ints]:
    """Source of each lane, in a keyed order, so that every rank's share of lanes has a bit of all;
    and which of its source's lanes it is."""
    lanes = sum(lane_counts)
    dealt = np.repeat(np.arange(len(lane_counts)), lane_counts)
    sources = dealt[permute(np.arange(lanes), lanes, mix64(seed, lanes))]
    places = np.empty_like(sources)
    for number, count in enumerate(lane_counts):
        places[sources == number] = np.arange(count)
    return sources, places
