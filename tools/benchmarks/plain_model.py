"""Encoder and shift decoder written the obvious way, over the same parameters (METHOD section 4).

The yardstick of `train_step`: operation by operation what the published step computes, in PyTorch's
default memory layout and with PyTorch's own layers. The tests hold the real modules to its numbers.

Letters: B batch, C channels, H height, W width, D = latent_dim, E embedding, K channels per head,
L positions, N = B x heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.encoder import Encoder
from pretrain.layers import NUM_GROUPS
from pretrain.shift_decoder import FrozenPass, ShiftDecoder
from pretrain.unet import AttentionBlock, Downsample, ResBlock, UNet, Upsample

Convolution = nn.Conv1d | nn.Conv2d


def look(unet: UNet, x_BCHW: Tensor, t_B: Tensor) -> FrozenPass:
    """What `ShiftDecoder.look` returns."""
    emb = unet.embed_time(t_B)
    h = unet.fold(x_BCHW)
    skips = []
    for block in unet.input_blocks:
        h = _sequence(block, h, emb, None)
        skips.append(h)
    out = _up(unet.middle_block, unet.output_blocks, unet.out, skips, emb, None)
    return FrozenPass(emb, skips, unet.unfold(out)[:, : unet.config.in_channels])


def shift(decoder: ShiftDecoder, frozen: FrozenPass, condition_BD: Tensor) -> Tensor:
    """What `ShiftDecoder` returns."""
    emb_z = decoder.label_emb(condition_BD)
    out = _up(
        decoder.shift_middle_block,
        decoder.shift_output_blocks,
        decoder.shift_out,
        frozen.skips,
        frozen.emb_BE,
        emb_z,
    )
    return decoder.backbone.unfold(out)


def encode(encoder: Encoder, x_BCHW: Tensor) -> Tensor:
    """What the encoder returns."""
    h = x_BCHW
    for layer in encoder.encoder:
        h = _layer(layer, h)
    return h


def _up(
    middle: nn.Module,
    blocks: nn.ModuleList,
    out: nn.Module,
    skips: list[Tensor],
    emb_BE: Tensor,
    emb_z_BE: Tensor | None,
) -> Tensor:
    h = _sequence(middle, skips[-1], emb_BE, emb_z_BE)
    for block, skip in zip(blocks, reversed(skips), strict=True):
        h = _sequence(block, torch.cat([h, skip], dim=1), emb_BE, emb_z_BE)
    return _sequence(out, h, emb_BE, emb_z_BE)


def _sequence(layers: nn.Module, h: Tensor, emb_BE: Tensor, emb_z_BE: Tensor | None) -> Tensor:
    for layer in layers.children():
        h = (
            _res_block(layer, h, emb_BE, emb_z_BE)
            if isinstance(layer, ResBlock)
            else _layer(layer, h)
        )
    return h


def _layer(layer: nn.Module, h: Tensor) -> Tensor:
    match layer:
        case AttentionBlock():
            return _attention(layer, h)
        case Upsample():
            return _convolution(layer.conv, F.interpolate(h, scale_factor=2, mode="nearest"))
        case Downsample():
            return _convolution(layer.op, h)
        case nn.GroupNorm():
            return _group_norm(layer, h)
        case nn.Conv1d() | nn.Conv2d():
            return _convolution(layer, h)
        case nn.Dropout():
            return F.dropout(h, layer.p, layer.training)
        case _:
            return layer(h)


def _group_norm(layer: nn.GroupNorm, h: Tensor) -> Tensor:
    return F.group_norm(h, NUM_GROUPS, layer.weight, layer.bias, 1e-5)


def _convolution(layer: Convolution, h: Tensor) -> Tensor:
    stride, padding = layer.stride[0], int(layer.padding[0])
    if isinstance(layer, nn.Conv1d):
        return F.conv1d(h, layer.weight, layer.bias, stride, padding)
    return F.conv2d(h, layer.weight, layer.bias, stride, padding)


def _res_block(block: ResBlock, x: Tensor, emb_BE: Tensor, emb_z_BE: Tensor | None) -> Tensor:
    norm_in, activation, conv_in = block.in_layers
    norm_out, *rest = block.out_layers
    h = activation(_layer(norm_in, x))
    if block.resample == "down":
        x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
    elif block.resample == "up":
        x, h = (F.interpolate(y, scale_factor=2, mode="nearest") for y in (x, h))
    h = _layer(conv_in, h)
    of_time = block.emb_layers(emb_BE)[:, :, None, None]
    if block.scale_shift_norm:
        scale, bias = of_time.chunk(2, dim=1)
        h = _layer(norm_out, h) * (1 + scale) + bias
    else:
        h = _layer(norm_out, h + of_time)
    if emb_z_BE is not None:
        scale, bias = block.emb_z_layers(emb_z_BE)[:, :, None, None].chunk(2, dim=1)
        h = (1 + scale) * h + bias
    for layer in rest:
        h = _layer(layer, h)
    return _layer(block.skip_connection, x) + h


def _attention(block: AttentionBlock, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    x_BCL = x.reshape(B, C, H * W)
    qkv = _convolution(block.qkv, _group_norm(block.norm, x_BCL))
    heads, K = block.num_heads, C // block.num_heads
    if block.order == "legacy":
        q, k, v = qkv.reshape(B * heads, 3 * K, H * W).split(K, dim=1)
    else:
        q, k, v = (part.reshape(B * heads, K, H * W) for part in qkv.chunk(3, dim=1))
    scores_NLL = torch.einsum("nkl,nkm->nlm", q * K**-0.25, k * K**-0.25)
    out_NKL = torch.einsum("nlm,nkm->nkl", scores_NLL.softmax(dim=-1), v)
    out_BCL = _layer(block.proj_out, out_NKL.reshape(B, C, H * W))
    return (x_BCL + out_BCL).reshape(B, C, H, W)
