"""How near a swap of subsets comes to the rendered counterfactual: scores from images alone.

A pair is an image a and its counterfactual b, drawn again with one option changed. Some dimensions
of a's feature are replaced by b's, and the mixture is decoded from the noise that was inferred from
a. With pixels in [0, 1], r the decode of a's own feature, s that of the mixture, M the pixels of a
pair where a and b differ by more than CHANGED in a channel, and sums over pairs, pixels, channels:

    reached = 1 - sum (s - b)^2 / sum (r - b)^2
    inside  = the same over M alone
    leak    = sum outside M of (s - r)^2 / sum over M of (a - b)^2

Reached is 1 where the swap draws the counterfactual, 0 where it changes nothing or nothing for the
better, and negative where it leads away. A decoder that ignores the feature, or always draws the
same, gets 0; one that redraws the face for the sake of the option pays for every other pixel.

Letters: B pairs, A attributes, C channels, H height, W width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHANGED = 0.1
"""Of black to white. JPEG's noise between two drawings stays below, any change of paint above."""


class PairSums(NamedTuple):
    """Sums over the pixels and channels of each pair, float64 (B,); see the module."""

    swapped_to_b: Tensor
    """(s - b)^2"""
    own_to_b: Tensor
    """(r - b)^2"""
    swapped_to_b_inside: Tensor
    own_to_b_inside: Tensor
    change_outside: Tensor
    """(s - r)^2 outside M"""
    wanted: Tensor
    """(a - b)^2 over M"""
    values: Tensor
    """How many a pair has: C * H * W."""


class Signs(NamedTuple):
    """Which attributes classifiers see in the images of pairs; bool, (B, A)."""

    a: Tensor
    b: Tensor
    swapped: Tensor


@dataclass(frozen=True, slots=True)
class SwapScore:
    """Of one swap over some pairs. Reached, inside and leak are the module's."""

    reached: float
    uncertainty: float
    """Standard error of `reached` over pairs."""
    inside: float
    leak: float
    error: float
    """Mean of (s - b)^2."""
    flipped: float | None
    """Of the pairs whose a and b a classifier of the option tells apart, the share in which it sees
    s as it sees b; None without classifiers, or where there is no such pair."""
    others: float | None
    """Other attributes, per pair, that classifiers see otherwise in s than in b."""


def pair_sums(a_BCHW: Tensor, b_BCHW: Tensor, own_BCHW: Tensor, swapped_BCHW: Tensor) -> PairSums:
    """Of rendered a and b, the decode of a's own feature, and that of a mixture; in [0, 1]."""
    a, b, own, swapped = (x.double() for x in (a_BCHW, b_BCHW, own_BCHW, swapped_BCHW))
    inside = changed_pixels(a, b).double()

    def total(values_BCHW: Tensor) -> Tensor:
        return values_BCHW.sum(dim=(1, 2, 3))

    to_b, own_to_b = (swapped - b).square(), (own - b).square()
    return PairSums(
        swapped_to_b=total(to_b),
        own_to_b=total(own_to_b),
        swapped_to_b_inside=total(to_b * inside),
        own_to_b_inside=total(own_to_b * inside),
        change_outside=total((swapped - own).square() * (1 - inside)),
        wanted=total((a - b).square() * inside),
        values=torch.full((len(a),), float(a[0].numel()), dtype=torch.float64),
    )


def changed_pixels(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """M of images in [0, 1]; bool (B, 1, H, W)."""
    return (a_BCHW - b_BCHW).abs().amax(dim=1, keepdim=True) > CHANGED


def score_swap(sums: PairSums, rows: slice, signs: Signs | None, target: int) -> SwapScore:
    """The score over the pairs of `rows`.

    Args:
        signs: of all pairs, if there are classifiers.
        target: the attribute in which the pairs differ, a column of `signs`.
    """
    some = PairSums(*(each[rows] for each in sums))
    left = _share(some.swapped_to_b, some.own_to_b)
    flipped, others = None, None
    if signs is not None:
        flipped, others = attribute_changes(Signs(*(each[rows] for each in signs)), target)
    return SwapScore(
        reached=1 - left,
        uncertainty=_uncertainty(some.swapped_to_b, some.own_to_b),
        inside=1 - _share(some.swapped_to_b_inside, some.own_to_b_inside),
        leak=_share(some.change_outside, some.wanted),
        error=_share(some.swapped_to_b, some.values),
        flipped=flipped,
        others=others,
    )


def attribute_changes(signs: Signs, target: int) -> tuple[float | None, float]:
    """`flipped` and `others` of `SwapScore`."""
    told = signs.a[:, target] != signs.b[:, target]
    flips = (signs.swapped[:, target] == signs.b[:, target])[told]
    others = signs.swapped != signs.b
    others[:, target] = False
    flipped = flips.double().mean().item() if len(flips) else None
    return flipped, others.sum(dim=1).double().mean().item()


def nearest_swap(sums: Mapping[str, PairSums], rows: slice) -> str:
    """The name of the swap that reaches most over these pairs; the first of equals."""
    return min(
        sums, key=lambda name: _share(sums[name].swapped_to_b[rows], sums[name].own_to_b[rows])
    )


def _share(part_B: Tensor, whole_B: Tensor) -> float:
    return (part_B.sum() / whole_B.sum()).item()


def _uncertainty(part_B: Tensor, whole_B: Tensor) -> float:
    """Standard error of a ratio of sums, linearised; 0 for one pair."""
    rest = part_B - _share(part_B, whole_B) * whole_B
    count = len(rest)
    return (rest.square().sum().sqrt() / whole_B.sum() * (count / max(1, count - 1)) ** 0.5).item()
