"""Which time-steps are trained on: one table of probabilities, and its inverse.

Letters: T time-steps, B batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from configs.task import TimestepsConfig
from pretrain.noise_schedule import NoiseSchedule, ddpm_schedule

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class TimestepDistribution:
    """The probability of each time-step."""

    probability_T: Floats
    """float64 (T,), adds up to 1."""

    @property
    def num_timesteps(self) -> int:
        return len(self.probability_T)

    @property
    def trained_range(self) -> tuple[int, int]:
        """The shortest range [first, end) that holds every time-step with a probability."""
        possible = np.flatnonzero(self.probability_T)
        return int(possible[0]), int(possible[-1]) + 1

    def quantile(self, u_B: Floats) -> NDArray[np.int64]:
        """The time-step below which a share `u` in [0, 1) of all draws falls; int64 (B,)."""
        cumulative_T = self.probability_T.cumsum()
        t_B = np.searchsorted(cumulative_T, u_B, side="right")
        return np.minimum(t_B, self.trained_range[1] - 1).astype(np.int64)


def uniform_timesteps(first: int, end: int, num_timesteps: int) -> TimestepDistribution:
    """Every time-step of [first, end) alike."""
    probability_T = np.zeros(num_timesteps)
    probability_T[first:end] = 1 / (end - first)
    return TimestepDistribution(probability_T)


def timestep_distribution(config: TimestepsConfig, schedule: NoiseSchedule) -> TimestepDistribution:
    """The distribution that a run describes, on its backbone's schedule.

    On the axis that draws are even in, each time-step owns a cell: [t, t + 1) of the DDPM's steps,
    or in log-SNR up to the middle of the way to its neighbours. A piece is shared out over the
    cells that it overlaps.

    Raises:
        ValueError: a piece overlaps no time-step of this schedule.
    """
    edges = np.array(config.edges)
    if config.unit == "timestep":
        cells = _ddpm_cells(schedule)
    else:
        edges, cells = -edges, -_log_snr_cells(schedule)
    probability_T = np.zeros(schedule.num_timesteps)
    for start, end, share in zip(edges[:-1], edges[1:], config.shares, strict=True):
        overlap = (np.minimum(cells[1:], end) - np.maximum(cells[:-1], start)).clip(min=0)
        if not overlap.sum():
            raise ValueError(
                f"task.timesteps: no time-step lies between {abs(start):g} and {abs(end):g} "
                f"({config.unit}); the schedule covers {abs(cells[0]):.2f} to {abs(cells[-1]):.2f}"
            )
        probability_T += share * overlap / overlap.sum()
    return TimestepDistribution(probability_T / probability_T.sum())


def _ddpm_cells(schedule: NoiseSchedule) -> Floats:
    """Rising bounds of the time-steps' cells in steps of the DDPM's schedule; float64 (T + 1,)."""
    T = schedule.num_timesteps
    ddpm = ddpm_schedule(T)
    if torch.equal(schedule.alpha_bar_T.cpu(), ddpm.alpha_bar_T):
        return np.arange(T + 1.0)
    return np.interp(-_log_snr_cells(schedule), -_log_snr_cells(ddpm), np.arange(T + 1.0))


def _log_snr_cells(schedule: NoiseSchedule) -> Floats:
    """Falling bounds of the time-steps' cells in log-SNR; float64 (T + 1,)."""
    log_snr = schedule.log_snr_T.double().cpu().numpy()
    middles = (log_snr[1:] + log_snr[:-1]) / 2
    first, last = 2 * log_snr[0] - middles[0], 2 * log_snr[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])
