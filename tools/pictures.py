"""Pictures that show what a trained model does to single images; all deterministic by seed.

Letters: B batch, C channels, H height, W width, D = latent_dim, N ways.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.diti import DiTi
from pretrain.noise_schedule import NoiseSchedule, Prediction
from pretrain.partition import Subset
from pretrain.sampling import ddim_sample, diti_estimate, mix_subsets
from pretrain.timesteps import uniform_timesteps
from pretrain.unet import UNet
from tools.denoising import draw_noise, encode

DDIM_STEPS = 25
SAMPLE_STEPS = 100
Grid = NDArray[np.uint8]
"""(rows, columns, H, W, 3)."""


@dataclass(frozen=True, slots=True)
class Reconstructions:
    """Rows are images; columns are named by `columns`."""

    columns: tuple[str, ...]
    grid: Grid


@dataclass(frozen=True, slots=True)
class Interpolation:
    """From face A towards face B in one range of subsets; columns are the steps of the way."""

    name: str
    subsets: tuple[Subset, ...]
    grid: Grid

    @property
    def change(self) -> float:
        """Mean change of a pixel over the whole way, as a share of black to white."""
        first, last = (self.grid[:, column].astype(np.float64) for column in (0, -1))
        return float(np.abs(last - first).mean() / 255)


@torch.inference_mode()
def reconstructions(model: DiTi, images_BCHW: Tensor) -> Reconstructions:
    """Each image, its noisy version, and the one-step estimates of backbone and DiTi.

    At two time-steps: a third and two thirds of the way through the trained range.
    """
    first, end = model.timesteps.trained_range
    z = encode(model, images_BCHW)
    columns, tiles = ["image"], [to_pixels(images_BCHW)]
    for t in (first + (end - first) // 3, first + 2 * (end - first) // 3):
        t_B, noise = _noise(model, images_BCHW, t)
        xt = model.schedule.add_noise(images_BCHW, t_B, noise)
        for name, estimate in zip(("backbone", "DiTi"), model.estimates(xt, t_B, z), strict=True):
            if name == "backbone":
                columns.append(f"noisy, t = {t}")
                tiles.append(to_pixels(xt))
            columns.append(f"{name}, t = {t}")
            tiles.append(to_pixels(model.schedule.remove_noise(xt, t_B, estimate)))
    return Reconstructions(tuple(columns), np.stack(tiles, axis=1))


def interpolations(
    model: DiTi, a_BCHW: Tensor, b_BCHW: Tensor, *, steps: int = 5
) -> list[Interpolation]:
    """Noise A to the end of the trained range and denoise it with parts of z moved towards B.

    One `Interpolation` per named range and one for the whole feature; a row per pair of faces.
    """
    z_a, z_b = encode(model, a_BCHW), encode(model, b_BCHW)
    trained = model.timesteps.trained_range
    ranges = {
        **model.partition.named_ranges(*trained),
        "all": model.partition.select(*trained),
    }
    shares = np.linspace(0, 1, steps)
    ways = [mix_subsets(z_a, z_b, each, share) for each in ranges.values() for share in shares]
    pixels = _denoise(model, a_BCHW, torch.stack(ways))
    grids = pixels.reshape(len(ranges), steps, *pixels.shape[1:]).swapaxes(1, 2)
    return [
        Interpolation(name, subsets, grid)
        for (name, subsets), grid in zip(ranges.items(), grids, strict=True)
    ]


def backbone_samples(
    unet: UNet,
    schedule: NoiseSchedule,
    prediction: Prediction,
    *,
    count: int,
    size_px: int,
    columns: int,
    on_step: Callable[[int], None],
) -> Grid:
    """Unconditional samples of a backbone by SAMPLE_STEPS stochastic steps; see `sample_sheet`."""
    steps_done = count_from(0)
    start = schedule.num_timesteps - 1
    blank = torch.zeros(count, 3, size_px, size_px)
    _, noise = draw_noise(blank, uniform_timesteps(start, start + 1, schedule.num_timesteps))

    def estimate(xt_BCHW: Tensor, t_B: Tensor) -> Tensor:
        on_step(next(steps_done))
        return schedule.epsilon_of(unet(xt_BCHW, t_B), prediction, xt_BCHW, t_B)

    images = ddim_sample(schedule, estimate, noise, start=start, steps=SAMPLE_STEPS, eta=1.0)
    return to_pixels(images).reshape(-1, columns, size_px, size_px, 3)


def _denoise(model: DiTi, images_BCHW: Tensor, z_NBD: Tensor) -> NDArray[np.uint8]:
    """The same noisy images denoised in N ways at once; (N, B, H, W, 3) pixels."""
    start = model.timesteps.trained_range[1] - 1
    t_B, noise = _noise(model, images_BCHW, start)
    xt = model.schedule.add_noise(images_BCHW, t_B, noise)
    x0 = ddim_sample(
        model.schedule,
        diti_estimate(model, z_NBD.flatten(0, 1)),
        xt.repeat(len(z_NBD), 1, 1, 1),
        start=start,
        steps=min(DDIM_STEPS, start + 1),
    )
    return to_pixels(x0).reshape(*z_NBD.shape[:2], *images_BCHW.shape[2:], 3)


def _noise(model: DiTi, images_BCHW: Tensor, t: int) -> tuple[Tensor, Tensor]:
    return draw_noise(images_BCHW, uniform_timesteps(t, t + 1, model.schedule.num_timesteps))


def to_pixels(images_BCHW: Tensor) -> NDArray[np.uint8]:
    """[-1, 1] to uint8, (B, H, W, 3)."""
    return ((images_BCHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
