"""The other thing a run can train: the denoiser that later runs use as their frozen backbone.

Letters: B batch, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn

from configs.schema import DenoiserTask
from pretrain.noise_schedule import make_schedule
from pretrain.objective import denoising_loss
from pretrain.unet import UNet


class Denoiser(nn.Module):
    """Images to one loss each: the simple epsilon-prediction objective of DDPM."""

    def __init__(self, task: DenoiserTask) -> None:
        super().__init__()
        self.task = task
        self.schedule = make_schedule(task.schedule)
        self.unet = UNet(task.unet)

    def tables_to(self, device: torch.device) -> None:
        """Move the schedule. It is no buffer, so that no engine casts it to bf16."""
        self.schedule = self.schedule.to(device)

    def forward(self, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Loss of each sample, float32 (B,)."""
        xt = self.schedule.add_noise(x0_BCHW, t_B, noise_BCHW)
        return denoising_loss(noise_BCHW, self.unet(xt, t_B))
