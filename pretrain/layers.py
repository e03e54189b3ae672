"""Layers with the numbers and parameter names of PyTorch's own, computed faster on a CPU.

Each says what it does differently. On other devices and in other dtypes it does nothing
differently: only float32 on a CPU was measured (`python -m tools.benchmarks.train_step`).

Letters: B batch, C channels, H height, W width, O output channels, I input channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_GROUPS = 32


def cpu_float32(x: Tensor) -> bool:
    """Whether x is what the faster ways were measured on."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def to_fast_layout(x_BCHW: Tensor) -> Tensor:
    """x in the memory layout that convolutions, resampling and attention are fastest in."""
    if cpu_float32(x_BCHW):
        return x_BCHW.contiguous(memory_format=torch.channels_last)
    return x_BCHW


class GroupNorm(nn.GroupNorm):
    """GroupNorm(32) computed in float32 whatever the input's dtype; CUDA's own kernel does so."""

    def __init__(self, channels: int) -> None:
        super().__init__(NUM_GROUPS, channels, eps=1e-5)

    def forward(self, input: Tensor) -> Tensor:
        starts_graph = self.weight.requires_grad and not input.requires_grad
        if starts_graph and torch.is_grad_enabled() and cpu_float32(input):
            # torch 2.13 ends the process in the backward of a channels-last input that needs no
            # gradient; so this one, the backbone's, is normalised in the other layout.
            return to_fast_layout(super().forward(input.contiguous()))
        if cpu_float32(input) and input.ndim == 4:
            return super().forward(input - _group_means(input))
        if input.dtype == self.weight.dtype and (input.is_cuda or input.dtype == torch.float32):
            return super().forward(input)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), NUM_GROUPS, weight, bias, self.eps).to(input.dtype)


@torch.no_grad()
def _group_means(x_BCHW: Tensor) -> Tensor:
    """Mean of each sample's group, (B, C, 1, 1).

    PyTorch takes the variance of channels-last input as the mean square minus the squared mean,
    which loses digits where the mean is large. Without its mean a group is normalised to the same,
    so this is taken off first; no gradient goes through it, because what would is zero.
    """
    B, C, _, _ = x_BCHW.shape
    groups_BGc = x_BCHW.mean(dim=(2, 3)).reshape(B, NUM_GROUPS, C // NUM_GROUPS)
    return groups_BGc.mean(dim=2, keepdim=True).expand_as(groups_BGc).reshape(B, C, 1, 1)


def _pointwise(x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight_OI11 = weight.reshape(*weight.shape[:2], 1, 1)
    # Dilation means nothing to a single tap, but PyTorch hands dilated convolutions to oneDNN. The
    # plain ones of a small batch on one thread go to a matrix product that is half as fast on AMD.
    return F.conv2d(x_BCHW, weight_OI11, bias, dilation=2 if cpu_float32(x_BCHW) else 1)


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution of BCHW, always through oneDNN."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return _pointwise(input, self.weight, self.bias)


class PointwiseConv1d(nn.Conv1d):
    """The same with the published attention's (O, I, 1) weights; it takes BCHW all the same."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return _pointwise(input, self.weight, self.bias)


class UpsampledConv2d(nn.Conv2d):
    """3x3 convolution of x repeated to twice its side, without making the repetition.

    The nine neighbours of an output pixel are copies of only four input pixels. Adding the weights
    of equal neighbours first leaves a 2x2 convolution for even and for odd rows and columns each:
    16 products per input pixel instead of 36.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        if not cpu_float32(input):
            return super().forward(F.interpolate(input, scale_factor=2, mode="nearest"))
        kernels = _phase_kernels(self.weight)
        rows = []
        for row in (0, 1):
            columns = []
            for column in (0, 1):
                padded = F.pad(input, (1 - column, column, 1 - row, row))
                columns.append(F.conv2d(padded, kernels[row, column], self.bias))
            rows.append(torch.stack([part.permute(0, 2, 3, 1) for part in columns], dim=3))
        B, _, H, W = input.shape
        return torch.stack(rows, dim=2).reshape(B, 2 * H, 2 * W, -1).permute(0, 3, 1, 2)


_EQUAL = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
"""Which of three neighbours an even (first) and an odd output position sees as its two inputs."""
_EQUAL_2D = torch.einsum("pta,qub->pqtuab", _EQUAL, _EQUAL).reshape(16, 9)


def _phase_kernels(weight_OI33: Tensor) -> Tensor:
    """The 2x2 kernels of even and odd rows and columns: (2, 2, O, I, 2, 2), channels last."""
    out_channels, in_channels = weight_OI33.shape[:2]
    sums = weight_OI33.reshape(-1, 9) @ _EQUAL_2D.T
    sums = sums.reshape(out_channels, in_channels, 2, 2, 2, 2)
    return sums.permute(2, 3, 0, 4, 5, 1).contiguous().permute(0, 1, 2, 5, 3, 4)
