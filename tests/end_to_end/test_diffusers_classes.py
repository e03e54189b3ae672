"""Every class of diffusers' denoisers: trained by two ZeRO-2 ranks, resumed, exported, and used.

The denoiser is taught a little first, on the noisiest steps, where it can only guess: then what the
feature says of an image is worth something, and another image's feature does harm.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cluster.export import export_features
from cluster.session import ray_session
from configs.loading import parse_run
from data_pipelines.object_store import ObjectStore
from data_pipelines.sample_images import decode_sample
from data_pipelines.sample_reader import iter_shard
from pretrain import checkpoint
from pretrain.copied_tail import run_model
from pretrain.diffusers_backbone import digest_of_folder, unpinned_diffusers
from pretrain.preflight import run_url
from pretrain.trained import load_diti
from tests.pretrain.test_train_diffusers import RUN
from tests.ranks import run_on_ranks
from tests.tiny_diffusers import KINDS, save_pipeline
from tests.tiny_run import make_shards
from tools.denoising import four_losses, to_unit

STORE = ObjectStore()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FIRST_STEP = 500
IMAGES = 16
SETTINGS = (
    f"task.timesteps.edges=[{FIRST_STEP}, 1000]",
    "task.partition={stage_ends: [1000], stage_dims: [24], stage_subsets: [1]}",
    "task.weight=v",
    "task.backbone.tail_blocks=3",
    "data.lanes=2",
    f"train.global_batch={IMAGES}",
    "train.ema_decay=0.95",
    "optimizer.learning_rate=3e-3",
    "engine.zero_stage=2",
    "cluster.num_workers=2",
)


def teach(folder: Path, images_BCHW: Tensor, *, steps: int = 200) -> None:
    """Train the denoiser of a pipeline for a moment, weighted as if it predicted v."""
    backbone = unpinned_diffusers(STORE, str(folder))
    model = backbone.model.requires_grad_(True).train()
    x0 = images_BCHW if backbone.latents is None else backbone.latents.encode(images_BCHW)
    schedule, is_flow = backbone.noise_schedule, backbone.prediction == "flow"
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    chance = torch.Generator().manual_seed(0)
    condition = tree_map_only(Tensor, lambda c: c.expand(16, *c.shape[1:]), backbone.condition)
    for _ in range(steps):
        x = x0[torch.randint(len(x0), (16,), generator=chance)]
        t = torch.randint(FIRST_STEP, 1000, (16,), generator=chance)
        noise = torch.randn(x.shape, generator=chance)
        xt = schedule.add_noise(x, t, noise)
        seen = schedule.flow_scale(t) * xt if is_flow else xt
        told = schedule.flow_sigma(t) * 1000 if is_flow else t
        output = run_model(model, seen, told, condition)
        epsilon = schedule.epsilon_of(output, backbone.prediction, xt, t)
        error = (epsilon - noise).square().mean((1, 2, 3)) / schedule.snr(t).clamp(min=1e-4)
        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    model.eval().save_pretrained(folder / part)


NOT_YET = pytest.mark.xfail(
    strict=True,
    reason="500 steps teach SD3's few narrow blocks too little: own 0.0239, another's 0.0242, "
    "backbone 0.0244",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=NOT_YET if kind == "sd3" else ()) for kind in KINDS]
)
def test_two_ranks_learn_a_feature_that_is_of_its_own_image(tmp_path: Path, kind: str) -> None:
    model_folder = tmp_path / "model"
    save_pipeline(kind, model_folder, prediction="v_prediction", scaling_factor=8.0)
    index = make_shards(STORE, str(tmp_path / "train"), shards=2, rows=IMAGES // 2)
    pixels = [decode_sample(sample, 16) for shard in index.shards
              for sample in iter_shard(STORE, shard)]  # fmt: skip
    images = to_unit(np.stack(pixels))
    teach(model_folder, images)
    frozen = digest_of_folder(STORE, str(model_folder))

    steps = 200 if kind in ("ddpm", "stable-diffusion", "sdxl") else 500
    counts = (
        f"train.total_images={IMAGES * steps}",
        f"train.checkpoint_every_images={IMAGES * steps}",
    )
    config = parse_run(RUN.format(folder=tmp_path, sha256=frozen), (*SETTINGS, *counts))
    run_on_ranks(config, tmp_path, stop_at=steps // 2)
    assert len(checkpoint.complete_steps(STORE, run_url(config))) == 2
    run_on_ranks(config, tmp_path)
    manifest = checkpoint.find(STORE, run_url(config), None)
    assert manifest.step == steps
    positions = [
        position for position, _ in checkpoint.read_samples(STORE, run_url(config), manifest)
    ]
    assert positions == list(range(IMAGES * steps))

    trained, _, _ = load_diti(STORE, run_url(config))
    losses = four_losses(trained, images, repeats=16)
    print(f"{kind}: {losses}")
    assert losses.diti < losses.backbone < losses.shuffled
    assert digest_of_folder(STORE, str(model_folder)) == frozen

    with ray_session(num_cpus=2):
        features = export_features(
            STORE,
            run_url=run_url(config),
            step=None,
            shards_url=str(tmp_path / "train"),
            out_url=str(tmp_path / "features"),
            num_workers=1,
        )
    assert (features.rows, [column.dims for column in features.columns]) == (IMAGES, [(0, 24)])
