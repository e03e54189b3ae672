"""Where the time of a step goes: every moment belongs to one phase.

A phase inside another pauses it, so the phases of a window add up to the window. On a GPU the
marks are events in its stream: a phase is charged for the work that it queued, not for the moment
of queueing, and nothing waits for it before the window is closed.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PHASES = (
    "data wait",
    "host to device",
    "backbone forward",
    "forward",
    "backward",
    "communication",
    "optimizer",
    "average",
    "checkpoint",
    "other",
)
"""`forward` is the encoder's and the shift path's; `average` is the EMA's."""

Clock = Callable[[str], AbstractContextManager[None]]
"""Charges what happens in its context to a phase."""


def untimed(phase: str) -> AbstractContextManager[None]:
    """The clock of those who do not ask."""
    return nullcontext()


class StepClock:
    """A `Clock`. Used by one thread; others may look at `where` and `step`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._entered = ["other"]
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._last = self._now()
        self.where = ("other", time.monotonic())
        """The phase that runs, and since when by `time.monotonic`."""
        self.step = 0
        """Steps done."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._mark()
        self._enter(phase)
        try:
            yield
        finally:
            self._mark()
            self._entered.pop()
            self.where = (self._entered[-1], time.monotonic())

    def close(self) -> dict[str, float]:
        """Seconds of every phase since the last call."""
        self._mark()
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for phase, mark in self._marks:
            seconds[phase] += _between(self._last, mark)
            self._last = mark
        self._marks = []
        return {phase: seconds[phase] for phase in PHASES}

    def _enter(self, phase: str) -> None:
        self._entered.append(phase)
        self.where = (phase, time.monotonic())

    def _mark(self) -> None:
        self._marks.append((self._entered[-1], self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: "float | torch.cuda.Event", after: "float | torch.cuda.Event") -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1e3
    assert isinstance(before, float)
    assert isinstance(after, float)
    return after - before
