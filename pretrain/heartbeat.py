"""Each rank says now and then what it is at, so that one that stops can be named.

In a collective every rank waits for the slowest, and after `cluster.stall_seconds` all of them
fail; from the failures alone nobody knows for whom they waited.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pretrain.progress import Pulse
from pretrain.step_clock import StepClock
from pretrain.world import World

BEAT_SECONDS = 5.0
WAITING = ("communication", "checkpoint")
"""Phases in which a rank waits for other ranks."""


@contextmanager
def heartbeat(clock: StepClock, world: World, send: Callable[[Pulse], object]) -> Iterator[None]:
    """Send a pulse every `BEAT_SECONDS`, from a thread, as long as the context is open."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():  # at once too: a rank that is never heard of cannot be missed
            phase, since = clock.where
            seconds = time.monotonic() - since
            send(Pulse(world.rank, socket.gethostname(), os.getpid(), clock.step, phase, seconds))
            ended.wait(BEAT_SECONDS)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def stalled(pulses: Sequence[tuple[Pulse, float]], after: float) -> list[str] | None:
    """The ranks that the others have waited for longer than `after` seconds, in words.

    None where no rank is heard of: they have not started, or have ended together.

    Args:
        pulses: the newest of every rank, with its age in seconds.
    """
    silent = [(pulse, age) for pulse, age in pulses if age > after]
    if len(silent) == len(pulses):
        return None
    if silent:
        return [
            f"{_name(pulse)} has given no sign of life for {age:.0f} s, last at step {pulse.step} "
            f"in {pulse.phase}"
            for pulse, age in silent
        ]
    if not any(pulse.phase in WAITING and pulse.seconds > after for pulse, _ in pulses):
        return []
    busy = [pulse for pulse, _ in pulses if pulse.phase not in WAITING]
    if not busy:
        return ["every rank waits for the others: the network between them, or storage, is stuck"]
    return [
        f"{_name(pulse)} is in {pulse.phase} of step {pulse.step + 1} for {pulse.seconds:.0f} s"
        for pulse in busy
    ]


def _name(pulse: Pulse) -> str:
    return f"rank {pulse.rank} (pid {pulse.pid} on {pulse.host})"
