"""A whole DiTi model in memory: 8 px images, three subsets of eight dimensions, nothing zero."""

import torch
from torch import Tensor

from configs.task import (
    BackboneConfig,
    DitiTask,
    EncoderConfig,
    ScheduleConfig,
    StagedPartition,
    UNetConfig,
)
from pretrain.backbone import Backbone
from pretrain.diti import DiTi
from pretrain.shift_decoder import ShiftDecoder
from pretrain.unet import UNet

SIZE_PX = 8
SHA256 = "0" * 64


def tiny_backbone(*, image_size_px: int = SIZE_PX, num_timesteps: int = 1000) -> Backbone:
    """A frozen random U-Net."""
    unet = UNet(
        UNetConfig(
            base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_factors=()
        )
    )
    schedule = ScheduleConfig(num_timesteps=num_timesteps)
    return Backbone(unet.requires_grad_(False).eval(), schedule, image_size_px, SHA256)


def tiny_task(**changes: object) -> DitiTask:
    """Subsets [0, 50), [50, 200), [200, 1000); eight dimensions each."""
    task = DitiTask(
        kind="diti",
        backbone=BackboneConfig(weights="none.safetensors", sha256=SHA256),
        encoder=EncoderConfig(latent_dim=24, channels=(32, 32), attention_after=None),
        partition=StagedPartition(
            stage_ends=(50, 200, 1000), stage_dims=(8, 8, 8), stage_subsets=(1, 1, 1)
        ),
    )
    return task.model_copy(update=changes)


def tiny_diti(**changes: object) -> DiTi:
    """The model, with noise on every parameter so that no branch is zero."""
    torch.manual_seed(0)
    model = DiTi(tiny_task(**changes), tiny_backbone(), image_size_px=SIZE_PX)
    with torch.no_grad():
        for parameter in (*model.decoder.backbone.parameters(), *model.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def both(decoder: ShiftDecoder, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The backbone's own prediction at (x_t, t), and the shift that z adds to it."""
    frozen = decoder.look(x, t)
    return frozen.output_BCHW, decoder(frozen, z)
