"""The copy of a diffusers model's tail: the model's own numbers, then what z makes of them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.task import DiffusersConfig
from data_pipelines.object_store import ObjectStore
from pretrain.attention import xformers_attention
from pretrain.backbone import digest_of_state
from pretrain.copied_tail import CopiedTail
from pretrain.diffusers_backbone import DiffusersBackbone, digest_of_folder, load_diffusers
from pretrain.unet import set_attention
from tests.tiny_diffusers import KINDS, save_pipeline

LATENT_DIM, SIZE_PX = 6, 16
STORE = ObjectStore()


@pytest.fixture(scope="module", params=KINDS)
def backbone(request, tmp_path_factory: pytest.TempPathFactory) -> DiffusersBackbone:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    save_pipeline(request.param, folder)
    return load(folder)


def load(folder: Path) -> DiffusersBackbone:
    digest = digest_of_folder(STORE, str(folder))
    config = DiffusersConfig(kind="diffusers", folder=str(folder), sha256=digest, tail_blocks=2)
    return load_diffusers(STORE, config, image_size_px=SIZE_PX)


def make_decoder(backbone: DiffusersBackbone) -> CopiedTail:
    torch.manual_seed(0)
    return backbone.make_decoder(LATENT_DIM)


def inputs(backbone: DiffusersBackbone) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and z of two images."""
    generator = torch.Generator().manual_seed(1)
    channels, side = (3, 16) if backbone.latents is None else (4, 8)
    x = torch.randn(2, channels, side, side, generator=generator)
    return x, torch.tensor([3, 700]), torch.randn(2, LATENT_DIM, generator=generator)


def last_layer(model: nn.Module, backbone: DiffusersBackbone) -> nn.Module:
    return model.get_submodule(backbone.anatomy.last)


def test_without_z_the_copy_is_the_model(backbone) -> None:
    decoder = make_decoder(backbone).eval()
    last_layer(decoder.tail, backbone).load_state_dict(
        last_layer(backbone.model, backbone).state_dict()
    )
    for name, weight in decoder.named_parameters():
        if "emb_z_layers" in name:
            nn.init.zeros_(weight)
    x, t, z = inputs(backbone)
    frozen = decoder.look(x, t)
    assert frozen.output_BCHW.abs().max() > 0
    torch.testing.assert_close(decoder(frozen, z), frozen.output_BCHW, rtol=0, atol=2e-6)


def test_the_shift_begins_as_nothing(backbone) -> None:
    decoder = make_decoder(backbone)
    x, t, z = inputs(backbone)
    assert torch.equal(decoder(decoder.look(x, t), z), torch.zeros_like(x))


def test_z_reaches_the_shift_and_every_weight_is_trained(backbone) -> None:
    decoder = make_decoder(backbone)
    nn.init.normal_(next(last_layer(decoder.tail, backbone).parameters()), std=0.1)
    x, t, z = inputs(backbone)
    z.requires_grad_(True)
    frozen = decoder.look(x, t)
    decoder(frozen, z).square().mean().backward()
    assert z.grad is not None
    assert (z.grad.abs().amax(dim=1) > 0).all(), "of each image's own feature"
    assert not [name for name, weight in decoder.named_parameters() if weight.grad is None]
    other = decoder(frozen, z.detach().roll(1, 0))
    assert not torch.equal(other, decoder(frozen, z.detach()))


def test_a_step_moves_the_copy_and_not_one_byte_of_the_model(backbone) -> None:
    before = digest_of_state(backbone.model.state_dict())
    decoder = make_decoder(backbone)
    tail = copy.deepcopy(decoder.state_dict())
    x, t, z = inputs(backbone)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for _ in range(2):  # the first only moves the last layer, which is 0
        optimizer.zero_grad()
        (decoder(decoder.look(x, t), z) - x).square().mean().backward()
        optimizer.step()
    moved = {name for name, tensor in decoder.state_dict().items() if (tensor != tail[name]).any()}
    assert {name for name in tail if "emb_z_layers" in name} <= moved
    assert digest_of_state(backbone.model.state_dict()) == before
    frozen_ones = {id(p) for p in backbone.model.parameters()}
    assert not frozen_ones & {id(p) for p in decoder.parameters()}
    assert not [p for p in backbone.model.parameters() if p.requires_grad or p.grad is not None]


def test_the_front_is_not_copied(backbone) -> None:
    """Of a large model it is most of the memory."""
    decoder = make_decoder(backbone)
    copied = {name for name, _ in decoder.tail.named_parameters() if "emb_z_layers" not in name}
    front = tuple(f"{name}." for name in backbone.anatomy.front)
    assert copied
    assert not [name for name in copied if name.startswith(front)]


def test_activations_that_are_recomputed_give_the_same_gradients(backbone) -> None:
    decoder = make_decoder(backbone)
    nn.init.normal_(next(last_layer(decoder.tail, backbone).parameters()), std=0.1)
    x, t, z = inputs(backbone)
    gradients = []
    for decoder.recomputes in (False, True):
        decoder.zero_grad()
        frozen = decoder.look(x, t)
        # Twice before the backward pass, as the mode `dual` does.
        (decoder(frozen, z).square().mean() + decoder(frozen, 2 * z).abs().mean()).backward()
        gradients.append([weight.grad.clone() for weight in decoder.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_in_bf16_the_shift_is_about_the_same(backbone) -> None:
    decoder = make_decoder(backbone)
    nn.init.normal_(next(last_layer(decoder.tail, backbone).parameters()), std=0.1)
    x, t, z = inputs(backbone)
    exact = decoder(decoder.look(x, t), z)
    try:
        decoder.trunk.bfloat16()
        decoder.bfloat16()
        rough = decoder(decoder.look(x, t), z.bfloat16())
    finally:
        decoder.trunk.float()
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.gpu
def test_on_a_gpu_xformers_and_sdpa_agree(backbone) -> None:
    decoder = make_decoder(backbone)
    nn.init.normal_(next(last_layer(decoder.tail, backbone).parameters()), std=0.1)
    x, t, z = (tensor.cuda() for tensor in inputs(backbone))
    decoder.cuda()
    decoder.trunk.cuda()
    try:
        by_sdpa = decoder(decoder.look(x, t), z)
        for part in (decoder, decoder.trunk):
            set_attention(part, xformers_attention)
        by_xformers = decoder(decoder.look(x, t), z)
    finally:
        decoder.trunk.cpu()
    torch.testing.assert_close(by_xformers, by_sdpa, rtol=1e-3, atol=1e-4)
