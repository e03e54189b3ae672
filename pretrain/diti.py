"""The DiTi model: encoder, partition and shift decoder against a frozen backbone.

Letters: B batch, C channels, H height, W width, D = latent_dim, K subsets, T time-steps.
"""

import torch
from torch import Tensor, nn

from configs.schema import DitiTask
from pretrain.backbone import Backbone
from pretrain.encoder import Encoder
from pretrain.noise_schedule import make_schedule
from pretrain.objective import diti_loss, shifted_estimate
from pretrain.partition import make_partition
from pretrain.shift_decoder import ShiftDecoder

FROZEN_PREFIX = "decoder.backbone."


class DiTi(nn.Module):
    """Images to one loss each; also the pieces that export and evaluation use.

    Raises:
        ValueError: the partition and the backbone's schedule, or the image sizes, do not agree.
    """

    def __init__(self, task: DitiTask, backbone: Backbone, *, image_size_px: int) -> None:
        super().__init__()
        self.task = task
        self.partition = make_partition(task.partition)
        self.schedule = make_schedule(backbone.schedule)
        self._check(backbone, image_size_px)
        self.encoder = Encoder(task.encoder, image_size_px=image_size_px)
        self.decoder = ShiftDecoder(backbone.unet, latent_dim=task.encoder.latent_dim)
        self.mask_KD = self.partition.cumulative_masks()
        self.subset_T = self.partition.subset_of_timestep()

    def _check(self, backbone: Backbone, image_size_px: int) -> None:
        if self.partition.num_timesteps != self.schedule.num_timesteps:
            raise ValueError(
                f"task.partition.stage_ends must end at the backbone's "
                f"{self.schedule.num_timesteps} time-steps, got {self.partition.num_timesteps}"
            )
        if backbone.image_size_px != image_size_px:
            raise ValueError(
                f"data.image_size_px is {image_size_px}, but the backbone was trained on "
                f"{backbone.image_size_px} px images; use that size"
            )

    def tables_to(self, device: torch.device) -> None:
        """Move schedule and masks. They are no buffers, so that no engine casts them to bf16."""
        self.schedule = self.schedule.to(device)
        self.mask_KD, self.subset_T = self.mask_KD.to(device), self.subset_T.to(device)

    def condition(self, z_BD: Tensor, t_B: Tensor) -> Tensor:
        """What the decoder may see at t: z with every subset beyond t's own set to 0; BD."""
        return z_BD * self.mask_KD[self.subset_T[t_B]].to(z_BD.dtype)

    def estimates(self, xt_BCHW: Tensor, t_B: Tensor, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Noise estimates of the backbone alone and of DiTi, from x_t; both BCHW."""
        epsilon, shift = self.decoder(xt_BCHW, t_B, self.condition(z_BD, t_B))
        return epsilon, shifted_estimate(self.schedule, t_B, epsilon, shift)

    def forward(self, x0_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Loss of each sample, float32 (B,), in mode `base`: z at all subsets up to t's own."""
        xt = self.schedule.add_noise(x0_BCHW, t_B, noise_BCHW)
        condition = self.condition(self.encoder(x0_BCHW), t_B)
        epsilon, shift = self.decoder(xt, t_B, condition)
        return diti_loss(
            self.schedule,
            t_B=t_B,
            noise_BCHW=noise_BCHW,
            epsilon_BCHW=epsilon,
            shift_BCHW=shift,
            weight=self.task.weight,
        )
