"""What a pass is said to hold is what its tensors take; nothing is computed for it."""

import pytest
import torch
from torch import Tensor, nn

from pretrain.activations import PassMemory, measure_pass
from pretrain.unet import set_recomputing
from tests.tiny_model import SIZE_PX, tiny_diti

IMAGE = 3 * SIZE_PX**2 * 4


class Exp(nn.Module):
    """One weight; the pass back needs the exponential, and not what it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (images * self.w).exp().sum(dim=(1, 2, 3))


class Wide(nn.Module):
    """Its weights are large, what it makes of an image is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * SIZE_PX**2, 4000)
        self.last = nn.Linear(4000, 1)

    def forward(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.last(self.first(images.flatten(1))).squeeze(1)


def measure(model: nn.Module, micro_batch: int, *frozen: nn.Module) -> PassMemory:
    return measure_pass(model, *frozen, image_size_px=SIZE_PX, micro_batch=micro_batch)


def test_what_is_freed_on_the_way_is_not_held():
    found = measure(Exp(), 100)
    assert 2 * 100 * IMAGE <= found.with_gradients < 3.1 * 100 * IMAGE


def test_gradients_are_told_apart():
    found = measure(Wide(), 1)
    weights = 4 * (3 * SIZE_PX**2 * 4000 + 4000 + 4000 + 1)
    assert weights <= found.with_gradients < 1.1 * weights
    largest = 4 * 3 * SIZE_PX**2 * 4000
    assert largest <= found.without_gradients < 1.1 * largest, "the moment it is made"


def diti_pass(micro_batch: int, *, recomputes: bool = False) -> PassMemory:
    model = tiny_diti()
    set_recomputing(model, recomputes)
    return measure(model, micro_batch, model.decoder.trunk)


def test_it_is_in_proportion_to_the_images_and_less_where_they_are_recomputed():
    eight, sixteen = diti_pass(8), diti_pass(16)
    assert sixteen.without_gradients == pytest.approx(2 * eight.without_gradients, rel=0.1)
    assert diti_pass(16, recomputes=True).without_gradients < 0.8 * sixteen.without_gradients


def test_a_model_of_any_size_is_measured_in_no_memory():
    """A batch of 2**30 images would hold terabytes."""
    assert measure(Exp(), 2**30).with_gradients > 2**40
