"""The distribution of training time-steps: its mass lies where the run says, in either unit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.task import ScheduleConfig, TimestepsConfig
from pretrain.noise_schedule import make_schedule
from pretrain.timesteps import timestep_distribution, uniform_timesteps

SCHEDULE = make_schedule(ScheduleConfig())
LOG_SNR = SCHEDULE.log_snr_T.double().numpy()


def test_the_default_is_the_papers_uniform_one():
    found = timestep_distribution(TimestepsConfig(), SCHEDULE)
    np.testing.assert_allclose(found.probability_T, np.full(1000, 1 / 1000), rtol=1e-12)
    assert found.trained_range == (0, 1000)


def test_pieces_receive_their_shares_evenly():
    config = TimestepsConfig(edges=(50, 100, 500), shares=(0.25, 0.75))
    p = timestep_distribution(config, SCHEDULE).probability_T
    assert p[50:100] == pytest.approx(0.25 / 50)
    assert p[100:500] == pytest.approx(0.75 / 400)
    assert p[:50].sum() == p[500:].sum() == 0


def test_log_snr_is_drawn_from_evenly():
    config = TimestepsConfig(unit="log_snr", edges=(4, -4))
    found = timestep_distribution(config, SCHEDULE)
    t = found.quantile((np.arange(20_000) + 0.5) / 20_000)
    assert LOG_SNR[t].min() > -4.1
    assert LOG_SNR[t].max() < 4.1
    counts, _ = np.histogram(LOG_SNR[t], bins=8, range=(-4, 4))
    assert counts == pytest.approx(2_500, rel=0.06)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 99), st.integers(1, 100), st.floats(0, 1, exclude_max=True))
def test_the_quantile_is_the_first_time_step_whose_cumulative_mass_exceeds_u(start, length, u):
    found = uniform_timesteps(start, min(start + length, 100), 100)
    [t] = found.quantile(np.array([u]))
    cumulative = found.probability_T.cumsum()
    first, end = found.trained_range
    assert first <= t < end
    assert t == min(int((cumulative <= u).sum()), end - 1)


def test_a_piece_without_a_time_step_is_refused():
    with pytest.raises(ValueError, match=r"no time-step lies between 40 and 30 \(log_snr\)"):
        timestep_distribution(TimestepsConfig(unit="log_snr", edges=(40, 30)), SCHEDULE)
