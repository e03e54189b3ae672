"""The losses and pictures of the report, each against the same made the long way."""

import pytest
import torch

from pretrain.objective import denoising_loss
from pretrain.sampling import ddim_sample, diti_estimate
from pretrain.timesteps import uniform_timesteps
from tests.tiny_model import tiny_diti
from tools.denoising import TimestepLosses, draw_noise, encode, four_losses, timestep_losses
from tools.pictures import DDIM_STEPS, interpolations, to_pixels

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def loss_given(z: torch.Tensor) -> tuple[float, float]:
    """Backbone's and DiTi's, at the first draw of noise."""
    model = tiny_diti().eval()
    t, noise = draw_noise(IMAGES, model.timesteps)
    with torch.no_grad():
        xt = model.schedule.add_noise(IMAGES, t, noise)
        epsilon, shifted = model.estimates(xt, t, z)
    return denoising_loss(noise, epsilon).mean().item(), denoising_loss(
        noise, shifted
    ).mean().item()


def test_only_the_feature_differs_between_the_four_losses():
    model = tiny_diti().eval()
    z = encode(model, IMAGES)
    found = four_losses(model, IMAGES, repeats=1)
    backbone, own = loss_given(z)
    others = loss_given(z[[5, 0, 1, 2, 3, 4]])[1]
    mean = loss_given(z.mean(0, keepdim=True).expand_as(z))[1]
    wanted = torch.tensor([backbone, own, others, mean])
    got = torch.tensor([found.backbone, found.diti, found.shuffled, found.mean])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    assert len(set(got.tolist())) == 4


def test_the_loss_by_time_step_covers_the_trained_range_once():
    model = tiny_diti().eval()
    first, end = model.timesteps.trained_range
    found = timestep_losses(model, IMAGES, num_bins=4)
    assert found.bin_starts[0] == first
    assert found.bin_starts[-1] < end <= found.bin_starts[-1] + found.bin_width
    assert len(found.backbone) == len(found.diti) == len(found.bin_starts) == 4
    assert all(
        len({*row}) == 4
        for row in zip(found.backbone, found.diti, found.shuffled, found.mean_image, strict=True)
    )


def test_the_mean_image_is_the_best_estimate_that_looks_at_no_image():
    """Its error in units of the noise, written out for one time-step."""
    model = tiny_diti().eval()
    found = timestep_losses(model, IMAGES, num_bins=1000)
    t = torch.tensor([700])
    snr = model.schedule.snr(t).item()
    wanted = snr * (IMAGES - IMAGES.mean(0)).square().sum(0).mean().item() / (len(IMAGES) - 1)
    assert found.mean_image[found.bin_starts.index(700)] == pytest.approx(wanted, rel=1e-5)


def test_where_the_backbone_is_worse_than_the_mean_image_is_told():
    def losses(*backbone: float) -> TimestepLosses:
        return TimestepLosses((0, 10, 20), 10, backbone, backbone, backbone, (3.0, 2.0, 1.0))

    assert losses(1.0, 1.0, 0.5).worse_than_the_mean_image_from is None
    assert losses(4.0, 1.0, 0.5).worse_than_the_mean_image_from is None, "not to the end"
    assert losses(1.0, 1.0, 1.5).worse_than_the_mean_image_from == 20
    assert losses(1.0, 2.5, 1.5).worse_than_the_mean_image_from == 10
    assert losses(4.0, 2.5, 1.5).worse_than_the_mean_image_from == 0


def test_interpolations_begin_at_a_and_end_at_the_moved_parts_of_b():
    model = tiny_diti().eval()
    a, b = IMAGES[:2], IMAGES[2:4]
    found = interpolations(model, a, b, steps=3)
    start = model.timesteps.trained_range[1] - 1
    t, noise = draw_noise(a, uniform_timesteps(start, start + 1, model.schedule.num_timesteps))
    xt = model.schedule.add_noise(a, t, noise)

    def pixels(z: torch.Tensor) -> torch.Tensor:
        steps = min(DDIM_STEPS, start + 1)
        x0 = ddim_sample(model.schedule, diti_estimate(model, z), xt, start=start, steps=steps)
        return torch.from_numpy(to_pixels(x0)).int()

    z_a, z_b = encode(model, a), encode(model, b)
    for each in found:
        z_end = z_a.clone()
        for subset in each.subsets:
            z_end[:, slice(*subset.dims)] = z_b[:, slice(*subset.dims)]
        for column, z in ((0, z_a), (-1, z_end)):
            there = torch.from_numpy(each.grid[:, column]).int()
            assert (there - pixels(z)).abs().max() <= 1, (each.name, column)
