"""The benchmark counts what it says it counts."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.step_clock import timed
from tools.benchmarks.peak import Operation, OperationList, Shape, measure_peak
from tools.benchmarks.train_step import (
    PHASES,
    Measured,
    Report,
    make_clock,
    model_operations,
    table,
)


def test_the_model_of_the_benchmark_is_the_published_one_in_flops():
    counts = model_operations(2)
    flops = sum(operation.flops * count for operation, count in counts.items())
    assert flops / 2 / 1e9 == pytest.approx(90.9, rel=0.01)


def test_listed_operations_have_pytorchs_own_count_and_can_be_run_again():
    conv = torch.nn.Conv2d(8, 4, 1)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        conv(x).sum().backward()
    with OperationList() as listed:
        conv(x).sum().backward()
    assert len(listed.counts) == 2
    forward = next(iter(listed.counts))
    assert forward.arguments[:3] == (Shape((2, 8, 5, 5)), Shape((4, 8, 1, 1)), Shape((4,)))
    peak = measure_peak(listed.counts)
    assert peak.flops == counter.get_total_flops()
    assert peak.flops_per_second > 0


def test_equal_operations_are_one_entry():
    a = torch.randn(3, 4)
    with OperationList() as listed:
        a @ a.T
        a @ (a + 1).T
    [(operation, count)] = listed.counts.items()
    assert isinstance(operation, Operation)
    assert count == 2


def test_time_inside_a_phase_within_a_phase_is_counted_once():
    clock = make_clock()

    def busy() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    with clock("trainable forward"):
        timed(clock, "encoder", busy)()
        timed(clock, "encoder", busy)()
    seconds = clock.close()
    assert seconds["encoder"] == pytest.approx(0.04, abs=0.01)
    assert seconds["trainable forward"] < 0.01


def test_the_table_states_the_ratio_and_the_shares():
    def measured(cpu_seconds: float, gflop: float) -> Measured:
        phases = dict.fromkeys(PHASES, 0.1)
        return Measured(cpu_seconds, 2.0, phases, 3.0, gflop)

    ways = {"ours": measured(2.0, 80.0), "published": measured(3.0, 100.0)}
    report = Report(8, 1, 5, 100.0, 500.0, 90.0, ways)
    assert report.share_of_peak("ours") == pytest.approx(0.8)
    assert report.executed_share_of_peak("ours") == pytest.approx(0.64)
    assert "ours / published, images per CPU second: 1.50" in table(report)
