"""The whole step against the plain implementation; one frozen pass for any number of shifts."""

import pytest
import torch
from torch import Tensor

from configs.task import EncoderConfig, UNetConfig
from pretrain.encoder import Encoder
from pretrain.shift_decoder import ShiftDecoder
from pretrain.unet import UNet, set_recomputing
from tests.tiny_model import both, tiny_diti
from tools.benchmarks import plain_model

# 64 + 96 channels meet in a skip: the boundary cuts through one of the 32 groups.
UNEVEN = UNetConfig(
    base_channels=32,
    channel_multipliers=(2, 3, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    num_heads=2,
)
ENCODER = EncoderConfig(latent_dim=6, channels=(64, 64), attention_after=2)
SIDE = 16


def make(config: UNetConfig) -> tuple[ShiftDecoder, Encoder]:
    torch.manual_seed(0)
    decoder = ShiftDecoder(UNet(config).requires_grad_(False), latent_dim=6)
    encoder = Encoder(ENCODER, image_size_px=SIDE)
    with torch.no_grad():
        parts = decoder.backbone, decoder, encoder
        for parameter in (weight for part in parts for weight in part.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder.train(), encoder.train()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, SIDE, SIDE, generator=generator), torch.tensor([3, 700])


def trained(decoder: ShiftDecoder, encoder: Encoder) -> list[tuple[str, Tensor]]:
    return [*decoder.named_parameters("decoder"), *encoder.named_parameters("encoder")]


def plain_step(decoder: ShiftDecoder, encoder: Encoder, x: Tensor, t: Tensor):
    with torch.no_grad():
        frozen = plain_model.look(decoder.backbone, x, t)
    z = plain_model.encode(encoder, x)
    return frozen.output_BCHW, plain_model.shift(decoder, frozen, z)


def step(decoder: ShiftDecoder, encoder: Encoder, x: Tensor, t: Tensor):
    return both(decoder, x, t, encoder(x))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size_px": 2},
        {"learn_sigma": True},
        {"resblock_updown": False},
        {"scale_shift_norm": False},
        {"attention_order": "new"},
    ],
    ids=lambda changes: next(iter(changes), "as published"),
)
def test_the_step_has_the_numbers_and_gradients_of_the_plain_implementation(
    changes: dict[str, object],
):
    decoder, encoder = make(UNEVEN.model_copy(update=changes))
    x, t = inputs()
    results = []
    for function in (step, plain_step):
        epsilon, shift = function(decoder, encoder, x, t)
        parameters = [parameter for _, parameter in trained(decoder, encoder)]
        loss = (epsilon + shift - x).square().mean()
        results.append((epsilon, shift, torch.autograd.grad(loss, parameters)))
    (epsilon, shift, gradients), (plain_epsilon, plain_shift, plain_gradients) = results
    for got, expected in ((epsilon, plain_epsilon), (shift, plain_shift)):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * scale)
    names = [name for name, _ in trained(decoder, encoder)]
    for name, got, expected in zip(names, gradients, plain_gradients, strict=True):
        difference = (got - expected).norm() / expected.norm()
        assert difference < 1e-5, f"{name}: {difference:.1e}"


def test_a_frozen_pass_holds_no_gradient_and_cannot_be_changed():
    decoder, _ = make(UNEVEN)
    frozen = decoder.look(*inputs())
    assert len(frozen.skips) == len(decoder.backbone.input_blocks)
    for tensor in (frozen.emb_BE, frozen.output_BCHW, *frozen.skips):
        assert not tensor.requires_grad
    with pytest.raises(AttributeError):
        frozen.output_BCHW = frozen.emb_BE  # pyright: ignore[reportAttributeAccessIssue]


def test_two_shifts_over_one_frozen_pass_add_their_gradients():
    decoder, encoder = make(UNEVEN)
    x, t = inputs()
    frozen = decoder.look(x, t)
    before = [skip.clone() for skip in frozen.skips]
    z = encoder(x).detach()
    parameters = list(decoder.parameters())
    losses = [decoder(frozen, c).square().mean() for c in (z, 2 * z)]
    together = torch.autograd.grad(sum(losses), parameters)
    alone = [
        torch.autograd.grad(both(decoder, x, t, c)[1].square().mean(), parameters)
        for c in (z, 2 * z)
    ]
    for summed, one, other in zip(together, *alone, strict=True):
        torch.testing.assert_close(summed, one + other, rtol=1e-4, atol=1e-5 * summed.abs().max())
    for skip, kept in zip(frozen.skips, before, strict=True):
        assert torch.equal(skip, kept)


def test_the_same_step_twice_has_the_same_bits():
    results = []
    for _ in range(2):
        decoder, encoder = make(UNEVEN.model_copy(update={"dropout": 0.1}))
        epsilon, shift = step(decoder, encoder, *inputs())
        parameters = [parameter for _, parameter in trained(decoder, encoder)]
        gradients = torch.autograd.grad((epsilon + shift).square().mean(), parameters)
        results.append([epsilon, shift, *gradients])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_recomputed_activations_give_the_same_bits_and_keep_less():
    results, kept = [], []
    for recomputes in (False, True):
        decoder, encoder = make(UNEVEN.model_copy(update={"dropout": 0.1}))
        set_recomputing(decoder, recomputes)
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            epsilon, shift = step(decoder, encoder, *inputs())
        kept.append(sum(saved.values()))
        parameters = [parameter for _, parameter in trained(decoder, encoder)]
        gradients = torch.autograd.grad((epsilon + shift).square().mean(), parameters)
        results.append([epsilon, shift, *gradients])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert kept[1] < 0.7 * kept[0], kept


def test_dropout_of_the_shift_path_is_on_in_training_and_off_in_evaluation():
    decoder, encoder = make(UNEVEN.model_copy(update={"dropout": 0.5}))
    x, t = inputs()
    z = encoder(x)
    shifts = [both(decoder, x, t, z)[1] for _ in range(2)]
    assert not torch.equal(*shifts)
    decoder.eval()
    shifts = [both(decoder, x, t, z)[1] for _ in range(2)]
    assert torch.equal(*shifts)


def test_the_backbone_stays_in_eval_mode_whatever_the_model_is_put_in():
    model = tiny_diti()
    for mode in (True, False, True):
        model.train(mode)
        assert model.encoder.training is mode
        assert not any(module.training for module in model.decoder.backbone.modules())
