"""Time-steps and noise: a pure function of seed and position, and of nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.position_noise import draw
from pretrain.timesteps import uniform_timesteps

SHAPE = (1, 2, 3)
positions_ = st.lists(st.integers(0, 2**62), min_size=1, max_size=8)


def drawn(positions, seed: int = 0, timesteps=(0, 1000), shape=SHAPE, batch: int = 1):
    found = draw(
        np.asarray(positions, np.int64),
        seed=seed,
        global_batch=batch,
        noise_shape=shape,
    )
    t_B = uniform_timesteps(*timesteps, 1000).quantile(found.place_B)
    return torch.from_numpy(t_B), found.noise_BCHW


def test_shapes_and_dtypes():
    t, noise = drawn([5, 6], shape=(3, 8, 4))
    assert (t.shape, t.dtype) == ((2,), torch.int64)
    assert (noise.shape, noise.dtype) == ((2, 3, 8, 4), torch.float32)
    t, noise = drawn([])
    assert (t.shape, noise.shape) == ((0,), (0, *SHAPE))


@settings(deadline=None, max_examples=50)
@given(positions_, st.integers(0, 2**63 - 1), st.integers(0, 8))
def test_a_draw_does_not_depend_on_the_batch_that_it_is_part_of(positions, seed: int, cut: int):
    t, noise = drawn(positions, seed)
    first, second = drawn(positions[:cut], seed), drawn(positions[cut:], seed)
    assert torch.equal(t, torch.cat([first[0], second[0]]))
    assert torch.equal(noise, torch.cat([first[1], second[1]]))
    backwards = drawn(positions[::-1], seed)
    assert torch.equal(noise, backwards[1].flip(0))


def test_another_seed_or_position_is_another_draw():
    pairs = [(seed, position) for seed in (0, 1, 2, 2**63 - 1) for position in (0, 1, 2, 2**40)]
    noises = {tuple(drawn([position], seed)[1].flatten().tolist()) for seed, position in pairs}
    assert len(noises) == len(pairs)


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    np.random.seed(1)
    before = drawn([7])
    torch_next, numpy_next = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    assert (torch.rand(1), np.random.rand()) == (torch_next, numpy_next)
    torch.manual_seed(2)
    assert torch.equal(before[1], drawn([7])[1])


@settings(deadline=None, max_examples=50)
@given(positions_, st.integers(0, 999), st.integers(1, 1000))
def test_time_steps_stay_inside_their_range(positions, start: int, length: int):
    end = min(start + length, 1000)
    t, _ = drawn(positions, timesteps=(start, end))
    assert ((t >= start) & (t < end)).all()


def test_time_steps_are_uniform_over_the_range_ends_included():
    t, _ = drawn(range(8_000), timesteps=(3, 11), shape=(1, 1, 1))
    counts = torch.bincount(t, minlength=11)
    assert counts[:3].sum() == 0
    assert counts[3:].min() > 1_000 - 150
    assert counts[3:].max() < 1_000 + 150


def test_noise_is_standard_normal_and_independent_of_its_neighbour_and_of_t():
    t, noise = drawn(range(4_000), shape=(1, 1, 4))
    flat = noise.reshape(4_000, 4).double()
    assert abs(float(flat.mean())) < 0.03
    assert float(flat.std()) == pytest.approx(1, abs=0.03)
    assert float((flat**4).mean()) == pytest.approx(3, abs=0.3)
    neighbours = torch.corrcoef(torch.stack([flat[:-1, 0], flat[1:, 0], flat[1:, 1], t[1:]]))
    assert (neighbours - torch.eye(4)).abs().max() < 0.06


@pytest.mark.parametrize("batch", [1, 2, 40, 100])
def test_every_global_batch_spreads_over_all_strata_of_time_steps(batch: int):
    t, _ = drawn(range(3 * batch), shape=(1, 1, 1), batch=batch)
    for one in t.reshape(3, batch):
        assert sorted((one * batch // 1000).tolist()) == list(range(batch))
    assert batch < 32 or t[:batch].tolist() != sorted(t[:batch].tolist())
    assert batch < 32 or (t[:batch] // 40).tolist() != (t[batch : 2 * batch] // 40).tolist()


def test_the_coin_is_fair_and_a_function_of_the_position():
    arguments = {"seed": 3, "global_batch": 4, "noise_shape": (1, 1, 1)}
    flips = draw(np.arange(2_000), **arguments).flip_B
    assert 850 < int(flips.sum()) < 1_150
    assert torch.equal(draw(np.arange(500, 600), **arguments).flip_B, flips[500:600])


def test_the_draws_never_change_between_versions():
    t, noise = drawn([0, 1, 10**12], seed=7, shape=(1, 1, 2))
    assert t.tolist() == [872, 882, 142]
    expected = [1.5391918, 0.63675386, -0.5029522, -0.8528061, 0.29827666, 0.4611871]
    np.testing.assert_allclose(noise.flatten().numpy(), expected, rtol=1e-6)
