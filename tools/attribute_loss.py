"""Where on the time axis each attribute is lost: what can still be read from x_t.

The paper's attribute loss says how often images with and without an attribute can no longer be told
apart at t, by the best classifier of x_t. Here the classifier is the linear probe, learnt anew at
each t, on the backbone's one-step reconstruction of x_0, which is a function of x_t.

Letters: N samples, A attributes, S time-steps, B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.object_store import ObjectStore, absolute
from data_pipelines.shard_index import read_index
from pretrain.diti import DiTi
from pretrain.timesteps import uniform_timesteps
from pretrain.trained import load_diti
from tools.attribute_probe import probe
from tools.denoising import CHUNK, draw_noise, to_unit
from tools.labels import attributes_of, iter_samples, read_pixels
from tools.representations import Representation

TIMESTEPS = (25, 50, 100, 150, 200, 300, 400, 500, 600, 700, 850, 999)


class Labelled(NamedTuple):
    """Images in [-1, 1], BCHW, and their labels, (N, A)."""

    images: Tensor
    labels: NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class AttributeLoss:
    """What is left of each attribute."""

    attributes: tuple[str, ...]
    timesteps: tuple[int, ...]
    """The first is -1: the image itself."""
    precision: NDArray[np.float64]
    """(S, A): average precision of a probe of the reconstruction from x_t."""
    base_rate: tuple[float, ...]
    """Share of the images that have the attribute: the precision of knowing nothing."""

    def half_lost(self, attribute: str) -> float | None:
        """The time-step at which half of what can be read from the image is gone, linearly between
        the measured ones; None where more is left at the last."""
        number = self.attributes.index(attribute)
        gain = self.precision[:, number] - self.base_rate[number]
        below = np.flatnonzero(gain <= gain[0] / 2)
        if not len(below) or below[0] == 0:
            return None
        after = below[0]
        before = after - 1
        share = (gain[before] - gain[0] / 2) / (gain[before] - gain[after])
        first, last = self.timesteps[before], self.timesteps[after]
        return max(0.0, float(first + share * (last - first)))


def evaluate_attribute_loss(
    store: ObjectStore,
    *,
    run_url: str,
    train_url: str,
    test_url: str,
    count: int = 2048,
    timesteps: Sequence[int] = TIMESTEPS,
    on_timestep: Callable[[int], None] = lambda t: None,
) -> AttributeLoss:
    """By the backbone of a run, on the first images of two labelled shard sets.

    Raises:
        ValueError: both sets are the same, the labels differ or are missing, an attribute has one
            value only, or a time-step is not the schedule's.
        CheckpointError, BackboneError: as `load_diti`.
    """
    model, config, _ = load_diti(store, absolute(run_url))
    last = model.schedule.num_timesteps - 1
    if wrong := [t for t in timesteps if not 0 <= t <= last]:
        raise ValueError(f"time-steps are 0 to {last}, not {wrong[0]}")
    indices = [read_index(store, absolute(url)) for url in (train_url, test_url)]
    if indices[0].digest == indices[1].digest:
        raise ValueError(
            f"{train_url} and {test_url} hold the same shards; a probe must be tested on images "
            f"that it has not seen: give a second split"
        )
    samples = [list(islice(iter_samples(store, index), count)) for index in indices]
    train, test = (attributes_of(each) for each in samples)
    if train.names != test.names:
        raise ValueError(
            f"{train_url} and {test_url} are labelled with different attributes: "
            f"{sorted(set(train.names) ^ set(test.names))}"
        )
    halves = [
        Labelled(to_unit(read_pixels(each, config.data.image_size_px)), labels.values)
        for each, labels in zip(samples, (train, test), strict=True)
    ]
    precision = []
    for t in (-1, *timesteps):
        on_timestep(t)
        precision.append(_precision(model, halves, t, train.names))
    return AttributeLoss(
        train.names, (-1, *timesteps), np.array(precision), tuple(test.values.mean(axis=0))
    )


def _precision(
    model: DiTi, halves: Sequence[Labelled], t: int, attributes: tuple[str, ...]
) -> tuple[float, ...]:
    flat = [
        (half.images if t < 0 else _reconstructed(model, half.images, t)).flatten(1).numpy()
        for half in halves
    ]
    (train, test) = halves
    seen = Representation("", flat[0], train.labels, flat[1], test.labels)
    return probe(seen, attributes).average_precision


@torch.inference_mode()
def _reconstructed(model: DiTi, images_BCHW: Tensor, t: int) -> Tensor:
    """The backbone's estimate of x_0 from x_t, BCHW."""
    at = uniform_timesteps(t, t + 1, model.schedule.num_timesteps)
    t_B, noise = draw_noise(images_BCHW, at, repeat=t)
    parts = []
    for x0, t_part, noise_part in zip(
        images_BCHW.split(CHUNK), t_B.split(CHUNK), noise.split(CHUNK), strict=True
    ):
        xt = model.schedule.add_noise(x0, t_part, noise_part)
        (epsilon,) = model.estimates(xt, t_part)
        parts.append(model.schedule.remove_noise(xt, t_part, epsilon).clamp(-1, 1))
    return torch.cat(parts)
