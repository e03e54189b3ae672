"""DDIM in both directions, and edits of z (METHOD section 7).

A *walk* says where an image is looked at and how much signal it has after each step; a noise
estimate is any function (x_t, t) -> epsilon. Sampling uses the masks and the shift coefficient of
training. The published samplers do not; their walks and coefficient are here under their names.

Letters: B batch, C channels, H height, W width, D = latent_dim.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.diti import DiTi
from pretrain.noise_schedule import NoiseSchedule
from pretrain.objective import conditions, shifted_estimate
from pretrain.partition import Subset

Estimate = Callable[[Tensor, Tensor], Tensor]
Walk = list[tuple[int, float]]
"""(time-step t that a step starts at, alpha-bar that it leads to)."""


def time_grid(start: int, steps: int) -> list[int]:
    """`steps` + 1 time-steps from `start` down to -1 (no noise), evenly spaced.

    Raises:
        ValueError: more steps than there are time-steps below `start`.
    """
    if not 1 <= steps <= start + 1:
        raise ValueError(f"from t = {start} there are 1 to {start + 1} steps, got {steps}")
    return [start - round(i * (start + 1) / steps) for i in range(steps + 1)]


def decode_walk(schedule: NoiseSchedule, start: int, steps: int) -> Walk:
    """From x_t at t = `start` to x_0."""
    _check_timestep(schedule, start)
    return [(t, _alpha_bar(schedule, after)) for t, after in pairwise(time_grid(start, steps))]


def encode_walk(schedule: NoiseSchedule, end: int, steps: int) -> Walk:
    """From x_0 to x_t at t = `end`; x_0 itself is looked at as x_t at t = 0."""
    _check_timestep(schedule, end)
    grid = time_grid(end, steps)[::-1]
    return [(max(t, 0), _alpha_bar(schedule, after)) for t, after in pairwise(grid)]


def published_walk(schedule: NoiseSchedule, steps: int, *, encode: bool = False) -> Walk:
    """DiTi's published grid: t = 0, T//S, ...; decoding ends at alpha-bar 1, encoding at 0.

    It has more than `steps` steps where `steps` does not divide T.
    """
    _check_steps(schedule, steps)
    grid = list(range(0, schedule.num_timesteps, schedule.num_timesteps // steps))
    bars = [_alpha_bar(schedule, t) for t in grid]
    if encode:
        return list(zip(grid, [*bars[1:], 0.0], strict=True))
    return list(zip(grid, [1.0, *bars[:-1]], strict=True))[::-1]


def pdae_walk(schedule: NoiseSchedule, steps: int, *, encode: bool = False) -> Walk:
    """PDAE's published grid: int(linspace(0, T-1, S+1)); decoding stops at alpha-bar_0."""
    _check_steps(schedule, steps)
    # In exact arithmetic 16 of the numbers of steps below 1000 would give another grid.
    grid = np.linspace(0, schedule.num_timesteps - 1, steps + 1).astype(int).tolist()
    pairs = pairwise(grid if encode else grid[::-1])
    return [(t, _alpha_bar(schedule, after)) for t, after in pairs]


@torch.no_grad()
def ddim_walk(
    schedule: NoiseSchedule,
    estimate: Estimate,
    x_BCHW: Tensor,
    walk: Walk,
    *,
    eta: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Take an image along a walk; BCHW.

    Every step estimates the noise, the x_0 that it implies (clamped to [-1, 1]) and the noise that
    goes with that x_0, and mixes the two at the next signal level.

    Args:
        eta: share of DDPM's fresh noise that is added at every step; 0 is deterministic DDIM.
        seed: of that noise.

    Raises:
        ValueError: fresh noise is asked for on a walk to more noise.
    """
    if eta and any(signal < schedule.alpha_bar_T[t] for t, signal in walk):
        raise ValueError(f"eta = {eta:g} adds fresh noise, which only a walk to less noise can")
    generator = torch.Generator().manual_seed(seed)
    x = x_BCHW
    for t, signal in walk:
        x0, epsilon = _predict(schedule, estimate, x, t)
        alpha_bar = schedule.alpha_bar_T[t]
        after = torch.as_tensor(signal, dtype=alpha_bar.dtype, device=alpha_bar.device)
        if not eta:
            x = after.sqrt() * x0 + (1 - after).sqrt() * epsilon
            continue
        sigma = eta * ((1 - after) / (1 - alpha_bar) * (1 - alpha_bar / after)).sqrt()
        x = after.sqrt() * x0 + (1 - after - sigma**2).clamp(min=0).sqrt() * epsilon
        x = x + sigma * torch.randn(x.shape, generator=generator).to(x)
    return x


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
    """x_0 in [-1, 1] from x_t at t = `start`, in `steps` even steps; see `ddim_walk`."""
    walk = decode_walk(schedule, start, steps)
    return ddim_walk(schedule, estimate, xt_BCHW, walk, eta=eta, seed=seed)


def ddim_encode(
    schedule: NoiseSchedule, estimate: Estimate, x0_BCHW: Tensor, *, end: int, steps: int
) -> Tensor:
    """The x_t at t = `end` that `ddim_sample` with the same estimate leads back to x_0; BCHW."""
    return ddim_walk(schedule, estimate, x0_BCHW, encode_walk(schedule, end, steps))


def diti_estimate(
    model: DiTi,
    z_BD: Tensor,
    *,
    masked: bool = True,
    coefficient: Literal["training", "published"] = "training",
    stop_below: int = 0,
) -> Estimate:
    """DiTi's estimate steered by z where it was trained to steer, the backbone's elsewhere.

    Args:
        masked: show the decoder the subsets up to t's own, as in training; False shows all of z.
        coefficient: s_t of the training loss, or -sqrt(1 - alpha_bar_t) of the published samplers.
        stop_below: time-steps below it are left to the backbone alone.
    """
    first, end = model.timesteps.trained_range

    def estimate(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        condition = conditions(model.masks, "base", z_BD, t_B)[0] if masked else z_BD
        epsilon, shift = model.epsilon_and_shift(x_BCHW, t_B, condition)
        if coefficient == "training":
            shifted = shifted_estimate(model.schedule, t_B, epsilon, shift)
        else:
            noise_share = (1 - model.schedule.alpha_bar_T[t_B])[:, None, None, None]
            shifted = epsilon - noise_share.sqrt() * shift
        steered = (t_B >= max(first, stop_below)) & (t_B < end)
        return torch.where(steered[:, None, None, None], shifted, epsilon)

    return estimate


def mix_subsets(a_BD: Tensor, b_BD: Tensor, subsets: Sequence[Subset], share: float) -> Tensor:
    """a, moved by `share` of the way towards b in the dimensions of these subsets; BD."""
    mixed = a_BD.clone()
    for subset in subsets:
        dims = slice(*subset.dims)
        mixed[:, dims] = a_BD[:, dims] + share * (b_BD[:, dims] - a_BD[:, dims])
    return mixed


def slerp(a_BCHW: Tensor, b_BCHW: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two batches of noise, by the angle between flattened samples."""
    a, b = a_BCHW.flatten(1), b_BCHW.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
    angle = torch.arccos(cosine.clamp(-1, 1))[:, None, None, None]
    mixed = torch.sin((1 - share) * angle) * a_BCHW + torch.sin(share * angle) * b_BCHW
    # Between parallel samples the sphere is flat.
    flat = (1 - share) * a_BCHW + share * b_BCHW
    return torch.where(torch.sin(angle).abs() > 1e-6, mixed / torch.sin(angle), flat)


def move_along(
    z_BD: Tensor,
    direction_D: Tensor,
    scale: float,
    *,
    mean_D: Tensor,
    std_D: Tensor,
    subsets: Sequence[Subset] | None = None,
) -> Tensor:
    """z moved along a direction of the standardised feature by `scale` sqrt(D); BD.

    Args:
        direction_D: such as a row of a linear classifier; only its direction matters.
        mean_D, std_D: of the feature over a data set.
        subsets: the move is restricted to their dimensions; None moves all.
    """
    if subsets is not None:
        kept = torch.zeros_like(direction_D)
        for subset in subsets:
            kept[slice(*subset.dims)] = 1
        direction_D = direction_D * kept
    if not direction_D.any():
        raise ValueError("the direction is zero in the dimensions of these subsets")
    step_D = scale * math.sqrt(len(direction_D)) * direction_D / direction_D.norm()
    return mean_D + std_D * ((z_BD - mean_D) / std_D + step_D)


def _check_timestep(schedule: NoiseSchedule, t: int) -> None:
    if not 0 <= t < schedule.num_timesteps:
        raise ValueError(f"t must be from 0 to {schedule.num_timesteps - 1}, got {t}")


def _check_steps(schedule: NoiseSchedule, steps: int) -> None:
    if not 1 <= steps <= schedule.num_timesteps:
        raise ValueError(f"there are 1 to {schedule.num_timesteps} steps, got {steps}")


def _alpha_bar(schedule: NoiseSchedule, t: int) -> float:
    return schedule.alpha_bar_T[t].item() if t >= 0 else 1.0


def _predict(
    schedule: NoiseSchedule, estimate: Estimate, x_BCHW: Tensor, t: int
) -> tuple[Tensor, Tensor]:
    """The clamped x_0 that a noise estimate implies, and the noise that goes with it."""
    t_B = torch.full((len(x_BCHW),), t, device=x_BCHW.device)
    alpha_bar = schedule.alpha_bar_T[t]
    x0 = schedule.remove_noise(x_BCHW, t_B, estimate(x_BCHW, t_B)).clamp(-1, 1)
    return x0, (x_BCHW - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
