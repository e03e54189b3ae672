"""The loop against models of diffusers: every class trains, and resumes to the last bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.loading import parse_run
from configs.schema import RunConfig
from data_pipelines.object_store import ObjectStore
from pretrain import checkpoint
from pretrain.diffusers_backbone import digest_of_folder
from pretrain.preflight import preflight, run_url
from pretrain.progress import Progress
from pretrain.train import run
from pretrain.trained import load_diti, load_encoder
from tests.tiny_diffusers import KINDS, save_pipeline
from tests.tiny_run import make_shards
from tools.denoising import four_losses

STORE = ObjectStore()
pytestmark = pytest.mark.usefixtures("world")
RUN = """
name: tiny
output: {folder}/runs
task:
  kind: diti
  backbone: {{kind: diffusers, folder: {folder}/model, sha256: {sha256}, tail_blocks: 2}}
  encoder: {{latent_dim: 24, channels: [32, 32], attention_after: null}}
  partition: {{stage_ends: [50, 300, 1000], stage_dims: [8, 8, 8], stage_subsets: [1, 1, 1]}}
data: {{shards: {folder}/train, image_size_px: 16, lanes: 8, window_rows: 16}}
train:
  {{total_images: 32, global_batch: 8, ema_decay: 0.9, checkpoint_every_images: 16}}
optimizer: {{learning_rate: 1e-3}}
wandb: {{mode: disabled}}
"""


def make_run(kind: str, folder: Path) -> RunConfig:
    save_pipeline(kind, folder / "model")
    make_shards(STORE, str(folder / "train"))
    sha256 = digest_of_folder(STORE, str(folder / "model"))
    return parse_run(RUN.format(folder=folder, sha256=sha256), ())


def tensors(config: RunConfig) -> dict[str, Tensor]:
    manifest = checkpoint.find(STORE, run_url(config), None)
    return checkpoint.read_tensors(STORE, run_url(config), manifest, ema=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path: Path, kind: str) -> None:
    whole = make_run(kind, tmp_path)
    parted = whole.model_copy(update={"name": "parted"})
    preflight(whole, world_size=1)
    run(whole, local_dir=tmp_path)

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(parted, local_dir=tmp_path, report=stop)
    assert checkpoint.complete_steps(STORE, run_url(parted)) == [0, 2]
    run(parted, local_dir=tmp_path)
    ends = tensors(whole), tensors(parted)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    manifest = checkpoint.find(STORE, run_url(whole), None)
    assert manifest.backbone_sha256 == digest_of_folder(STORE, str(tmp_path / "model"))
    assert not [name for name in manifest.shapes if "trunk" in name or "vae" in name]
    assert load_encoder(STORE, run_url(whole)).backbone_sha256 == manifest.backbone_sha256
    model, _, _ = load_diti(STORE, run_url(whole))
    losses = four_losses(model, torch.randn(8, 3, 16, 16), repeats=1)
    assert len({losses.backbone, losses.diti, losses.shuffled, losses.mean}) == 4
