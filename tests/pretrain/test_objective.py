"""The losses and the DiTi model against METHOD section 3 and the slow reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from configs.task import ScheduleConfig, TimestepsConfig
from pretrain.diti import DiTi
from pretrain.noise_schedule import make_schedule
from pretrain.objective import (
    conditions,
    denoising_loss,
    diti_loss,
    loss_weight,
    shifted_estimate,
)
from tests import reference
from tests.random_cuts import cuts
from tests.tiny_model import SIZE_PX, tiny_backbone, tiny_diti, tiny_task

SCHEDULE = make_schedule(ScheduleConfig())
STEPS = torch.tensor([0, 1, 50, 475, 999])
REFERENCE = reference.make_schedule()


def random_images(seed: int, batch: int = len(STEPS), side: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, side, side, generator=generator)


NOISE, EPSILON, SHIFT = (random_images(seed) for seed in range(3))


def numbers(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy()


def loss_of(weight: str, shift: Tensor = SHIFT) -> Tensor:
    return diti_loss(
        SCHEDULE, t_B=STEPS, noise_BCHW=NOISE, epsilon_BCHW=EPSILON, shift_BCHW=shift, weight=weight
    )


# --- the formulas ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=500)
@given(
    found=cuts(),
    mode=st.sampled_from(["base", "stop_grad", "dual"]),
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    gamma=st.sampled_from([0.1, 0.0, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_loss_and_gradient_by_z_are_the_references_in_every_mode(found, mode, shape, gamma, seed):
    partition, cut = found
    rng = np.random.default_rng(seed)
    num_timesteps, batch, pixels = partition.num_timesteps, shape[0], math.prod(shape[1:])
    schedule = make_schedule(ScheduleConfig(num_timesteps=num_timesteps))
    t = rng.integers(num_timesteps, size=batch)
    z = rng.normal(size=(batch, partition.latent_dim))
    decoder = rng.normal(size=(pixels, partition.latent_dim))
    noise, epsilon = rng.normal(size=shape), rng.normal(size=shape)

    z_BD, t_B = torch.tensor(z, dtype=torch.float32, requires_grad=True), torch.tensor(t)
    loss_B = torch.stack(
        [
            diti_loss(
                schedule,
                t_B=t_B,
                noise_BCHW=torch.tensor(noise),
                epsilon_BCHW=torch.tensor(epsilon),
                shift_BCHW=(c_BD @ torch.tensor(decoder).float().T).reshape(shape),
                snr_gamma=gamma,
            )
            for c_BD in conditions(partition.masks(), mode, z_BD, t_B)
        ]
    ).sum(dim=0)
    [gradient_BD] = torch.autograd.grad(loss_B.sum(), z_BD)

    for n in range(batch):
        expected = reference.diti_loss(
            reference.make_schedule(num_timesteps),
            cut,
            mode,
            t=int(t[n]),
            z=z[n],
            decoder=decoder,
            noise=noise[n],
            epsilon=epsilon[n],
            gamma=gamma,
        )
        assert loss_B[n].item() == pytest.approx(expected.value, rel=1e-3)
        scale = np.abs(expected.z_gradient).max()
        np.testing.assert_allclose(
            gradient_BD[n], expected.z_gradient, rtol=1e-3, atol=1e-3 * scale
        )
        outside = cut.own[cut.of_timestep[t[n]]] == 0
        if mode == "stop_grad":
            assert gradient_BD[n, outside].count_nonzero() == 0
        elif t[n] > 0:  # t = 0 teaches nothing
            earlier = cut.receding[cut.of_timestep[t[n]]] == 1
            assert (gradient_BD[n, earlier] != 0).all()


def test_the_loss_is_float32_and_the_constant_weight_is_one():
    loss = loss_of("constant")
    assert (loss.shape, loss.dtype) == ((5,), torch.float32)
    weight = [REFERENCE.weight(t) for t in STEPS.tolist()]
    np.testing.assert_allclose(numbers(loss_of("snr") / loss), weight, rtol=1e-3)


def test_the_denoising_loss_is_the_mean_square_of_each_sample_in_float32():
    loss = denoising_loss(NOISE.bfloat16(), EPSILON.bfloat16())
    assert loss.dtype == torch.float32
    difference = numbers(NOISE.bfloat16()) - numbers(EPSILON.bfloat16())
    np.testing.assert_allclose(numbers(loss), (difference**2).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_timestep_zero_teaches_the_shift_nothing_and_every_other_one_does():
    shift = SHIFT.clone().requires_grad_()
    loss_of("snr", shift).sum().backward()
    assert shift.grad is not None
    assert shift.grad[0].count_nonzero() == 0
    assert (shift.grad[1:].flatten(1) != 0).all()
    changed = SHIFT.clone()
    changed[0] += 100
    assert loss_of("snr", changed)[0] == loss_of("snr")[0]


def test_the_loss_is_the_reweighted_error_of_the_estimated_image():
    x0 = random_images(3).clamp(-1, 1)
    xt = SCHEDULE.add_noise(x0, STEPS, NOISE)
    estimate = shifted_estimate(SCHEDULE, STEPS, EPSILON, SHIFT)
    x0_hat = SCHEDULE.remove_noise(xt, STEPS, estimate)
    error = numbers(x0 - x0_hat) ** 2
    snr = np.array([REFERENCE.snr(t) for t in STEPS.tolist()])
    weight = snr**1.1 / (1 + snr)  # w_t SNR_t
    np.testing.assert_allclose(
        numbers(loss_of("snr")), weight * error.mean(axis=(1, 2, 3)), rtol=5e-3
    )


# --- the model ------------------------------------------------------------------------------------


def gradient_of_z(model: DiTi, t_B: Tensor) -> Tensor:
    """d loss / d z of each sample, (B, D)."""
    features: list[Tensor] = []

    def keep(_module: object, _inputs: object, z: Tensor) -> None:
        z.retain_grad()
        features.append(z)

    hook = model.encoder.register_forward_hook(keep)
    images, noise = (random_images(seed, len(t_B), SIZE_PX) for seed in (4, 5))
    model(images.clamp(-1, 1), t_B, noise).sum().backward()
    hook.remove()
    gradient = features[0].grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize(
    ("t", "visible_dims"), [(1, 8), (49, 8), (50, 16), (199, 16), (200, 24), (999, 24)]
)
def test_a_timestep_teaches_its_own_and_every_earlier_subset_and_no_later_one(
    t: int, visible_dims: int
):
    gradient = gradient_of_z(tiny_diti(), torch.tensor([t, t]))
    assert gradient.shape == (2, 24)
    assert (gradient[:, :visible_dims] != 0).all()
    assert gradient[:, visible_dims:].count_nonzero() == 0


def test_every_sample_of_a_batch_follows_its_own_timestep():
    gradient = gradient_of_z(tiny_diti(), torch.tensor([500, 10, 0, 120]))
    assert (gradient != 0).sum(dim=1).tolist() == [24, 8, 0, 16]  # t = 0 teaches nothing


def test_the_models_loss_is_the_objective_of_its_parts():
    model = tiny_diti(weight="constant")
    t = torch.tensor([30, 700])
    x0, noise = random_images(4, 2, SIZE_PX).clamp(-1, 1), random_images(5, 2, SIZE_PX)
    loss = model(x0, t, noise)
    xt = SCHEDULE.add_noise(x0, t, noise)
    epsilon, shifted = model.estimates(xt, t, model.encoder(x0))
    torch.testing.assert_close(loss, (noise - shifted).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(epsilon, model.decoder.backbone(xt, t))


def test_the_condition_is_z_up_to_the_timesteps_own_subset_and_zero_beyond():
    z = torch.arange(1.0, 25.0).repeat(2, 1)
    [condition] = conditions(tiny_diti().masks, "base", z, torch.tensor([49, 50]))
    assert condition[0].tolist() == [*range(1, 9), *[0] * 16]
    assert condition[1].tolist() == [*range(1, 17), *[0] * 8]


@pytest.mark.parametrize(("t", "own"), [(49, (0, 8)), (50, (8, 16)), (999, (16, 24))])
def test_stop_grad_has_the_same_loss_and_teaches_the_own_subset_only(t: int, own: tuple[int, int]):
    t_B = torch.tensor([t])
    base = gradient_of_z(tiny_diti(), t_B)
    stopped = gradient_of_z(tiny_diti(mode="stop_grad"), t_B)
    assert torch.equal(stopped[:, slice(*own)], base[:, slice(*own)])
    assert stopped[:, : own[0]].count_nonzero() == stopped[:, own[1] :].count_nonzero() == 0
    assert (base[:, : own[1]] != 0).all()


def test_dual_adds_the_two_losses_and_their_gradients():
    t_B = torch.tensor([30, 700])
    x0, noise = random_images(4, 2, SIZE_PX).clamp(-1, 1), random_images(5, 2, SIZE_PX)
    losses = {m: tiny_diti(mode=m)(x0, t_B, noise) for m in ("base", "stop_grad", "dual")}
    assert torch.equal(losses["base"], losses["stop_grad"])
    torch.testing.assert_close(losses["dual"], losses["base"] + losses["stop_grad"])
    gradients = {m: gradient_of_z(tiny_diti(mode=m), t_B) for m in losses}
    torch.testing.assert_close(gradients["dual"], gradients["base"] + gradients["stop_grad"])


def test_weighed_by_v_the_loss_is_the_error_of_the_velocity():
    """v of two noise estimates at the same x_t."""
    t = torch.tensor([1, 50, 400, 900])
    xt, noise, estimate = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    alpha_bar = SCHEDULE.alpha_bar_T[t].double()[:, None, None, None]

    def v_of(epsilon):
        x0 = (xt - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        return alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0

    wanted = (v_of(noise) - v_of(estimate)).square().mean(dim=(1, 2, 3))
    found = loss_weight(SCHEDULE, t, "v") * denoising_loss(noise, estimate)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def test_min_snr_weighs_like_constant_loss_until_its_cap():
    weight = numbers(loss_weight(SCHEDULE, STEPS, "min_snr", min_snr_cap=5.0))
    snr = np.array([REFERENCE.snr(t) for t in STEPS.tolist()])
    np.testing.assert_allclose(weight, np.minimum(snr, 5) / snr, rtol=1e-3)


def test_a_backbone_with_another_number_of_timesteps_is_refused():
    with pytest.raises(ValueError, match=r"partition must end at the backbone's 500 .* got 1000"):
        DiTi(tiny_task(), tiny_backbone(num_timesteps=500), image_size_px=SIZE_PX)


def test_a_backbone_of_another_image_size_is_refused():
    with pytest.raises(ValueError, match="image_size_px is 8, but the backbone was trained on 16"):
        DiTi(tiny_task(), tiny_backbone(image_size_px=16), image_size_px=SIZE_PX)


@pytest.mark.parametrize(
    ("mode", "edges", "subset"), [("base", (0, 200), "z002"), ("stop_grad", (50, 1000), "z000")]
)
def test_a_subset_that_no_timestep_teaches_is_refused(mode, edges, subset: str):
    timesteps = TimestepsConfig(edges=edges)
    with pytest.raises(ValueError, match=rf"never teach subset {subset}"):
        tiny_diti(mode=mode, timesteps=timesteps)


def test_in_base_mode_later_timesteps_teach_the_earlier_subsets():
    model = tiny_diti(timesteps=TimestepsConfig(edges=(200, 1000)))
    assert (gradient_of_z(model, torch.tensor([250])) != 0).all()


@pytest.mark.parametrize("cap", [1.0, 5.0])
def test_min_snr_caps_the_weight_of_clean_time_steps(cap: float):
    snr = SCHEDULE.snr(STEPS)
    expected = torch.where(snr > cap, cap / snr, 1.0)
    assert (snr > cap).any()
    assert (snr < cap).any()
    torch.testing.assert_close(loss_weight(SCHEDULE, STEPS, "min_snr", min_snr_cap=cap), expected)


@pytest.mark.parametrize(
    "changes",
    [{"weight": "snr", "snr_gamma": 0.7}, {"weight": "min_snr", "min_snr_cap": 0.3}],
)
def test_the_tasks_weight_and_its_numbers_reach_the_loss(changes: dict[str, object]):
    images, t = random_images(1, side=SIZE_PX), STEPS
    noise = random_images(2, side=SIZE_PX)
    plain = tiny_diti(weight="constant")(images, t, noise)
    schedule = tiny_diti().schedule
    numbers_of = {key: value for key, value in changes.items() if key != "weight"}
    w = loss_weight(schedule, t, changes["weight"], **numbers_of)  # pyright: ignore
    torch.testing.assert_close(tiny_diti(**changes)(images, t, noise), w * plain)
