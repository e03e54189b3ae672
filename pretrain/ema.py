"""Exponential moving average of the trained weights, held in the pieces that this rank owns.

Under ZeRO-3 a rank averages only its own partition, so no rank ever holds the whole. BatchNorm's
buffers are not averaged once more: the averaged weights go with copies of the live ones (METHOD
section 6).
"""

import torch
from torch import Tensor


class Ema:
    """float32 average of parameter pieces: a <- decay a + (1 - decay) p, once per step."""

    def __init__(self, shards: list[Tensor], decay: float) -> None:
        self.decay = decay
        self.shards = [shard.detach().float().clone() for shard in shards]

    def update(self, shards: list[Tensor]) -> None:
        live = [shard.float() for shard in shards]
        torch._foreach_lerp_(self.shards, live, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    def swap(self, shards: list[Tensor]) -> None:
        """Exchange the average with the live pieces; swapping twice changes nothing."""
        for average, live in zip(self.shards, shards, strict=True):
            kept = live.float().clone()
            live.copy_(average)
            average.copy_(kept)
