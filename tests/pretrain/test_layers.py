"""The faster layers against PyTorch's own: the same numbers and gradients in any memory layout."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.layers import (
    GroupNorm,
    PointwiseConv1d,
    PointwiseConv2d,
    UpsampledConv2d,
    to_fast_layout,
)
from tests.own_process import check_runs

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def random_image(layout: torch.memory_format, channels: int = 6) -> Tensor:
    x = torch.randn(2, channels, 5, 3, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=layout).requires_grad_()


def assert_same_function(layer: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Output, and the gradients of x and of the parameters they share."""
    results = []
    for function in (layer, plain):
        out = function(x)
        random = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad(out, [x, *layer.parameters()], random)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_upsampled_convolution_is_repetition_and_then_convolution(layout: torch.memory_format):
    layer = UpsampledConv2d(6, 4)

    def plain(x: Tensor) -> Tensor:
        doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.conv2d(doubled, layer.weight, layer.bias, padding=1)

    assert_same_function(layer, plain, random_image(layout))


def test_an_upsampled_convolution_of_bfloat16_adds_no_weights():
    layer = UpsampledConv2d(6, 4).bfloat16()
    x = random_image(torch.contiguous_format).detach().bfloat16()
    doubled = F.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.equal(layer(x), F.conv2d(doubled, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [PointwiseConv1d, PointwiseConv2d])
def test_a_pointwise_convolution_is_a_matrix_times_every_pixel(
    kind: type[PointwiseConv1d | PointwiseConv2d], layout: torch.memory_format
):
    layer = kind(6, 4)

    def plain(x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, 3), layer.weight.reshape(4, 6), layer.bias).movedim(3, 1)

    assert_same_function(layer, plain, random_image(layout))


def test_the_layers_have_the_parameters_of_those_they_replace():
    for layer, plain in (
        (PointwiseConv1d(6, 4), nn.Conv1d(6, 4, 1)),
        (PointwiseConv2d(6, 4), nn.Conv2d(6, 4, 1)),
        (UpsampledConv2d(6, 4), nn.Conv2d(6, 4, 3)),
    ):
        layer.load_state_dict(plain.state_dict(), strict=True)


def test_only_float32_on_a_cpu_changes_its_layout():
    x = torch.randn(2, 3, 4, 4)
    assert to_fast_layout(x).is_contiguous(memory_format=torch.channels_last)
    assert to_fast_layout(x.bfloat16()).is_contiguous()
    assert to_fast_layout(x.to("meta")).is_contiguous()


NO_GRADIENT_WANTED = """
import torch
from pretrain.layers import GroupNorm

x = torch.randn(2, 64, 4, 4)
gradients = []
for layout in (torch.contiguous_format, torch.channels_last):
    norm = GroupNorm(64)
    loss = norm(x.contiguous(memory_format=layout)).square().sum()
    gradients.append(torch.autograd.grad(loss, norm.weight)[0])
torch.testing.assert_close(*gradients)
"""


def test_a_channels_last_input_without_gradient_does_not_crash_the_normalisation():
    # torch 2.13 ends the process with a segmentation fault here if nothing is done about it.
    check_runs(NO_GRADIENT_WANTED)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
def test_group_norm_keeps_its_digits_far_from_zero_in_both_layouts(layout, offset: float):
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)) + offset
    layer = GroupNorm(64)
    input = x.clone(memory_format=layout).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, wanted = layer(input), F.group_norm(exact, 32, eps=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert input.grad is not None
    assert exact.grad is not None
    for ours, theirs in ((found, wanted), (input.grad, exact.grad)):
        assert (ours.double() - theirs).norm() / theirs.norm() < 5e-7
