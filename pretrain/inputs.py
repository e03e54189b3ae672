"""What goes into a model: a batch that was read, or zeros of the same shapes.

Letters: B batch, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from data_pipelines.sample_stream import Batch
from pretrain.baselines import Baseline, Classifier
from pretrain.denoiser import Denoiser
from pretrain.diffae import DiffAe
from pretrain.diti import DiTi
from pretrain.position_noise import draw

Model = DiTi | Denoiser | Baseline
OfTimesteps = DiTi | Denoiser | DiffAe
"""Models that take time-steps beside images and noise."""


def to_tensors(
    batch: Batch, config: RunConfig, model: Model, device: torch.device
) -> tuple[Tensor, ...]:
    """A micro-batch as the model takes it, on the device.

    Returns:
        Images in [-1, 1]; then time-steps and noise, or the labels, or only noise. Time-steps and
        noise are followed by latents and embeddings of captions that were made beforehand.
    """
    pixels_BHWC = torch.from_numpy(batch.images).to(device)
    images = pixels_BHWC.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    drawn = draw(
        batch.positions,
        seed=config.seed,
        global_batch=config.train.global_batch,
        noise_shape=noise_shape(model, config.data.image_size_px),
    )
    if config.data.horizontal_flip:
        mirrored = drawn.flip_B.to(device)[:, None, None, None]
        images = torch.where(mirrored, images.flip(3), images)
    if isinstance(model, Classifier):
        return images, torch.from_numpy(batch.labels).to(device)
    noise = drawn.noise_BCHW.to(device)
    if isinstance(model, OfTimesteps):
        t_B = torch.from_numpy(model.timesteps.quantile(drawn.place_B))
        made = {name: torch.from_numpy(a).to(device).float() for name, a in batch.encoded.items()}
        if "mirrored" in made:
            mirrored = drawn.flip_B.to(device)[:, None, None, None]
            made["latent"] = torch.where(mirrored, made.pop("mirrored"), made["latent"])
        return images, t_B.to(device), noise, *made.values()
    return images, noise


def noise_shape(model: nn.Module, image_size_px: int) -> tuple[int, int, int]:
    """Channels, height and width of the noise that a model takes."""
    return model.noise_shape if isinstance(model, DiTi) else (3, image_size_px, image_size_px)


def zeros(
    model: nn.Module, count: int, image_size_px: int, device: str | torch.device
) -> tuple[Tensor, ...]:
    """Inputs of so many images, for what a pass costs and not for what it finds."""
    images = torch.zeros(count, 3, image_size_px, image_size_px, device=device)
    if isinstance(model, Classifier):
        return images, torch.zeros(count, len(model.attributes), device=device)
    if isinstance(model, Baseline) and not isinstance(model, OfTimesteps):
        return images, images
    noise = torch.zeros(count, *noise_shape(model, image_size_px), device=device)
    return images, torch.zeros(count, dtype=torch.int64, device=device), noise
