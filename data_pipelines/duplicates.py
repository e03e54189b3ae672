"""Which images repeat an earlier one: pure functions of digests and perceptual hashes."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_U64 = np.uint64


def repeats_exactly(digests: NDArray[np.void]) -> Ints:
    """For each image, the first one with its digest; -1 where it is the first; (N,)."""
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    return _others(first[group])


def repeats_nearly(looks_N: NDArray[np.uint64], bits: int) -> Ints:
    """For each image, an earlier one that stays and whose hash differs in at most `bits`, or -1.

    Images are taken in order, and one stays unless it is that near to one that stayed before it.
    """
    unique, first, group = np.unique(looks_N, return_index=True, return_inverse=True)
    repeated = first[group]
    if bits:
        of = np.arange(len(unique))
        order = np.argsort(first)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        for later, earlier in sorted(_near_pairs(unique[order], bits)):
            if of[order[earlier]] == order[earlier] and of[order[later]] == order[later]:
                of[order[later]] = order[earlier]
        repeated = first[of[group]]
    return _others(repeated)


def _others(repeated: Ints) -> Ints:
    return np.where(repeated == np.arange(len(repeated)), -1, repeated)


def _near_pairs(hashes_N: NDArray[np.uint64], bits: int) -> Iterator[tuple[int, int]]:
    """Pairs (later, earlier) of places whose hashes differ in at most `bits`, each at least once.

    With the 64 bits cut into `bits + 1` bands, two such hashes have a whole band in common.
    """
    edges = np.linspace(0, 64, bits + 2).astype(int)
    for low, high in pairwise(edges):
        band = (hashes_N >> _U64(low)) & _U64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")  # places of one band rise
        bounds = np.flatnonzero(np.diff(band[order])) + 1
        for places in np.split(order, bounds):
            for number, later in enumerate(places[1:].tolist(), start=1):
                apart = np.bitwise_count(hashes_N[places[:number]] ^ hashes_N[later])
                yield from ((later, int(e)) for e in places[:number][apart <= bits])
