"""ProbMask: few dimensions out of many, those that tell; and the schedule that gets there."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.probmask import kept_share, train_probmask, with_sum

INFORMATIVE = [3, 11, 12, 30]


def problem(
    seed: int, *, strength: float = 0.6, n: int = 600, d: int = 32
) -> tuple[Tensor, Tensor]:
    """Standard features, four of which lean towards the label, two of these the other way."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=generator) < 0.4).int()
    x = torch.randn(n, d, generator=generator)
    x[:, INFORMATIVE] += strength * torch.tensor([1.0, -1.0, 1.0, -1.0]) * (2 * y[:, None] - 1)
    return (x - x.mean(0)) / x.std(0), y


def test_the_dimensions_that_tell_are_kept_and_no_other_has_a_weight():
    for seed in range(2):
        found = train_probmask(*problem(seed), num_kept=4, steps=150)
        assert found.mask_D.nonzero().flatten().tolist() == INFORMATIVE
        assert found.weight_D.nonzero().flatten().tolist() == INFORMATIVE
        assert found.weight_D[INFORMATIVE].sign().tolist() == [1, -1, 1, -1]


def test_of_two_alike_the_stronger_is_kept():
    x, y = problem(0, strength=0.0)
    x[:, 5] += 0.6 * (2 * y - 1)
    x[:, 6] += 1.8 * (2 * y - 1)
    found = train_probmask(x / x.std(0), y, num_kept=1)
    assert found.mask_D.nonzero().item() == 6


def test_as_many_are_kept_as_were_wanted_even_where_nothing_tells_and_always_the_same():
    x, y = problem(4, strength=0.0)
    first, again = (train_probmask(x, y, num_kept=5, steps=50) for _ in range(2))
    assert first.mask_D.sum() == 5
    assert torch.equal(first.weight_D, again.weight_D)
    assert first.probability_D.min() >= 0
    assert first.probability_D.sum() <= 5 + 1e-3
    for wrong in (0, 33):
        with pytest.raises(ValueError, match=f"1 to 32 dimensions can be kept, not {wrong}"):
            train_probmask(x, y, num_kept=wrong)


def test_the_kept_share_falls_by_a_cube_between_a_tenth_and_four_tenths():
    done = [0.0, 0.1, 0.25, 0.4, 1.0]
    assert [kept_share(each, 0.25) for each in done] == pytest.approx(
        [1, 1, 0.25 + 0.75 / 8, 0.25, 0.25]
    )
    assert all(np.diff([kept_share(i / 100, 0.1) for i in range(101)]) <= 0)


def test_probabilities_are_lowered_all_alike_and_only_when_they_are_too_many():
    some = torch.tensor([1.2, 0.9, 0.5, 0.1])
    assert with_sum(some, 2.6).tolist() == pytest.approx([1, 0.9, 0.5, 0.1])
    assert with_sum(some, 1.5).tolist() == pytest.approx(
        [1.2 - 1.1 / 3, 0.9 - 1.1 / 3, 0.5 - 1.1 / 3, 0]
    )
