"""A real run that fits in seconds: 32 px avatars, a two-level U-Net, all else as it ships."""

from collections.abc import Mapping
from typing import Any

import torch

from configs.loading import parse_run
from configs.schema import RunConfig
from configs.task import ScheduleConfig, UNetConfig
from data_pipelines.avatars import AvatarSpec, Split, draw_avatar
from data_pipelines.object_store import ObjectStore, join
from data_pipelines.shard_index import ShardIndex, write_index
from data_pipelines.shard_writer import write_shard
from pretrain.backbone import save_backbone
from pretrain.unet import UNet

UNET = UNetConfig(
    patch_size_px=2,
    base_channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    attention_factors=(2,),
)

RUN = """
name: tiny
output: {output}
task:
  kind: diti
  backbone: {{weights: {weights}, sha256: {sha256}}}
  encoder: {{latent_dim: 24, channels: [32, 32, 32], attention_after: 2}}
  partition:
    kind: stages
    stage_ends: [50, 300, 1000]
    stage_dims: [8, 8, 8]
    stage_subsets: [1, 1, 1]
  weight: constant
  timesteps: {{edges: [0, 400]}}
data: {{shards: {shards}, image_size_px: 32, lanes: 8, window_rows: 16}}
train:
  total_images: 320
  global_batch: 32
  ema_decay: 0.9
  checkpoint_every_images: 64
  log_every_steps: 1
optimizer: {{learning_rate: 1e-3, clip_norm: 1.0}}
cluster: {{num_workers: 2}}
store: {{deadline_seconds: 20, request_timeout_seconds: 5}}
wandb: {{mode: disabled}}
"""


def make_backbone(
    store: ObjectStore, url: str, config: UNetConfig = UNET, *, image_size_px: int = 32
) -> str:
    """A random, non-zero backbone at `url`; returns its SHA-256."""
    torch.manual_seed(0)
    unet = UNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return save_backbone(
        store,
        url,
        state=unet.state_dict(),
        unet=config,
        schedule=ScheduleConfig(),
        image_size_px=image_size_px,
        provenance={},
    )


def make_shards(
    store: ObjectStore,
    url: str,
    *,
    split: Split = "train",
    shards: int = 4,
    rows: int = 24,
    more: Mapping[str, Any] | None = None,
) -> ShardIndex:
    """A small avatar set; `more` goes into the json of every sample."""
    spec = AvatarSpec(split=split)
    return write_index(
        store,
        url,
        [
            write_shard(
                store,
                url,
                number,
                (
                    (face.jpeg, face.metadata | (more or {}))
                    for face in (draw_avatar(spec, number * rows + row) for row in range(rows))
                ),
            )
            for number in range(shards)
        ],
    )


def make_run(store: ObjectStore, url: str, *overrides: str, dropout: float = 0.0) -> RunConfig:
    """Backbone and shards below `url`, and the run that trains on them."""
    weights = join(url, "backbone.safetensors")
    sha256 = make_backbone(store, weights, UNET.model_copy(update={"dropout": dropout}))
    make_shards(store, join(url, "train"))
    text = RUN.format(
        output=join(url, "runs"), weights=weights, sha256=sha256, shards=join(url, "train")
    )
    return parse_run(text, overrides)
