"""The published CelebA recipe on two CPU cores: its own sizes and rates, twenty steps of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from torch import Tensor

import configs
from cluster.launch import launch_training
from configs.loading import load_run
from configs.schema import RunConfig
from configs.task import UNetConfig
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import write_index
from data_pipelines.shard_writer import write_shard
from pretrain import checkpoint
from pretrain.diti import DiTi
from pretrain.preflight import run_url
from pretrain.progress import Progress
from pretrain.train import build_model
from tests.tiny_run import make_backbone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RECIPE = Path(configs.__file__).parent / "runs" / "celeba64_diti.yaml"
CELEBA64 = UNetConfig(dropout=0.1)  # METHOD section 4: all else is the schema's default
# Twenty steps of its batch of 128 would take half an hour; the learning rate stays its own.
TWO_CORES = (
    "train.global_batch=8",
    "train.total_images=160",
    "train.checkpoint_every_images=160",
    "train.log_every_steps=1",
    "cluster.num_workers=2",
    "cluster.use_gpu=false",
    "wandb.mode=disabled",
)


def random_pictures(seed: int, count: int) -> np.ndarray:
    """Blurred noise, uint8 (count, 64, 64, 3): as large as a photograph, about nothing."""
    coarse = np.random.default_rng(seed).integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def make_shards(store: ObjectStore, url: str) -> None:
    pictures = [
        (simplejpeg.encode_jpeg(picture, quality=90), {}) for picture in random_pictures(0, 64)
    ]
    halves = (pictures[:32], pictures[32:])
    write_index(store, url, [write_shard(store, url, i, half) for i, half in enumerate(halves)])


def online_loss(store: ObjectStore, config: RunConfig, step: int) -> Tensor:
    """Of the weights at a step, not their average, without dropout, on one fixed batch; (8,)."""
    manifest = checkpoint.find(store, run_url(config), step)
    weights = checkpoint.read_tensors(store, run_url(config), manifest, ema=False)
    model, _ = build_model(config, store, torch.device("cpu"))
    assert isinstance(model, DiTi)
    model.load_state_dict(weights, strict=False)
    images = torch.from_numpy(random_pictures(1, 8)).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 75, 150, 250, 350, 450, 600, 900])
    with torch.inference_mode():
        return model.eval()(images, t, noise)


def test_the_celeba64_recipe_learns_in_twenty_steps(
    store: ObjectStore, s3_url: str, tmp_path: Path
) -> None:
    shards, weights = join(s3_url, "celeba64"), join(s3_url, "celeba64.safetensors")
    make_shards(store, shards)
    sha256 = make_backbone(store, weights, CELEBA64, image_size_px=64)
    config = load_run(
        RECIPE,
        (
            f"task.backbone.weights={weights}",
            f"task.backbone.sha256={sha256}",
            f"data.shards={shards}",
            f"output={join(s3_url, 'runs')}",
            *TWO_CORES,
        ),
    )
    peaks: dict[int, float] = {}

    def keep(ranks: Mapping[int, Progress]) -> None:
        peaks.update({rank: progress.peak_memory_gib for rank, progress in ranks.items()})

    manifest = launch_training(config, local_dir=tmp_path, on_progress=keep)
    assert (manifest.step, manifest.images) == (20, 160)
    before, after = (online_loss(store, config, step) for step in (0, 20))
    print(f"loss before {before.mean():.5f}, after {after.mean():.5f}")
    print("after / before by time-step:", (after / before).tolist())
    print("peak memory per worker:", {rank: f"{gib:.2f} GiB" for rank, gib in peaks.items()})
    assert after.mean() < before.mean()
    assert peaks.keys() == {0, 1}
    assert max(peaks.values()) < 6
