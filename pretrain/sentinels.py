"""What a run watches in itself: numbers that are none, and losses that jump."""

import json
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPIKE_RATIO = 2.0
"""A loss above so many times the usual one is a spike: a window's loss varies by a tenth of it."""
_WINDOWS = 32
_FEWEST = 8


@dataclass(frozen=True, slots=True)
class Taken:
    """One optimizer step of this rank, and what it was taken on."""

    step: int
    """Steps done with this one."""
    loss: Tensor
    """Mean over this rank's samples, a scalar."""
    gradient_norm: Tensor | float
    """Of the whole gradient, before it was clipped; the same on every rank."""
    positions: tuple[int, ...]
    keys: tuple[str, ...]

    def fault(self) -> str:
        """What is no finite number: "loss", "gradient norm", or nothing."""
        if not torch.isfinite(self.loss):
            return "loss"
        return "" if torch.isfinite(torch.as_tensor(self.gradient_norm)) else "gradient norm"


@dataclass(frozen=True, slots=True)
class Fault:
    """The first step of a rank that came to no finite number."""

    rank: int
    what: str
    taken: Taken

    @property
    def value(self) -> float:
        return float(self.taken.loss if self.what == "loss" else self.taken.gradient_norm)

    def to_json(self) -> bytes:
        """For whoever wants to know why: the samples, by position and key, and how to repeat it."""
        return json.dumps(
            {
                "step": self.taken.step,
                "rank": self.rank,
                "what": self.what,
                "value": str(self.value),
                "positions": self.taken.positions,
                "keys": self.taken.keys,
                "repeat": f"the same command with --replay {self.taken.step}",
            },
            indent=1,
        ).encode()


def first_fault(rank: int, window: Sequence[Taken]) -> Fault | None:
    """Where it began on this rank; the steps after it are its consequence."""
    for taken in window:
        if what := taken.fault():
            return Fault(rank, what, taken)
    return None


class LossWatch:
    """Remembers the losses of the last windows."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOWS)

    def jump(self, loss: float) -> float | None:
        """How many times the median of the windows before it a loss is, where that is a spike."""
        usual = statistics.median(self._losses) if len(self._losses) >= _FEWEST else None
        self._losses.append(loss)
        return loss / usual if usual and loss > SPIKE_RATIO * usual else None
