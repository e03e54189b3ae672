"""The losses, as pure tensor functions (METHOD section 3).

Letters: B batch, C channels, H height, W width, D = latent_dim, K subsets.
"""

from typing import Literal

from torch import Tensor

from pretrain.noise_schedule import NoiseSchedule

Weight = Literal["snr", "constant"]


def denoising_loss(noise_BCHW: Tensor, estimate_BCHW: Tensor) -> Tensor:
    """Mean squared error of a noise estimate per sample; float32 (B,)."""
    return (noise_BCHW.float() - estimate_BCHW.float()).square().mean(dim=(1, 2, 3))


def shifted_estimate(
    schedule: NoiseSchedule, t_B: Tensor, epsilon_BCHW: Tensor, shift_BCHW: Tensor
) -> Tensor:
    """DiTi's noise estimate: epsilon_theta + s_t G; float32 BCHW."""
    return epsilon_BCHW.float() + schedule.shift_coefficient(t_B) * shift_BCHW.float()


def diti_loss(
    schedule: NoiseSchedule,
    *,
    t_B: Tensor,
    noise_BCHW: Tensor,
    epsilon_BCHW: Tensor,
    shift_BCHW: Tensor,
    weight: Weight,
) -> Tensor:
    """w_t times the mean over pixels of (epsilon - epsilon_theta - s_t G)^2; float32 (B,)."""
    estimate = shifted_estimate(schedule, t_B, epsilon_BCHW, shift_BCHW)
    loss_B = denoising_loss(noise_BCHW, estimate)
    return loss_B * schedule.snr_weight(t_B) if weight == "snr" else loss_B
