"""ADM-type U-Net in pixel space (METHOD section 4), and the blocks the shift decoder reuses.

Module names give the state-dict keys of the published checkpoints: `time_embed`, `input_blocks`,
`middle_block`, `output_blocks`, `out`.

Letters: B batch, C channels, H height, W width, E embedding (4 x base channels), L = H*W.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configs.task import UNetConfig
from pretrain.attention import Kernel, sdpa, xformers_attention
from pretrain.layers import (
    GroupNorm,
    PointwiseConv1d,
    PointwiseConv2d,
    UpsampledConv2d,
    to_fast_layout,
)

Steering = Literal["scale", "scale_shift"]
"""What z does to normalised activations: scales them (Diff-AE), or shifts them too (PDAE, DiTi)."""


def timestep_embedding(t_B: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [cos | sin] of integer t, frequencies 10000^(-i/(dim/2)); (B, dim)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_init(module: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """The module with all its parameters set to 0, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _resample(x: Tensor, resample: str) -> Tensor:
    if resample == "down":
        return F.avg_pool2d(x, 2)
    if resample == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return x


class ResBlock(nn.Module):
    """Residual block with adaptive GroupNorm from the time-step and, with `steering`, from z.

    `scale_shift`: h <- (1 + s_z) * (GN(h) (1 + s_t) + b_t) + b_z (METHOD's ResBlockShift).
    `scale`: the same without b_z (Preechakul et al. 2022).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int,
        *,
        resample: str = "none",
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        steering: Steering | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift_norm = scale_shift_norm
        self.steering = steering
        conv_in = (
            UpsampledConv2d(in_channels, out_channels)
            if resample == "up"
            else nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.in_layers = nn.Sequential(GroupNorm(in_channels), nn.SiLU(), conv_in)
        of_time = 2 * out_channels if scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, of_time))
        if steering is not None:
            of_z = out_channels if steering == "scale" else 2 * out_channels
            self.emb_z_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, of_z))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity()
            if in_channels == out_channels
            else PointwiseConv2d(in_channels, out_channels)
        )

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor, emb_z_BE: Tensor | None = None) -> Tensor:
        norm_in, activation_in, conv_in = self.in_layers
        h = activation_in(norm_in(x_BCHW))
        h = conv_in(F.avg_pool2d(h, 2) if self.resample == "down" else h)
        norm_out, *rest = self.out_layers
        of_time = self.emb_layers(emb_BE)[:, :, None, None]
        if self.scale_shift_norm:
            scale_t, shift_t = of_time.chunk(2, dim=1)
            h = norm_out(h) * (1 + scale_t) + shift_t
        else:
            h = norm_out(h + of_time)
        if emb_z_BE is not None:
            of_z = self.emb_z_layers(emb_z_BE)[:, :, None, None]
            if self.steering == "scale":
                h = h * (1 + of_z)
            else:
                scale_z, shift_z = of_z.chunk(2, dim=1)
                h = h * (1 + scale_z) + shift_z
        for layer in rest:
            h = layer(h)
        return self.skip_connection(_resample(x_BCHW, self.resample)) + h


class Downsample(nn.Module):
    """Half the side by a strided convolution, where residual blocks do not resample."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(x_BCHW)


class Upsample(nn.Module):
    """Twice the side by repetition and a convolution, where residual blocks do not resample."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = UpsampledConv2d(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions, through the kernel set by `set_attention`."""

    def __init__(self, channels: int, *, num_heads: int, order: str = "legacy") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.order = order
        self.kernel: Kernel = sdpa
        self.norm = GroupNorm(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        self.proj_out = zero_init(PointwiseConv1d(channels, channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        qkv_BLC = self.qkv(self.norm(x_BCHW)).flatten(2).transpose(1, 2)
        K = C // self.num_heads
        if self.order == "legacy":  # heads first, q|k|v inside each head
            q, k, v = qkv_BLC.reshape(B, H * W, self.num_heads, 3, K).unbind(3)
        else:  # q|k|v first, heads inside each
            q, k, v = qkv_BLC.reshape(B, H * W, 3, self.num_heads, K).unbind(2)
        out_BHLK = self.kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out_BHWC = out_BHLK.transpose(1, 2).reshape(B, H, W, C)
        return x_BCHW + self.proj_out(out_BHWC.permute(0, 3, 1, 2))


class BlockSequence(nn.Sequential):
    """Layers in order; residual blocks also receive the embeddings."""

    recomputes = False
    """Keep only the input for the backward pass, which then runs the layers once more."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, emb: Tensor, emb_z: Tensor | None = None
    ) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._run, x, emb, emb_z, use_reentrant=False)
        return self._run(x, emb, emb_z)

    def _run(self, x: Tensor, emb: Tensor, emb_z: Tensor | None) -> Tensor:
        for layer in self:
            x = layer(x, emb, emb_z) if isinstance(layer, ResBlock) else layer(x)
        return x


def set_attention(model: nn.Module, kernel: Kernel) -> None:
    """Make every attention block below `model` use this kernel, those of diffusers too."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "kernel"):
            module.kernel = kernel
        elif kernel is xformers_attention and hasattr(module, "processor"):
            module.set_use_memory_efficient_attention_xformers(True)  # diffusers' own is SDPA


def set_recomputing(model: nn.Module, recomputes: bool) -> None:
    """Whether the blocks below `model` that are trained recompute their activations."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "recomputes"):
            module.recomputes = recomputes


class BlockMaker:
    """Residual and attention blocks of one U-Net's shape."""

    def __init__(self, config: UNetConfig, *, steering: Steering | None = None) -> None:
        self.config = config
        self.steering: Steering | None = steering
        self.embed_dim = 4 * config.base_channels

    def res(self, in_channels: int, out_channels: int, resample: str = "none") -> ResBlock:
        return ResBlock(
            in_channels,
            out_channels,
            self.embed_dim,
            resample=resample,
            dropout=self.config.dropout,
            scale_shift_norm=self.config.scale_shift_norm,
            steering=self.steering,
        )

    def down(self, channels: int) -> nn.Module:
        if self.config.resblock_updown:
            return self.res(channels, channels, "down")
        return Downsample(channels)

    def up(self, channels: int) -> nn.Module:
        return (
            self.res(channels, channels, "up")
            if self.config.resblock_updown
            else Upsample(channels)
        )

    def attention(self, channels: int, factor: int) -> list[nn.Module]:
        if factor not in self.config.attention_factors:
            return []
        return [self._attention(channels)]

    def _attention(self, channels: int) -> AttentionBlock:
        per_head = self.config.head_channels
        num_heads = channels // per_head if per_head else self.config.num_heads
        return AttentionBlock(channels, num_heads=num_heads, order=self.config.attention_order)

    def down_path(self) -> tuple[nn.ModuleList, list[int]]:
        """`input_blocks`, and the channels that each of them hands to the up path."""
        config = self.config
        channels = config.base_channels * config.channel_multipliers[0]
        image_channels = config.in_channels * config.patch_size_px**2
        blocks = nn.ModuleList([BlockSequence(nn.Conv2d(image_channels, channels, 3, padding=1))])
        skips = [channels]
        last_level = len(config.channel_multipliers) - 1
        for level, multiplier in enumerate(config.channel_multipliers):
            out = config.base_channels * multiplier
            for _ in range(config.num_res_blocks):
                blocks.append(
                    BlockSequence(self.res(channels, out), *self.attention(out, 2**level))
                )
                channels = out
                skips.append(channels)
            if level != last_level:
                blocks.append(BlockSequence(self.down(channels)))
                skips.append(channels)
        return blocks, skips

    def middle(self, channels: int) -> BlockSequence:
        return BlockSequence(
            self.res(channels, channels), self._attention(channels), self.res(channels, channels)
        )

    def up_path(self, channels: int, skips: list[int]) -> nn.ModuleList:
        """`output_blocks`: each concatenates one skip of the down path, last first."""
        config, skips = self.config, list(skips)
        blocks = nn.ModuleList()
        for level in reversed(range(len(config.channel_multipliers))):
            out = config.base_channels * config.channel_multipliers[level]
            for index in range(config.num_res_blocks + 1):
                layers = [
                    self.res(channels + skips.pop(), out),
                    *self.attention(out, 2**level),
                ]
                channels = out
                if level and index == config.num_res_blocks:
                    layers.append(self.up(channels))
                blocks.append(BlockSequence(*layers))
        return blocks

    def out(self, image_channels: int) -> nn.Sequential:
        config = self.config
        channels = config.base_channels * config.channel_multipliers[0]
        return nn.Sequential(
            GroupNorm(channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, image_channels * config.patch_size_px**2, 3, padding=1)),
        )


def walk_up(
    blocks: nn.ModuleList, h: Tensor, skips: list[Tensor], emb: Tensor, emb_z: Tensor | None = None
) -> Tensor:
    """Run an up path over `h`, taking the skips from the last to the first."""
    for block, skip in zip(blocks, reversed(skips), strict=True):
        h = block(torch.cat([h, skip], dim=1), emb, emb_z)
    return h


class UNet(nn.Module):
    """The denoiser epsilon_theta(x_t, t); with `steering`, epsilon_theta(x_t, t, emb_z)."""

    def __init__(self, config: UNetConfig, *, steering: Steering | None = None) -> None:
        super().__init__()
        self.config = config
        make = BlockMaker(config, steering=steering)
        self.time_embed = nn.Sequential(
            nn.Linear(config.base_channels, make.embed_dim),
            nn.SiLU(),
            nn.Linear(make.embed_dim, make.embed_dim),
        )
        self.input_blocks, skips = make.down_path()
        self.skip_channels = skips
        self.middle_block = make.middle(skips[-1])
        self.output_blocks = make.up_path(skips[-1], skips)
        self.out = make.out(config.in_channels * (2 if config.learn_sigma else 1))

    def embed_time(self, t_B: Tensor) -> Tensor:
        """Time-step embedding, BE, in the weights' dtype."""
        dtype = next(self.time_embed.parameters()).dtype
        return self.time_embed(timestep_embedding(t_B, self.config.base_channels).to(dtype))

    def fold(self, x_BCHW: Tensor) -> Tensor:
        """Image to the first convolution's layout: patches folded into channels."""
        patch = self.config.patch_size_px
        # torch 2.13 crashes in backward on what pixel_unshuffle makes of a channels-last image.
        return F.pixel_unshuffle(x_BCHW.contiguous(), patch) if patch > 1 else x_BCHW

    def unfold(self, h_BCHW: Tensor) -> Tensor:
        """The inverse of `fold`."""
        patch = self.config.patch_size_px
        return F.pixel_shuffle(h_BCHW, patch) if patch > 1 else h_BCHW

    def encode(
        self, x_BCHW: Tensor, emb_BE: Tensor, emb_z_BE: Tensor | None = None
    ) -> list[Tensor]:
        """Activations of every input block, first to last."""
        h = to_fast_layout(self.fold(x_BCHW).to(emb_BE.dtype))
        skips = []
        for block in self.input_blocks:
            h = block(h, emb_BE, emb_z_BE)
            skips.append(h)
        return skips

    def decode(self, skips: list[Tensor], emb_BE: Tensor, emb_z_BE: Tensor | None = None) -> Tensor:
        """The prediction, BCHW, from the activations of `encode`; learnt variances are dropped."""
        h = self.middle_block(skips[-1], emb_BE, emb_z_BE)
        out = self.unfold(self.out(walk_up(self.output_blocks, h, skips, emb_BE, emb_z_BE)))
        return out[:, : self.config.in_channels]

    def forward(self, x_BCHW: Tensor, t_B: Tensor, emb_z_BE: Tensor | None = None) -> Tensor:
        """Predicted noise for x_t (BCHW, [-1, 1] scale) at integer time-steps t (B)."""
        emb = self.embed_time(t_B)
        return self.decode(self.encode(x_BCHW, emb, emb_z_BE), emb, emb_z_BE)


def attention_blocks(model: nn.Module) -> Iterator[AttentionBlock]:
    """Every attention block below `model`."""
    return (module for module in model.modules() if isinstance(module, AttentionBlock))
