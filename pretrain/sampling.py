"""Sampling by DDIM: deterministic (eta = 0), or with DDPM's fresh noise at every step (eta = 1).

A noise estimate is any function (x_t, t) -> epsilon: a `UNet` is one (no guidance), and
`diti_estimate` makes another. Training and sampling share the masks and the shift coefficient.

Letters: B batch, C channels, H height, W width, D = latent_dim.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pretrain.diti import DiTi
from pretrain.noise_schedule import NoiseSchedule

Estimate = Callable[[Tensor, Tensor], Tensor]


def time_grid(start: int, steps: int) -> list[int]:
    """`steps` + 1 time-steps from `start` down to -1 (no noise), evenly spaced.

    Raises:
        ValueError: more steps than there are time-steps below `start`.
    """
    if not 1 <= steps <= start + 1:
        raise ValueError(f"from t = {start} there are 1 to {start + 1} steps, got {steps}")
    return [start - round(i * (start + 1) / steps) for i in range(steps + 1)]


@torch.no_grad()
def ddim_sample(
    schedule: NoiseSchedule,
    estimate: Estimate,
    xt_BCHW: Tensor,
    *,
    start: int,
    steps: int,
    eta: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """x_0 in [-1, 1] from x_t at t = `start`; BCHW.

    Args:
        eta: share of DDPM's noise that is added at every step; 0 is deterministic.
        seed: of that noise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = xt_BCHW
    for t, t_next in pairwise(time_grid(start, steps)):
        x0, epsilon = _predict(schedule, estimate, x, t)
        alpha_bar = schedule.alpha_bar_T[t]
        after = schedule.alpha_bar_T[t_next] if t_next >= 0 else torch.ones_like(alpha_bar)
        sigma = eta * ((1 - after) / (1 - alpha_bar) * (1 - alpha_bar / after)).sqrt()
        x = after.sqrt() * x0 + (1 - after - sigma**2).clamp(min=0).sqrt() * epsilon
        if eta:
            x = x + sigma * torch.randn(x.shape, generator=generator).to(x)
    return x


def _predict(
    schedule: NoiseSchedule, estimate: Estimate, x_BCHW: Tensor, t: int
) -> tuple[Tensor, Tensor]:
    """The clamped x_0 that a noise estimate implies, and the noise that goes with it."""
    t_B = torch.full((len(x_BCHW),), t, device=x_BCHW.device)
    alpha_bar = schedule.alpha_bar_T[t]
    x0 = schedule.remove_noise(x_BCHW, t_B, estimate(x_BCHW, t_B)).clamp(-1, 1)
    return x0, (x_BCHW - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def diti_estimate(model: DiTi, z_BD: Tensor) -> Estimate:
    """DiTi's estimate steered by z where it was trained to steer, the backbone's elsewhere."""
    first, end = model.task.timesteps

    def estimate(x: Tensor, t_B: Tensor) -> Tensor:
        epsilon, shifted = model.estimates(x, t_B, z_BD)
        trained = ((t_B >= first) & (t_B < end))[:, None, None, None]
        return torch.where(trained, shifted, epsilon)

    return estimate
