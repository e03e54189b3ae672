"""What a rank says of itself. Nothing here needs torch, so the coordinator does without."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rank is; the numbers are of the last `log_every_steps` steps."""

    rank: int
    pid: int
    """Another one than before: the rank was restarted after a failure."""
    step: int
    total_steps: int
    images: int
    loss: float
    """Mean over all ranks."""
    images_per_second: float
    """Of all ranks together."""
    data_wait_share: float
    """Part of the time that this rank waited for data."""
    peak_memory_gib: float
    bad_samples: int
    """Of the whole run so far: samples that had to be replaced."""
    checkpoint_step: int
    """Step of the newest complete checkpoint."""
    gradient_norm: float = 0.0
    """The largest of the window's steps."""
    shares: Mapping[str, float] | None = None
    """Part of the time by phase; they add up to 1. See `step_clock.PHASES`."""
    frozen_flops: float = 0.0
    """FLOP/s of this rank in the frozen backbone."""
    trained_flops: float = 0.0
    """FLOP/s of this rank in everything else."""
    peak_share: float = 0.0
    """Both together, as a share of the measured peak of a matrix product."""
    hint: str = ""
    """What to change, where this rank waits for data."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a rank is at."""

    rank: int
    host: str
    pid: int
    step: int
    """Steps done."""
    phase: str
    seconds: float
    """How long it has been in it."""
