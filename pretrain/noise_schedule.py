"""The noise schedule (METHOD section 1): alpha-bar, SNR, and the coefficients that use them.

All tables are float32 vectors of length T, indexed by integer time-step t = 0..T-1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from configs.task import ScheduleConfig

Prediction = Literal["epsilon", "v", "x0"]


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

    def epsilon_of(
        self, output_BCHW: Tensor, prediction: Prediction, xt_BCHW: Tensor, t_B: Tensor
    ) -> Tensor:
        """The noise estimate that a denoiser's output implies; BCHW.

        v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0, so that
        epsilon = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t.
        """
        if prediction == "epsilon":
            return output_BCHW
        alpha_bar = self.alpha_bar_T[t_B][:, None, None, None]
        if prediction == "v":
            return alpha_bar.sqrt() * output_BCHW + (1 - alpha_bar).sqrt() * xt_BCHW
        return (xt_BCHW - alpha_bar.sqrt() * output_BCHW) / (1 - alpha_bar).sqrt()

    def target(
        self, prediction: Prediction, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor
    ) -> Tensor:
        """What a denoiser of this kind should put out; BCHW."""
        if prediction == "epsilon":
            return noise_BCHW
        if prediction == "x0":
            return x0_BCHW
        alpha_bar = self.alpha_bar_T[t_B][:, None, None, None]
        return alpha_bar.sqrt() * noise_BCHW - (1 - alpha_bar).sqrt() * x0_BCHW


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The linear-beta schedule of `config`, in float32 throughout like the published models."""
    beta_T = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps)
    alpha_T = 1 - beta_T
    alpha_bar_T = alpha_T.cumprod(0)
    return NoiseSchedule(alpha_T, alpha_bar_T, torch.cat([torch.ones(1), alpha_bar_T[:-1]]))
