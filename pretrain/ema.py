"""Exponential moving average of the trained weights, held in the pieces that a rank owns.

A rank averages only what its optimizer updates, in float32 whatever the model computes with, so
no rank ever holds the whole. BatchNorm's buffers are not averaged once more: the averaged weights
go with copies of the live ones (METHOD section 6).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Ema:
    """a <- decay a + (1 - decay) w, once per step, of tensors that training changes in place."""

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = list(weights)
        self.tensors: list[Tensor] = [tensor.clone() for tensor in weights]
        """The averages, in their order."""

    def update(self) -> None:
        if self.tensors:
            torch._foreach_lerp_(self.tensors, self._weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
