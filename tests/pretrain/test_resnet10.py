"""ResNet10: the published one's parameters, blocks that start as nothing, the mean as feature."""

import torch

from configs.task import ResNet10Config
from pretrain.encoder import make_encoder
from pretrain.resnet10 import BasicBlock, ResNet10


def test_it_has_the_published_number_of_parameters_and_512_dimensions():
    encoder = make_encoder(ResNet10Config(kind="resnet10"), image_size_px=64)
    assert isinstance(encoder, ResNet10)
    assert sum(p.numel() for p in encoder.parameters()) == 4_898_112  # METHOD section 4
    for size in (32, 64):
        assert encoder(torch.randn(2, 3, size, size)).shape == (2, 512)


def test_the_last_activation_has_an_eighth_of_the_images_side():
    last = []
    encoder = ResNet10()
    encoder.blocks.register_forward_hook(lambda _m, _i, out: last.append(out))
    z = encoder(torch.randn(1, 3, 64, 64))
    assert last[0].shape == (1, 512, 8, 8)
    torch.testing.assert_close(z, last[0].mean(dim=(2, 3)))


def test_a_block_starts_as_its_skip():
    x = torch.randn(2, 64, 8, 8).relu()
    assert torch.equal(BasicBlock(64, 64, 1)(x), x)


def test_training_normalises_by_the_batch_and_evaluation_by_the_average_of_batches():
    encoder = ResNet10()
    images = 3 + 2 * torch.randn(8, 3, 16, 16)
    encoder.train()(images)
    h = encoder.conv1(images)
    torch.testing.assert_close(encoder.bn1.running_mean, 0.1 * h.mean(dim=(0, 2, 3)))
    before = encoder.eval()(images[:1])
    torch.testing.assert_close(encoder(images)[:1], before)
