"""Operations are those of the layers, counted by hand; counting changes nothing."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain import flops
from pretrain.flops import count_flops, measured_peak
from tests.tiny_model import tiny_diti

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """A convolution from 3 to 4 channels, and a norm whose averages could move."""

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


def test_what_the_backbone_does_is_counted_apart():
    model = tiny_diti()
    image, t = torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as backbone, torch.no_grad():
        model.decoder.backbone(image, t)
    with FlopCounterMode(display=False) as forward:
        model(image, t, image)
    found = count_flops(model, 8, CPU)
    assert found.frozen == backbone.get_total_flops() > 0
    of_trained = forward.get_total_flops() - found.frozen
    assert 2 * of_trained < found.trained < 3 * of_trained, "the backward pass takes about twice"


def test_a_peak_is_the_fastest_of_several_products(monkeypatch: pytest.MonkeyPatch):
    seconds = iter([0.5, 0.25, 1.0, 0.5])
    monkeypatch.setattr(flops, "_seconds_of_product", lambda a: next(seconds))
    assert measured_peak(CPU, torch.float32) == 2 * 1024**3 / 0.25
