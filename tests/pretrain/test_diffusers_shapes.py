"""A model of diffusers known by its configurations alone: the same shapes, and no weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from configs.task import BUILTIN_PREFIX, DiffusersConfig
from data_pipelines.object_store import ObjectStore, join
from pretrain.backbone import BackboneError
from pretrain.diffusers_backbone import DiffusersBackbone, digest_of_folder, load_diffusers
from pretrain.diffusers_shapes import packaged_architectures, untrained_diffusers
from tests.tiny_diffusers import KINDS, save_pipeline

STORE = ObjectStore()
VAE = 83_653_863
DIT_TIME_AND_CLASS = 2 * 1152 + 256 * 1152 + 1152**2 + 1001 * 1152
# Denoiser and VAE. Published: 859.52 M (model card of 1.4), 865.91 M, 2.57 B (Podell et al.),
# 2.03 B (Esser et al.: 2 B). DiT-XL/2 has 675.13 M (Peebles and Xie), of which 256 x 1152 are its
# fixed positions, no weights here; diffusers gives each of 28 blocks its own embeddings, DiT one.
PUBLISHED = {
    "stable-diffusion-1.5": (859_520_964, VAE),
    "stable-diffusion-2.1-base": (865_910_724, VAE),
    "stable-diffusion-xl": (2_567_463_684, VAE),
    "stable-diffusion-3-medium": (2_028_328_000, VAE + 165_820),
    "dit-xl-2-256": (675_129_632 - 256 * 1152 + 27 * DIT_TIME_AND_CLASS, VAE),
}


def config_of(folder: object) -> DiffusersConfig:
    return DiffusersConfig(kind="diffusers", folder=str(folder), sha256="0" * 64, tail_blocks=1)


def untrained(folder: object, image_size_px: int = 16) -> DiffusersBackbone:
    return untrained_diffusers(STORE, config_of(folder), image_size_px=image_size_px)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def without_weights(folder: Path) -> Path:
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".json":
            file.unlink()
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_packaged_shape_has_the_published_number_of_parameters(name: str) -> None:
    backbone = untrained(BUILTIN_PREFIX + name, 512 if "diffusion" in name else 256)
    assert backbone.latents is not None
    for part, published in zip(
        (backbone.model, backbone.latents.vae), PUBLISHED[name], strict=True
    ):
        weights = list(part.parameters())
        assert sum(weight.numel() for weight in weights) == pytest.approx(published, rel=1e-3)
        assert {weight.device.type for weight in weights} == {"meta"}


def test_the_published_numbers_are_of_all_that_is_packaged() -> None:
    assert packaged_architectures() == sorted(BUILTIN_PREFIX + name for name in PUBLISHED)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_without_weights_is_what_a_model_with_weights_has(kind, tmp_path) -> None:
    save_pipeline(kind, tmp_path / "model")
    pinned = config_of(tmp_path / "model").model_copy(
        update={"sha256": digest_of_folder(STORE, str(tmp_path / "model"))}
    )
    loaded = load_diffusers(STORE, pinned, image_size_px=16)
    known = untrained(without_weights(tmp_path / "model"))
    assert shapes(known.model) == shapes(loaded.model)
    assert not any(weight.requires_grad for weight in known.model.parameters())
    told, its_shape = tree_flatten(known.condition)
    told_to_loaded, shape_of_loaded = tree_flatten(loaded.condition)
    assert its_shape == shape_of_loaded
    assert [t.shape for t in told] == [t.shape for t in told_to_loaded]
    assert [t.dtype for t in told] == [t.dtype for t in told_to_loaded]
    assert isinstance(known.noise_schedule.alpha_bar_T, Tensor)
    assert torch.equal(known.noise_schedule.alpha_bar_T, loaded.noise_schedule.alpha_bar_T)
    assert (known.anatomy, known.prediction) == (loaded.anatomy, loaded.prediction)
    if loaded.latents is not None and known.latents is not None:
        assert shapes(known.latents.vae) == shapes(loaded.latents.vae)
        assert known.latents.factor == loaded.latents.factor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline's configurations, which may be spoiled."""
    save_pipeline("stable-diffusion", tmp_path / "model")
    return without_weights(tmp_path / "model")


def test_of_a_folder_in_a_bucket_only_json_is_fetched(folder, s3_url: str) -> None:
    url = join(s3_url, "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights at all")
    for file in folder.rglob("*.*"):
        STORE.upload(file, join(url, str(file.relative_to(folder))))
    assert shapes(untrained(url).model) == shapes(untrained(folder).model)


def test_a_shape_is_planned_by_and_not_trained() -> None:
    with pytest.raises(BackboneError, match=r"has no weights; fetch the model and give task\.back"):
        load_diffusers(STORE, config_of("builtin/stable-diffusion-1.5"), image_size_px=256)


def test_a_shape_that_is_not_there_is_refused_with_those_that_are() -> None:
    for name in ("builtin/stable-diffusion-9", "builtin/../weights", "builtin/"):
        with pytest.raises(BackboneError, match=r"there are \['builtin/dit-xl-2-256', "):
            untrained(name)


def change(folder: Path, part: str, **told: object) -> None:
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: change(f, "unet", _class_name="UNet3D"), "names the class 'UNet3D'"),
        (lambda f: change(f, "unet", block_out_channels=[16]), "does not make a UNet2DCondition"),
        (lambda f: change(f, "unet", norm_num_groups=7), "does not make a UNet2DConditionModel"),
        (lambda f: change(f, "text_encoder", hidden_size=24), "of 24 dimensions, but the denoiser"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "no text_encoder/config.json"),
        (lambda f: shutil.rmtree(f / "scheduler"), "no scheduler/scheduler_config.json"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_with_their_place(folder, spoil, says) -> None:
    spoil(folder)
    with pytest.raises(BackboneError, match=says):
        untrained(folder)
