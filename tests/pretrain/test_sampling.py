"""DDIM: exact with a perfect estimate, and steered only where DiTi was trained."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.task import ScheduleConfig, TimestepsConfig
from pretrain import sampling
from pretrain.noise_schedule import NoiseSchedule, make_schedule
from pretrain.partition import Masks, Partition
from pretrain.sampling import (
    Estimate,
    ddim_encode,
    ddim_sample,
    ddim_walk,
    decode_walk,
    diti_estimate,
    encode_walk,
    mix_subsets,
    move_along,
    pdae_walk,
    published_walk,
    slerp,
    time_grid,
)
from pretrain.timesteps import TimestepDistribution, uniform_timesteps
from tests import reference
from tests.random_cuts import cuts
from tests.tiny_model import SIZE_PX, tiny_diti

SCHEDULE, REFERENCE = make_schedule(ScheduleConfig()), reference.make_schedule()


def random_images(seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, SIZE_PX, SIZE_PX, generator=generator)


X0, NOISE = random_images(0).clamp(-0.95, 0.95), random_images(1)


def knows_the_image(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The noise that turns X0 into x_t, whatever x_t is."""
    alpha_bar = SCHEDULE.alpha_bar_T[t_B][:, None, None, None]
    return (x_BCHW - alpha_bar.sqrt() * X0) / (1 - alpha_bar).sqrt()


# --- the time grid --------------------------------------------------------------------------------


def test_a_grid_goes_evenly_from_its_start_to_the_clean_image():
    assert time_grid(9, 5) == [9, 7, 5, 3, 1, -1]
    assert time_grid(999, 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    assert time_grid(4, 1) == [4, -1]
    assert time_grid(0, 1) == [0, -1]


def test_every_grid_falls_strictly_in_nearly_equal_steps():
    for start in (*range(40), 199):
        for steps in range(1, start + 2):
            grid = time_grid(start, steps)
            falls = {before - after for before, after in pairwise(grid)}
            assert (grid[0], grid[-1], len(grid)) == (start, -1, steps + 1)
            assert min(falls) >= 1
            assert max(falls) - min(falls) <= 1


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_more_steps_than_timesteps_or_none_are_refused(steps: int):
    with pytest.raises(ValueError, match=f"from t = 9 there are 1 to 10 steps, got {steps}"):
        time_grid(9, steps)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "steps"), [(999, 1), (999, 20), (500, 7), (30, 31), (0, 1)])
def test_with_the_true_noise_the_image_comes_back(start: int, steps: int):
    xt = SCHEDULE.add_noise(X0, torch.tensor([start, start]), NOISE)
    assert start == 0 or (xt - X0).abs().max() > 0.1
    sample = ddim_sample(SCHEDULE, lambda _x, _t: NOISE, xt, start=start, steps=steps)
    torch.testing.assert_close(sample, X0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_with_the_true_image_any_start_leads_to_it(steps: int):
    sample = ddim_sample(SCHEDULE, knows_the_image, 3 * NOISE, start=999, steps=steps)
    torch.testing.assert_close(sample, X0, rtol=0, atol=1e-4)


def test_a_step_keeps_the_noise_and_mixes_it_anew():
    """After one of two steps from 999, x lies on the line between image and noise at t = 499."""
    seen: list[tuple[int, Tensor]] = []

    def estimate(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        seen.append((int(t_B[0]), x_BCHW))
        return knows_the_image(x_BCHW, t_B)

    xt = SCHEDULE.add_noise(X0, torch.tensor([999, 999]), NOISE)
    ddim_sample(SCHEDULE, estimate, xt, start=999, steps=2)
    assert [t for t, _ in seen] == [999, 499]
    expected = SCHEDULE.add_noise(X0, torch.tensor([499, 499]), NOISE)
    torch.testing.assert_close(seen[1][1], expected, rtol=0, atol=1e-4)


def test_the_sample_stays_between_minus_one_and_one():
    sample = ddim_sample(SCHEDULE, lambda x, _t: -x, 5 * NOISE, start=999, steps=5)
    assert sample.abs().max() == 1


def test_sampling_keeps_no_graph():
    xt = NOISE.clone().requires_grad_()
    assert not ddim_sample(SCHEDULE, lambda x, _t: x, xt, start=999, steps=2).requires_grad


def test_with_eta_the_noise_is_renewed_by_ddpms_share_and_stays_of_unit_size():
    """After one of two steps: old and fresh noise in the shares of the DDPM posterior."""
    seen: list[Tensor] = []

    def estimate(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        seen.append(x_BCHW)
        return (x_BCHW - SCHEDULE.alpha_bar_T[t_B[0]].sqrt() * image) / (
            1 - SCHEDULE.alpha_bar_T[t_B[0]]
        ).sqrt()

    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 3, 100, 100, generator=generator)
    image = torch.full_like(noise, 0.5)
    start = SCHEDULE.add_noise(image, torch.tensor([199]), noise)
    sample = ddim_sample(SCHEDULE, estimate, start, start=199, steps=2, eta=1.0)
    now, after = (SCHEDULE.alpha_bar_T[t].item() for t in (199, 99))
    left = (seen[1] - after**0.5 * image) / (1 - after) ** 0.5
    kept = (1 - (1 - now / after) / (1 - now)) ** 0.5  # share of the old noise in the new one
    assert left.std().item() == pytest.approx(1, abs=0.03)
    assert (left * noise).mean().item() == pytest.approx(kept, abs=0.03)
    torch.testing.assert_close(sample, image, rtol=0, atol=1e-4)  # the last step adds none


def test_the_seed_decides_the_fresh_noise():
    def sample(eta: float, seed: int) -> Tensor:
        return ddim_sample(
            SCHEDULE, lambda x, _t: 0.5 * x, NOISE, start=300, steps=3, eta=eta, seed=seed
        )

    assert torch.equal(sample(1.0, 1), sample(1.0, 1))
    assert not torch.equal(sample(1.0, 1), sample(1.0, 2))
    assert torch.equal(sample(0.0, 1), sample(0.0, 2))


# --- DiTi's estimate ------------------------------------------------------------------------------

Z = torch.randn(2, 24, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def steered() -> tuple[Estimate, Estimate, Estimate]:
    """DiTi trained on [50, 300): its estimate, its backbone's, and always the shifted one."""
    model = tiny_diti(timesteps=TimestepsConfig(edges=(50, 300))).eval()
    return (
        diti_estimate(model, Z),
        model.decoder.backbone,
        lambda x, t_B: model.estimates(x, t_B, Z)[1],
    )


def test_the_estimate_is_shifted_exactly_where_the_model_was_trained(steered):
    estimate, backbone, shifted = steered
    for t, trained in ((0, False), (49, False), (50, True), (299, True), (300, False)):
        t_B = torch.tensor([t, t])
        expected = (shifted if trained else backbone)(NOISE, t_B)
        torch.testing.assert_close(estimate(NOISE, t_B), expected, rtol=1e-5, atol=1e-6)
        assert t == 0 or (shifted(NOISE, t_B) - backbone(NOISE, t_B)).abs().max() > 1e-3


def test_each_sample_of_a_batch_follows_its_own_timestep(steered):
    estimate, backbone, shifted = steered
    t_B = torch.tensor([100, 300])
    torch.testing.assert_close(estimate(NOISE, t_B)[0], shifted(NOISE, t_B)[0])
    torch.testing.assert_close(estimate(NOISE, t_B)[1], backbone(NOISE, t_B)[1])


def test_sampling_twice_gives_the_same_image(steered):
    samples = [ddim_sample(SCHEDULE, steered[0], NOISE, start=250, steps=4) for _ in range(2)]
    assert torch.equal(*samples)
    unguided = ddim_sample(SCHEDULE, steered[1], NOISE, start=250, steps=4)
    assert (samples[0] - unguided).abs().max() > 1e-3


def test_the_condition_the_coefficient_and_the_stop_can_be_the_published_ones(steered):
    model = tiny_diti().eval()
    t_B = torch.tensor([60, 60])
    epsilon, shift_of_all = model.epsilon_and_shift(NOISE, t_B, Z)
    _, shift_of_masked = model.epsilon_and_shift(NOISE, t_B, Z * model.masks.cumulative_KD[1])
    published = -(1 - SCHEDULE.alpha_bar_T[60]).sqrt()
    trained = SCHEDULE.shift_coefficient(t_B)
    for options, expected in (
        ({}, epsilon + trained * shift_of_masked),
        ({"masked": False}, epsilon + trained * shift_of_all),
        ({"coefficient": "published"}, epsilon + published * shift_of_masked),
        ({"stop_below": 60}, epsilon + trained * shift_of_masked),
        ({"stop_below": 61}, epsilon),
    ):
        torch.testing.assert_close(diti_estimate(model, Z, **options)(NOISE, t_B), expected)


# --- walks ----------------------------------------------------------------------------------------


def bars(*timesteps: int) -> list[float]:
    return [SCHEDULE.alpha_bar_T[t].item() for t in timesteps]


def test_the_walks_are_methods_tables():
    assert decode_walk(SCHEDULE, 999, 2) == [(999, bars(499)[0]), (499, 1.0)]
    assert encode_walk(SCHEDULE, 999, 2) == [(0, bars(499)[0]), (499, bars(999)[0])]
    assert published_walk(SCHEDULE, 4) == [
        *zip((750, 500, 250), bars(500, 250, 0), strict=True),
        (0, 1.0),
    ]
    assert published_walk(SCHEDULE, 4, encode=True)[-1] == (750, 0.0)
    assert len(published_walk(SCHEDULE, 300)) == 334  # 300 does not divide 1000
    assert pdae_walk(SCHEDULE, 2) == list(zip((999, 499), bars(499, 0), strict=True))


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize("name", ["published_walk", "pdae_walk"])
def test_the_published_walks_are_the_references_at_every_number_of_steps(name: str, encode: bool):
    for steps in range(1, 1000):
        found = getattr(sampling, name)(SCHEDULE, steps, encode=encode)
        expected = getattr(reference, name)(REFERENCE, steps, encode=encode)
        assert [t for t, _ in found] == [t for t, _ in expected], steps
        np.testing.assert_allclose([to for _, to in found], [to for _, to in expected], rtol=2e-6)


ALL_TIMESTEPS = uniform_timesteps(0, 1000, 1000)


@dataclass(frozen=True)
class LinearDiTi:
    """What `diti_estimate` needs of a model: epsilon_theta = x / 2 and G = A c."""

    masks: Masks
    decoder: Tensor
    schedule: NoiseSchedule = SCHEDULE
    timesteps: TimestepDistribution = ALL_TIMESTEPS

    def epsilon_and_shift(self, x: Tensor, _t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        return x / 2, (condition @ self.decoder.T).reshape(x.shape)


@settings(deadline=None, max_examples=500)
@given(
    found=cuts(1000),
    walk=st.sampled_from(["published_walk", "pdae_walk"]),
    steps=st.integers(1, 8),
    encode=st.booleans(),
    options=st.fixed_dictionaries(
        {"masked": st.booleans(), "coefficient": st.sampled_from(["training", "published"])}
    ),
    seed=st.integers(0, 2**32),
)
def test_a_walk_under_a_linear_decoder_is_the_references(found, walk, steps, encode, options, seed):
    """One step and several, both grids, both directions, all of z or the trained part of it."""
    partition, cut = found
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=(1, 3, 2, 2)), rng.normal(size=partition.latent_dim)
    decoder = 0.3 * rng.normal(size=(12, partition.latent_dim))

    def expected_estimate(x: reference.Array, t: int) -> reference.Array:
        seen = cut.cumulative[cut.of_timestep[t]] if options["masked"] else 1
        published = options["coefficient"] == "published"
        s = -np.sqrt(1 - REFERENCE.alpha_bar[t]) if published else REFERENCE.shift_coefficient(t)
        return x / 2 + s * (decoder @ (z * seen)).reshape(x.shape)

    model = LinearDiTi(partition.masks(), torch.tensor(decoder).float())
    estimate = diti_estimate(model, torch.tensor(z).float()[None], **options)
    steps_taken = getattr(sampling, walk)(SCHEDULE, steps, encode=encode)
    result = ddim_walk(SCHEDULE, estimate, torch.tensor(x).float(), steps_taken)
    wanted_walk = getattr(reference, walk)(REFERENCE, steps, encode=encode)
    expected = reference.ddim_walk(REFERENCE, x, wanted_walk, expected_estimate)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("end", "steps"), [(999, 20), (300, 5)])
def test_what_is_encoded_decodes_to_itself(end: int, steps: int):
    xt = ddim_encode(SCHEDULE, knows_the_image, X0, end=end, steps=steps)
    assert (xt - X0).abs().max() > 0.05
    back = ddim_sample(SCHEDULE, knows_the_image, xt, start=end, steps=steps)
    torch.testing.assert_close(back, X0, rtol=1e-4, atol=1e-4)


# --- edits of z -----------------------------------------------------------------------------------

PARTITION = Partition((10, 20, 30), (2, 5, 9))


def test_mixing_moves_the_named_subsets_and_nothing_else():
    a, b = torch.zeros(1, 9), torch.ones(1, 9)
    mixed = mix_subsets(a, b, PARTITION.select(10, 20), 0.25)
    assert mixed.tolist() == [[0, 0, 0.25, 0.25, 0.25, 0, 0, 0, 0]]
    assert a.count_nonzero() == 0


def test_slerp_keeps_the_length_and_meets_both_ends():
    a, b = random_images(8), random_images(9)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    unit_a, unit_b = (x / x.flatten(1).norm(dim=1)[:, None, None, None] for x in (a, b))
    middle = slerp(unit_a, unit_b, 0.5).flatten(1)
    torch.testing.assert_close(middle.norm(dim=1), torch.ones(2))
    angles = [torch.cosine_similarity(middle, x.flatten(1)) for x in (a, b)]
    torch.testing.assert_close(angles[0], angles[1], rtol=1e-3, atol=1e-3)


def test_a_move_is_so_many_standard_deviations_along_the_direction():
    mean, std = torch.full((9,), 2.0), torch.linspace(1, 3, 9)
    direction = torch.zeros(9)
    direction[3] = -7.0
    moved = move_along(mean[None], direction, 0.5, mean_D=mean, std_D=std)
    expected = mean.clone()
    expected[3] -= 0.5 * 3 * std[3]  # sqrt(9) = 3
    torch.testing.assert_close(moved, expected[None])
    inside = move_along(
        mean[None],
        torch.ones(9),
        0.5,
        mean_D=mean,
        std_D=std,
        subsets=PARTITION.select(0, 10),
    )
    assert (inside != mean).tolist() == [[True] * 2 + [False] * 7]


def test_steps_timesteps_and_directions_that_cannot_be_are_refused():
    schedule = make_schedule(ScheduleConfig())
    x = torch.zeros(1, 3, 4, 4)

    def estimate(x: Tensor, t: Tensor) -> Tensor:
        return x

    for walk in (published_walk, pdae_walk):
        for steps in (0, 2000):
            with pytest.raises(ValueError, match=f"1 to 1000 steps, got {steps}"):
                walk(schedule, steps)
    with pytest.raises(ValueError, match="t must be from 0 to 999, got 2000"):
        ddim_sample(schedule, estimate, x, start=2000, steps=10)
    with pytest.raises(ValueError, match="t must be from 0 to 999, got 1000"):
        ddim_encode(schedule, estimate, x, end=1000, steps=10)
    with pytest.raises(ValueError, match="only a walk to less noise"):
        ddim_walk(schedule, estimate, x, published_walk(schedule, 10, encode=True), eta=0.5)
    ones = torch.ones(4)
    with pytest.raises(ValueError, match="direction is zero"):
        move_along(ones[None], torch.zeros(4), 1.0, mean_D=ones, std_D=ones)
