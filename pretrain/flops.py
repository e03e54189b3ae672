"""Floating-point operations of a model, and how many a machine does in a second.

Counted are convolutions, matrix products and attention by torch's own kernels; xformers' is not.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.diti import DiTi
from pretrain.inputs import zeros

_PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices whose product is timed."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Of one image in one step."""

    frozen: int
    """The backbone's forward pass, and the one that makes its latents."""
    trained: int
    """Forward and backward of everything else."""


def count_flops(model: nn.Module, image_size_px: int, device: torch.device) -> ModelFlops:
    """By one pass of one image of zeros; changes no weight, gradient or buffer.

    Args:
        model: inputs to losses, see `inputs`.
    """
    was_training = model.training
    model.eval()  # BatchNorm's averages stay as they are
    inputs = zeros(model, 1, image_size_px, device)
    weights = list(model.parameters())
    with FlopCounterMode(display=False) as everything:
        torch.autograd.grad(model(*inputs).sum(), weights, allow_unused=True)
    frozen = 0
    if isinstance(model, DiTi):
        with FlopCounterMode(display=False) as looking:
            images, t, _ = inputs
            model.decoder.look(model.to_latents(images), t)
        frozen = looking.get_total_flops()
    model.train(was_training)
    return ModelFlops(frozen, everything.get_total_flops() - frozen)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device, with this process's threads."""
    size = _PEAK_SIZE[device.type]
    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(_seconds_of_product(a) for _ in range(4))


def _seconds_of_product(a: Tensor) -> float:
    def finish() -> None:
        if a.is_cuda:
            torch.cuda.synchronize()

    finish()
    start = time.perf_counter()
    _ = a @ a
    finish()
    return time.perf_counter() - start
