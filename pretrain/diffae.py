"""Diff-AE (Preechakul et al. 2022): encoder and conditional denoiser trained together.

Where DiTi and PDAE correct a frozen backbone, this denoiser starts from nothing and is given z all
along. Only the encoder is of interest here, so nothing samples from the denoiser.

Letters: B batch, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn

from configs.task import DiffAeTask
from pretrain.encoder import make_encoder
from pretrain.noise_schedule import make_schedule
from pretrain.objective import denoising_loss
from pretrain.timesteps import timestep_distribution
from pretrain.unet import UNet


class DiffAe(nn.Module):
    """Images to one loss each: ||epsilon - epsilon_theta(x_t, t, E(x_0))||^2, both from scratch.

    z scales the normalised activations of every residual block, down, middle and up. It goes
    through `label_emb` first, as in the shift decoder.

    Raises:
        ValueError: images of this size do not fit the encoder, or no time-step can be drawn.
    """

    def __init__(self, task: DiffAeTask, *, image_size_px: int) -> None:
        super().__init__()
        self.schedule = make_schedule(task.schedule)
        self.timesteps = timestep_distribution(task.timesteps, self.schedule)
        self.encoder = make_encoder(task.encoder, image_size_px=image_size_px)
        self.label_emb = nn.Linear(task.encoder.latent_dim, 4 * task.unet.base_channels)
        self.unet = UNet(task.unet, steering="scale")

    def tables_to(self, device: torch.device) -> None:
        """Move the schedule. It is no buffer, so that no engine casts it to bf16."""
        self.schedule = self.schedule.to(device)

    def forward(self, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Loss of each sample, the mean over its pixels; float32 (B,)."""
        xt = self.schedule.add_noise(x0_BCHW, t_B, noise_BCHW)
        emb_z = self.label_emb(self.encoder(x0_BCHW))
        return denoising_loss(noise_BCHW, self.unet(xt, t_B, emb_z))
