"""Reconstruction error: one number per sampler, from the same images, features and noise."""

import json

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from data_pipelines.avatars import AvatarSpec
from data_pipelines.object_store import ObjectStore
from pretrain.sampling import ddim_encode, ddim_sample, diti_estimate
from tests.published_files import SIZE_PX, write_denoiser, write_run
from tests.tiny_model import tiny_diti
from tools.cli import app
from tools.denoising import encode
from tools.evaluate_reconstruction import SAMPLERS, evaluate_reconstruction
from tools.make_data import make_avatars

STEPS = 8


def images_of(count: int, size_px: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, size_px, size_px, generator=generator) * 2 - 1


def test_errors_are_those_of_the_samplers_named_in_pixels_from_0_to_1():
    model = tiny_diti().eval()
    images = images_of(3, model.encoder.image_size_px)
    found = {r.sampler: r for r in evaluate_reconstruction(model, images, steps=STEPS)}
    assert list(found) == list(SAMPLERS)
    estimate = diti_estimate(model, encode(model, images), masked=False, coefficient="published")
    x_T = ddim_encode(model.schedule, estimate, images, end=999, steps=STEPS)
    back = ddim_sample(model.schedule, estimate, x_T, start=999, steps=STEPS)
    expected = ((back + 1) / 2 - (images + 1) / 2).square().mean().item()
    assert found["both, as published"].inferred == pytest.approx(expected, rel=1e-4)


def test_without_a_shift_every_sampler_is_the_backbone():
    model = tiny_diti().eval()
    for parameter in model.decoder.shift_out.parameters():
        torch.nn.init.zeros_(parameter)
    results = evaluate_reconstruction(model, images_of(3, SIZE_PX), steps=STEPS)
    assert len({(r.inferred, r.random) for r in results}) == 1
    assert {r.random_above_first for r in results} == {0.0}


def test_each_departure_changes_the_error_and_a_longer_way_back_is_truer():
    model = tiny_diti().eval()
    images = images_of(2, SIZE_PX)
    short, long = (evaluate_reconstruction(model, images, steps=steps) for steps in (8, 32))
    assert len({r.random for r in short}) == len(SAMPLERS)
    assert long[-1].inferred < short[-1].inferred
    assert all(r.uncertainty > 0 for r in short[1:])


def test_the_command_reads_a_published_checkpoint(tmp_path):
    shards = str(tmp_path / "shards")
    make_avatars(AvatarSpec(), 6, ObjectStore(), shards, rows_per_shard=4, workers=1)
    command = ["eval", "reconstruction", "--shards", shards, "--steps", "4", "--json"]
    file = str(write_run(tmp_path))
    result = CliRunner().invoke(app, [*command, "--checkpoint", file, "--count", "5"])
    assert result.exit_code == 0, result.output
    assert [row["sampler"] for row in json.loads(result.stdout)] == list(SAMPLERS)
    for arguments, words in (
        (["--checkpoint", file, "--count", "7"], "has 6 images, 7 were asked for"),
        (["--checkpoint", str(write_denoiser(tmp_path / "dpm"))], "without an encoder"),
        ([], "exactly one of a run and --checkpoint"),
    ):
        refusal = CliRunner().invoke(app, [*command, *arguments])
        assert refusal.exit_code == 2
        assert words in refusal.stderr
