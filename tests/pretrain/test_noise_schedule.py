"""The noise schedule against the reference and the figures of METHOD sections 1 and 3."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.task import ScheduleConfig
from pretrain.noise_schedule import make_schedule
from pretrain.objective import loss_weight
from tests import reference

SCHEDULE = make_schedule(ScheduleConfig())
ALL = torch.arange(1000)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.flatten().double().numpy()


@settings(deadline=None, max_examples=500)
@given(st.integers(1, 400), st.floats(1e-4, 0.05), st.floats(1, 10), st.floats(0, 2))
def test_tables_coefficient_and_weight_are_the_references(length, beta_start, rise, gamma):
    beta_end = min(beta_start * rise, 0.1)
    config = ScheduleConfig(num_timesteps=length, beta_start=beta_start, beta_end=beta_end)
    schedule, expected = (
        make_schedule(config),
        reference.make_schedule(length, beta_start, beta_end),
    )
    t_B, steps = torch.arange(length), range(length)
    for found, wanted in (
        (schedule.alpha_T, expected.alpha),
        (schedule.alpha_bar_T, expected.alpha_bar),
        (schedule.alpha_bar_prev_T, [expected.alpha_bar_before(t) for t in steps]),
    ):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(numbers(found), wanted, rtol=2e-5)
    # 1 - alpha-bar keeps 3 to 4 of float32's digits where beta is smallest.
    shift = schedule.shift_coefficient(t_B)
    assert shift.shape == (length, 1, 1, 1)
    wanted = [expected.shift_coefficient(t) for t in steps]
    np.testing.assert_allclose(numbers(shift), wanted, rtol=1e-3)
    assert shift[0] == 0
    weight = loss_weight(schedule, t_B, "snr", snr_gamma=gamma)
    np.testing.assert_allclose(
        numbers(weight), [expected.weight(t, gamma) for t in steps], rtol=1e-3
    )


def test_the_shift_over_the_noise_is_methods_table():
    steps = torch.tensor([0, 1, 2, 5, 10, 15, 50, 100, 300])
    noise = (1 - SCHEDULE.alpha_bar_T[steps]).sqrt()
    share = numbers(SCHEDULE.shift_coefficient(steps).abs().flatten() / noise)
    np.testing.assert_allclose(
        share, [0, 0.45, 0.61, 0.78, 0.86, 0.90, 0.96, 0.98, 0.99], atol=0.006
    )


def test_the_weight_peaks_at_475_and_shares_out_as_methods():
    weight = loss_weight(SCHEDULE, ALL, "snr")
    assert weight.shape == (1000,)
    assert int(weight.argmax()) == 475
    assert float(weight.max()) == pytest.approx(0.72, abs=0.003)
    assert float(weight[0]) == pytest.approx(2.5e-4, rel=0.01)
    assert float(weight[999]) == pytest.approx(0.36, abs=0.005)
    stages = [float(part.sum() / weight.sum()) for part in weight.split([50, 50, 200, 200, 500])]
    assert stages == pytest.approx([0.0017, 0.0084, 0.147, 0.277, 0.566], abs=6e-4)


def test_noising_mixes_image_and_noise_per_sample_and_is_undone():
    torch.manual_seed(0)
    images, noise = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    steps = torch.tensor([0, 10, 475, 999])
    noised = SCHEDULE.add_noise(images, steps, noise)
    for n, t in enumerate(steps.tolist()):
        expected = reference.make_schedule().add_noise(images[n].numpy(), t, noise[n].numpy())
        np.testing.assert_allclose(noised[n], expected, rtol=1e-4, atol=1e-5)
    back = SCHEDULE.remove_noise(noised, steps, noise)
    torch.testing.assert_close(back[:3], images[:3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(back[3], images[3], rtol=0.01, atol=0.01)  # divided by 0.006


def test_noised_unit_images_keep_unit_variance():
    torch.manual_seed(0)
    images, noise = torch.randn(3, 1, 200, 200), torch.randn(3, 1, 200, 200)
    noised = SCHEDULE.add_noise(images, torch.tensor([5, 300, 900]), noise)
    assert noised.var(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=0.03)


def test_the_whole_schedule_moves_to_a_device():
    moved = SCHEDULE.to(torch.device("meta"))
    tables = (moved.alpha_T, moved.alpha_bar_T, moved.alpha_bar_prev_T)
    assert {table.device.type for table in tables} == {"meta"}


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_perfect_output_of_any_kind_implies_the_noise(prediction):
    t = torch.tensor([5, 400, 900])
    x0, noise = torch.randn(3, 3, 4, 4).clamp(-1, 1), torch.randn(3, 3, 4, 4)
    xt = SCHEDULE.add_noise(x0, t, noise)
    output = SCHEDULE.target(prediction, x0, noise, t)
    found = SCHEDULE.epsilon_of(output, prediction, xt, t)
    torch.testing.assert_close(found, noise, rtol=1e-3, atol=1e-3)
