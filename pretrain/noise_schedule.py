"""The noise schedule (METHOD section 1): alpha-bar, SNR, and the coefficients that use them.

All tables are float32 vectors of length T, indexed by integer time-step t = 0..T-1. Noise is always
added so that variance is kept; a rectified flow's x = (1 - sigma) x_0 + sigma epsilon is x_t times
`flow_scale` at the same SNR, so a flow is a schedule like any other.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from configs.task import ScheduleConfig

Prediction = Literal["epsilon", "v", "x0", "flow"]
"""What a denoiser puts out; `flow` is a rectified flow's velocity, epsilon - x_0."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon."""

    alpha_T: Tensor
    alpha_bar_T: Tensor
    alpha_bar_prev_T: Tensor
    """alpha_bar_{t-1}; 1 at t = 0."""

    @property
    def num_timesteps(self) -> int:
        return self.alpha_bar_T.shape[0]

    @property
    def log_snr_T(self) -> Tensor:  # noqa: N802
        """log(alpha_bar / (1 - alpha_bar)); falls with t."""
        return self.alpha_bar_T.log() - (1 - self.alpha_bar_T).log()

    def to(self, device: torch.device) -> "NoiseSchedule":
        return NoiseSchedule(
            self.alpha_T.to(device), self.alpha_bar_T.to(device), self.alpha_bar_prev_T.to(device)
        )

    def add_noise(self, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """x_t, BCHW, for integer time-steps t (B)."""
        alpha_bar = self.alpha_bar_T[t_B][:, None, None, None]
        return alpha_bar.sqrt() * x0_BCHW + (1 - alpha_bar).sqrt() * noise_BCHW

    def remove_noise(self, xt_BCHW: Tensor, t_B: Tensor, epsilon_BCHW: Tensor) -> Tensor:
        """The one-step estimate of x_0 from x_t and a noise estimate; BCHW, not clamped."""
        alpha_bar = self.alpha_bar_T[t_B][:, None, None, None]
        return (xt_BCHW - (1 - alpha_bar).sqrt() * epsilon_BCHW) / alpha_bar.sqrt()

    def shift_coefficient(self, t_B: Tensor) -> Tensor:
        """s_t = -sqrt(alpha_t) (1 - alpha_bar_{t-1}) / sqrt(1 - alpha_bar_t); shape (B, 1, 1, 1).

        It turns PDAE's posterior-mean shift Sigma_t G into units of epsilon (METHOD section 3).
        """
        numerator = self.alpha_T[t_B].sqrt() * (1 - self.alpha_bar_prev_T[t_B])
        return -(numerator / (1 - self.alpha_bar_T[t_B]).sqrt())[:, None, None, None]

    def snr(self, t_B: Tensor) -> Tensor:
        """alpha_bar_t / (1 - alpha_bar_t); (B,)."""
        return self.alpha_bar_T[t_B] / (1 - self.alpha_bar_T[t_B])

    def flow_sigma(self, t_B: Tensor) -> Tensor:
        """The share of noise in a rectified flow's x of the same SNR: sigma / (1 - sigma) is
        sqrt(1 / SNR); (B,)."""
        alpha_bar = self.alpha_bar_T[t_B]
        return (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())

    def flow_scale(self, t_B: Tensor) -> Tensor:
        """What makes x_t a rectified flow's x: sqrt((1 - sigma)^2 + sigma^2); (B, 1, 1, 1)."""
        alpha_bar = self.alpha_bar_T[t_B][:, None, None, None]
        return 1 / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())

    def epsilon_of(
        self, output_BCHW: Tensor, prediction: Prediction, xt_BCHW: Tensor, t_B: Tensor
    ) -> Tensor:
        """The noise estimate that a denoiser's output implies; BCHW.

        v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0, so that
        epsilon = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t. Of a flow's x and velocity,
        epsilon = x + (1 - sigma) velocity.
        """
        if prediction == "epsilon":
            return output_BCHW
        alpha_bar = self.alpha_bar_T[t_B][:, None, None, None]
        if prediction == "v":
            return alpha_bar.sqrt() * output_BCHW + (1 - alpha_bar).sqrt() * xt_BCHW
        if prediction == "flow":
            scale, sigma = self.flow_scale(t_B), self.flow_sigma(t_B)[:, None, None, None]
            return scale * xt_BCHW + (1 - sigma) * output_BCHW
        return (xt_BCHW - alpha_bar.sqrt() * output_BCHW) / (1 - alpha_bar).sqrt()

    def target(
        self, prediction: Prediction, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor
    ) -> Tensor:
        """What a denoiser of this kind should put out; BCHW."""
        if prediction == "epsilon":
            return noise_BCHW
        if prediction == "x0":
            return x0_BCHW
        if prediction == "flow":
            return noise_BCHW - x0_BCHW
        alpha_bar = self.alpha_bar_T[t_B][:, None, None, None]
        return alpha_bar.sqrt() * noise_BCHW - (1 - alpha_bar).sqrt() * x0_BCHW


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The linear-beta schedule of `config`, in float32 throughout like the published models."""
    beta_T = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps)
    alpha_T = 1 - beta_T
    alpha_bar_T = alpha_T.cumprod(0)
    return NoiseSchedule(alpha_T, alpha_bar_T, torch.cat([torch.ones(1), alpha_bar_T[:-1]]))


def ddpm_schedule(num_timesteps: int) -> NoiseSchedule:
    """The one in whose steps partitions and edges are written."""
    return make_schedule(ScheduleConfig(num_timesteps=num_timesteps))


def schedule_of(alpha_bar_T: Tensor) -> NoiseSchedule:
    """The schedule with these alpha-bar; float32 (T,), falling, between 0 and 1."""
    before = torch.cat([torch.ones(1), alpha_bar_T[:-1]])
    return NoiseSchedule(alpha_bar_T / before, alpha_bar_T, before)


def flow_schedule(num_timesteps: int, shift: float = 1.0) -> NoiseSchedule:
    """A rectified flow's: sigma at the middles of T even steps of (0, 1), shifted towards noise.

    sigma <- shift sigma / (1 + (shift - 1) sigma), as Esser et al. 2024 do for larger images.
    """
    sigma = (torch.arange(num_timesteps, dtype=torch.float64) + 0.5) / num_timesteps
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return schedule_of(((1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)).float())


def steps_of_same_noise(schedule: NoiseSchedule, reference: NoiseSchedule) -> Tensor:
    """For each time-step of `schedule`, that of `reference` with the nearest log-SNR; int64 (T,).

    Partitions and edges are written in steps of the DDPM's schedule; this is where they lie on
    another one.
    """
    found, known = schedule.log_snr_T.double(), reference.log_snr_T.double()
    middles = -(known[1:] + known[:-1]) / 2
    return torch.searchsorted(middles, -found)
