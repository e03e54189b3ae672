"""Numbers that are none are found where they began; a loss that jumps is told."""

import json
import math

import pytest
import torch

from pretrain.sentinels import LossWatch, Taken, first_fault


def taken(step: int, loss: float, norm: float = 1.0) -> Taken:
    return Taken(step, torch.tensor(loss), norm, (step * 2, step * 2 + 1), (f"a{step}", f"b{step}"))


def test_a_window_of_finite_numbers_has_no_fault():
    assert first_fault(0, [taken(1, 0.5), taken(2, 0.4)]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_step_that_is_no_number_is_the_fault_and_names_its_samples(value: float):
    fault = first_fault(3, [taken(7, 0.5), taken(8, value), taken(9, math.nan)])
    assert fault is not None
    assert (fault.rank, fault.what, fault.taken.step) == (3, "loss", 8)
    said = json.loads(fault.to_json())
    assert (said["positions"], said["keys"]) == ([16, 17], ["a8", "b8"])
    assert said["repeat"].endswith("--replay 8")


def test_a_gradient_that_is_no_number_is_found_before_the_loss_that_follows_from_it():
    fault = first_fault(0, [taken(7, 0.5, math.inf), taken(8, math.nan, math.nan)])
    assert fault is not None
    assert (fault.what, fault.taken.step, fault.value) == ("gradient norm", 7, math.inf)


def test_a_loss_of_more_than_twice_the_usual_one_is_told_with_how_many_times():
    watch = LossWatch()
    assert [watch.jump(loss) for loss in [1.0, 1.1, 0.9] * 4 + [1.99]] == [None] * 13
    assert watch.jump(3.0) == pytest.approx(3.0)


def test_what_was_usual_long_ago_is_forgotten():
    watch = LossWatch()
    for _ in range(40):
        watch.jump(1.0)
    assert [watch.jump(3.0) for _ in range(15)][-1] is not None
    assert [watch.jump(3.0) for _ in range(17)][-1] is None, "now it is the usual one"


def test_nothing_is_usual_before_there_were_a_few_windows():
    watch = LossWatch()
    assert [watch.jump(loss) for loss in (*[1.0] * 7, 9.0)] == [None] * 8
    assert watch.jump(9.0) == pytest.approx(9.0)
