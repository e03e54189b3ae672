"""Operations are those of the layers, counted by hand; counting changes nothing."""

import torch
from torch import Tensor, nn

from pretrain.flops import count_flops, measured_peak

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """A convolution from 3 to 4 channels and a frozen matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.norm(self.conv(images)).mean(dim=(1, 2, 3))


def test_forward_and_backward_are_counted_and_nothing_changes():
    model = Tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = count_flops(model, 8, CPU)
    one_pass = 2 * 3 * 4 * 8 * 8
    assert found.frozen == 0
    assert found.trained == 2 * one_pass, "forward, and the weights' gradient; images need none"
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_peak_is_a_speed():
    assert 1e8 < measured_peak(CPU, torch.float32) < 1e15
