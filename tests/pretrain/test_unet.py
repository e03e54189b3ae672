"""U-Net, encoder and shift decoder against METHOD sections 4 and 5: numbers, names and counts."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.task import EncoderConfig, UNetConfig
from pretrain.encoder import Encoder
from pretrain.shift_decoder import ShiftDecoder
from pretrain.unet import (
    AttentionBlock,
    ResBlock,
    Steering,
    UNet,
    set_attention,
    timestep_embedding,
)
from tests.own_process import check_runs
from tests.tiny_model import both

TINY = UNetConfig(
    patch_size_px=2,
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    dropout=0.5,
)
CELEBA64 = UNetConfig(num_res_blocks=2, channel_multipliers=(1, 2, 4, 8), attention_factors=(4,))
RES = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
ATTENTION = ("norm", "qkv", "proj_out")


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with noise on every parameter: nothing is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def random_inputs(batch: int = 2, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, side, side, generator=generator)
    return x, torch.randint(0, 1000, (batch,), generator=generator)


def frozen_unet() -> UNet:
    unet = UNet(TINY)
    randomised(unet)
    return unet.requires_grad_(False).eval()


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- pieces ---------------------------------------------------------------------------------------


def test_the_timestep_embedding_is_cos_then_sin_of_t_times_falling_frequencies():
    steps, dim = [0, 1, 17, 500, 999], 64
    embedding = timestep_embedding(torch.tensor(steps), dim)
    assert embedding.shape == (5, dim)
    assert embedding.dtype == torch.float32
    for row, t in zip(embedding.tolist(), steps, strict=True):
        angles = [t * 10000 ** (-i / (dim / 2)) for i in range(dim // 2)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(expected, abs=2e-4)  # float32 angles up to 999


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unfold_is_the_inverse_of_fold(patch: int):
    unet = UNet(TINY.model_copy(update={"patch_size_px": patch}))
    x, _ = random_inputs()
    folded = unet.fold(x)
    assert folded.shape == (2, 3 * patch**2, 8 // patch, 8 // patch)
    assert torch.equal(unet.unfold(folded), x)


def test_fold_puts_the_pixels_of_a_patch_side_by_side_in_the_channels():
    x, _ = random_inputs()
    folded = UNet(TINY).fold(x)
    for channel, dy, dx in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1)):
        assert torch.equal(folded[:, 4 * channel + 2 * dy + dx], x[:, channel, dy::2, dx::2])


def slow_attention(block: AttentionBlock, x: Tensor, *, heads_first: bool) -> Tensor:
    """METHOD section 4 in float64, head by head: q and k each times K^(-1/4)."""
    B, C, H, W = x.shape
    L, K = H * W, C // block.num_heads
    weights = {name: p.detach().double() for name, p in block.named_parameters()}
    x = x.double().reshape(B, C, L)
    normed = F.group_norm(x, 32, weights["norm.weight"], weights["norm.bias"], 1e-5)
    qkv = weights["qkv.weight"][:, :, 0] @ normed + weights["qkv.bias"][:, None]
    heads = torch.empty(B, C, L, dtype=torch.float64)
    for b in range(B):
        for head in range(block.num_heads):
            starts = [(3 * head + n) * K if heads_first else n * C + head * K for n in range(3)]
            q, k, v = (qkv[b, start : start + K] for start in starts)
            scores = (q * K**-0.25).T @ (k * K**-0.25)
            weight = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
            heads[b, head * K : (head + 1) * K] = v @ weight.T
    out = weights["proj_out.weight"][:, :, 0] @ heads + weights["proj_out.bias"][:, None]
    return (x + out).reshape(B, C, H, W)


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_attention_layouts_match_a_slow_reference(order: str, layout: torch.memory_format):
    block = AttentionBlock(64, num_heads=4, order=order)
    randomised(block)
    x = torch.randn(2, 64, 4, 3, generator=torch.Generator().manual_seed(2))
    out = block(x.contiguous(memory_format=layout))
    expected = slow_attention(block, x, heads_first=order == "legacy")
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    other = slow_attention(block, x, heads_first=order != "legacy")
    assert (out - other).abs().max() > 0.01, "the layouts cannot be told apart here"


def test_set_attention_reaches_every_block():
    unet = UNet(TINY)
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q.shape, k.shape, v.shape))
        return v

    set_attention(unet, kernel)
    unet(*random_inputs())
    head = torch.Size((2, 1, 4, 64))  # B, heads, positions, channels per head
    assert calls == [(head, head, head)] * 4  # one down, the middle, two up


@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("steering", [None, "scale", "scale_shift"])
def test_a_residual_block_is_methods_formula(resample: str, steering: Steering | None):
    block = ResBlock(32, 64, 16, resample=resample, steering=steering)
    randomised(block)
    generator = torch.Generator().manual_seed(3)
    x, emb = torch.randn(2, 32, 4, 4, generator=generator), torch.randn(2, 16, generator=generator)
    emb_z = torch.randn(2, 16, generator=generator) if steering else None
    p = dict(block.named_parameters())

    def resampled(h: Tensor) -> Tensor:
        if resample == "down":
            rows = (h[:, :, ::2] + h[:, :, 1::2]) / 2
            return (rows[..., ::2] + rows[..., 1::2]) / 2
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else h

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def conv(name: str, h: Tensor) -> Tensor:
        return F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], padding="same")

    def scale_and_bias(name: str, e: Tensor) -> tuple[Tensor, Tensor]:
        both = F.linear(F.silu(e), p[f"{name}.weight"], p[f"{name}.bias"])[:, :, None, None]
        scale, bias = both[:, :64], both[:, 64:]
        return scale, bias if bias.numel() else torch.zeros(())  # Diff-AE's z only scales

    h = conv("in_layers.2", resampled(F.silu(norm("in_layers.0", x))))
    scale, bias = scale_and_bias("emb_layers.1", emb)
    h = norm("out_layers.0", h) * (1 + scale) + bias
    if emb_z is not None:
        scale, bias = scale_and_bias("emb_z_layers.1", emb_z)
        h = (1 + scale) * h + bias
    expected = conv("skip_connection", resampled(x)) + conv("out_layers.3", F.silu(h))
    torch.testing.assert_close(block.eval()(x, emb, emb_z), expected, rtol=1e-4, atol=1e-5)


# --- the U-Net ------------------------------------------------------------------------------------


def test_a_fresh_unet_predicts_exactly_nothing_and_a_moved_one_does_not():
    unet = UNet(TINY)
    x, t = random_inputs()
    assert unet(x, t).shape == x.shape
    assert unet(x, t).count_nonzero() == 0
    randomised(unet)
    assert unet(x, t).count_nonzero() == x.numel()


def test_the_unets_output_depends_on_the_timestep_of_each_sample():
    unet = frozen_unet()
    x, _ = random_inputs()
    one, other = unet(x, torch.tensor([3, 400])), unet(x, torch.tensor([3, 401]))
    torch.testing.assert_close(one[0], other[0])
    assert (one[1] - other[1]).abs().max() > 1e-3


CHANNELS_LAST = """
import torch
from tests.pretrain.test_unet import TINY, random_inputs, randomised
from pretrain.unet import UNet

torch.set_num_threads(1)
unet = UNet(TINY).eval()
randomised(unet)
x, t = random_inputs()
gradients, outputs = [], []
for image in (x, x.to(memory_format=torch.channels_last)):
    image = image.clone(memory_format=torch.preserve_format).requires_grad_()
    unet.zero_grad()
    out = unet(image, t)
    out.square().sum().backward()
    outputs.append(out.detach())
    gradients.append([image.grad] + [p.grad.clone() for p in unet.parameters()])
torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
for one, other in zip(*gradients, strict=True):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())
"""


def test_a_channels_last_image_gives_the_same_numbers_and_does_not_crash_backward():
    # torch 2.13 ends the process with a segmentation fault if `fold` lets the layout through.
    check_runs(CHANNELS_LAST)


# --- names and counts of the published checkpoints ------------------------------------------------


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_the_celeba64_unet_has_methods_names_and_number_of_parameters():
    with torch.device("meta"):
        unet = UNet(CELEBA64)
    assert num_parameters(unet) == 63_958_019
    shapes = shapes_of(unet)
    assert len(shapes) == 356
    layers = {re.sub(r"\.(weight|bias)$", "", key) for key in shapes}
    kinds = {re.sub(r"^(input|output)_blocks\.\d+", r"\1_blocks.N", layer) for layer in layers}
    with_skip = (*RES, "skip_connection")
    assert kinds - {"input_blocks.N.0"} == {
        *(f"time_embed.{n}" for n in (0, 2)),
        *(f"input_blocks.N.0.{layer}" for layer in with_skip),
        *(f"input_blocks.N.1.{layer}" for layer in ATTENTION),
        *(f"middle_block.{n}.{layer}" for n in (0, 2) for layer in RES),
        *(f"middle_block.1.{layer}" for layer in ATTENTION),
        *(f"output_blocks.N.0.{layer}" for layer in with_skip),
        *(f"output_blocks.N.1.{layer}" for layer in (*ATTENTION, *RES)),
        *(f"output_blocks.N.2.{layer}" for layer in RES),
        *(f"out.{n}" for n in (0, 2)),
    }
    assert {layer for layer in layers if layer.endswith(".0") and layer.count(".") == 2} == {
        "input_blocks.0.0"  # the first convolution is the only plain layer of the down path
    }


def test_the_celeba64_unets_blocks_stand_where_method_puts_them():
    with torch.device("meta"):
        shapes = shapes_of(UNet(CELEBA64))
    assert shapes["time_embed.0.weight"] == (256, 64)
    assert shapes["input_blocks.0.0.weight"] == (64, 3, 3, 3)
    assert shapes["input_blocks.7.1.qkv.weight"] == (768, 256, 1)
    assert shapes["input_blocks.7.1.proj_out.weight"] == (256, 256, 1)
    assert shapes["out.2.weight"] == (3, 64, 3, 3)
    attention = sorted(key.removesuffix(".qkv.bias") for key in shapes if key.endswith("qkv.bias"))
    assert attention == [
        "input_blocks.7.1",
        "input_blocks.8.1",
        "middle_block.1",
        *(f"output_blocks.{n}.1" for n in (3, 4, 5)),
    ]
    rising = [k for k in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.2\.bias", k)]
    assert [key.split(".")[1:3] for key in rising] == [["2", "1"], ["5", "2"], ["8", "1"]]


def test_the_celeba64_shift_decoder_adds_258_tensors_and_methods_number_of_parameters():
    with torch.device("meta"):
        decoder = ShiftDecoder(UNet(CELEBA64).requires_grad_(False), latent_dim=512)
    assert num_parameters(decoder.backbone) + num_parameters(decoder) == 115_965_830
    assert num_parameters(decoder) == 52_007_811
    added = list(decoder.state_dict())
    assert len(added) == 258
    assert {key.split(".")[0] for key in added} == {
        "label_emb",
        "shift_middle_block",
        "shift_output_blocks",
        "shift_out",
    }
    steered = {key.split(".emb_z_layers.")[0] for key in added if ".emb_z_layers.1.weight" in key}
    timed = {key.split(".emb_layers.")[0] for key in added if ".emb_layers.1.weight" in key}
    assert steered == timed, "every residual block of the shift path hears z"


def test_the_celeba64_encoder_has_methods_indices_and_number_of_parameters():
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(), image_size_px=64)
    assert num_parameters(encoder) == 1_487_104
    shapes = shapes_of(encoder)
    indices = dict.fromkeys(int(key.split(".")[1]) for key in shapes)
    assert tuple(indices) == (0, 1, 3, 4, 5, 7, 8, 10, 11, 14)
    assert shapes["encoder.4.qkv.weight"] == (384, 128, 1)
    assert shapes["encoder.14.weight"] == (512, 2048)
    assert {key.split(".")[2] for key in shapes if key.startswith("encoder.4.")} == set(ATTENTION)


# --- the encoder ----------------------------------------------------------------------------------

SMALL_ENCODER = EncoderConfig(latent_dim=5, channels=(32, 32), attention_after=1)


def test_the_encoder_makes_one_feature_per_image_from_that_image_alone():
    encoder = Encoder(SMALL_ENCODER, image_size_px=8)
    randomised(encoder)
    x, _ = random_inputs(batch=3)
    z = encoder(x)
    assert z.shape == (3, 5)
    torch.testing.assert_close(z[1:2], encoder(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (4, 3, 4, 4), (1, 3, 8, 16)])
def test_the_encoder_refuses_another_image_size(shape: tuple[int, ...]):
    encoder = Encoder(SMALL_ENCODER, image_size_px=8)
    with pytest.raises(ValueError, match="takes 8 px square images") as error:
        encoder(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_an_image_size_that_the_convolutions_cannot_halve_is_refused_when_built():
    with pytest.raises(ValueError, match=r"image_size_px must be divisible by 4.*got 10"):
        Encoder(SMALL_ENCODER, image_size_px=10)


# --- the shift decoder ----------------------------------------------------------------------------


def condition(latent_dim: int = 6) -> Tensor:
    return torch.randn(2, latent_dim, generator=torch.Generator().manual_seed(4))


def steered(backbone: UNet) -> ShiftDecoder:
    """A decoder whose shift path is past its zero start; the backbone is as it was."""
    decoder = ShiftDecoder(backbone, latent_dim=6)
    for part in (decoder.shift_middle_block, decoder.shift_output_blocks, decoder.shift_out):
        randomised(part)
    return decoder


def test_the_shift_starts_as_exactly_nothing_and_the_backbone_is_not_changed_by_it():
    backbone = frozen_unet()
    x, t = random_inputs()
    expected = backbone(x, t)
    epsilon, shift = both(ShiftDecoder(backbone, latent_dim=6), x, t, condition())
    assert shift.shape == x.shape
    assert shift.count_nonzero() == 0
    assert torch.equal(epsilon, expected)


def test_the_shift_is_steered_by_z_and_the_backbones_estimate_is_not():
    decoder = steered(frozen_unet()).eval()
    x, t = random_inputs()
    (epsilon, shift), (epsilon_0, shift_0) = (
        both(decoder, x, t, z) for z in (condition(), torch.zeros(2, 6))
    )
    assert torch.equal(epsilon, epsilon_0)
    assert (shift - shift_0).abs().max() > 1e-3


def test_the_backbone_stays_in_eval_mode_whatever_is_above_it_trains():
    decoder = ShiftDecoder(frozen_unet(), latent_dim=6)
    model = nn.Sequential(decoder)
    for train in (decoder.train, model.train):
        decoder.eval()
        train()
        assert not any(module.training for module in decoder.backbone.modules())
        for part in (decoder, decoder.shift_middle_block, *decoder.shift_output_blocks):
            assert part.training
    x, t = random_inputs()
    epsilons = [both(decoder, x, t, condition())[0] for _ in range(2)]
    assert torch.equal(*epsilons), "dropout 0.5 of the backbone is on"


def test_no_gradient_reaches_the_backbone_even_if_it_was_not_frozen():
    decoder = steered(frozen_unet().requires_grad_(True))
    x, t = random_inputs()
    z = condition().requires_grad_()
    epsilon, shift = both(decoder, x, t, z)
    assert not epsilon.requires_grad
    (epsilon + shift).square().sum().backward()
    assert all(parameter.grad is None for parameter in decoder.backbone.parameters())
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert z.grad is not None
    assert z.grad.count_nonzero() == z.numel()


# --- what other published U-Nets do differently ---------------------------------------------------


def test_learnt_variances_are_dropped_and_the_shift_has_none():
    config = TINY.model_copy(update={"learn_sigma": True})
    unet = randomised(UNet(config)).eval()
    assert unet.out[2].weight.shape[0] == 2 * 3 * 4
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert unet(x, t).shape == (2, 3, 8, 8)
    decoder = ShiftDecoder(unet.requires_grad_(False), latent_dim=5)
    assert decoder.shift_out[2].weight.shape[0] == 3 * 4
    epsilon, shift = both(decoder, x, t, torch.randn(2, 5))
    assert epsilon.shape == shift.shape == (2, 3, 8, 8)


def test_convolutions_resample_where_residual_blocks_do_not():
    config = TINY.model_copy(update={"resblock_updown": False})
    unet = randomised(UNet(config)).eval()
    keys = set(unet.state_dict())
    assert {"input_blocks.2.0.op.weight", "output_blocks.1.2.conv.bias"} <= keys
    assert unet(torch.randn(2, 3, 8, 8), torch.tensor([3, 700])).shape == (2, 3, 8, 8)
    down, up = unet.input_blocks[2][0], unet.output_blocks[1][2]
    h = torch.randn(1, down.op.in_channels, 4, 4)
    expected = F.conv2d(h, down.op.weight, down.op.bias, stride=2, padding=1)
    assert torch.equal(down(h), expected)
    h = torch.randn(1, up.conv.in_channels, 2, 2)
    doubled = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(h), F.conv2d(doubled, up.conv.weight, up.conv.bias, padding=1))


def test_the_timestep_can_be_added_instead_of_scaling():
    block = randomised(ResBlock(32, 64, 16, scale_shift_norm=False, steering="scale_shift")).eval()
    x, emb, emb_z = torch.randn(2, 32, 4, 4), torch.randn(2, 16), torch.randn(2, 16)
    assert block.emb_layers[1].out_features == 64
    h = block.in_layers(x) + block.emb_layers(emb)[:, :, None, None]
    scale, shift = block.emb_z_layers(emb_z)[:, :, None, None].chunk(2, dim=1)
    norm, *rest = block.out_layers
    h = norm(h) * (1 + scale) + shift
    for layer in rest:
        h = layer(h)
    torch.testing.assert_close(block(x, emb, emb_z), block.skip_connection(x) + h)


def test_the_frozen_pass_is_computed_once_for_any_number_of_conditions():
    unet = randomised(UNet(TINY)).requires_grad_(False).eval()
    decoder = ShiftDecoder(unet, latent_dim=5).eval()
    randomised(decoder.shift_out)
    x, t, c = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5)
    frozen = decoder.look(x, t)
    assert not frozen.output_BCHW.requires_grad
    assert torch.equal(frozen.output_BCHW, unet(x, t))
    for condition in (c, 2 * c):
        assert torch.equal(decoder(frozen, condition), both(decoder, x, t, condition)[1])
