"""The losses, as pure tensor functions (METHOD section 3).

Letters: B batch, C channels, H height, W width, D = latent_dim, K subsets.
"""

from typing import Literal

from torch import Tensor

from pretrain.noise_schedule import NoiseSchedule
from pretrain.partition import Masks

Mode = Literal["base", "stop_grad", "dual"]
Weight = Literal["snr", "constant", "min_snr", "v"]


def denoising_loss(target_BCHW: Tensor, estimate_BCHW: Tensor) -> Tensor:
    """Mean squared error of an estimate per sample; float32 (B,)."""
    return (target_BCHW.float() - estimate_BCHW.float()).square().mean(dim=(1, 2, 3))


def shifted_estimate(
    schedule: NoiseSchedule, t_B: Tensor, epsilon_BCHW: Tensor, shift_BCHW: Tensor
) -> Tensor:
    """DiTi's noise estimate: epsilon_theta + s_t G; float32 BCHW."""
    return epsilon_BCHW.float() + schedule.shift_coefficient(t_B) * shift_BCHW.float()


def conditions(masks: Masks, mode: Mode, z_BD: Tensor, t_B: Tensor) -> list[Tensor]:
    """What the decoder sees at t, one BD tensor for each of its passes.

    base:      z * masks[i]: every subset up to t's own, i.
    stop_grad: sg(z) * receding[i] + z * own[i]: the same values, gradients to subset i only.
    dual:      both, one after the other; their losses are added.
    """
    subset_B = masks.subset_T[t_B]
    base = z_BD * masks.cumulative_KD.to(z_BD.dtype)[subset_B]
    if mode == "base":
        return [base]
    own = z_BD * masks.own_KD.to(z_BD.dtype)[subset_B]
    earlier = z_BD.detach() * masks.receding_KD.to(z_BD.dtype)[subset_B]
    return [earlier + own] if mode == "stop_grad" else [base, earlier + own]


def loss_weight(
    schedule: NoiseSchedule,
    t_B: Tensor,
    weight: Weight,
    *,
    snr_gamma: float = 0.1,
    min_snr_cap: float = 5.0,
) -> Tensor:
    """w_t: the paper's SNR^gamma / (1 + SNR), 1, min(SNR, cap) / SNR, or (1 + SNR) / SNR, which
    makes it the error of v; float32 (B,)."""
    snr = schedule.snr(t_B)
    if weight == "snr":
        return snr**snr_gamma / (1 + snr)
    if weight == "min_snr":
        return snr.clamp(max=min_snr_cap) / snr
    if weight == "v":
        return (1 + snr) / snr
    return snr.new_ones(snr.shape)


def diti_loss(
    schedule: NoiseSchedule,
    *,
    t_B: Tensor,
    noise_BCHW: Tensor,
    epsilon_BCHW: Tensor,
    shift_BCHW: Tensor,
    weight: Weight = "snr",
    snr_gamma: float = 0.1,
    min_snr_cap: float = 5.0,
) -> Tensor:
    """w_t times the mean over pixels of (epsilon - epsilon_theta - s_t G)^2; float32 (B,).

    The mean of the result is the paper's loss; each value belongs to its sample's time-step.
    """
    estimate = shifted_estimate(schedule, t_B, epsilon_BCHW, shift_BCHW)
    w_B = loss_weight(schedule, t_B, weight, snr_gamma=snr_gamma, min_snr_cap=min_snr_cap)
    return w_B * denoising_loss(noise_BCHW, estimate)
