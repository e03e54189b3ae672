"""Of images that are alike the first stays, whatever their number and order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipelines.duplicates import repeats_exactly, repeats_nearly


def digests(*numbers: int) -> NDArray[np.void]:
    return np.frombuffer(b"".join(n.to_bytes(16, "big") for n in numbers), "V16")


def by_hand(looks: list[int], bits: int) -> list[int]:
    """In order, each against all that stayed before it."""
    found: list[int] = []
    for look in looks:
        near = [
            n for n, other in enumerate(looks[: len(found)])
            if found[n] < 0 and (look ^ other).bit_count() <= bits
        ]  # fmt: skip
        found.append(near[0] if near else -1)
    return found


def test_the_same_digest_repeats_the_first_one() -> None:
    assert repeats_exactly(digests(5, 0, 5, 7, 0, 5)).tolist() == [-1, -1, 0, -1, 1, 0]
    assert repeats_exactly(digests()).tolist() == []


def test_no_bit_apart_is_equality() -> None:
    looks = np.array([9, 8, 9, 2**63], np.uint64)
    assert repeats_nearly(looks, 0).tolist() == [-1, -1, 0, -1]


@settings(deadline=None)
@st.composite
def near_looks(draw: st.DrawFn) -> list[int]:
    """Hashes that differ in up to four bits from one of a few."""
    bases = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=4, unique=True)
    return [
        draw(st.sampled_from(bases)) ^ sum(1 << bit for bit in draw(flips))
        for _ in range(draw(st.integers(0, 25)))
    ]


@given(near_looks())
def test_two_bits_apart_is_what_a_comparison_of_all_pairs_finds(looks: list[int]) -> None:
    found = repeats_nearly(np.array(looks, np.uint64), 2)
    assert [earlier >= 0 for earlier in found] == [earlier >= 0 for earlier in by_hand(looks, 2)]
    for look, earlier in zip(looks, found.tolist(), strict=True):
        assert earlier < 0 or (look ^ looks[earlier]).bit_count() <= 2
        assert earlier < 0 or found[earlier] < 0, "what it repeats stays"
