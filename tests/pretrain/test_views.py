"""Augmentations: eight numbers decide everything."""

import pytest
import torch
from torch import Tensor

from pretrain.views import GREY_SHARE, view

# area, x, y, mirror, brightness, contrast, saturation, grey
AS_IT_IS = [1.0, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 1.0]


def changed(**numbers: float) -> Tensor:
    names = ("area", "x", "y", "mirror", "brightness", "contrast", "saturation", "grey")
    found = dict(zip(names, AS_IT_IS, strict=True)) | numbers
    return torch.tensor([[found[name] for name in names]])


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.6


def test_the_middle_of_every_number_leaves_the_image_as_it_is(image: Tensor) -> None:
    torch.testing.assert_close(view(image, changed()), image, rtol=0, atol=1e-5)


def test_it_is_mirrored_where_its_number_says_so(image: Tensor) -> None:
    torch.testing.assert_close(view(image, changed(mirror=0)), image.flip(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_the_smallest_cut_is_a_quarter_of_the_image_where_its_numbers_say(
    x: float, y: float
) -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[0, :, 8 * int(y) :, 8 * int(x) :][:, :8, :8] = 0.5
    found = view(image, changed(area=0, x=x, y=y))
    assert found.shape == image.shape
    inner = found[0, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), rtol=0, atol=1e-5)


def test_a_grey_view_has_three_equal_channels_and_the_same_luma(image: Tensor) -> None:
    grey = view(image, changed(grey=GREY_SHARE / 2))
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(grey[:, 0], (image * luma).sum(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", ["brightness", "contrast", "saturation"])
def test_colours_go_up_and_down_and_stay_colours(image: Tensor, number: str) -> None:
    low, high = (view(image, changed(**{number: end})) for end in (0.0, 1.0))
    spread = [(v + 1).mean() if number == "brightness" else v.std() for v in (low, image, high)]
    assert spread[0] < spread[1] < spread[2]
    assert all(v.abs().max() <= 1 for v in (low, high))


def test_each_image_has_its_own_view(image: Tensor) -> None:
    both = view(image.repeat(2, 1, 1, 1), torch.cat([changed(), changed(mirror=0)]))
    torch.testing.assert_close(both[0], both[1].flip(2), rtol=0, atol=1e-5)
