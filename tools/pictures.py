"""Pictures that show what a trained model does to single images; all deterministic by seed.

Letters: B batch, C channels, H height, W width, D = latent_dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.diti import DiTi
from pretrain.noise_schedule import NoiseSchedule
from pretrain.partition import Partition, Subset
from pretrain.position_noise import draw
from pretrain.sampling import ddim_sample, diti_estimate
from pretrain.unet import UNet
from tools.denoising import NOISE_SEED, encode

DDIM_STEPS = 25
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


@torch.inference_mode()
def reconstructions(model: DiTi, images_BCHW: Tensor) -> Reconstructions:
    """Each image, its noisy version, and the one-step estimates of backbone and DiTi.

    At two time-steps of the trained range: a half and the last.
    """
    first, end = model.task.timesteps
    z = encode(model, images_BCHW)
    columns, tiles = ["image"], [to_pixels(images_BCHW)]
    for t in ((first + end) // 2, end - 1):
        t_B, noise = _noise(images_BCHW, t)
        xt = model.schedule.add_noise(images_BCHW, t_B, noise)
        for name, estimate in zip(("backbone", "DiTi"), model.estimates(xt, t_B, z), strict=True):
            if name == "backbone":
                columns.append(f"noisy, t = {t}")
                tiles.append(to_pixels(xt))
            columns.append(f"{name}, t = {t}")
            tiles.append(to_pixels(model.schedule.remove_noise(xt, t_B, estimate)))
    return Reconstructions(tuple(columns), np.stack(tiles, axis=1))


def named_ranges(partition: Partition, timesteps: tuple[int, int]) -> dict[str, tuple[Subset, ...]]:
    """The trained subsets as `fine`, `middle` and `coarse`: thirds of their number."""
    subsets = partition.select(*timesteps)
    cuts = [round(i * len(subsets) / 3) for i in range(4)]
    return {
        name: subsets[cuts[i] : cuts[i + 1]]
        for i, name in enumerate(("fine", "middle", "coarse"))
        if cuts[i] < cuts[i + 1]
    }


def interpolations(
    model: DiTi, a_BCHW: Tensor, b_BCHW: Tensor, *, steps: int = 5
) -> list[Interpolation]:
    """Noise A to the end of the trained range and denoise it with parts of z moved towards B.

    One `Interpolation` per named range and one for the whole feature; a row per pair of faces.
    """
    z_a, z_b = encode(model, a_BCHW), encode(model, b_BCHW)
    ranges = named_ranges(model.partition, model.task.timesteps)
    ranges["all"] = model.partition.select(*model.task.timesteps)
    return [
        Interpolation(
            name,
            subsets,
            np.stack(
                [
                    _denoise(model, a_BCHW, _mix(z_a, z_b, subsets, share))
                    for share in np.linspace(0, 1, steps)
                ],
                axis=1,
            ),
        )
        for name, subsets in ranges.items()
    ]


def backbone_samples(
    unet: UNet, schedule: NoiseSchedule, *, count: int, size_px: int, columns: int
) -> Grid:
    """Unconditional samples of a backbone by 100 stochastic steps."""
    _, noise = draw(
        np.arange(count), seed=NOISE_SEED, timesteps=(0, 1), image_shape=(3, size_px, size_px)
    )
    start = schedule.num_timesteps - 1
    images = ddim_sample(schedule, unet, noise, start=start, steps=100, eta=1.0)
    return to_pixels(images).reshape(-1, columns, size_px, size_px, 3)


def _mix(z_a: Tensor, z_b: Tensor, subsets: tuple[Subset, ...], share: float) -> Tensor:
    mixed = z_a.clone()
    dims = slice(subsets[0].dims[0], subsets[-1].dims[1])
    mixed[:, dims] = z_a[:, dims].lerp(z_b[:, dims], share)
    return mixed


def _denoise(model: DiTi, images_BCHW: Tensor, z_BD: Tensor) -> NDArray[np.uint8]:
    start = model.task.timesteps[1] - 1
    t_B, noise = _noise(images_BCHW, start)
    xt = model.schedule.add_noise(images_BCHW, t_B, noise)
    return to_pixels(
        ddim_sample(
            model.schedule,
            diti_estimate(model, z_BD),
            xt,
            start=start,
            steps=min(DDIM_STEPS, start + 1),
        )
    )


def _noise(images_BCHW: Tensor, t: int) -> tuple[Tensor, Tensor]:
    count, channels, height, width = images_BCHW.shape
    return draw(
        np.arange(count),
        seed=NOISE_SEED,
        timesteps=(t, t + 1),
        image_shape=(channels, height, width),
    )


def to_pixels(images_BCHW: Tensor) -> NDArray[np.uint8]:
    """[-1, 1] to uint8, (B, H, W, 3)."""
    return ((images_BCHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
