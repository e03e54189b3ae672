"""Diff-AE: the loss by hand, z heard by every block, and learnt to be used, from scratch."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.task import DiffAeTask, EncoderConfig, UNetConfig
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError
from pretrain.diffae import DiffAe
from pretrain.preflight import preflight, run_url
from pretrain.replay import replay
from pretrain.train import run
from pretrain.trained import load_diti, load_encoder
from pretrain.unet import ResBlock
from tests.tiny_run import make_run

STORE = ObjectStore()
SIDE = 8
TASK = DiffAeTask(
    kind="diffae",
    encoder=EncoderConfig(latent_dim=16, channels=(32, 32), attention_after=None),
    unet=UNetConfig(
        base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_factors=(2,)
    ),
)
RUN = """task={
    kind: diffae,
    encoder: {latent_dim: 24, channels: [32, 32, 32], attention_after: 2},
    unet: {patch_size_px: 2, base_channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1,
           attention_factors: [2]},
    schedule: {num_timesteps: 200},
    timesteps: {edges: [0, 200]}}"""


def fresh() -> DiffAe:
    torch.manual_seed(0)
    return DiffAe(TASK, image_size_px=SIDE)


def randomised() -> DiffAe:
    """Nothing is zero any more."""
    model = fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(count: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, count, 3, SIDE, SIDE, generator=generator)
    return x0.clamp(-1, 1), torch.randint(0, 1000, (count,), generator=generator), noise


def test_the_loss_is_the_error_of_the_noise_estimate_that_is_given_the_images_own_z() -> None:
    model = randomised()
    x0, t, noise = inputs(3)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    expected = []
    for i in range(3):
        a = float(alpha_bar[t[i]])
        xt = a**0.5 * x0[i] + (1 - a) ** 0.5 * noise[i]
        emb_z = model.label_emb(model.encoder(x0[i][None]))
        estimate = model.unet(xt[None], t[i][None], emb_z)
        expected.append(((noise[i] - estimate[0]) ** 2).sum() / (3 * SIDE * SIDE))
    torch.testing.assert_close(model(x0, t, noise), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_z_scales_in_every_residual_block_and_each_alone_teaches_the_encoder() -> None:
    model = randomised()
    blocks = [name for name, part in model.unet.named_modules() if isinstance(part, ResBlock)]
    assert len(blocks) == (2 + 1) + 2 + (4 + 1)  # down, middle, up, with those that resample
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = [f"unet.{name}.emb_z_layers.1.weight" for name in blocks]
    for alone in heads:
        others_silent = {name: torch.zeros_like(kept[name]) for name in heads if name != alone}
        model.load_state_dict(kept | others_silent)
        first = next(model.encoder.parameters())
        (gradient,) = torch.autograd.grad(model(*inputs(2)).sum(), first)
        assert gradient.abs().max() > 1e-8


def test_z_is_heard_once_the_two_convolutions_that_start_as_zero_have_moved() -> None:
    model = fresh()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    largest = []
    for _ in range(3):
        optimizer.zero_grad()
        model(*inputs(4)).mean().backward()
        gradients = [p.grad for p in model.encoder.parameters() if p.grad is not None]
        largest.append(max(float(gradient.abs().max()) for gradient in gradients))
        optimizer.step()
    assert largest[:2] == [0, 0], "the last one hides the blocks' at first, theirs then hide z"
    assert largest[2] > 1e-8
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_training_teaches_it_to_lean_on_the_images_own_z() -> None:
    model = fresh()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x0, t = inputs(4)[0].sign(), torch.full((4,), 200)  # no pixel tells anything of another
    for step in range(40):
        optimizer.zero_grad()
        model(x0, t, inputs(4, seed=2 + step)[2]).mean().backward()
        optimizer.step()
    noise = inputs(4)[2]
    with torch.no_grad():
        xt = model.schedule.add_noise(x0, t, noise)
        emb_z = model.label_emb(model.encoder(x0))
        own, others = (
            (noise - model.unet(xt, t, emb)).square().mean() for emb in (emb_z, emb_z.roll(1, 0))
        )
    assert own < 0.7 * others, (own, others)


@pytest.mark.usefixtures("world")
def test_a_run_leaves_an_encoder_of_one_subset_over_its_own_time_steps(tmp_path: Path) -> None:
    config = make_run(STORE, str(tmp_path), RUN, "train.total_images=64", "train.global_batch=16")
    assert preflight(config, 1).plan.total_steps == 4
    manifest = run(config, local_dir=tmp_path)
    lines = checkpoint.read_metrics(STORE, run_url(config), manifest)
    assert all(line["frozen_gflops"] == 0 < line["trained_gflops"] for line in lines)
    trained = load_encoder(STORE, run_url(config))
    assert (trained.partition.latent_dim, trained.partition.num_timesteps) == (24, 200)
    assert trained.backbone_sha256 is None
    z = trained.encoder(torch.zeros(2, 3, 32, 32))
    assert z.shape == (2, 24)
    again = replay(config, 3)
    assert again.loss == lines[2]["loss"]
    assert len({sample.timestep for sample in again.samples}) > 4
    assert all(0 <= (sample.timestep or 0) < 200 for sample in again.samples)
    with pytest.raises(CheckpointError, match=re.escape("is a run of kind 'diffae'; a DiTi run")):
        load_diti(STORE, run_url(config))
