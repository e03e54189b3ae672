"""The other thing a run can train: the denoiser that later runs use as their frozen backbone.

Letters: B batch, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn

from configs.task import DenoiserTask
from pretrain.noise_schedule import make_schedule
from pretrain.objective import denoising_loss
from pretrain.timesteps import timestep_distribution
from pretrain.unet import UNet


class Denoiser(nn.Module):
    """Images to one loss each: the simple objective of DDPM on epsilon, v or x_0."""

    def __init__(self, task: DenoiserTask) -> None:
        super().__init__()
        self.task = task
        self.schedule = make_schedule(task.schedule)
        self.timesteps = timestep_distribution(task.timesteps, self.schedule)
        self.unet = UNet(task.unet)

    def tables_to(self, device: torch.device) -> None:
        """Move the schedule. It is no buffer, so that no engine casts it to bf16."""
        self.schedule = self.schedule.to(device)

    def forward(self, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Loss of each sample, float32 (B,)."""
        xt = self.schedule.add_noise(x0_BCHW, t_B, noise_BCHW)
        target = self.schedule.target(self.task.prediction, x0_BCHW, noise_BCHW, t_B)
        return denoising_loss(target, self.unet(xt, t_B))
