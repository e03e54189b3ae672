"""The rank that the others wait for is named; nobody is where all go on, or all have ended."""

import os
import time

import pytest
import torch

from pretrain.heartbeat import heartbeat, stalled
from pretrain.progress import Pulse
from pretrain.step_clock import StepClock
from pretrain.world import World


def pulse(rank: int, phase: str, seconds: float, age: float = 1.0) -> tuple[Pulse, float]:
    return Pulse(rank, "node-a", 100 + rank, 7, phase, seconds), age


WAITS = pulse(0, "communication", 40)


def test_a_rank_that_waits_for_data_while_the_others_wait_for_it_is_named():
    [said] = stalled([WAITS, pulse(1, "data wait", 41), pulse(2, "communication", 40)], 30) or []
    assert said == "rank 1 (pid 101 on node-a) is in data wait of step 8 for 41 s"


def test_a_rank_that_no_longer_speaks_is_named():
    [said] = stalled([WAITS, pulse(1, "backward", 2, age=50)], 30) or []
    assert said == (
        "rank 1 (pid 101 on node-a) has given no sign of life for 50 s, last at step 7 in backward"
    )


def test_where_all_wait_for_each_other_it_is_the_network():
    [said] = stalled([WAITS, pulse(1, "communication", 39)], 30) or []
    assert "network" in said


def test_waiting_for_others_to_publish_is_waiting_too():
    [said] = stalled([pulse(0, "checkpoint", 40), pulse(1, "data wait", 41)], 30) or []
    assert said.startswith("rank 1")


def test_a_rank_says_at_once_and_again_what_it_is_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pretrain.heartbeat.BEAT_SECONDS", 0.05)
    clock, heard = StepClock(torch.device("cpu")), []
    clock.step = 7
    world = World(rank=3, size=4, device=torch.device("cpu"))
    with clock("data wait"), heartbeat(clock, world, heard.append):
        time.sleep(0.5)
    assert len(heard) > 2
    assert {(each.rank, each.step, each.phase, each.pid) for each in heard} == {
        (3, 7, "data wait", os.getpid())
    }
    assert heard[0].seconds < 0.1 < 0.3 < heard[-1].seconds < 0.6


@pytest.mark.parametrize(
    "pulses",
    [
        [pulse(0, "communication", 3), pulse(1, "forward", 3)],
        [pulse(0, "forward", 90), pulse(1, "forward", 90)],
    ],
    ids=["a short wait", "all compute for long"],
)
def test_nobody_is_named_while_nobody_waits_for_long(pulses: list[tuple[Pulse, float]]):
    assert stalled(pulses, 30) == []


def test_when_all_are_silent_they_have_ended_or_not_begun():
    assert stalled([pulse(0, "forward", 1, age=99), pulse(1, "forward", 1, age=99)], 30) is None
    assert stalled([], 30) is None
