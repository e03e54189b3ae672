"""The published recipes: METHOD section 6's numbers, and a backbone that the user must bring."""

from pathlib import Path

import pytest
import torch

import configs
from configs.loading import ConfigError, load_run
from configs.schema import RunConfig
from configs.task import BUILTIN_PREFIX, DiffusersConfig, DitiTask, EncoderConfig
from data_pipelines.object_store import ObjectStore
from pretrain.diffusers_backbone import digest_of_folder
from pretrain.encoder import make_encoder
from pretrain.partition import make_partition, published_partition
from pretrain.run_plan import plan_run

RUNS = Path(configs.__file__).parent / "runs"
ARCHITECTURES = Path(configs.__file__).parents[1] / "pretrain" / "architectures"
BACKBONE = ("task.backbone.weights=dpm.safetensors", f"task.backbone.sha256={'a' * 64}")
SMALL_ENCODER, LARGE_ENCODER = 1_487_104, 3_914_240  # parameters, METHOD section 4
UNBALANCED = published_partition(
    64, 512, stage_ends=(50, 100, 300, 500, 1000), stage_dims=(10, 25, 327, 100, 50)
)
BALANCED, UNCUT = published_partition(64, 512), published_partition(1, 512)

# recipe: pixels, encoder's parameters, partition, images, batch, learning rate, steps
TABLE = {
    "celeba64_diti": (64, SMALL_ENCODER, UNBALANCED, 38_000_000, 128, 1e-4, 296_875),
    "ffhq128_diti": (128, LARGE_ENCODER, UNBALANCED, 64_000_000, 128, 1e-4, 500_000),
    "bedroom128_diti": (128, LARGE_ENCODER, UNBALANCED, 70_000_000, 128, 1e-4, 546_875),
    "celeba64_pdae": (64, SMALL_ENCODER, UNCUT, 38_000_000, 128, 2e-4, 296_875),
    "ffhq128_pdae": (128, LARGE_ENCODER, UNCUT, 64_000_000, 256, 2e-4, 250_000),
    "bedroom128_pdae": (128, LARGE_ENCODER, UNCUT, 70_000_000, 128, 5e-5, 546_875),
}


def recipe(name: str, *overrides: str) -> tuple[RunConfig, DitiTask]:
    run = load_run(RUNS / f"{name}.yaml", (*BACKBONE, *overrides))
    assert isinstance(run.task, DitiTask)
    return run, run.task


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_methods_numbers(name: str):
    size, num_parameters, partition, images, batch, rate, steps = TABLE[name]
    run, task = recipe(name)
    with torch.device("meta"):
        encoder = make_encoder(task.encoder, image_size_px=run.data.image_size_px)
    assert run.data.image_size_px == size
    assert sum(p.numel() for p in encoder.parameters()) == num_parameters
    channels = (64, 128, 128, 128) if size == 64 else (64, 128, 256, 256, 256)  # METHOD section 4
    attention_after = 2 if size == 64 else 3
    assert task.encoder == EncoderConfig(channels=channels, attention_after=attention_after)
    assert make_partition(task.partition, task.encoder.latent_dim) == partition
    assert (run.train.total_images, run.train.global_batch) == (images, batch)
    assert (task.mode, task.weight, task.snr_gamma) == ("base", "snr", 0.1)
    assert run.data.horizontal_flip
    assert (run.train.ema_decay, run.engine.precision) == (0.9999, "fp32")

    optimizer = run.optimizer
    assert optimizer.learning_rate == rate
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0, None)
    assert (optimizer.warmup_images, optimizer.decay_images) == (0, 0)

    plan = plan_run(run.train, run.cluster.num_workers)
    assert (plan.total_steps, plan.checkpoint_every_steps, plan.accumulation) == (steps, 1000, 1)


def test_the_published_variants_are_overrides():
    balanced = "task.partition={kind: published}"
    for name in ("celeba64_diti", "ffhq128_diti", "bedroom128_diti"):
        _, task = recipe(name, balanced, "task.mode=stop_grad")
        assert task.mode == "stop_grad"
        assert make_partition(task.partition, 512) == BALANCED
        assert balanced.replace("=", "='") in (RUNS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_without_its_backbone_says_what_to_give(name: str):
    with pytest.raises(ConfigError) as error:
        load_run(RUNS / f"{name}.yaml")
    assert error.value.problems == (
        "task.backbone: is required but missing; "
        "give task.backbone.weights=... task.backbone.sha256=...",
    )
    with pytest.raises(ConfigError) as error:
        load_run(RUNS / f"{name}.yaml", BACKBONE[:1])
    assert error.value.problems == (
        "task.backbone.sha256: is required but missing; give task.backbone.sha256=...",
    )


LAION = {path.stem for path in RUNS.glob("laion*.yaml")}


@pytest.mark.parametrize("name", sorted(LAION))
def test_a_laion_recipe_pins_a_shape_that_is_packaged(name: str):
    run = load_run(RUNS / f"{name}.yaml")
    assert isinstance(run.task, DitiTask)
    assert isinstance(run.task.backbone, DiffusersConfig)
    packaged = ARCHITECTURES / run.task.backbone.folder.removeprefix(BUILTIN_PREFIX)
    assert run.task.backbone.sha256 == digest_of_folder(ObjectStore(), str(packaged))
    partition = make_partition(run.task.partition, run.task.encoder.latent_dim)
    assert partition.num_timesteps == 1000
    assert f"{run.train.global_batch:,} images" in (RUNS / f"{name}.yaml").read_text()
