"""Everything random about a sample as a pure function of (seed, global position).

So the loss of a sample does not depend on the world size, the batch split or where a run was
resumed. Counter-based random numbers (Philox) take the pair as their key: no state, no collisions.

Letters: B samples, C channels, H height, W width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.sample_order import mix64, permute


@dataclass(frozen=True, slots=True)
class Draw:
    """Random numbers of B samples."""

    place_B: NDArray[np.float64]
    """In [0, 1): where in a distribution of time-steps."""
    noise_BCHW: Tensor
    """float32, N(0, I)."""
    flip_B: Tensor
    """bool, a fair coin."""


def draw(
    positions: NDArray[np.int64],
    *,
    seed: int,
    global_batch: int,
    noise_shape: tuple[int, int, int],
) -> Draw:
    """Places, noise and coins of the samples at these positions.

    Places are stratified: the `global_batch` samples of one global batch fall into as many equal
    parts of the distribution, one each, in an order that every batch permutes anew.
    """
    u_B = np.empty(len(positions))
    noise_BCHW = np.empty((len(positions), *noise_shape), np.float32)
    flip_B = np.empty(len(positions), bool)
    for i, position in enumerate(positions.tolist()):
        generator = np.random.Generator(np.random.Philox(key=[seed, position]))
        u_B[i] = generator.random()
        generator.standard_normal(dtype=np.float32, out=noise_BCHW[i])
        flip_B[i] = generator.random() < 0.5
    strata_B = permute(
        positions % global_batch, global_batch, mix64(seed, positions // global_batch)
    )
    place_B = (strata_B + u_B) / global_batch
    return Draw(place_B, torch.from_numpy(noise_BCHW), torch.from_numpy(flip_B))
