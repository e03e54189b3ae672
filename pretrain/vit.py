"""The encoder for natural images: a vision transformer that asks with one token per subset.

Patches and query tokens go through the same blocks; each query's output becomes its subset of z.

Letters: B batch, C channels, H height, W width, L tokens, E width, K subsets, D = latent_dim.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.task import VitConfig
from pretrain.attention import Kernel, sdpa

_SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
"""Width, blocks and heads: Dosovitskiy et al. 2021, and S by Touvron et al. 2021."""


class VitBlock(nn.Module):
    """x <- x + attention(norm(x)); x <- x + MLP(norm(x))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel: Kernel = sdpa
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BLE: Tensor) -> Tensor:
        B, L, E = x_BLE.shape
        qkv = self.qkv(self.norm_attention(x_BLE)).reshape(B, L, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = self.kernel(q, k, v).transpose(1, 2).reshape(B, L, E)
        x = x_BLE + self.out(attended)
        return x + self.mlp(self.norm_mlp(x))


class VitEncoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> z (B, D), float.

    Args:
        dim_ends: where each subset of z ends, as a partition's.

    Raises:
        ValueError: the patches do not divide the image.
    """

    recomputes = False
    """Keep only what goes into each block for the backward pass, which runs it once more."""

    def __init__(self, config: VitConfig, *, image_size_px: int, dim_ends: Sequence[int]) -> None:
        super().__init__()
        if image_size_px % config.patch_size_px:
            raise ValueError(
                f"data.image_size_px must be divisible by encoder.patch_size_px "
                f"({config.patch_size_px}), got {image_size_px}"
            )
        self.image_size_px = image_size_px
        width, depth, num_heads = _SHAPES[config.size]
        patch, num_queries = config.patch_size_px, len(dim_ends)
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, (image_size_px // patch) ** 2, width))
        self.queries = nn.Parameter(torch.empty(1, num_queries, width))
        self.blocks = nn.ModuleList(VitBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        sizes = [end - start for start, end in pairwise((0, *dim_ends))]
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        for parameter in (self.positions, self.queries):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[-2:] != (self.image_size_px, self.image_size_px):
            raise ValueError(
                f"this encoder takes {self.image_size_px} px square images, "
                f"got shape {tuple(x_BCHW.shape)}"
            )
        patches = self.patches(x_BCHW.to(self.queries.dtype)).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(patches), -1, -1)
        x_BLE = torch.cat([queries, patches + self.positions], dim=1)
        recomputes = self.recomputes and torch.is_grad_enabled()
        for block in self.blocks:
            x_BLE = checkpoint(block, x_BLE, use_reentrant=False) if recomputes else block(x_BLE)
        answers_BKE = self.norm(x_BLE[:, : len(self.heads)])
        parts = [head(answers_BKE[:, i]) for i, head in enumerate(self.heads)]
        return torch.cat(parts, dim=1)
