"""Time-steps and noise as a pure function of (seed, global position).

So the loss of a sample does not depend on the world size, the batch split or where a run was
resumed. Counter-based random numbers (Philox) take the pair as their key: no state, no collisions.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def draw(
    positions: NDArray[np.int64],
    *,
    seed: int,
    timesteps: tuple[int, int],
    image_shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """t ~ U[timesteps) as int64 (B,), and noise ~ N(0, I) as float32 (B, *image_shape)."""
    t = torch.empty(len(positions), dtype=torch.int64)
    noise = torch.empty(len(positions), *image_shape)
    for i, position in enumerate(positions.tolist()):
        generator = np.random.Generator(np.random.Philox(key=[seed, position]))
        t[i] = int(generator.integers(*timesteps))
        noise[i] = torch.from_numpy(generator.standard_normal(image_shape, dtype=np.float32))
    return t, noise
