"""Where the time of a step goes: every moment belongs to one phase.

A phase inside another pauses it, so the phases of a window add up to the window. On a GPU the
marks are events in its stream: a phase is charged for the work that it queued, not for the moment
of queueing, and nothing waits for it before the window is closed.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
Result = TypeVar("Result")
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


def timed(clock: Clock, phase: str, function: Callable[P, Result]) -> Callable[P, Result]:
    """`function`, charged to a phase whenever it is called; `__wrapped__` is itself."""

    @functools.wraps(function)
    def charged(*args: P.args, **kwargs: P.kwargs) -> Result:
        with clock(phase):
            return function(*args, **kwargs)

    return charged


class StepClock:
    """A `Clock`. Used by one thread; others may look at `where` and `step`.

    Args:
        phases: all there are; the last one has what is in no other.
        seconds: what passes on a CPU.
    """

    def __init__(
        self,
        device: torch.device,
        phases: Sequence[str] = PHASES,
        seconds: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._on_gpu = device.type == "cuda"
        self._phases, self._seconds = phases, seconds
        self._entered = [phases[-1]]
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._last = self._now()
        self.where = (phases[-1], time.monotonic())
        """The phase that runs, and since when by `time.monotonic`."""
        self.step = 0
        """Steps done."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._mark()
        self._entered.append(phase)
        self.where = (phase, time.monotonic())
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
        seconds = dict.fromkeys(self._phases, 0.0)
        for phase, mark in self._marks:
            seconds[phase] += _between(self._last, mark)
            self._last = mark
        self._marks = []
        return seconds

    def _mark(self) -> None:
        self._marks.append((self._entered[-1], self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return self._seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: "float | torch.cuda.Event", after: "float | torch.cuda.Event") -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1e3
    assert isinstance(before, float)
    assert isinstance(after, float)
    return after - before
