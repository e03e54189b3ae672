"""A small model of Stable Diffusion's format: made by the verb, read as the real ones are."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.loading import parse_run
from configs.task import DiffusersConfig
from data_pipelines.object_store import ObjectStore
from data_pipelines.shard_index import read_index
from pretrain import small_stable_diffusion
from pretrain.diffusers_backbone import digest_of_folder, load_diffusers
from pretrain.small_stable_diffusion import (
    Captioned,
    SmallModel,
    read_captioned,
    take_latents,
    train_autoencoder,
    train_denoiser,
)
from pretrain.train import run
from tests.diti_command import diti
from tests.tiny_run import make_shards

STORE = ObjectStore()
MODEL = SmallModel(image_size_px=16, images=48)
SIZES = ("--image-size", "16", "--images", "48")
RUN = """
name: tiny
output: {folder}/runs
task:
  kind: diti
  backbone: {{kind: diffusers, folder: {model}, sha256: {sha256}}}
  encoder: {{latent_dim: 24, channels: [32, 32], attention_after: null}}
  partition: {{stage_ends: [50, 300, 1000], stage_dims: [8, 8, 8], stage_subsets: [1, 1, 1]}}
data: {{shards: {shards}, image_size_px: 16, lanes: 8, window_rows: 16}}
train: {{total_images: 8, global_batch: 8, ema_decay: 0.9, checkpoint_every_images: 8}}
optimizer: {{learning_rate: 1e-3}}
wandb: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("set") / "train")
    make_shards(STORE, url, shards=2, rows=16)
    return url


@pytest.fixture(scope="module")
def made(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "model"
    said = diti("backbone", "make-small", shards, "--out", str(out), *SIZES)
    assert said.stdout == f"{out}: SHA-256 {digest_of_folder(STORE, str(out))}\n", said.output
    return out


@pytest.fixture(scope="module")
def data(shards: str) -> Captioned:
    return read_captioned(STORE, read_index(STORE, shards), MODEL, lambda images: None)


def test_diffusers_draws_from_a_caption(made: Path, data: Captioned) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(made)
    pipeline.set_progress_bar_config(disable=True)

    def drawn(caption: str) -> torch.Tensor:
        seeded = torch.Generator().manual_seed(0)
        told = {"num_inference_steps": 2, "output_type": "pt", "generator": seeded}
        return pipeline(caption, **told).images

    images = [drawn(caption) for caption in data.captions[:2]]
    assert images[0].shape == (1, 3, 16, 16)
    assert not torch.equal(images[0], images[1])


def test_our_loader_reads_it_and_its_latents_have_variance_1(made: Path, data: Captioned) -> None:
    pinned = DiffusersConfig(
        kind="diffusers", folder=str(made), sha256=digest_of_folder(STORE, str(made))
    )
    backbone = load_diffusers(STORE, pinned, image_size_px=16)
    assert (backbone.prediction, backbone.image_size_px) == ("epsilon", 16)
    assert backbone.latents is not None
    latents = backbone.latents.encode(data.images.permute(0, 3, 1, 2) / 127.5 - 1)
    assert latents.shape == (32, 4, 4, 4)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    found = json.loads(diti("backbone", "inspect", str(made), "--json").stdout)
    assert found["sha256"] == pinned.sha256


def test_where_it_comes_from_is_in_the_folder(made: Path, shards: str) -> None:
    told = json.loads((made / "provenance.json").read_text())
    command = f"diti backbone make-small {shards} --image-size 16 --images 48 --seed 0"
    assert told["command"] == command
    assert told["images_seen"] == {"autoencoder": 16, "denoiser": 32}
    assert told["index_digest"] == read_index(STORE, shards).digest


def test_the_same_command_makes_the_same_model_and_another_seed_another(
    made: Path, shards: str, tmp_path: Path
) -> None:
    def digest(name: str, *more: str) -> str:
        out = str(tmp_path / name)
        assert diti("backbone", "make-small", shards, "--out", out, *SIZES, *more).exit_code == 0
        return digest_of_folder(STORE, out)

    torch.manual_seed(5)  # what was drawn before does not matter
    assert digest("again") == digest_of_folder(STORE, str(made))
    assert digest("other", "--seed", "1") != digest_of_folder(STORE, str(made))


@pytest.mark.usefixtures("world")
def test_a_run_trains_against_it(made: Path, shards: str, tmp_path: Path) -> None:
    sha256 = digest_of_folder(STORE, str(made))
    text = RUN.format(folder=tmp_path, model=made, sha256=sha256, shards=shards)
    manifest = run(parse_run(text, ()), local_dir=tmp_path)
    assert (manifest.step, manifest.backbone_sha256) == (1, sha256)


def test_images_come_back_and_noise_is_told_after_some_training(data: Captioned) -> None:
    longer = SmallModel(image_size_px=16, images=1_440)
    vae = train_autoencoder(data, longer, lambda images: None)
    latents = take_latents(vae, data, lambda images: None)
    images = data.images.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        back = vae.decode(latents / vae.config.scaling_factor).sample
    assert F.mse_loss(back, images) < 0.9 * images.var()

    pipeline = train_denoiser(vae, latents, data, longer, lambda images: None)
    noise, t = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(0)), 600
    noisy = pipeline.scheduler.add_noise(latents, noise, torch.tensor([t]))
    with torch.no_grad():
        prompts, _ = pipeline.encode_prompt(data.captions, "cpu", 1, False)
        told = pipeline.unet(noisy, t, encoder_hidden_states=prompts).sample
    assert F.mse_loss(told, noise) < 0.6


def test_what_captions_say_is_learnt_from_unless_they_are_dropped(
    data: Captioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = train_autoencoder(data, MODEL, lambda images: None)
    latents = take_latents(vae, data, lambda images: None)
    others = Captioned(data.images, data.captions[::-1])

    def is_the_same_with_others() -> bool:
        first, second = (
            train_denoiser(vae, latents, told, MODEL, lambda images: None).unet.conv_out.weight
            for told in (data, others)
        )
        return torch.equal(first, second)

    assert not is_the_same_with_others()
    monkeypatch.setattr(small_stable_diffusion, "DROPPED_CAPTIONS", 1.0)
    assert is_the_same_with_others()
    monkeypatch.undo()
    dropped = small_stable_diffusion._drops_caption(np.arange(4000), seed=0)
    assert dropped.mean() == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--image-size", "20"), "image size 20 does not fit: it must be a multiple of 8 px"),
        (("--image-size", "8"), "from 16 to 128"),
        (("--images", "47"), "images must be at least 48, got 47"),
    ],
)
def test_what_cannot_be_made_is_refused(shards: str, tmp_path: Path, more, says: str) -> None:
    out = tmp_path / "model"
    result = diti("backbone", "make-small", shards, "--out", str(out), *more)
    assert (result.exit_code, says in result.stderr) == (2, True), result.output
    assert not out.exists()


def test_a_folder_that_holds_something_and_a_set_without_captions_are_refused(
    shards: str, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    out = str(tmp_path / "full")
    result = diti("backbone", "make-small", shards, "--out", out, *SIZES)
    assert (result.exit_code, "holds notes.txt already" in result.stderr) == (2, True)

    make_shards(STORE, str(tmp_path / "mute"), shards=1, rows=4, more={"caption": None})
    out = str(tmp_path / "model")
    result = diti("backbone", "make-small", str(tmp_path / "mute"), "--out", out, *SIZES)
    assert (result.exit_code, "000000000 of" in result.stderr) == (2, True), result.output
    assert "has no caption" in result.stderr
    assert not Path(out).exists()
