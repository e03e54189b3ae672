"""The global order of samples: a pure function of (seed, epoch, shard sizes), and nothing else.

An epoch is a permutation of all N samples, built in three steps:

1. the *tape*: shards in a permuted order, one after the other; inside a shard, windows of
   consecutive rows in a permuted order; inside a window, rows in a permuted order. A window is what
   one ranged GET fetches, so reading along the tape is cheap;
2. the *lanes*: the tape is cut into L contiguous pieces whose lengths differ by at most one;
3. the *epoch*: position q takes the next sample of lane q mod L, so neighbours in a batch come from
   far-apart places of the tape.

Global position p is q = p mod N of epoch p // N: every sample exactly once per epoch, every batch
full, no stall at the seam, and the state of the whole pipeline is the one integer p. Every lookup
costs O(log shards); no replay.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
_U64 = np.uint64


def mix64(*values: Any) -> NDArray[np.uint64]:
    """A well-mixed 64-bit hash of integers or integer arrays (broadcast together)."""
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for value in values:
            state = np.asarray(value).astype(_U64) ^ (state * _U64(0x9E3779B97F4A7C15))
            state = (state ^ (state >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> _U64(27))) * _U64(0x94D049BB133111EB)
            state = state ^ (state >> _U64(31))
    return np.asarray(state, dtype=_U64)


def permute(index: Any, size: Any, key: Any, *, inverse: bool = False) -> Ints:
    """Where `index` goes under the keyed permutation of range(size); all three broadcast.

    A four-round Feistel network on the smallest even number of bits that holds `size`; results
    outside the range walk on until they fall inside, which keeps it a bijection. With `inverse`,
    where it comes from: the same walk backwards.
    """
    arrays = np.asarray(index, np.int64), np.asarray(size, np.int64), np.asarray(key, _U64)
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    index, size, key = np.broadcast_arrays(*arrays, np.empty(1))[:3]
    bits = np.ceil(np.log2(np.maximum(size, 4))).astype(_U64)
    half = (bits + _U64(1)) // _U64(2)
    out = _feistel(index.astype(_U64), half, key, inverse=inverse)
    while (outside := out >= size.astype(_U64)).any():
        out[outside] = _feistel(out[outside], half[outside], key[outside], inverse=inverse)
    return out.astype(np.int64).reshape(shape)


def _feistel(
    value: NDArray[np.uint64],
    half: NDArray[np.uint64],
    key: NDArray[np.uint64],
    *,
    inverse: bool,
) -> NDArray[np.uint64]:
    mask = (_U64(1) << half) - _U64(1)
    left, right = value >> half, value & mask
    for turn in (3, 2, 1, 0) if inverse else (0, 1, 2, 3):
        if inverse:
            left, right = right ^ (mix64(key, turn, left) & mask), left
        else:
            left, right = right, left ^ (mix64(key, turn, right) & mask)
    return (left << half) | right


class SampleOrder:
    """Position -> (shard, row) for a shard set.

    Args:
        shard_sizes: samples per shard, in the order of the index.
        seed: of the run.
        lanes: places of the tape read side by side.
        window_rows: rows fetched and shuffled together.

    Raises:
        ValueError: there are no samples, or a shard is empty.
    """

    def __init__(self, shard_sizes: ArrayLike, *, seed: int, lanes: int, window_rows: int) -> None:
        self.shard_sizes = np.array(shard_sizes, np.int64)
        if not len(self.shard_sizes) or self.shard_sizes.min() < 1:
            raise ValueError(
                f"a sample order needs shards of at least one sample each, got sizes "
                f"{self.shard_sizes[:8].tolist()}; remove empty shards from the index"
            )
        self.seed, self.lanes, self.window_rows = seed, lanes, window_rows
        self.samples_per_epoch = int(self.shard_sizes.sum())
        self._tapes: dict[int, _Tape] = {}

    def locate(self, positions: Any) -> tuple[Ints, Ints]:
        """Shard numbers and rows of global positions; two int64 arrays of the same shape."""
        flat = np.atleast_1d(np.asarray(positions, np.int64))
        shards, rows = np.empty_like(flat), np.empty_like(flat)
        epochs = flat // self.samples_per_epoch
        for epoch in np.unique(epochs):
            here = epochs == epoch
            shards[here], rows[here] = self._locate_in_epoch(
                int(epoch), flat[here] - epoch * self.samples_per_epoch
            )
        return shards, rows

    def lanes_of(self, positions: Ints) -> Ints:
        """The lane of each position: it reads one window after the other."""
        return positions % self.samples_per_epoch % self.lanes

    def _locate_in_epoch(self, epoch: int, q: Ints) -> tuple[Ints, Ints]:
        tape = self._tape(epoch)
        at = self._lane_start(q % self.lanes) + q // self.lanes
        slot = np.searchsorted(tape.ends, at, side="right")
        shards = tape.shards[slot]
        sizes = tape.sizes[slot]
        offsets = at - (tape.ends[slot] - sizes)
        return shards, self._row_in_shard(epoch, shards, sizes, offsets)

    def _tape(self, epoch: int) -> "_Tape":
        if epoch not in self._tapes:
            while len(self._tapes) > 1:  # a stream crosses from one epoch to the next
                self._tapes.pop(min(self._tapes))
            self._tapes[epoch] = _lay_out(self.shard_sizes, self.seed, epoch)
        return self._tapes[epoch]

    def _lane_start(self, lane: Ints) -> Ints:
        """Tape index at which a lane starts; the first N mod L lanes are one sample longer."""
        length, longer = divmod(self.samples_per_epoch, self.lanes)
        return lane * length + np.minimum(lane, longer)

    def _row_in_shard(self, epoch: int, shards: Ints, sizes: Ints, offsets: Ints) -> Ints:
        """Row that the `offset`-th read of a shard returns: permuted windows, permuted rows."""
        W = self.window_rows
        key = mix64(self.seed, epoch, shards)
        windows = -(-sizes // W)
        last_size = sizes - (windows - 1) * W
        # Only the last window may be short; it stands at turn `short_turn`, and every later turn
        # starts that much earlier.
        short_turn = permute(windows - 1, windows, key, inverse=True)
        before = offsets < short_turn * W
        after_offset = offsets - short_turn * W - last_size
        in_short = ~before & (after_offset < 0)
        turn = np.where(before, offsets // W, short_turn + 1 + after_offset // W)
        turn = np.where(in_short, short_turn, turn)
        inside = np.where(before, offsets % W, after_offset % W)
        inside = np.where(in_short, offsets - short_turn * W, inside)
        window = permute(turn, windows, key)
        size = np.where(in_short, last_size, W)
        return window * W + permute(inside, size, mix64(key, window))


@dataclass(frozen=True, slots=True)
class _Tape:
    """One epoch's shards in permuted order, and where each ends on the tape."""

    shards: Ints
    sizes: Ints
    ends: Ints


def _lay_out(sizes: Ints, seed: int, epoch: int) -> _Tape:
    count = len(sizes)
    shards = permute(np.arange(count), count, mix64(seed, epoch), inverse=True)
    return _Tape(shards, sizes[shards], np.cumsum(sizes[shards]))


def batch_positions(
    batch: int, *, global_batch: int, rank: int, world_size: int
) -> NDArray[np.int64]:
    """Positions of batch number `batch` that belong to a rank: a contiguous share, in order.

    Raises:
        ValueError: the batch cannot be split evenly over the ranks.
    """
    if global_batch % world_size:
        raise ValueError(
            f"global batch {global_batch} cannot be split over {world_size} ranks; "
            f"legal world sizes are {legal_world_sizes(global_batch)}"
        )
    share = global_batch // world_size
    start = batch * global_batch + rank * share
    return np.arange(start, start + share, dtype=np.int64)


def legal_world_sizes(global_batch: int) -> list[int]:
    """World sizes that split the global batch evenly."""
    return [size for size in range(1, global_batch + 1) if global_batch % size == 0]
