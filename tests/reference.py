"""METHOD's formulas the slow, obvious way: float64, one image at a time, no code of the product.

An image is an array (C, H, W), z is (D,), t is an integer. The decoder is the simplest one whose
gradient can be written by hand: G = A c, with A of shape (C*H*W, D).
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mode = Literal["base", "stop_grad", "dual"]

# --- sections 1 and 3: noise, shift coefficient, weight -------------------------------------------


@dataclass(frozen=True)
class Schedule:
    alpha: list[float]
    alpha_bar: list[float]

    def alpha_bar_before(self, t: int) -> float:
        return self.alpha_bar[t - 1] if t > 0 else 1.0

    def shift_coefficient(self, t: int) -> float:
        noise_before = 1 - self.alpha_bar_before(t)
        return -np.sqrt(self.alpha[t]) * noise_before / np.sqrt(1 - self.alpha_bar[t])

    def snr(self, t: int) -> float:
        return self.alpha_bar[t] / (1 - self.alpha_bar[t])

    def weight(self, t: int, gamma: float = 0.1) -> float:
        return self.snr(t) ** gamma / (1 + self.snr(t))

    def add_noise(self, x0: Array, t: int, noise: Array) -> Array:
        return np.sqrt(self.alpha_bar[t]) * x0 + np.sqrt(1 - self.alpha_bar[t]) * noise


def make_schedule(
    num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
    """Tables of float32 values like the published ones, of which all else is float64."""
    betas = np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float32)
    alpha = [float(np.float32(1) - beta) for beta in betas]
    alpha_bar, product = [], 1.0
    for value in alpha:
        product *= value
        alpha_bar.append(float(np.float32(product)))
    return Schedule(alpha, alpha_bar)


# --- section 2: the cut of z ----------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """The subset of each time-step, and of each dimension."""

    of_timestep: list[int]
    of_dim: list[int]

    def masks(self, keeps: Callable[[int, int], bool]) -> Array:
        subsets = range(self.of_timestep[-1] + 1)
        return np.array([[float(keeps(owner, i)) for owner in self.of_dim] for i in subsets])

    @property
    def cumulative(self) -> Array:
        return self.masks(lambda owner, i: owner <= i)

    @property
    def own(self) -> Array:
        return self.masks(lambda owner, i: owner == i)

    @property
    def receding(self) -> Array:
        return self.masks(lambda owner, i: owner < i)


def staged_cut(ends: Sequence[int], dims: Sequence[int], subsets: Sequence[int]) -> Cut:
    """The intended map, offset_s + floor((t - start_s) / (end_s - start_s) k_s), exactly."""
    of_timestep: list[int] = []
    of_dim: list[int] = []
    offset = 0
    for (start, end), width, count in zip(pairwise((0, *ends)), dims, subsets, strict=True):
        length = end - start
        of_timestep += [offset + int(Fraction(t, length) * count) for t in range(length)]
        of_dim += [offset + min(dim // (width // count), count - 1) for dim in range(width)]
        offset += count
    return Cut(of_timestep, of_dim)


def published_cut(
    num_subsets: int,
    latent_dim: int,
    ends: Sequence[int] | None,
    dims: Sequence[int] | None,
    num_timesteps: int,
) -> Cut:
    """floor(t / (T / k)) in doubles; a subset is of the stage that holds its first time-step."""
    of_timestep = [int(t / (num_timesteps / num_subsets)) for t in range(num_timesteps)]
    if ends is None or dims is None:
        dim_ends = [int(latent_dim / num_subsets * (i + 1)) for i in range(num_subsets)]
    else:
        stage_of = [bisect_right(ends, of_timestep.index(i)) for i in range(num_subsets)]
        dim_ends = []
        for i, stage in enumerate(stage_of):
            position, count = i - stage_of.index(stage), stage_of.count(stage)
            width = dims[stage] // count * (position + 1)
            is_last = position == count - 1
            dim_ends.append(sum(dims[:stage]) + (dims[stage] if is_last else width))
    return Cut(of_timestep, [bisect_right(dim_ends, dim) for dim in range(dim_ends[-1])])


# --- section 3: the loss and its gradient ---------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    value: float
    z_gradient: Array


def diti_loss(
    schedule: Schedule,
    cut: Cut,
    mode: Mode,
    *,
    t: int,
    z: Array,
    decoder: Array,
    noise: Array,
    epsilon: Array,
    gamma: float = 0.1,
) -> Loss:
    """w_t times the mean of (noise - epsilon - s_t G)^2, and its derivative by each entry of z."""
    i = cut.of_timestep[t]
    w, s = schedule.weight(t, gamma), schedule.shift_coefficient(t)
    value, z_gradient = 0.0, np.zeros_like(z)
    for a_pass in ("base", "stop_grad") if mode == "dual" else (mode,):
        if a_pass == "base":
            condition, learns = z * cut.cumulative[i], cut.cumulative[i]
        else:
            condition, learns = z * cut.receding[i] + z * cut.own[i], cut.own[i]
        for pixel in range(noise.size):
            shift = float(decoder[pixel] @ condition)
            error = noise.flat[pixel] - (epsilon.flat[pixel] + s * shift)
            value += w * error**2 / noise.size
            z_gradient += w * 2 * error * -s * decoder[pixel] * learns / noise.size
    return Loss(value, z_gradient)


# --- section 7: DDIM ------------------------------------------------------------------------------

Walk = list[tuple[int, float]]
"""(time-step that a step looks at, alpha-bar that it leads to)."""


def published_walk(schedule: Schedule, steps: int, *, encode: bool) -> Walk:
    """DiTi's: range(0, T, T // S); decoding ends at alpha-bar 1, encoding at 0."""
    grid = range(0, len(schedule.alpha), len(schedule.alpha) // steps)
    bars = [schedule.alpha_bar[t] for t in grid]
    if encode:
        return [(t, (*bars, 0.0)[i + 1]) for i, t in enumerate(grid)]
    return [(t, (1.0, *bars)[i]) for i, t in reversed(list(enumerate(grid)))]


def pdae_walk(schedule: Schedule, steps: int, *, encode: bool) -> Walk:
    """PDAE's: int(linspace(0, T - 1, S + 1)), in one direction or the other."""
    grid = [int(t) for t in np.linspace(0, len(schedule.alpha) - 1, steps + 1)]
    return [(t, schedule.alpha_bar[to]) for t, to in pairwise(grid if encode else grid[::-1])]


def ddim_step(schedule: Schedule, x: Array, t: int, after: float, epsilon: Array) -> Array:
    bar = schedule.alpha_bar[t]
    x0 = np.clip(x / np.sqrt(bar) - np.sqrt(1 / bar - 1) * epsilon, -1, 1)
    implied = (x / np.sqrt(bar) - x0) / np.sqrt(1 / bar - 1)
    return np.sqrt(after) * x0 + np.sqrt(1 - after) * implied


def ddim_walk(
    schedule: Schedule, x: Array, walk: Walk, estimate: Callable[[Array, int], Array]
) -> Array:
    for t, after in walk:
        x = ddim_step(schedule, x, t, after, estimate(x, t))
    return x
