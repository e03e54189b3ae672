"""Every moment belongs to one phase, and the phases add up to the time that has passed."""

import time

import pytest
import torch

from pretrain.step_clock import PHASES, StepClock

CPU = torch.device("cpu")


def test_phases_add_up_and_one_inside_another_pauses_it():
    clock, start = StepClock(CPU), time.perf_counter()
    clock.close()
    with clock("backward"):
        time.sleep(0.05)
        with clock("communication"):
            time.sleep(0.1)
        time.sleep(0.05)
    seconds = clock.close()
    passed = time.perf_counter() - start
    assert tuple(seconds) == PHASES
    assert sum(seconds.values()) == pytest.approx(passed, rel=0.05)
    assert seconds["backward"] == pytest.approx(0.1, rel=0.3)
    assert seconds["communication"] == pytest.approx(0.1, rel=0.3)
    assert seconds["forward"] == 0


def test_a_window_begins_where_the_last_one_ended():
    clock = StepClock(CPU)
    time.sleep(0.05)
    clock.close()
    assert sum(clock.close().values()) < 0.02


def test_an_error_ends_its_phase():
    clock = StepClock(CPU)
    with pytest.raises(ValueError, match="broken"), clock("forward"):
        raise ValueError("broken")
    assert clock.where[0] == "other"
    clock.close()
    time.sleep(0.02)
    assert clock.close()["other"] >= 0.02


def test_others_see_what_runs():
    clock = StepClock(CPU)
    with clock("data wait"):
        phase, since = clock.where
    assert phase == "data wait"
    assert time.monotonic() - since < 1
    with clock("backward"):
        time.sleep(0.02)
        with clock("communication"):
            time.sleep(0.02)
        assert clock.where[0] == "backward"
        assert time.monotonic() - clock.where[1] < 0.02, "since it came back to it"


def test_a_phase_costs_microseconds():
    def seconds_of_a_phase() -> float:
        clock, times = StepClock(CPU), 1_000
        start = time.perf_counter()
        for _ in range(times):
            with clock("forward"):
                pass
        clock.close()
        return (time.perf_counter() - start) / times

    assert min(seconds_of_a_phase() for _ in range(7)) < 50e-6, "a step has about ten of them"
