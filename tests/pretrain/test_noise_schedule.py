"""The noise schedule against float64 references and the figures of METHOD sections 1 and 3."""

import numpy as np
import pytest
import torch

from configs.schema import ScheduleConfig
from pretrain.noise_schedule import make_schedule
from pretrain.objective import loss_weight

SCHEDULE = make_schedule(ScheduleConfig())
ALL = torch.arange(1000)
ALPHA = 1 - np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(ALPHA)
PREVIOUS = np.append(1.0, ALPHA_BAR[:-1])
SHIFT = -np.sqrt(ALPHA) * (1 - PREVIOUS) / np.sqrt(1 - ALPHA_BAR)
SNR = ALPHA_BAR / (1 - ALPHA_BAR)
WEIGHT = SNR**0.1 / (1 + SNR)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.flatten().double().numpy()


def test_the_tables_are_float32_and_match_float64():
    for table, reference in (
        (SCHEDULE.alpha_T, ALPHA),
        (SCHEDULE.alpha_bar_T, ALPHA_BAR),
        (SCHEDULE.alpha_bar_prev_T, PREVIOUS),
    ):
        assert table.dtype == torch.float32
        assert table.shape == (1000,)
        np.testing.assert_allclose(numbers(table), reference, rtol=2e-6)
    assert SCHEDULE.alpha_bar_prev_T[0] == 1
    assert torch.equal(SCHEDULE.alpha_bar_prev_T[1:], SCHEDULE.alpha_bar_T[:-1])
    assert SCHEDULE.num_timesteps == 1000


def test_other_schedules_have_other_lengths_and_ends():
    short = make_schedule(ScheduleConfig(num_timesteps=3, beta_start=0.1, beta_end=0.3))
    np.testing.assert_allclose(numbers(short.alpha_T), [0.9, 0.8, 0.7], rtol=1e-6)
    np.testing.assert_allclose(numbers(short.alpha_bar_T), [0.9, 0.72, 0.504], rtol=1e-6)
    np.testing.assert_allclose(numbers(short.alpha_bar_prev_T), [1, 0.9, 0.72], rtol=1e-6)


def test_the_shift_coefficient_matches_and_is_zero_at_step_zero():
    shift = SCHEDULE.shift_coefficient(ALL)
    assert shift.shape == (1000, 1, 1, 1)
    np.testing.assert_allclose(numbers(shift), SHIFT, atol=2e-6)
    assert shift[0] == 0
    assert (shift[1:] < 0).all()


def test_the_shift_over_the_noise_is_methods_table():
    steps = torch.tensor([0, 1, 2, 5, 10, 15, 50, 100, 300])
    noise = (1 - SCHEDULE.alpha_bar_T[steps]).sqrt()
    share = numbers(SCHEDULE.shift_coefficient(steps).abs().flatten() / noise)
    np.testing.assert_allclose(
        share, [0, 0.45, 0.61, 0.78, 0.86, 0.90, 0.96, 0.98, 0.99], atol=0.006
    )


def test_the_weight_matches_peaks_at_475_and_is_methods():
    weight = loss_weight(SCHEDULE, ALL, "snr")
    assert weight.shape == (1000,)
    np.testing.assert_allclose(numbers(weight), WEIGHT, rtol=3e-4)
    assert int(weight.argmax()) == 475
    assert float(weight.max()) == pytest.approx(0.72, abs=0.003)
    assert float(weight[0]) == pytest.approx(2.5e-4, rel=0.01)
    assert float(weight[999]) == pytest.approx(0.36, abs=0.005)
    stages = [float(part.sum() / weight.sum()) for part in weight.split([50, 50, 200, 200, 500])]
    assert stages == pytest.approx([0.0017, 0.0084, 0.147, 0.277, 0.566], abs=6e-4)


def test_the_weight_of_another_gamma():
    np.testing.assert_allclose(
        numbers(loss_weight(SCHEDULE, ALL, "snr", snr_gamma=0.5)), SNR**0.5 / (1 + SNR), rtol=1e-3
    )


def test_noising_mixes_image_and_noise_per_sample_and_is_undone():
    torch.manual_seed(0)
    images, noise = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    steps = torch.tensor([0, 10, 475, 999])
    noised = SCHEDULE.add_noise(images, steps, noise)
    for n, t in enumerate(steps.tolist()):
        expected = ALPHA_BAR[t] ** 0.5 * images[n] + (1 - ALPHA_BAR[t]) ** 0.5 * noise[n]
        torch.testing.assert_close(noised[n], expected.float(), rtol=1e-4, atol=1e-5)
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
