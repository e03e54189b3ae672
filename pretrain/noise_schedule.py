"""The noise schedule (METHOD section 1): alpha-bar, SNR, and the coefficients that use them.

All tables are float32 vectors of length T, indexed by integer time-step t = 0..T-1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ScheduleConfig


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

    def snr_weight(self, t_B: Tensor, *, gamma: float = 0.1) -> Tensor:
        """The paper's loss weight w_t = SNR_t^gamma / (1 + SNR_t), shape (B,)."""
        snr = self.alpha_bar_T[t_B] / (1 - self.alpha_bar_T[t_B])
        return snr**gamma / (1 + snr)


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The linear-beta schedule of `config`, in float32 throughout like the published models."""
    beta_T = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps)
    alpha_T = 1 - beta_T
    alpha_bar_T = alpha_T.cumprod(0)
    return NoiseSchedule(alpha_T, alpha_bar_T, torch.cat([torch.ones(1), alpha_bar_T[:-1]]))
