"""ProbMask: which few dimensions of a feature tell an attribute (METHOD section 7, ProMask).

Every dimension has a probability of being kept. A linear classifier learns behind masks that are
drawn from them anew at each step, softly, so that the probabilities learn too, while their sum is
brought down from all dimensions to the wanted few. Two departures from the published code: the
final mask holds the most probable dimensions instead of being drawn once more; and a step sees the
whole set, each sample behind a mask of its own, at a rate for hundreds of steps instead of for ten
thousands. With one mask for all, the draws hid what a dimension is worth.

Letters: N samples, D = latent_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

STEPS = 300
RATE = 1e-2
SCORE_CLIP = 3.0
EPSILON = 1e-4


@dataclass(frozen=True, slots=True)
class ProbMask:
    """A classifier behind its mask."""

    probability_D: Tensor
    mask_D: Tensor
    """float32, 1 for the dimensions that are kept, as many as were wanted."""
    weight_D: Tensor
    """Of standardised features; 0 where the mask is."""


def train_probmask(
    x_ND: Tensor, y_N: Tensor, *, num_kept: int, seed: int = 0, steps: int = STEPS
) -> ProbMask:
    """Learn which dimensions to keep.

    Args:
        x_ND: standardised features, float32.
        y_N: labels, 0 or 1.

    Raises:
        ValueError: as many dimensions cannot be kept.
    """
    latent_dim = x_ND.shape[1]
    if not 1 <= num_kept <= latent_dim:
        raise ValueError(f"1 to {latent_dim} dimensions can be kept, not {num_kept}")
    generator = torch.Generator().manual_seed(seed)
    probability = torch.ones(latent_dim, requires_grad=True)
    weight, bias = (torch.zeros(size, requires_grad=True) for size in (latent_dim, 1))
    adam = torch.optim.Adam([weight, bias, probability], lr=RATE)
    for step in range(steps):
        mask_ND = _soft_masks(probability, len(x_ND), step / steps, generator)
        logits_N = (x_ND * mask_ND) @ weight + bias
        adam.zero_grad()
        binary_cross_entropy_with_logits(logits_N, y_N.float()).backward()
        torch.nn.utils.clip_grad_norm_([probability], SCORE_CLIP)
        adam.step()
        share = kept_share((step + 1) / steps, num_kept / latent_dim)
        with torch.no_grad():
            probability.copy_(with_sum(probability, share * latent_dim))
    return _hardened(probability.detach(), weight.detach(), num_kept)


def kept_share(done: float, wanted: float) -> float:
    """The share of dimensions that is kept when a share `done` of the steps is: all of them until
    0.1, the wanted ones from 0.4 on, in between falling by a cube."""
    left = 1 - min(max((done - 0.1) / 0.3, 0.0), 1.0)
    return wanted + (1 - wanted) * left**3


def with_sum(probability_D: Tensor, most: float) -> Tensor:
    """Probabilities lowered all alike, within [0, 1], until they add up to `most` or less."""
    if probability_D.clamp(0, 1).sum() <= most:
        return probability_D.clamp(0, 1)
    low, high = 0.0, probability_D.max().item()
    for _ in range(40):
        middle = (low + high) / 2
        if (probability_D - middle).clamp(0, 1).sum() > most:
            low = middle
        else:
            high = middle
    return (probability_D - high).clamp(0, 1)


def _soft_masks(
    probability_D: Tensor, num_samples: int, done: float, generator: torch.Generator
) -> Tensor:
    """A draw for each sample and dimension, nearly 0 or 1, the more so the further training is."""
    u_ND = torch.rand(num_samples, len(probability_D), generator=generator)
    sharpness = 1 / (0.97 * (1 - done) + 0.03)
    kept_D, drawn_ND = (torch.logit(each, eps=EPSILON) for each in (probability_D, u_ND))
    return torch.sigmoid(sharpness * (kept_D + drawn_ND))


def _hardened(probability_D: Tensor, weight_D: Tensor, num_kept: int) -> ProbMask:
    """The most probable dimensions; of equal ones those with the larger weights."""
    by_weight = weight_D.abs().argsort(descending=True, stable=True)
    order = by_weight[probability_D[by_weight].argsort(descending=True, stable=True)]
    mask = torch.zeros_like(probability_D)
    mask[order[:num_kept]] = 1
    return ProbMask(probability_D, mask, weight_D * mask)
