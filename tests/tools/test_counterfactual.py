"""Scores of swaps: the formulas by hand, and what cannot be gained without redrawing the face."""

import pytest
import torch
from torch import Tensor

from tools.counterfactual import (
    Signs,
    attribute_changes,
    changed_pixels,
    nearest_swap,
    pair_sums,
    score_swap,
)

EVERY = slice(None)
PAIRS, SIDE = 6, 4


def faces(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(PAIRS, 3, SIDE, SIDE, generator=generator)


def with_option(a: Tensor) -> Tensor:
    """The counterfactual: the first row of pixels the other way round."""
    b = a.clone()
    b[:, :, 0] = 1 - b[:, :, 0]
    return b


A, B = faces(), with_option(faces())


def score(own: Tensor, swapped: Tensor, a: Tensor = A, b: Tensor = B):
    return score_swap(pair_sums(a, b, own, swapped), EVERY, None, 0)


def test_the_formulas_on_four_pixels():
    def image(*pixels: float) -> Tensor:
        return torch.tensor(pixels).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)

    a, b = image(0, 0.5, 0.5, 0.5), image(1, 0.55, 0.5, 0.5)  # one pixel differs by over a tenth
    own, swapped = image(0.1, 0.5, 0.5, 0.5), image(0.7, 0.5, 0.9, 0.5)
    found = score(own, swapped, a, b)
    assert found.reached == pytest.approx(1 - (0.09 + 0.0025 + 0.16) / (0.81 + 0.0025))
    assert found.inside == pytest.approx(1 - 0.09 / 0.81)
    assert found.leak == pytest.approx(0.16 / 1)
    assert found.error == pytest.approx((0.09 + 0.0025 + 0.16) / 4)
    assert (found.flipped, found.others) == (None, None)


def test_the_counterfactual_itself_is_reached_without_a_leak():
    found = score(A, B)
    assert (found.reached, found.inside, found.leak, found.error) == (1, 1, 0, 0)


def test_changing_nothing_reaches_nothing_however_well_faces_are_drawn():
    for own in (A, faces(1), torch.full_like(A, 0.5)):
        found = score(own, own)
        assert (found.reached, found.inside, found.leak) == (0, 0, 0)


def test_what_is_redrawn_beside_the_option_costs_and_leaks():
    swapped = B.clone()
    swapped[:, :, 1:] = faces(2)[:, :, 1:]
    found = score(A, swapped)
    assert found.inside == 1
    assert found.reached < 0
    assert found.leak > 1


def test_a_wrong_way_is_negative():
    beside = A.clone()
    beside[:, :, 3] = 1 - beside[:, :, 3]
    assert score(A, beside).reached < -0.5


def test_noise_below_a_tenth_is_no_change_and_any_channel_is_one():
    a = torch.full((1, 3, 1, 3), 0.5)
    b = a.clone()
    b[0, 1, 0, 1] += 0.09
    b[0, 2, 0, 2] -= 0.11
    assert changed_pixels(a, b).flatten().tolist() == [False, False, True]


def test_uncertainty_is_that_of_the_mean_where_all_pairs_weigh_the_same():
    """Grey faces: own is 1 away from b in every pixel, s more or less."""
    a, b = torch.zeros(PAIRS, 3, 1, 1), torch.ones(PAIRS, 3, 1, 1)
    left = torch.linspace(0.2, 0.7, PAIRS)
    found = score(a, (1 - left.sqrt())[:, None, None, None].expand_as(a), a, b)
    assert found.reached == pytest.approx(1 - left.mean().item(), abs=1e-6)
    assert found.uncertainty == pytest.approx(left.std().item() / PAIRS**0.5, abs=1e-6)


def test_only_the_rows_asked_for_count_in_a_score_and_in_a_choice():
    halfway = (A + B) / 2
    early, late = halfway.clone(), halfway.clone()
    early[::2], late[1::2] = B[::2], B[1::2]
    sums = {"early": pair_sums(A, B, A, early), "late": pair_sums(A, B, A, late)}
    even, odd = slice(0, None, 2), slice(1, None, 2)
    assert [nearest_swap(sums, rows) for rows in (even, odd)] == ["early", "late"]
    assert score_swap(sums["early"], even, None, 0).reached == 1
    assert score_swap(sums["early"], odd, None, 0).reached == pytest.approx(0.75)


def test_flips_count_where_the_drawings_are_told_apart_and_others_by_the_counterfactual():
    """Attribute 1 is the target. The classifier does not tell the third pair apart."""
    a = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]]).bool()
    b = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 0]]).bool()
    swapped = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 1]]).bool()
    flipped, others = attribute_changes(Signs(a, b, swapped), target=1)
    assert flipped == pytest.approx(2 / 3)
    assert others == pytest.approx((0 + 2 + 1 + 1) / 4)
    assert attribute_changes(Signs(b, b, swapped), target=1)[0] is None
