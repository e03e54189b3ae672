"""Models as diffusers saves them: what is read, what it means, what is refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from configs.task import DiffusersConfig, ScheduleConfig
from data_pipelines.object_store import ObjectStore, join
from pretrain.backbone import BackboneError
from pretrain.diffusers_backbone import (
    DiffusersBackbone,
    digest_of_folder,
    load_diffusers,
    unpinned_diffusers,
)
from pretrain.noise_schedule import (
    flow_schedule,
    make_schedule,
    schedule_of,
    steps_of_same_noise,
)
from tests.tiny_diffusers import save_pipeline

STORE = ObjectStore()
DDPM = make_schedule(ScheduleConfig())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pipeline("stable-diffusion", folder, prediction="v_prediction")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    copied = tmp_path / "model"
    for file in saved.rglob("*.*"):
        target = copied / file.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return copied


def load(url: str, sha256: str | None = None) -> DiffusersBackbone:
    digest = sha256 or digest_of_folder(STORE, url)
    config = DiffusersConfig(kind="diffusers", folder=url, sha256=digest, tail_blocks=1)
    return load_diffusers(STORE, config, image_size_px=16)


def test_schedule_prediction_and_latents_are_what_the_folder_says(saved) -> None:
    backbone = load(str(saved))
    scheduler = diffusers.DDIMScheduler.from_pretrained(saved / "scheduler")
    assert torch.equal(backbone.noise_schedule.alpha_bar_T, scheduler.alphas_cumprod)
    assert backbone.prediction == "v"
    assert backbone.latents is not None
    assert (backbone.latents.scaling_factor, backbone.latents.factor) == (0.5, 2)
    images = torch.randn(2, 3, 16, 16)
    mean = backbone.latents.vae.encode(images).latent_dist.mean
    assert torch.equal(backbone.latents.encode(images), 0.5 * mean)


def test_the_null_prompt_is_the_pipelines_own(saved) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(saved)
    with torch.no_grad():
        _, null = pipeline.encode_prompt("anything", "cpu", 1, True)
    assert torch.equal(load(str(saved)).condition["encoder_hidden_states"], null)


def test_a_folder_in_a_bucket_is_the_same_model(saved, s3_url: str) -> None:
    url = join(s3_url, "model")
    for file in saved.rglob("*.*"):
        STORE.upload(file, join(url, str(file.relative_to(saved))))
    assert digest_of_folder(STORE, url) == digest_of_folder(STORE, str(saved))
    there, here = load(url), load(str(saved))
    for one, other in zip(there.model.parameters(), here.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_flow_is_a_schedule_of_the_same_noise() -> None:
    """x_t and its scale give the flow's x, and an exact velocity gives the exact noise."""
    schedule = flow_schedule(1000, shift=3.0)
    t = torch.tensor([0, 10, 500, 999])
    x0, noise = torch.randn(2, 4, 3, 8, 8)
    xt = schedule.add_noise(x0, t, noise)
    sigma = schedule.flow_sigma(t)[:, None, None, None]
    torch.testing.assert_close(
        schedule.flow_scale(t) * xt, (1 - sigma) * x0 + sigma * noise, rtol=1e-4, atol=1e-5
    )
    velocity = schedule.target("flow", x0, noise, t)
    torch.testing.assert_close(
        schedule.epsilon_of(velocity, "flow", xt, t), noise, rtol=1e-3, atol=1e-3
    )
    plain = (torch.arange(1000) + 0.5) / 1000
    torch.testing.assert_close(
        schedule.flow_sigma(torch.arange(1000)), 3 * plain / (1 + 2 * plain), rtol=1e-4, atol=1e-5
    )


def test_steps_of_the_ddpm_lie_where_the_noise_is_the_same() -> None:
    assert torch.equal(steps_of_same_noise(DDPM, DDPM), torch.arange(1000))
    flow = flow_schedule(1000)
    steps = steps_of_same_noise(flow, DDPM)
    inner = (steps > 0) & (steps < 999)
    far = (flow.log_snr_T - DDPM.log_snr_T[steps]).abs()[inner]
    assert inner.sum() > 900
    largest_step = -DDPM.log_snr_T.diff().min()
    assert far.max() < largest_step / 2
    assert (steps.diff() >= 0).all()
    stable_diffusion = schedule_of(
        diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ).alphas_cumprod
    )
    found = steps_of_same_noise(stable_diffusion, DDPM)
    assert found[[0, 100, 500, 999]].tolist() == expected_by_hand(stable_diffusion)


def expected_by_hand(schedule) -> list[int]:
    return [
        int((DDPM.log_snr_T - schedule.log_snr_T[t]).abs().argmin()) for t in (0, 100, 500, 999)
    ]


def spoil_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def spoil_class(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "UNet3D"}))


def spoil_keys(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["more"] = weights.pop("conv_in.bias")
    save_file(weights, file, {"format": "pt"})


def pickle_weights(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, file.with_suffix(".bin"))


def hide_code_in_weights(folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (folder / "ran",))

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.with_suffix(".bin").write_bytes(pickle.dumps(Bomb()))


def cut_weights(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def forget_the_schedule(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()


def reshape_the_unet(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 24}))


def widen_the_text(folder: Path) -> None:
    transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=514, hidden_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(folder / "text_encoder")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_index, "no model_index.json"),
        (spoil_class, "names the class 'UNet3D'; supported are UNet2DModel"),
        (spoil_keys, "missing: conv_in.bias; unexpected: more"),
        (pickle_weights, "unet holds no weights in safetensors"),
        (hide_code_in_weights, "unet holds no weights in safetensors"),
        (cut_weights, "vae"),
        (forget_the_schedule, "no scheduler/scheduler_config.json"),
        (reshape_the_unet, "unet cannot be loaded: .*mismatch"),
        (widen_the_text, "embeddings of 24 dimensions, but the denoiser takes 16"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(folder, spoil, says) -> None:
    spoil(folder)
    with pytest.raises(BackboneError, match=says):
        load(str(folder))
    assert not (folder / "ran").exists()


def test_another_folder_than_the_pinned_one_is_refused(folder) -> None:
    pinned = digest_of_folder(STORE, str(folder))
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.25}))
    with pytest.raises(BackboneError, match=f"pins {pinned}"):
        load(str(folder), pinned)


@pytest.mark.parametrize(
    ("kind", "size", "says"),
    [
        ("stable-diffusion", 18, "multiples of 4 px; it was made for 16 px"),
        ("dit", 32, "multiples of 16 px, at most 16; it was made for 16"),
        ("sd3", 64, "multiples of 4 px, at most 32; it was made for 16"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_refused(tmp_path, kind, size, says) -> None:
    save_pipeline(kind, tmp_path / "model")
    url = str(tmp_path / "model")
    config = DiffusersConfig(
        kind="diffusers", folder=url, sha256=digest_of_folder(STORE, url), tail_blocks=1
    )
    with pytest.raises(BackboneError, match=says):
        load_diffusers(STORE, config, image_size_px=size)
    assert unpinned_diffusers(STORE, url).image_size_px == 16


def _edited(part: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / part
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _without_a_weight(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights[sorted(weights)[0]]
    save_file(weights, file, {"format": "pt"})


def _cut(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_without_a_weight, r"weights in text_encoder do not fit its config\.json; missing: "),
        (_cut, "text_encoder cannot be loaded"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "each needs the other"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "each needs the other"),
        (_edited("text_encoder/config.json", architectures=["Evil"]), "architecture 'Evil'"),
        (lambda folder: (folder / "text_encoder" / "config.json").write_text("{"), "be read"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "holds no JSON object"),
        (
            _edited("scheduler/scheduler_config.json", prediction_type="x"),
            "'x' in scheduler_config",
        ),
        (_edited("scheduler/scheduler_config.json", beta_schedule="x"), "cannot be used"),
        (_edited("unet/config.json", sample_size=None), "sample_size None"),
        (_edited("vae/config.json", scaling_factor=None), "scaling_factor None"),
    ],
)
def test_a_broken_part_is_refused_by_name(
    folder: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(folder)
    with pytest.raises(BackboneError, match=message):
        unpinned_diffusers(STORE, str(folder))
