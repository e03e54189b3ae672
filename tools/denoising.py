"""Does the encoder add information? Losses of one trained model on images it has never seen.

Everything is computed on the same (x_0, t, noise), so that only the feature differs.

Letters: B batch, D = latent_dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.diti import DiTi
from pretrain.objective import denoising_loss
from pretrain.position_noise import draw
from pretrain.timesteps import TimestepDistribution, uniform_timesteps

CHUNK = 256
NOISE_SEED = 20240  # of evaluation; no run trains with it


@dataclass(frozen=True, slots=True)
class FourLosses:
    """Mean squared error of the noise estimate over the trained time-steps; lower is better."""

    backbone: float
    diti: float
    shuffled: float
    """With each image given another image's feature."""
    mean: float
    """With each image given the mean feature."""


@dataclass(frozen=True, slots=True)
class TimestepLosses:
    """The same per bin of time-steps (the paper's Fig. A9)."""

    bin_starts: tuple[int, ...]
    bin_width: int
    backbone: tuple[float, ...]
    diti: tuple[float, ...]
    shuffled: tuple[float, ...]
    mean_image: tuple[float, ...]
    """Of an estimate that takes every image for the mean of all: SNR_t times their variance."""

    @property
    def worse_than_the_mean_image_from(self) -> int | None:
        """The first time-step from which on the backbone knows less than that; None if it never
        does. Its own error there is larger than all that a feature could take off."""
        first = None
        bins = zip(self.bin_starts, self.backbone, self.mean_image, strict=True)
        for start, backbone, mean_image in reversed(list(bins)):
            if backbone <= mean_image:
                break
            first = start
        return first


@torch.inference_mode()
def encode(model: DiTi, images_BCHW: Tensor) -> Tensor:
    """z of images in [-1, 1]; BD."""
    return torch.cat([model.encoder(chunk) for chunk in images_BCHW.split(CHUNK)])


@torch.inference_mode()
def to_latents(model: DiTi, images_BCHW: Tensor) -> Tensor:
    """What noise is added to, of images in [-1, 1]; BCHW."""
    return torch.cat([model.to_latents(chunk) for chunk in images_BCHW.split(CHUNK)])


def to_unit(images_BHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 pixels to [-1, 1]; BCHW."""
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def four_losses(model: DiTi, images_BCHW: Tensor, *, repeats: int = 2) -> FourLosses:
    """The four losses, each image at `repeats` time-steps of the trained range."""
    z = encode(model, images_BCHW)
    features = (z, z.roll(1, 0), z.mean(0, keepdim=True).expand_as(z))
    x0 = to_latents(model, images_BCHW)
    losses = []
    for repeat in range(repeats):
        t, noise = draw_noise(x0, model.timesteps, repeat)
        losses.append(_losses(model, x0, t, noise, *features))
    return FourLosses(*torch.cat(losses, dim=1).mean(dim=1).tolist())


def timestep_losses(model: DiTi, images_BCHW: Tensor, *, num_bins: int = 16) -> TimestepLosses:
    """Losses by time-step over the trained range."""
    first, end = model.timesteps.trained_range
    width = -(-(end - first) // num_bins)
    z, x0 = encode(model, images_BCHW), to_latents(model, images_BCHW)
    variance = x0.var(dim=0).mean().item()
    starts, rows = tuple(range(first, end, width)), []
    for number, start in enumerate(starts):
        bin_of = uniform_timesteps(start, min(start + width, end), model.schedule.num_timesteps)
        t, noise = draw_noise(x0, bin_of, number)
        means = _losses(model, x0, t, noise, z, z.roll(1, 0)).mean(dim=1).tolist()
        rows.append((*means, variance * model.schedule.snr(t).mean().item()))
    return TimestepLosses(starts, width, *zip(*rows, strict=True))


def draw_noise(
    x0_BCHW: Tensor, timesteps: TimestepDistribution, repeat: int = 0
) -> tuple[Tensor, Tensor]:
    """Time-steps and noise of evaluation, the same for every model; other ones per `repeat`."""
    count, channels, height, width = x0_BCHW.shape
    drawn = draw(
        np.arange(count) + repeat * count,
        seed=NOISE_SEED,
        global_batch=count,
        noise_shape=(channels, height, width),
    )
    return torch.from_numpy(timesteps.quantile(drawn.place_B)), drawn.noise_BCHW


@torch.inference_mode()
def _losses(model: DiTi, x0: Tensor, t: Tensor, noise: Tensor, *features: Tensor) -> Tensor:
    """Loss of each sample, a row for the backbone alone and one for DiTi given each feature."""
    parts = []
    for part in torch.arange(len(x0)).split(CHUNK):
        xt = model.schedule.add_noise(x0[part], t[part], noise[part])
        estimates = model.estimates(xt, t[part], *(z[part] for z in features))
        parts.append(torch.stack([denoising_loss(noise[part], each) for each in estimates]))
    return torch.cat(parts, dim=1)
