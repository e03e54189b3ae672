"""`diti eval reconstruction`: how well images come back from their features, and by which sampler.

METHOD section 7, autoencoding: x_T is inferred by DDIM and decoded by DDIM, or drawn at random and
decoded: then only the feature says what the image was. The samplers differ in the two points where
the published code departs from its own training loss.

Letters: B batch, C channels, H height, W width, D = latent_dim.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from data_pipelines.object_store import ObjectStore, absolute
from data_pipelines.shard_index import read_index
from pretrain.diti import DiTi
from pretrain.published import ConfigSource
from pretrain.sampling import ddim_encode, ddim_sample, diti_estimate
from pretrain.timesteps import uniform_timesteps
from pretrain.trained import load_diti, load_published_diti
from tools.denoising import draw_noise, encode, to_unit
from tools.labels import iter_samples, read_pixels

CHUNK = 32
SAMPLERS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "z never masked": {"masked": False},
    "published coefficient": {"coefficient": "published"},
    "both, as published": {"masked": False, "coefficient": "published"},
    "backbone alone": {"stop_below": sys.maxsize},
}
"""Names, and what `diti_estimate` is told."""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Error of one sampler over the images: squared, on pixels in [0, 1]."""

    sampler: str
    inferred: float
    """From the x_T that the same sampler, run backwards, infers."""
    random: float
    """From random x_T, the same for every sampler."""
    random_above_first: float
    """Mean difference of `random` from that of the first sampler, image by image."""
    uncertainty: float
    """Standard error of that difference over images."""


def load_model(
    store: ObjectStore, run_url: str | None, checkpoint: str | None, config: ConfigSource | None
) -> DiTi:
    """The model of a run, or of a published checkpoint file; in eval mode.

    Raises:
        ValueError: not exactly one of both is given, or it cannot be used.
    """
    if (run_url is None) == (checkpoint is None):
        raise ValueError("exactly one of a run and --checkpoint FILE must be given")
    if run_url is not None:
        return load_diti(store, absolute(run_url))[0]
    assert checkpoint is not None
    return load_published_diti(absolute(checkpoint), config, store=store)[0]


def read_images(store: ObjectStore, shards_url: str, count: int, size_px: int) -> Tensor:
    """The first `count` images of a shard set in [-1, 1]; BCHW.

    Raises:
        ValueError: the set has fewer.
    """
    index = read_index(store, shards_url)
    if index.num_samples < count:
        raise ValueError(
            f"{shards_url} has {index.num_samples} images, {count} were asked for; lower --count"
        )
    samples = list(islice(iter_samples(store, index), count))
    return to_unit(read_pixels(samples, size_px))


@torch.inference_mode()
def evaluate_reconstruction(
    model: DiTi,
    images_BCHW: Tensor,
    *,
    steps: int,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[Reconstruction]:
    """Errors by our sampler, by each departure of the published ones from it, and without z.

    Args:
        steps: of DDIM, in either direction.
        on_progress: told the share that is done.

    Raises:
        ValueError: more steps than time-steps.
    """
    last = model.schedule.num_timesteps - 1
    _, noise = draw_noise(images_BCHW, uniform_timesteps(last, last + 1, last + 1))
    z = encode(model, images_BCHW)
    errors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, changes in SAMPLERS.items():
        inferred, random = [], []
        for part in torch.arange(len(images_BCHW)).split(CHUNK):
            estimate, images = diti_estimate(model, z[part], **changes), images_BCHW[part]
            x_T = ddim_encode(model.schedule, estimate, images, end=last, steps=steps)
            for found, start in ((inferred, x_T), (random, noise[part])):
                back = ddim_sample(model.schedule, estimate, start, start=last, steps=steps)
                found.append(((back - images) / 2).square().mean(dim=(1, 2, 3)))
            on_progress((len(errors) + (part[-1].item() + 1) / len(z)) / len(SAMPLERS))
        errors[name] = torch.cat(inferred), torch.cat(random)
    first = next(iter(errors.values()))[1]
    return [
        Reconstruction(
            name,
            inferred.mean().item(),
            random.mean().item(),
            (random - first).mean().item(),
            ((random - first).std() / len(first) ** 0.5).item(),
        )
        for name, (inferred, random) in errors.items()
    ]
